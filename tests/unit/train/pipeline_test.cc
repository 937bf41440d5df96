// The trainer with pipelines: the losses of one rank, and checkpoints from any layout to any other.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/train/memory.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using testing::ExpectNear;
using ::testing::HasSubstr;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TrainOnThreads;
using testing::With;
using Layout = testing::TrainLayout;

TrainConfig SevenBlocks(const ScratchDirectory& directory, const std::string& family, bool tied) {
  TrainConfig config = testing::TinyRun(directory, family);
  config.model.layers = 7;
  config.model.tie_embeddings = tied;
  config.runtime.dtype = "f64";
  return config;
}

class PipelineTrainer : public ::testing::TestWithParam<Layout> {};

TEST_P(PipelineTrainer, FollowsOneRank) {
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ScratchDirectory directory;
    const TrainConfig config = SevenBlocks(directory, family, tied);
    const RunRecord one = TrainOnThreads(1, config);
    const RunRecord many = TrainOnThreads(GetParam().ranks(), With(config, GetParam()));
    ExpectNear(many, one, 1e-9);
    // The same bits again, however long messages take.
    const RunRecord again = TrainOnThreads(GetParam().ranks(), With(config, GetParam()),
                                           {.random_delay_us = 200, .delay_seed = 3});
    ExpectNear(again, many, 0);
    EXPECT_EQ(again.parameters, many.parameters);
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, PipelineTrainer,
                         ::testing::Values(Layout{.pp = 2}, Layout{.dp = 2, .pp = 2},
                                           Layout{.pp = 3, .schedule = "gpipe"},
                                           Layout{.pp = 7, .schedule = "zb-h1"},
                                           Layout{.dp = 2, .pp = 2, .schedule = "zb-h1"},
                                           Layout{.pp = 2, .schedule = "interleaved", .chunks = 3},
                                           Layout{.dp = 2, .pp = 3, .schedule = "interleaved"},
                                           Layout{.pp = 3, .schedule = "v-shaped"},
                                           Layout{.dp = 2, .pp = 2, .schedule = "v-shaped"},
                                           Layout{.dp = 3, .pp = 2, .schedule = "v-shaped"}),
                         [](const auto& info) { return info.param.Name(); });

// Saved under one layout, loaded under any other: the next steps have the same losses.
TEST(PipelineCheckpoint, GoesFromAnyLayoutToAnyOther) {
  const std::vector<Layout> layouts = {
      {}, {.dp = 3}, {.dp = 2, .pp = 2}, {.pp = 7}, {.pp = 3, .schedule = "v-shaped"}};
  for (const bool tied : {true, false}) {
    const ScratchDirectory directory;
    TrainConfig config = SevenBlocks(directory, tied ? "gpt2" : "qwen3", tied);
    config.optimizer.schedule = "constant";
    config.steps = 5;
    const RunRecord whole = TrainOnThreads(1, config);
    ASSERT_TRUE(whole.status.ok()) << whole.status.message();
    for (size_t from = 0; from < layouts.size(); ++from) {
      TrainConfig first = With(config, layouts[from]);
      first.steps = 3;
      first.output = directory / absl::StrCat("run", from);
      const RunRecord saved =
          TrainOnThreads(layouts[from].ranks(), first, {}, [](Trainer& t) { return t.Save(); });
      ASSERT_TRUE(saved.status.ok()) << saved.status.message();
      const Layout& to = layouts[(from + 2) % layouts.size()];
      TrainConfig second = With(config, to);
      second.output = first.output;
      second.checkpoint.resume = "must";
      const RunRecord resumed = TrainOnThreads(to.ranks(), second);
      ASSERT_TRUE(resumed.status.ok()) << from << ": " << resumed.status.message();
      ASSERT_EQ(resumed.steps.size(), 2u);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_NEAR(resumed.steps[i].loss / whole.steps[3 + i].loss, 1, 1e-9)
            << "from layout " << from << ", step " << 4 + i;
      }
    }
  }
}

TEST(PipelineTrainer, InitialWeightsReachEveryStage) {
  const ScratchDirectory directory;
  TrainConfig config = SevenBlocks(directory, "gpt2", true);
  config.steps = 2;
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  TrainConfig next = config;
  next.seed = 99;
  next.checkpoint.initial = config.output + "/checkpoints";
  next.output = directory / "one";
  const RunRecord one = TrainOnThreads(1, next);
  next.output = directory / "two";
  ExpectNear(TrainOnThreads(4, With(next, {.dp = 2, .pp = 2})), one, 1e-9);
}

