// The trainer under mpirun against the same trainer on threads: the same bits. Run with any number
// of ranks; each rank exits non-zero on a mismatch.
#include <cstdio>

#include "stretto/core/log.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

absl::Status Compare(World& world, const TrainConfig& config, bool same_bits) {
  std::vector<StepStats> mine;
  {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    while (trainer->step() < config.steps) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
      mine.push_back(stats);
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
  }
  // Rank 0 repeats the run on threads; with one rank as well, which must agree to rounding.
  absl::Status verdict;
  if (world.rank() == 0) {
    for (const int ranks : {world.size(), 1}) {
      const testing::RunRecord record = testing::TrainOnThreads(ranks, config);
      verdict.Update(record.status);
      for (size_t i = 0; record.status.ok() && i < mine.size(); ++i) {
        const double expected = record.steps[i].loss, got = mine[i].loss;
        const bool exact = same_bits && ranks == world.size();
        if (exact ? expected != got : !(std::abs(expected - got) <= 1e-5 * expected)) {
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
  // All ranks use rank 0's directory and files.
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> paths,
                           world.AllGather("scratch", scratch.path()));
  for (const char* family : {"gpt2", "qwen3"}) {
    TrainConfig config = testing::TinyRun(scratch, family);
    config.steps = 20;
    config.output = paths[0] + "/run";
    config.data.train = paths[0] + "/train.bin";
    config.data.validation = paths[0] + "/validation.bin";
    STRETTO_RETURN_IF_ERROR(world.Agree("writing the data", absl::OkStatus()));
    STRETTO_RETURN_IF_ERROR(Compare(world, config, true));
  }
  // Nobody removes the files that another rank still reads.
  return world.Barrier("end");
}

}  // namespace
}  // namespace stretto

int main() {
  // With delays of up to 300 us before every message, bits must not change.
  auto world = stretto::World::Create(
      {.timeout = std::chrono::seconds(120), .random_delay_us = 300, .delay_seed = 5});
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", std::string(world.status().message()).c_str());
    return 1;
  }
  stretto::SetLogRank((*world)->rank(), (*world)->size());
  const absl::Status status = stretto::RunAll(**world);
  if (!status.ok()) {
    std::fprintf(stderr, "rank %d: %s\n", (*world)->rank(), std::string(status.message()).c_str());
    return 1;
  }
  return 0;
}
