// The trainer with ZeRO-2 and 3: the losses, norms and parameters of one rank, alone and with
// pipelines; bytes on the wire; checkpoints between all levels.
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
using testing::Precision;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TinyRun;
using testing::TrainOnThreads;
using testing::With;
using Layout = testing::TrainLayout;

TrainConfig FiveBlocks(const ScratchDirectory& directory, const std::string& family, bool tied) {
  TrainConfig config = TinyRun(directory, family);
  config.model.layers = 5;
  config.model.tie_embeddings = tied;
  config.runtime.dtype = "f64";
  config.steps = 4;
  return config;
}

void ExpectSameBits(const RunRecord& got, const RunRecord& expected) {
  ExpectNear(got, expected, 0);
  EXPECT_EQ(got.parameters, expected.parameters);
}

class ZeroTrainer : public ::testing::TestWithParam<Layout> {};

TEST_P(ZeroTrainer, FollowsOneRank) {
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ScratchDirectory directory;
    TrainConfig config = FiveBlocks(directory, family, tied);
    config.optimizer.clip_norm = 0.5;  // below the norm, so that it matters
    const RunRecord one = TrainOnThreads(1, config);
    const TrainConfig many = With(config, GetParam());
    const RunRecord plain = TrainOnThreads(GetParam().ranks(), many);
    ExpectNear(plain, one, 1e-9);
    // The same bits again, however long messages take.
    ExpectSameBits(
        TrainOnThreads(GetParam().ranks(), many, {.random_delay_us = 200, .delay_seed = 3}), plain);
    TrainConfig single = config;
    single.runtime.dtype = "f32";
    ExpectNear(TrainOnThreads(GetParam().ranks(), With(single, GetParam())),
               TrainOnThreads(1, single), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, ZeroTrainer,
    ::testing::Values(Layout{.dp = 2, .zero = 2}, Layout{.dp = 3, .zero = 2},
                      Layout{.dp = 4, .zero = 2}, Layout{.dp = 2, .zero = 3},
                      Layout{.dp = 3, .zero = 3}, Layout{.dp = 4, .zero = 3},
                      Layout{.dp = 8, .zero = 3}, Layout{.dp = 2, .pp = 2, .zero = 2},
                      Layout{.dp = 2, .pp = 2, .zero = 3},
                      Layout{.dp = 3, .pp = 2, .zero = 2, .schedule = "gpipe"},
                      Layout{.dp = 3, .pp = 2, .zero = 3, .schedule = "gpipe"},
                      Layout{.dp = 2, .pp = 2, .zero = 2, .schedule = "zb-h1"},
                      Layout{.dp = 2, .pp = 2, .zero = 3, .schedule = "zb-h1"},
                      Layout{.dp = 2, .pp = 2, .zero = 2, .schedule = "v-shaped"},
                      Layout{.dp = 2, .pp = 2, .zero = 3, .schedule = "v-shaped"},
                      Layout{.dp = 2, .pp = 2, .zero = 3, .schedule = "interleaved"}),
    [](const auto& info) { return info.param.Name(); });

// Together with a tensor axis, and with all three axes.
class ZeroTensor : public ::testing::TestWithParam<Layout> {
 protected:
  static TrainConfig SixHeads(const ScratchDirectory& directory, bool tied) {
    TrainConfig config = FiveBlocks(directory, tied ? "gpt2" : "qwen3", tied);
    config.model.heads = 6;
    config.model.kv_heads = tied ? 6 : 3;
    return config;
  }
};

TEST_P(ZeroTensor, FollowsOneRank) {
  const Layout& layout = GetParam();
  for (const bool tied : {true, false}) {
    SCOPED_TRACE(tied ? "tied" : "untied");
    const ScratchDirectory directory;
    TrainConfig config = SixHeads(directory, tied);
    const RunRecord one = TrainOnThreads(1, config);
    const TrainConfig many = With(config, layout);
    const RunRecord plain = TrainOnThreads(layout.ranks(), many);
    ExpectNear(plain, one, 1e-9);
    ExpectSameBits(TrainOnThreads(layout.ranks(), many, {.random_delay_us = 200, .delay_seed = 3}),
                   plain);
    TrainConfig dropped = many;
    dropped.runtime.recompute = "block";
    dropped.runtime.loss_chunk = 64;
    ExpectNear(TrainOnThreads(layout.ranks(), dropped), one, 1e-9);
    TrainConfig single = config;
    single.runtime.dtype = "f32";
    ExpectNear(TrainOnThreads(layout.ranks(), With(single, layout)), TrainOnThreads(1, single),
               1e-5);
  }
}

TEST_P(ZeroTensor, SendsTheBytesOfThePlanAndLoadsAnywhere) {
  const Layout& layout = GetParam();
  const ScratchDirectory directory;
  TrainConfig config = SixHeads(directory, true);
  config.optimizer.schedule = "constant";
  config.steps = 5;
  const RunRecord whole = TrainOnThreads(1, config);
  TrainConfig first = With(config, layout);
  first.steps = 3;
  first.output = directory / "saved";
  std::vector<int64_t> sent[2];
  std::vector<int64_t> planned(static_cast<size_t>(layout.ranks()));
  for (const int steps : {1, 3}) {
    std::vector<int64_t>& bytes = sent[steps / 2];
    bytes.resize(planned.size());
    const absl::Status status =
        World::RunThreads(layout.ranks(), [&](World& world) -> absl::Status {
          STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, first));
          STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                                   PlanRun(trainer->config(), world.size(), world.rank()));
          while (trainer->step() < steps) STRETTO_RETURN_IF_ERROR(trainer->Step().status());
          if (steps == 3) STRETTO_RETURN_IF_ERROR(trainer->Save());
          STRETTO_RETURN_IF_ERROR(trainer->Finish());
          const auto rank = static_cast<size_t>(world.rank());
          bytes[rank] = trainer->BytesSent("dp");
          planned[rank] = plan.gradient_bytes_sent + plan.parameter_bytes_sent;
          return absl::OkStatus();
        });
    ASSERT_TRUE(status.ok()) << status.message();
  }
  for (size_t r = 0; r < planned.size(); ++r) {
    EXPECT_EQ(sent[1][r] - sent[0][r], 2 * planned[r]) << "rank " << r;
  }
  for (const Layout& to :
       {Layout{}, Layout{.dp = 3, .zero = 3}, Layout{.tp = 3, .zero = 2}, layout}) {
    TrainConfig second = With(config, to);
    second.output = first.output;
    second.checkpoint.resume = "must";
    const RunRecord resumed = TrainOnThreads(to.ranks(), second);
    ASSERT_TRUE(resumed.status.ok()) << resumed.status.message();
    ASSERT_EQ(resumed.steps.size(), 2u);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_NEAR(resumed.steps[i].loss / whole.steps[3 + i].loss, 1, 1e-9)
          << ::testing::PrintToString(to);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, ZeroTensor,
    ::testing::Values(Layout{.dp = 2, .tp = 2, .zero = 2}, Layout{.dp = 2, .tp = 2, .zero = 3},
                      Layout{.dp = 2, .tp = 3, .zero = 3}, Layout{.dp = 3, .tp = 2, .zero = 3},
                      Layout{.dp = 2, .pp = 2, .tp = 2, .zero = 2, .schedule = "zb-h1"},
                      Layout{.dp = 2, .pp = 2, .tp = 2, .zero = 3},
                      Layout{.dp = 2, .tp = 2, .zero = 2, .pieces = 3},
                      Layout{.dp = 2, .tp = 2, .zero = 3, .pieces = 2},
                      Layout{.dp = 2, .pp = 2, .tp = 2, .zero = 3, .schedule = "interleaved"}),
    [](const auto& info) { return info.param.Name(); });

