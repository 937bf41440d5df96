// Data-parallel ranks with a keeper: one copy of the state, the same bits with snapshots and after
// going on from one. With --cuda on GPUs; prints SKIP where there are fewer than ranks.
#include <cstdio>
#include <string>

#include "tests/support/rank_main.h"
#include "tests/support/snapshot_run.h"

namespace stretto {
namespace {

bool on_gpus = false;

absl::Status RunAll(World& world) {
  if (on_gpus) {
    STRETTO_ASSIGN_OR_RETURN(const bool gpus, testing::EveryRankHasAGpu(world));
    if (!gpus) return absl::OkStatus();
  }
  for (const int zero : {1, 3}) {
    const testing::ScratchDirectory scratch;
    STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, "llama"));
    config.parallel.zero = zero;
    if (on_gpus) config.runtime.device = "cuda";
    if (on_gpus) config.runtime.dtype = "bf16";
    if (!on_gpus && zero == 3) config.runtime.stream = "fifo";
    STRETTO_RETURN_IF_ERROR(testing::CheckSnapshotRun(world, config));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  stretto::on_gpus = argc > 1 && std::string(argv[1]) == "--cuda";
  return stretto::testing::RankMain(stretto::RunAll);
}
