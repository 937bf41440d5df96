// Traces of real runs: everything that the plan says is there once and in its order, ranks lie on
// one time axis, and tracing changes no bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/observe/signals.h"
#include "tests/support/traced_run.h"

namespace stretto {
namespace {

using testing::Arg;
using testing::CheckTrace;
using ::testing::HasSubstr;
using testing::Json;
using testing::Parse;
using testing::RankTrace;
using testing::ReadJson;
using testing::ScratchDirectory;
using testing::Traced;
using testing::With;
using Layout = testing::TrainLayout;

TrainConfig TinyTraced(const ScratchDirectory& directory, const Layout& layout = {}) {
  return Traced(With(testing::TinyRun(directory, "gpt2"), layout));
}

// By rank.
absl::StatusOr<std::vector<std::vector<StepStats>>> TrainAll(int ranks, const TrainConfig& config,
                                                             const WorldOptions& options = {}) {
  std::vector<std::vector<StepStats>> steps(static_cast<size_t>(ranks));
  STRETTO_RETURN_IF_ERROR(World::RunThreads(
      ranks,
      [&](World& world) -> absl::Status {
        STRETTO_ASSIGN_OR_RETURN(steps[static_cast<size_t>(world.rank())],
                                 testing::TrainRank(world, config));
        return absl::OkStatus();
      },
      options));
  return steps;
}

class TracedRun : public ::testing::TestWithParam<Layout> {};

TEST_P(TracedRun, ShowsThePlanAndChangesNoBit) {
  const int ranks = GetParam().ranks();
  const ScratchDirectory directory;
  const TrainConfig config = TinyTraced(directory, GetParam());
  TrainConfig untraced = config;
  untraced.metrics.trace_steps = 0;
  const auto without = TrainAll(ranks, untraced);
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_FALSE(std::filesystem::exists(config.metrics.trace_file));
  const auto with = TrainAll(ranks, config, {.random_delay_us = 100, .delay_seed = 9});
  ASSERT_TRUE(with.ok()) << with.status();
  const Json file = ReadJson(config.metrics.trace_file);
  for (int rank = 0; rank < ranks; ++rank) {
    const auto r = static_cast<size_t>(rank);
    CheckTrace(config, ranks, rank, file, (*with)[r], (*without)[r]);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, TracedRun,
                         ::testing::Values(Layout{}, Layout{.dp = 2}, Layout{.dp = 2, .zero = 3},
                                           Layout{.pp = 2, .schedule = "zb-h1"}, Layout{.tp = 2},
                                           Layout{.dp = 2, .pp = 2, .tp = 2},
                                           Layout{
                                               .dp = 2, .pp = 2, .tp = 2, .schedule = "v-shaped"}),
                         [](const auto& info) { return info.param.Name(); });

TEST(StepTraceEnds, WithTheRun) {
  const ScratchDirectory directory;
  TrainConfig config = TinyTraced(directory, {.dp = 2});
  config.runtime.stream = "fifo";
  config.metrics.trace_steps = 100;  // the run has 6
  const absl::Status status = TrainAll(2, config).status();
  ASSERT_TRUE(status.ok()) << status;
  std::map<int, RankTrace> ranks = Parse(ReadJson(config.metrics.trace_file));
  ASSERT_EQ(ranks.size(), 2u);
  for (auto& [rank, trace] : ranks) {
    std::vector<int64_t> seen;
    for (const Json& s : trace.Of("steps")) seen.push_back(Arg(s, "step"));
    EXPECT_EQ(seen, (std::vector<int64_t>{3, 4, 5, 6}));
  }
}

TEST(StepTraceEnds, WithASignal) {
  const ScratchDirectory directory;
  TrainConfig config = TinyTraced(directory, {.dp = 2});
  config.metrics.trace_steps = 100;
  config.metrics.trace_from = 1;
  const auto signals = StopSignals::Install();
  ASSERT_TRUE(signals.ok()) << signals.status();
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    STRETTO_RETURN_IF_ERROR(trainer->Step().status());
    if (world.rank() == 0) std::raise(SIGUSR1);
    STRETTO_RETURN_IF_ERROR(world.Barrier("asked to stop"));
    STRETTO_ASSIGN_OR_RETURN(const RunResult result, trainer->Run());
    EXPECT_EQ(result, RunResult::kRequested);
    return absl::OkStatus();
  });
  StopSignals::Clear();
  ASSERT_TRUE(status.ok()) << status;
  std::map<int, RankTrace> ranks = Parse(ReadJson(config.metrics.trace_file));
  ASSERT_EQ(ranks.size(), 2u);
  for (auto& [rank, trace] : ranks) EXPECT_EQ(trace.Of("steps").size(), 2u);
}

// Whoever cannot go on writes what it saw.
TEST(StepTraceEnds, WithAnError) {
  const ScratchDirectory directory;
  TrainConfig config = TinyTraced(directory, {.dp = 2});
  config.metrics.trace_from = 1;
  config.metrics.trace_steps = 100;
  config.spikes.max_loss = 1e-3;  // no step stays below
  config.spikes.max_skipped = 2;
  EXPECT_THAT(std::string(TrainAll(2, config).status().message()), HasSubstr("2 updates in a row"));
  EXPECT_FALSE(std::filesystem::exists(config.metrics.trace_file));
  for (const int rank : {0, 1}) {
    auto ranks = Parse(ReadJson(absl::StrCat(config.metrics.trace_file, ".rank", rank, ".json")));
    ASSERT_EQ(ranks.size(), 1u);
    EXPECT_EQ(ranks[rank].Of("steps").size(), 2u);
    EXPECT_GT(ranks[rank].Of("dp").size(), 0u);
  }
}

TEST(StepTraceSettings, AreCheckedBeforeTheRun) {
  const ScratchDirectory directory;
  TrainConfig config = TinyTraced(directory);
  config.metrics.trace_from = 7;
  EXPECT_THAT(std::string(config.Resolve(1).message()),
              HasSubstr("metrics.trace_from is 7 but the run has only 6 steps"));
  config = TinyTraced(directory);
  config.metrics.trace_file = config.data.train + "/trace.json";  // below a file
  EXPECT_THAT(std::string(TrainAll(1, config).status().message()), HasSubstr("train.bin"));
}

}  // namespace
}  // namespace stretto
