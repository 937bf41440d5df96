// Models cut into stages on several ranks against the whole model on one: loss and every gradient.
#include "stretto/parallel/stages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "tests/support/layout_step.h"

namespace stretto {
namespace {

using testing::CompareSteps;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::Layout;
using testing::StepError;
using testing::StepOnThreads;
using testing::StepOptions;
using testing::StepOutcome;
using testing::UnevenBatches;

TEST(CutBlocks, BalancesWhatTheEndsCost) {
  const auto cut = [](int64_t blocks, int stages, double first, double last) {
    return CutBlocks(blocks, stages, 1, first, last).value();
  };
  EXPECT_THAT(cut(8, 4, 0, 0), ElementsAre(2, 2, 2, 2));
  EXPECT_THAT(cut(7, 3, 0, 0), ElementsAre(3, 2, 2));
  EXPECT_THAT(cut(12, 4, 0, 3), ElementsAre(4, 4, 3, 1));
  EXPECT_THAT(cut(4, 4, 0, 100), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(cut(5, 1, 1, 1), ElementsAre(5));
  for (int64_t blocks = 1; blocks < 40; ++blocks) {
    for (int stages = 1; stages <= blocks && stages <= 9; ++stages) {
      const auto counts = cut(blocks, stages, 0.5, 2.25);
      EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), blocks);
      // No other cut is better: taking a block from the most expensive stage makes another as
      // expensive.
      const auto cost = [&](size_t s, int64_t n) {
        return static_cast<double>(n) + (s == 0 ? 0.5 : 0) + (s + 1 == counts.size() ? 2.25 : 0);
      };
      double most = 0;
      size_t where = 0;
      for (size_t s = 0; s < counts.size(); ++s) {
        if (counts[s] > 1 && cost(s, counts[s]) > most) most = cost(s, counts[s]), where = s;
      }
      for (size_t s = 0; most > 0 && s < counts.size(); ++s) {
        if (s == where) continue;
        EXPECT_GE(cost(s, counts[s] + 1), most);
      }
    }
  }
  EXPECT_THAT(std::string(CutBlocks(2, 3, 1, 0, 0).status().message()),
              HasSubstr("2 blocks cannot be cut into 3 stages"));
}

TEST(ModelPart, RefusesPartsThatCannotBe) {
  ModelConfig config = testing::OddModel("qwen3", false);
  ASSERT_TRUE(config.Resolve().ok());
  for (const ModelPart& part : {ModelPart{1, 1}, ModelPart{-1, 1}, ModelPart{0, 99}}) {
    EXPECT_FALSE(BuildModel(config, {.part = part}).ok());
  }
}

ModelConfig SevenBlocks(const std::string& family, bool tied) {
  ModelConfig config = testing::OddModel(family, tied);
  config.layers = 7;
  EXPECT_TRUE(config.Resolve().ok());
  return config;
}

// Of an error in its place: nothing is near it.
StepOutcome StepOf(const ModelConfig& config, const Layout& layout, const StepOptions& options = {},
                   const WorldOptions& world = {}) {
  const auto outcome =
      StepOnThreads(config, layout, options, UnevenBatches(config.vocabulary, layout.dp), world);
  EXPECT_TRUE(outcome.ok()) << outcome.status().message();
  return outcome.value_or(StepOutcome());
}

void ExpectNear(const StepOutcome& got, const StepOutcome& expected, double tolerance) {
  const StepError error = CompareSteps(got, expected);
  EXPECT_LT(error.worst, tolerance) << error.where;
}

class Stages : public ::testing::TestWithParam<Layout> {};

TEST_P(Stages, GiveTheGradientsOfOneRank) {
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ModelConfig config = SevenBlocks(family, tied);
    const StepOutcome one = StepOf(config, {});
    const StepOutcome many = StepOf(config, GetParam());
    ExpectNear(many, one, 1e-9);
    ExpectNear(StepOf(config, GetParam(), {.recompute = Recompute::kBlock, .loss_chunk = 64}), one,
               1e-9);
    // The same bits again, in another run.
    EXPECT_EQ(StepOf(config, GetParam()).gradients, many.gradients);
  }
}

// ZeRO-2 and 3 without a pipeline: a micro-batch runs as a whole, buckets stay from forward to
// backward, and ranks have unequal numbers of micro-batches.
class Sharded : public Stages {};