// On four ranks one has a micro-batch less than the others.
TEST(ZeroTrainer, OverlapStreamsAndRecomputationChangeNoBit) {
  for (const int zero : {2, 3}) {
    SCOPED_TRACE(zero);
    const ScratchDirectory directory;
    TrainConfig config = With(TinyRun(directory), {.dp = 4, .zero = zero});
    config.model.tie_embeddings = true;
    const RunRecord plain = TrainOnThreads(4, config);
    const auto change = [&](const auto& set) {
      TrainConfig c = config;
      set(c);
      ExpectSameBits(TrainOnThreads(4, c), plain);
    };
    change([](TrainConfig&) {});
    change([](TrainConfig& c) { c.parallel.overlap = false; });
    change([](TrainConfig& c) { c.parallel.prefetch = false; });
    change([](TrainConfig& c) { c.parallel.overlap = c.parallel.prefetch = false; });
    change([](TrainConfig& c) { c.runtime.stream = "fifo"; });
    change([](TrainConfig& c) { c.runtime.recompute = "norms"; });
    change([](TrainConfig& c) {
      c.runtime.recompute = "block";
      c.runtime.stream = "fifo";
    });
    config.runtime.stream = "fifo";
    ExpectSameBits(TrainOnThreads(4, config, {.random_delay_us = 1000, .delay_seed = 2}), plain);
  }
}

