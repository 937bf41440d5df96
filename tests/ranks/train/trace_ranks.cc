// The trace of a run under mpirun, by every rank against the plan: on the CPU as dp 2 x pp 2 x tp 2
// with 8 ranks; with --cuda on GPUs, one axis at a time. Prints SKIP where there are fewer GPUs
// than ranks.
#include <cstdio>
#include <string>
#include <vector>

#include "tests/support/rank_main.h"
#include "tests/support/traced_run.h"

namespace stretto {
namespace {

bool on_gpus = false;

absl::Status Check(World& world, TrainConfig config, const testing::TrainLayout& layout) {
  config = testing::Traced(testing::With(std::move(config), layout));
  config.output += "-" + layout.Name();
  config.metrics.trace_file = config.output + "/trace.json";
  TrainConfig untraced = config;
  untraced.metrics.trace_steps = 0;
  STRETTO_ASSIGN_OR_RETURN(const std::vector<StepStats> without,
                           testing::TrainRank(world, untraced));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<StepStats> with, testing::TrainRank(world, config));
  STRETTO_RETURN_IF_ERROR(world.Barrier("the file is there"));
  const testing::Json file = testing::ReadJson(config.metrics.trace_file);
  testing::CheckTrace(config, world.size(), world.rank(), file, with, without);
  const bool failed = ::testing::UnitTest::GetInstance()->ad_hoc_test_result().Failed();
  if (world.rank() == 0 && !failed) {
    std::printf("%s: %zu events, clocks to %s us\n", layout.Name().c_str(),
                file["traceEvents"].size(), file["otherData"]["clock_error_us"].dump().c_str());
  }
  return world.Agree(
      "checking the trace",
      failed ? absl::InternalError("the trace is wrong, see above") : absl::OkStatus());
}

absl::Status RunAll(World& world) {
  const testing::ScratchDirectory scratch;
  STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, "gpt2"));
  std::vector<testing::TrainLayout> layouts = {{.dp = 2, .pp = 2, .tp = 2}};
  if (on_gpus) {
    STRETTO_ASSIGN_OR_RETURN(const bool gpus, testing::EveryRankHasAGpu(world));
    if (!gpus) return absl::OkStatus();
    config.runtime.device = "cuda";
    layouts = {{.dp = 2}, {.dp = 2, .zero = 3}, {.pp = 2, .schedule = "zb-h1"}, {.tp = 2}};
  }
  for (const testing::TrainLayout& layout : layouts) {
    STRETTO_RETURN_IF_ERROR(Check(world, config, layout));
  }
  return world.Barrier("end");  // nobody removes the files that another rank still reads
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  stretto::on_gpus = argc > 1 && std::string(argv[1]) == "--cuda";
  return stretto::testing::RankMain(stretto::RunAll);
}
