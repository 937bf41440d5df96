// The communicator on GPUs, one for each rank, under mpirun: every collective against the host's
// reference, the order of operations, waits between streams, submission far ahead of the device,
// bytes counted, and the trainer against itself on one GPU. Prints SKIP where there are fewer GPUs
// than ranks. usage: nccl_ranks [collectives|layouts|documents], all of them by default
#include "tests/cuda/nccl_ranks.h"

#include <string>

#include "tests/support/rank_main.h"

namespace stretto {
namespace {

const char* part = "";  // empty: all

absl::Status RunAll(World& world) {
  STRETTO_ASSIGN_OR_RETURN(const bool gpus, testing::EveryRankHasAGpu(world));
  if (!gpus) return absl::OkStatus();
  const testing::ScratchDirectory scratch;
  const auto wanted = [](const char* name) { return part[0] == 0 || std::string(part) == name; };
  if (wanted("collectives")) {
    STRETTO_RETURN_IF_ERROR(CheckCollectives(world));
    STRETTO_RETURN_IF_ERROR(CheckQueues(world));
  }
  if (wanted("layouts")) {
    STRETTO_RETURN_IF_ERROR(world.Agree("trainer", CheckLayouts(world, scratch)));
  }
  if (wanted("documents")) {
    STRETTO_RETURN_IF_ERROR(world.Agree("documents", CheckDocuments(world, scratch)));
  }
  // Nobody removes the files that another rank still reads.
  return world.Barrier("end");
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  if (argc > 1) stretto::part = argv[1];
  // Delays before each operation must not change a bit, nor make two ranks wait for each other.
  return stretto::testing::RankMain(stretto::RunAll, {.random_delay_us = 200, .delay_seed = 7});
}
