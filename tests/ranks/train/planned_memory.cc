// The plan's memory against the process's real peak (VmHWM): within 1 % plus the listed overheads,
// and not far below either, so that the plan cannot be right by being generous.
#include <cstdio>

#include "stretto/observe/memory.h"
#include "stretto/train/memory.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

bool tensor_axis = false;  // all ranks are one; else they are data-parallel

absl::Status Check(World& world, int64_t zero) {
  testing::ScratchDirectory scratch;
  STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, "llama"));
  config.steps = 2;
  config.model.vocabulary = 8192;
  config.model.layers = 4;
  config.model.hidden = 512;
  config.model.heads = 8;
  config.model.kv_heads = 8;
  config.model.head_dim = 64;
  config.model.ffn = 1376;
  config.parallel.tp = tensor_axis ? world.size() : 1;
  config.batch.global = 16;
  config.batch.micro = 8;
  config.parallel.zero = zero;
  STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
  STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                           PlanRun(trainer->config(), world.size(), world.rank()));
  while (trainer->step() < config.steps) STRETTO_RETURN_IF_ERROR(trainer->Step().status());
  STRETTO_RETURN_IF_ERROR(trainer->Finish());
  STRETTO_ASSIGN_OR_RETURN(const ProcessMemory memory, ReadProcessMemory());
  const double planned = static_cast<double>(plan.arena_bytes);
  const double peak = static_cast<double>(memory.peak_resident_bytes);
  std::printf("rank %d, zero %ld: planned %.1f MB, peak %.1f MB, overheads at most %.1f MB\n",
              world.rank(), static_cast<long>(zero), planned / 1e6, peak / 1e6,
              static_cast<double>(plan.overhead_bytes) / 1e6);
  if (peak > 1.01 * planned + static_cast<double>(plan.overhead_bytes)) {
    return absl::InternalError("the process needed more than planned plus the listed overheads");
  }
  if (peak < 0.99 * planned) return absl::InternalError("the plan is far above what was used");
  return absl::OkStatus();
}

// The smallest plan first: a process has one peak.
absl::Status CheckAll(World& world) {
  for (const int64_t zero : {3, 2, 1}) {
    STRETTO_RETURN_IF_ERROR(world.Agree("a level", Check(world, zero)));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  stretto::tensor_axis = argc > 1 && std::string(argv[1]) == "--tensor";
  return stretto::testing::RankMain(stretto::CheckAll);
}