TEST_P(Sharded, GiveTheGradientsOfOneRank) {
  for (const bool tied : {true, false}) {
    SCOPED_TRACE(tied ? "tied" : "untied");
    const ModelConfig config = SevenBlocks(tied ? "gpt2" : "qwen3", tied);
    const StepOutcome one = StepOf(config, {});
    for (const Recompute recompute :
         {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
      for (const int64_t bucket_bytes : {1, 3000, 1 << 30}) {
        for (const int64_t chunk : {0, 64}) {
          SCOPED_TRACE(::testing::Message() << Name(recompute) << ", buckets of " << bucket_bytes
                                            << ", chunk " << chunk);
          ExpectNear(
              StepOf(config, GetParam(),
                     {.recompute = recompute, .loss_chunk = chunk, .bucket_bytes = bucket_bytes}),
              one, 1e-9);
        }
      }
    }
    ExpectNear(StepOf(config, GetParam(), {.dtype = DType::kF32, .recompute = Recompute::kBlock}),
               StepOf(config, {}, {.dtype = DType::kF32}), 1e-5);
  }
}

TEST_P(Sharded, GivesTheSameBitsWithoutOverlapAndUnderDelays) {
  const ModelConfig config = SevenBlocks("gpt2", true);
  const auto run = [&](StepOptions options, uint64_t delay_seed = 0) {
    options.recompute = Recompute::kBlock;
    return StepOf(config, GetParam(), options,
                  {.random_delay_us = delay_seed == 0 ? 0 : 300, .delay_seed = delay_seed})
        .gradients;
  };
  const auto plain = run({});
  EXPECT_EQ(run({.poison = false}), plain);
  EXPECT_EQ(run({.overlap = false}), plain);
  EXPECT_EQ(run({.prefetch = false}), plain);
  EXPECT_EQ(run({.overlap = false, .prefetch = false}, 3), plain);
  for (const uint64_t seed : {1, 2}) EXPECT_EQ(run({}, seed), plain);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Sharded,
                         ::testing::Values(Layout{.dp = 2, .zero = 2}, Layout{.dp = 3, .zero = 2},
                                           Layout{.dp = 4, .zero = 2}, Layout{.dp = 2, .zero = 3},
                                           Layout{.dp = 3, .zero = 3}, Layout{.dp = 4, .zero = 3}),
                         [](const auto& info) { return info.param.Name(); });

// Negative controls: a plan that gives a bucket up too early, or two buckets the same place, is
// found out, by the poison or by another gradient.
TEST(ShardedComparison, SeesAPlanThatIsWrong) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "messages under way read places that are written: the races are what is wrong";
#endif
  ModelConfig config = testing::OddModel("qwen3", false);
  config.layers = 3;
  ASSERT_TRUE(config.Resolve().ok());
  std::vector<std::vector<PackedBatch>> one(1), two(2);
  for (int i = 0; i < 4; ++i) {
    const PackedBatch batch = testing::RandomBatch({7 - i, 2}, config.vocabulary, 1 + i);
    one[0].push_back(batch);
    two[i % 2].push_back(batch);
  }
  const auto expected = StepOnThreads(config, {}, {}, one);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const auto wrong = [&](const std::function<void(BucketPlan&)>& sabotage) {
    const auto out = StepOnThreads(config, {.dp = 2, .zero = 3}, {.sabotage = sabotage}, two);
    return !out.ok() || !(CompareSteps(*out, *expected).worst <= 1e-3);
  };
  EXPECT_FALSE(wrong([](BucketPlan&) {}));
  const auto move = [](std::vector<std::vector<BucketEvent>>& events, BucketEventKind kind,
                       int by) {
    // The first event of this kind in the second half of the list.
    for (size_t a = events.size() / 2; a < events.size(); ++a) {
      for (size_t i = 0; i < events[a].size(); ++i) {
        if (events[a][i].kind != kind) continue;
        const BucketEvent event = events[a][i];
        events[a].erase(events[a].begin() + static_cast<std::ptrdiff_t>(i));
        if (by != 0) events[a - static_cast<size_t>(by)].push_back(event);
        return;
      }
    }
    ADD_FAILURE() << "the plan has no event to move";
  };
  // The parameters are gone, or their place is, before the layer runs.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kRelease, 2); }));
  // The gradients leave before they are complete.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kReduce, 2); }));
  // The sums of a bucket are never added up.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kCollect, 0); }));
  EXPECT_TRUE(wrong([](BucketPlan& p) {
    for (BucketStay& s : p.training.stays) s.offset = 0;
  }));
}