TEST(ZeroTrainer, BucketsOfAnySizeGiveTheSame) {
  const ScratchDirectory directory;
  TrainConfig config = FiveBlocks(directory, "gpt2", true);
  const RunRecord one = TrainOnThreads(1, config);
  for (const int zero : {2, 3}) {
    for (const int64_t bytes : {1, 20000, 1 << 30}) {
      for (const char* recompute : {"none", "block"}) {
        TrainConfig c = With(config, {.dp = 3, .zero = zero});
        c.parallel.bucket_bytes = bytes;
        c.runtime.recompute = recompute;
        c.runtime.loss_chunk = 64;
        ExpectNear(TrainOnThreads(3, c), one, 1e-9);
      }
    }
  }
}

// Two buckets, the second with the embedding alone, which only forward reads: nothing of an earlier
// step may be left of it.
TEST(ZeroTrainer, TheEmbeddingAloneInTheLastBucketIsNeverOld) {
  const ScratchDirectory directory;
  TrainConfig config = FiveBlocks(directory, "llama", false);
  const RunRecord one = TrainOnThreads(1, config);
  const Graph graph = BuildModel(config.model, {.dtype = DType::kF64}).value().graph;
  int64_t rest = 0;
  for (const ParameterInfo& p : graph.parameters) {
    if (p.layers.front() != 0) rest += p.elements() * SizeOf(DType::kF64);
  }
  TrainConfig c = With(config, {.dp = 2, .zero = 3});
  c.parallel.bucket_bytes = rest;
  ASSERT_EQ(MakeBuckets(graph, rest).size(), 2u);
  ExpectNear(TrainOnThreads(2, c), one, 1e-9);
}

TEST(ZeroTrainer, RanksMayHaveUnequalNumbersOfMicroBatches) {
  for (const Layout& layout : {Layout{.dp = 2, .zero = 2}, Layout{.dp = 2, .zero = 3},
                               Layout{.dp = 2, .pp = 3, .zero = 2, .schedule = "zb-h1"},
                               Layout{.dp = 2, .pp = 3, .zero = 3, .schedule = "interleaved"},
                               Layout{.dp = 4, .pp = 2, .zero = 3, .schedule = "gpipe"}}) {
    SCOPED_TRACE(::testing::PrintToString(layout));
    const ScratchDirectory directory;
    TrainConfig config = FiveBlocks(directory, "qwen3", false);
    config.model.layers = 6;
    config.batch.global = 9;
    config.batch.micro = 1;
    ExpectNear(TrainOnThreads(layout.ranks(), With(config, layout)), TrainOnThreads(1, config),
               1e-9);
  }
}

// What a rank sends is what its plan says, to the byte: of runs of two and of five steps, since the
// last gathers of a step may arrive in the next.
TEST(ZeroTrainer, SendsTheBytesOfThePlan) {
  for (const Layout& layout :
       {Layout{.dp = 3}, Layout{.dp = 3, .zero = 2}, Layout{.dp = 3, .zero = 3},
        Layout{.dp = 2, .pp = 2, .zero = 2}, Layout{.dp = 2, .pp = 2, .zero = 3},
        Layout{.dp = 2, .pp = 2, .zero = 3, .schedule = "zb-h1"},
        Layout{.dp = 2, .pp = 2, .zero = 2, .schedule = "v-shaped"}}) {
    for (const bool tied : {true, false}) {
      SCOPED_TRACE(::testing::PrintToString(layout) + (tied ? ", tied" : ", untied"));
      const ScratchDirectory directory;
      const TrainConfig config = With(FiveBlocks(directory, "gpt2", tied), layout);
      std::vector<int64_t> planned(static_cast<size_t>(layout.ranks()));
      const auto sent = [&](int64_t steps) {
        std::vector<int64_t> bytes(static_cast<size_t>(layout.ranks()));
        const absl::Status status =
            World::RunThreads(layout.ranks(), [&](World& world) -> absl::Status {
              STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
              STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                                       PlanRun(trainer->config(), world.size(), world.rank()));
              for (int64_t s = 0; s < steps; ++s) {
                STRETTO_RETURN_IF_ERROR(trainer->Step().status());
              }
              STRETTO_RETURN_IF_ERROR(trainer->Finish());
              const auto rank = static_cast<size_t>(world.rank());
              bytes[rank] = trainer->BytesSent("dp");
              planned[rank] = plan.gradient_bytes_sent + plan.parameter_bytes_sent;
              return absl::OkStatus();
            });
        EXPECT_TRUE(status.ok()) << status.message();
        return bytes;
      };
      const std::vector<int64_t> two = sent(2), five = sent(5);
      for (size_t r = 0; r < two.size(); ++r) {
        EXPECT_GT(planned[r], 0);
        EXPECT_EQ(five[r] - two[r], 3 * planned[r]) << "rank " << r;
      }
    }
  }
}

