// The trainer under mpirun against the same trainer on threads: the same bits. Run with any number
// of ranks; each rank exits non-zero on a mismatch.
#include <cstdio>

#include "tests/support/rank_main.h"

namespace stretto {
namespace {

absl::Status Compare(World& world, const TrainConfig& config) {
  std::vector<StepStats> mine;
  {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    while (trainer->step() < config.steps) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
      mine.push_back(stats);
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
  }
  // Rank 0 repeats the run on threads, and on one, which must agree to rounding.
  absl::Status verdict;
  if (world.rank() == 0) {
    for (const int ranks : {world.size(), 1}) {
      TrainConfig here = config;
      if (ranks == 1) here.parallel.pp = here.parallel.tp = 1;
      const testing::RunRecord record = testing::TrainOnThreads(ranks, here);
      const double tolerance = config.runtime.dtype == "f64" ? 1e-9 : 1e-5;
      verdict.Update(record.status);
      for (size_t i = 0; record.status.ok() && i < mine.size(); ++i) {
        const double expected = record.steps[i].loss, got = mine[i].loss;
        const bool exact = ranks == world.size();
        if (exact ? expected != got : !(std::abs(expected - got) <= tolerance * expected)) {
          verdict.Update(absl::InternalError(absl::StrCat(config.model.family, ", step ", i + 1,
                                                          ": loss ", got, " over MPI, ", expected,
                                                          " on ", ranks, " threads")));
        }
      }
    }
  }
  return world.Agree("comparing", verdict);
}

absl::Status RunAll(World& world) {
  testing::ScratchDirectory scratch;
  for (const char* family : {"gpt2", "qwen3"}) {
    STRETTO_ASSIGN_OR_RETURN(TrainConfig config, testing::SharedTinyRun(world, scratch, family));
    config.steps = 8;
    STRETTO_RETURN_IF_ERROR(Compare(world, config));
    // With gradients and parameters sharded, too.
    TrainConfig sharded = config;
    sharded.steps = 4;
    for (const int64_t zero : {2, 3}) {
      for (const char* dtype : {"f32", "f64"}) {
        sharded.parallel.zero = zero;
        sharded.runtime.dtype = dtype;
        STRETTO_RETURN_IF_ERROR(Compare(world, sharded));
      }
    }
    // With pipelines of two ranks, under a schedule of each kind.
    if (world.size() % 2 != 0) continue;
    config.model.layers = 5;
    config.parallel.pp = 2;
    for (const char* schedule : {"zb-h1", "v-shaped"}) {
      config.parallel.schedule = schedule;
      STRETTO_RETURN_IF_ERROR(Compare(world, config));
    }
    sharded = config;
    sharded.steps = 4;
    sharded.parallel.zero = 3;
    STRETTO_RETURN_IF_ERROR(Compare(world, sharded));
    // With tensor axes of two ranks, alone and within pipelines.
    config.model.heads = 6;
    config.model.kv_heads = config.model.family == "gpt2" ? 6 : 3;
    config.parallel.schedule = "1f1b";
    config.parallel.tp = 2;
    for (const int pp : {1, 2}) {
      if (world.size() % (2 * pp) != 0) continue;
      config.parallel.pp = pp;
      STRETTO_RETURN_IF_ERROR(Compare(world, config));
      // With parameters sharded over the data axis, where there is one.
      TrainConfig all = config;
      all.steps = 4;
      all.parallel.zero = 3;
      STRETTO_RETURN_IF_ERROR(Compare(world, all));
    }
  }
  // Nobody removes the files that another rank still reads.
  return world.Barrier("end");
}

}  // namespace
}  // namespace stretto

int main() {
  // With delays of up to 300 us before every message, bits must not change.
  return stretto::testing::RankMain(stretto::RunAll, {.random_delay_us = 300, .delay_seed = 5});
}