// With fewer micro-batches a schedule may need more buffers: pipelines of one run may differ by
// one.
TEST(PipelineTrainer, PipelinesMayHaveUnequalNumbersOfMicroBatches) {
  for (const Layout& layout : {Layout{.dp = 2, .pp = 3, .schedule = "interleaved", .chunks = 3},
                               Layout{.dp = 2, .pp = 3, .schedule = "v-shaped"},
                               Layout{.dp = 2, .pp = 4, .schedule = "zb-h1"}}) {
    SCOPED_TRACE(layout.schedule);
    const ScratchDirectory directory;
    TrainConfig config = SevenBlocks(directory, "qwen3", false);
    config.model.layers = 9;
    config.batch.global = 9;
    config.batch.micro = 1;
    config.steps = 2;
    ExpectNear(TrainOnThreads(layout.ranks(), With(config, layout)), TrainOnThreads(1, config),
               1e-9);
  }
}

// What stages send each other is what the plan says, to the byte.
TEST(PipelineTrainer, SendsTheBytesOfThePlan) {
  for (const Layout& layout : {Layout{.dp = 2, .pp = 2}, Layout{.pp = 3, .schedule = "v-shaped"},
                               Layout{.pp = 2, .schedule = "interleaved"}}) {
    const ScratchDirectory directory;
    TrainConfig config = With(SevenBlocks(directory, "gpt2", true), layout);
    config.batch.global = 12;  // the same for all ranks
    const absl::Status status =
        World::RunThreads(layout.ranks(), [&](World& world) -> absl::Status {
          STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
          STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                                   PlanRun(trainer->config(), world.size(), world.rank()));
          const auto sent = [&] { return trainer->BytesSent("pp"); };
          STRETTO_RETURN_IF_ERROR(trainer->Step().status());
          const int64_t before = sent();
          STRETTO_RETURN_IF_ERROR(trainer->Step().status());
          const int64_t expected = plan.boundary_bytes_sent + plan.tied_bytes_sent;
          if (sent() - before != expected || expected == 0) {
            return absl::InternalError(absl::StrCat("rank ", world.rank(), " sent ",
                                                    sent() - before, " bytes, planned were ",
                                                    expected));
          }
          return trainer->Finish();
        });
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST(PipelineConfig, NamesWhatDoesNotFit) {
  const auto error = [](const Layout& layout, int ranks, auto change) {
    TrainConfig config = With(TrainConfig(), layout);
    config.model.layers = 4;
    change(config);
    return std::string(config.Resolve(ranks).message());
  };
  const auto nothing = [](TrainConfig&) {};
  EXPECT_EQ(error({.dp = 0, .pp = 2}, 4, nothing), "");
  EXPECT_THAT(error({.dp = 0, .pp = 3}, 4, nothing), HasSubstr("parallel.pp is 3 but 4 ranks run"));
  EXPECT_THAT(error({.dp = 2, .pp = 2}, 6, nothing),
              HasSubstr("parallel.dp is 2 and parallel.pp 2 but 6 ranks run"));
  EXPECT_THAT(error({.pp = 5}, 5, nothing), HasSubstr("more than model.layers (4)"));
  EXPECT_THAT(error({.pp = 2, .schedule = "interleaved", .chunks = 3}, 2, nothing),
              HasSubstr("more than model.layers (4)"));
  EXPECT_THAT(error({.pp = 2, .chunks = 2}, 2, nothing), HasSubstr("the 1f1b schedule has 1"));
  EXPECT_THAT(error({.pp = 2, .schedule = "2f2b"}, 2, nothing), HasSubstr("parallel.schedule"));
  EXPECT_THAT(error({.pp = 2}, 2, [](TrainConfig& c) { c.batch.global = int64_t{1} << 40; }),
              HasSubstr("at most 65536 are supported"));
  EXPECT_THAT(error({.pp = 2}, 2, [](TrainConfig& c) { c.sample.tokens = 5; }),
              HasSubstr("sample.tokens=0"));
  EXPECT_THAT(error({.pp = 2}, 2,
                    [](TrainConfig& c) {
                      c.runtime.dtype = "bf16";
                      c.runtime.fp8 = "e4m3";
                    }),
              HasSubstr("without a pipeline only"));
}

}  // namespace
}  // namespace stretto