// Saved at one level on some ranks, loaded at another on others: the next steps have the same
// losses.
TEST(ZeroCheckpoint, GoesFromAnyLevelToAnyOther) {
  const std::vector<Layout> layouts = {{},
                                       {.dp = 3},
                                       {.dp = 2, .zero = 2},
                                       {.dp = 3, .zero = 3},
                                       {.dp = 2, .pp = 2, .zero = 3},
                                       {.dp = 4, .zero = 2}};
  for (const bool tied : {true, false}) {
    const ScratchDirectory directory;
    TrainConfig config = FiveBlocks(directory, tied ? "gpt2" : "qwen3", tied);
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
      for (const Layout& to : layouts) {
        TrainConfig second = With(config, to);
        second.output = first.output;
        second.checkpoint.resume = "must";
        const RunRecord resumed = TrainOnThreads(to.ranks(), second);
        ASSERT_TRUE(resumed.status.ok()) << from << ": " << resumed.status.message();
        ASSERT_EQ(resumed.steps.size(), 2u);
        for (size_t i = 0; i < 2; ++i) {
          EXPECT_NEAR(resumed.steps[i].loss / whole.steps[3 + i].loss, 1, 1e-9)
              << "from " << ::testing::PrintToString(layouts[from]) << " to "
              << ::testing::PrintToString(to) << ", step " << 4 + i;
        }
      }
    }
  }
}

TEST(ZeroCheckpoint, InitialWeightsReachEveryShard) {
  const ScratchDirectory directory;
  TrainConfig config = FiveBlocks(directory, "gpt2", true);
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  TrainConfig next = config;
  next.seed = 99;
  next.checkpoint.initial = config.output + "/checkpoints";
  next.output = directory / "one";
  const RunRecord one = TrainOnThreads(1, next);
  next.output = directory / "three";
  ExpectNear(TrainOnThreads(3, With(next, {.dp = 3, .zero = 3})), one, 1e-9);
}

class ZeroPrecision : public ::testing::TestWithParam<Precision> {};

// Every way to keep the state: a run that was interrupted goes on with the same bits, and stays
// close to ZeRO-1.
TEST_P(ZeroPrecision, GoesOnAsIfNothingHadHappened) {
  for (const int zero : {2, 3}) {
    const ScratchDirectory directory;
    TrainConfig config = GetParam().Of(TinyRun(directory));
    config.optimizer.schedule = "constant";
    config.optimizer.offload = true;  // without effect on the CPU
    const RunRecord plain = TrainOnThreads(3, config);
    config = With(config, {.dp = 3, .zero = zero});
    const RunRecord whole = TrainOnThreads(3, config);
    ExpectNear(whole, plain, GetParam().name == "F32" ? 1e-5 : 2e-3);
    TrainConfig half = config;
    half.steps = 3;
    half.checkpoint.resume = "auto";
    ASSERT_TRUE(TrainOnThreads(3, half, {}, [](Trainer& t) { return t.Save(); }).status.ok());
    config.checkpoint.resume = "must";
    const RunRecord rest = TrainOnThreads(3, config);
    ASSERT_TRUE(rest.status.ok()) << rest.status.message();
    EXPECT_EQ(rest.parameters, whole.parameters);
    EXPECT_EQ(rest.steps.back().loss, whole.steps.back().loss);
  }
}
INSTANTIATE_TEST_SUITE_P(Precisions, ZeroPrecision, ::testing::ValuesIn(testing::AllPrecisions()),
                         [](const auto& info) { return info.param.name; });