// The comparison sees a micro-batch that is left out.
TEST(StagesComparison, SeesAMissingMicroBatch) {
  ModelConfig config = testing::OddModel("qwen3", false);
  ASSERT_TRUE(config.Resolve().ok());
  const std::vector<PackedBatch> both = {testing::RandomBatch({7, 2}, config.vocabulary, 1),
                                         testing::RandomBatch({4}, config.vocabulary, 2)};
  const auto whole = StepOnThreads(config, {}, {}, {both});
  auto part = StepOnThreads(config, {}, {}, {{both[0]}});
  ASSERT_TRUE(whole.ok() && part.ok()) << whole.status() << part.status();
  EXPECT_EQ(CompareSteps(*part, *whole).where, "tokens");
  part->tokens = whole->tokens;
  part->loss = whole->loss;
  EXPECT_GT(CompareSteps(*part, *whole).worst, 1e-3);
}

// Frames are filled with NaN before, so a value that was overwritten before its last reader shows.
TEST(TwoLists, GiveTheBitsOfOne) {
  const ModelConfig config = SevenBlocks("qwen3", false);
  for (const Layout& layout : {Layout{.pp = 2, .kind = ScheduleKind::kZeroBubbleH1},
                               Layout{.pp = 3, .kind = ScheduleKind::kZeroBubbleH1},
                               Layout{.pp = 2, .kind = ScheduleKind::kVShaped, .chunks = 2},
                               Layout{.pp = 2, .tp = 2, .kind = ScheduleKind::kZeroBubbleH1}}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
      SCOPED_TRACE(layout.Name() + " " + Name(recompute));
      const auto run = [&](bool two_lists) {
        return StepOf(config, layout, {.recompute = recompute, .two_lists = two_lists});
      };
      const StepOutcome one = run(false), two = run(true);
      EXPECT_EQ(two.loss, one.loss);
      EXPECT_EQ(two.gradients, one.gradients);
    }
  }
}

TEST(TwoLists, AreRefusedWhereBucketsComeAndGoByOne) {
  const ModelConfig config = SevenBlocks("qwen3", false);
  for (const int zero : {2, 3}) {
    const Layout layout = {.dp = 2, .pp = 2, .kind = ScheduleKind::kZeroBubbleH1, .zero = zero};
    const auto outcome = StepOnThreads(config, layout, {.two_lists = true},
                                       UnevenBatches(config.vocabulary, layout.dp));
    EXPECT_THAT(std::string(outcome.status().message()),
                HasSubstr(absl::StrCat("stage 1 has two lists of actions, and ZeRO-", zero)));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, Stages,
    ::testing::Values(
        Layout{.pp = 2, .kind = ScheduleKind::kGPipe},
        Layout{.pp = 3, .kind = ScheduleKind::kOneF1B},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kOneF1B},
        Layout{.pp = 7, .kind = ScheduleKind::kOneF1B},
        Layout{.pp = 2, .kind = ScheduleKind::kInterleaved, .chunks = 3},
        Layout{.dp = 2, .pp = 3, .kind = ScheduleKind::kInterleaved, .chunks = 2},
        Layout{.pp = 4, .kind = ScheduleKind::kZeroBubbleH1},
        Layout{.dp = 2, .pp = 3, .kind = ScheduleKind::kZeroBubbleH1},
        Layout{.pp = 3, .kind = ScheduleKind::kVShaped, .chunks = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kVShaped, .chunks = 2},
        Layout{.kind = ScheduleKind::kVShaped, .chunks = 2},
        Layout{.dp = 3, .kind = ScheduleKind::kOneF1B},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kGPipe, .zero = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kGPipe, .zero = 3},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kOneF1B, .zero = 2},
        Layout{.dp = 2, .pp = 3, .kind = ScheduleKind::kOneF1B, .zero = 3},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kInterleaved, .chunks = 2, .zero = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kInterleaved, .chunks = 3, .zero = 3},
        Layout{.dp = 2, .pp = 3, .kind = ScheduleKind::kZeroBubbleH1, .zero = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kZeroBubbleH1, .zero = 3},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kVShaped, .chunks = 2, .zero = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kVShaped, .chunks = 2, .zero = 3}),
    [](const auto& info) { return info.param.Name(); });

}  // namespace
}  // namespace stretto