TEST(ZeroTrainer, LayersInFloat8TrainAsWithZero1) {
  const ScratchDirectory directory;
  TrainConfig config = TinyRun(directory, "llama");
  config.runtime.dtype = "bf16";
  config.runtime.fp8 = "hybrid";
  config.model.hidden = 32;
  config.model.head_dim = 16;
  config.model.ffn = 48;
  const RunRecord plain = TrainOnThreads(2, config);
  for (const int zero : {2, 3}) {
    ExpectNear(TrainOnThreads(2, With(config, {.dp = 2, .zero = zero})), plain, 5e-3);
  }
}

// Evaluations use the buffers in which the next step's parameters lie.
TEST(ZeroTrainer, EvaluationsBetweenStepsChangeNothing) {
  const ScratchDirectory directory;
  TrainConfig config = With(TinyRun(directory), {.dp = 3, .zero = 3});
  config.evaluate.samples = 7;  // the last round has samples for one rank only
  const RunRecord plain = TrainOnThreads(3, config);
  ASSERT_TRUE(plain.status.ok()) << plain.status.message();
  std::vector<double> losses, evaluations;
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    while (trainer->step() < config.steps) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
      STRETTO_ASSIGN_OR_RETURN(const double loss, trainer->Evaluate());
      if (world.rank() == 0) {
        losses.push_back(stats.loss);
        evaluations.push_back(loss);
      }
      if (trainer->step() == 3) STRETTO_RETURN_IF_ERROR(trainer->Save());
    }
    return trainer->Finish();
  });
  ASSERT_TRUE(status.ok()) << status.message();
  for (size_t i = 0; i < losses.size(); ++i) EXPECT_EQ(losses[i], plain.steps[i].loss);
  EXPECT_EQ(evaluations.back(), plain.eval_loss);
}

TEST(ZeroTrainer, SamplesTheTextOfZero1) {
  const ScratchDirectory directory;
  std::vector<std::string> texts;
  for (const int zero : {1, 2, 3}) {
    TrainConfig config = With(TinyRun(directory), {.dp = 3, .zero = zero});
    config.runtime.dtype = "f64";
    config.steps = 3;
    const RunRecord record = TrainOnThreads(3, config, {}, [&](Trainer& t) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const std::string text, t.Sample("unto the ", 40, 0.8, 40));
      if (!text.empty()) texts.push_back(text);
      return absl::OkStatus();
    });
    ASSERT_TRUE(record.status.ok()) << record.status.message();
  }
  ASSERT_EQ(texts.size(), 3u);  // of rank 0
  EXPECT_EQ(texts[0], texts[1]);
  EXPECT_EQ(texts[0], texts[2]);
}

// All ranks skip the same updates, and the parameters that come back are the old ones.
TEST(ZeroTrainer, SkippedUpdatesLeaveTheParameters) {
  for (const int zero : {2, 3}) {
    const ScratchDirectory directory;
    TrainConfig config = With(TinyRun(directory), {.dp = 2, .zero = zero});
    config.spikes.max_loss = 1e-3;  // every loss is above
    const RunRecord skipped = TrainOnThreads(2, config);
    ASSERT_TRUE(skipped.status.ok()) << skipped.status.message();
    EXPECT_EQ(skipped.steps.back().skipped_total, config.steps);
    config.spikes.max_loss = 0;
    config.optimizer.lr = 0;
    EXPECT_EQ(TrainOnThreads(2, config).parameters, skipped.parameters);
    config.optimizer.lr = 1e300;  // infinite in f32
    config.spikes.max_skipped = 3;
    EXPECT_THAT(std::string(TrainOnThreads(2, config).status.message()),
                HasSubstr("3 updates in a row were skipped"));
  }
}

// What is exposed is noted in every step, and is part of it.
TEST(ZeroTrainer, TellsWhatCommunicationIsExposed) {
  for (const bool overlap : {true, false}) {
    const ScratchDirectory directory;
    TrainConfig config = With(TinyRun(directory), {.dp = 2, .zero = 3});
    config.parallel.overlap = config.parallel.prefetch = overlap;
    const RunRecord record = TrainOnThreads(2, config, {.random_delay_us = 200});
    ASSERT_TRUE(record.status.ok()) << record.status.message();
    for (const StepStats& stats : record.steps) {
      EXPECT_GT(stats.comm_exposed_ms, 0);
      EXPECT_LT(stats.comm_exposed_ms, stats.step_ms);
    }
  }
}

}  // namespace
}  // namespace stretto
