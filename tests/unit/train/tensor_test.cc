// The trainer with a tensor axis, alone and beside the others: the losses and norms of one rank,
// checkpoints from any layout to any other, and the bytes of the plan.
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

// Key heads, inner features, vocabulary and tokens that 2, 3 and 4 ranks cannot share evenly.
TrainConfig Uneven(const ScratchDirectory& directory, const std::string& family, bool tied) {
  TrainConfig config = testing::TinyRun(directory, family);
  config.model.layers = 4;
  config.model.heads = family == "gpt2" ? 5 : 10;
  config.model.kv_heads = 5;
  config.model.tie_embeddings = tied;
  config.data.sequence_length = 23;
  config.runtime.dtype = "f64";
  return config;
}

class TensorTrainer : public ::testing::TestWithParam<Layout> {};

TEST_P(TensorTrainer, FollowsOneRank) {
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ScratchDirectory directory;
    const TrainConfig config = Uneven(directory, family, tied);
    const RunRecord one = TrainOnThreads(1, config);
    const RunRecord many = TrainOnThreads(GetParam().ranks(), With(config, GetParam()));
    ExpectNear(many, one, 1e-9);
    // The same bits again, however long messages take, on queued streams.
    TrainConfig queued = With(config, GetParam());
    queued.runtime.stream = "fifo";
    const RunRecord again =
        TrainOnThreads(GetParam().ranks(), queued, {.random_delay_us = 50, .delay_seed = 3});
    ExpectNear(again, many, 0);
    EXPECT_EQ(again.parameters, many.parameters);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, TensorTrainer,
    ::testing::Values(Layout{.tp = 2}, Layout{.tp = 3}, Layout{.tp = 4}, Layout{.dp = 2, .tp = 2},
                      Layout{.pp = 2, .tp = 2}, Layout{.pp = 2, .tp = 2, .schedule = "zb-h1"},
                      Layout{.pp = 2, .tp = 3}, Layout{.dp = 2, .pp = 2, .tp = 2},
                      Layout{.dp = 2, .pp = 2, .tp = 2, .schedule = "v-shaped"},
                      Layout{.tp = 2, .pieces = 2}, Layout{.dp = 2, .tp = 3, .pieces = 3},
                      Layout{.dp = 2, .pp = 2, .tp = 2, .pieces = 2}),
    [](const auto& info) { return info.param.Name(); });

TEST(TensorTrainerTypes, FollowOneRankInF32AndBf16) {
  for (const auto& [dtype, tolerance] :
       {std::pair<const char*, double>{"f32", 2e-5}, {"bf16", 0.02}}) {
    const ScratchDirectory directory;
    TrainConfig config = Uneven(directory, "qwen2", true);
    config.runtime.dtype = dtype;
    config.runtime.recompute = "block";
    config.runtime.loss_chunk = 64;
    const RunRecord one = TrainOnThreads(1, config);
    const RunRecord many = TrainOnThreads(8, With(config, {.dp = 2, .pp = 2, .tp = 2}));
    ASSERT_TRUE(one.status.ok() && many.status.ok()) << one.status << many.status;
    for (size_t i = 0; i < one.steps.size(); ++i) {
      EXPECT_NEAR(many.steps[i].loss / one.steps[i].loss, 1, tolerance) << dtype << " " << i;
    }
  }
}

// Random bits belong to elements of the whole parameter, also of columns and of several pieces.
TEST(TensorTrainerTypes, RoundsElementsAsOneRankDoes) {
  const ScratchDirectory directory;
  TrainConfig config = Uneven(directory, "qwen3", false);
  config.runtime.dtype = "f32";
  config.optimizer.moments = "bf16";
  config.steps = 3;
  // Gradients differ in their last bits, and so may a moment that lies on the edge of being rounded
  // up: the losses stay together as they would not with other random numbers.
  const RunRecord one = TrainOnThreads(1, config);
  const RunRecord many = TrainOnThreads(4, With(config, {.tp = 4}));
  ASSERT_TRUE(one.status.ok() && many.status.ok()) << one.status << many.status;
  for (size_t i = 0; i < one.steps.size(); ++i) {
    EXPECT_NEAR(many.steps[i].loss / one.steps[i].loss, 1, 1e-5) << i;
  }
}

// Saved under one layout, loaded under any other: the next steps have the same losses.
TEST(TensorCheckpoint, GoesFromAnyLayoutToAnyOther) {
  const std::vector<Layout> layouts = {{.dp = 2, .pp = 2, .tp = 2},
                                       {.dp = 8},
                                       {.dp = 2, .tp = 4},
                                       {.dp = 2, .pp = 4},
                                       {},
                                       {.tp = 3},
                                       {.pp = 2, .tp = 2, .schedule = "v-shaped"}};
  for (const bool tied : {true, false}) {
    const ScratchDirectory directory;
    TrainConfig config = Uneven(directory, tied ? "gpt2" : "qwen3", tied);
    config.optimizer.schedule = "constant";
    config.steps = 5;
    const RunRecord whole = TrainOnThreads(1, config);
    ASSERT_TRUE(whole.status.ok()) << whole.status.message();
    const auto continues = [&](const Layout& from, const Layout& to, const std::string& output) {
      TrainConfig second = With(config, to);
      second.output = output;
      second.checkpoint.resume = "must";
      const RunRecord resumed = TrainOnThreads(to.ranks(), second);
      ASSERT_TRUE(resumed.status.ok())
          << from.Name() << " to " << to.Name() << ": " << resumed.status.message();
      ASSERT_EQ(resumed.steps.size(), 2u);
      for (size_t i = 0; i < 2; ++i) {
        EXPECT_NEAR(resumed.steps[i].loss / whole.steps[3 + i].loss, 1, 1e-9)
            << from.Name() << " to " << to.Name() << ", step " << 4 + i;
        EXPECT_NEAR(resumed.steps[i].grad_norm / whole.steps[3 + i].grad_norm, 1, 1e-9);
      }
    };
    for (size_t from = 0; from < layouts.size(); ++from) {
      TrainConfig first = With(config, layouts[from]);
      first.steps = 3;
      first.output = directory / absl::StrCat("run", from);
      const RunRecord saved =
          TrainOnThreads(layouts[from].ranks(), first, {}, [](Trainer& t) { return t.Save(); });
      ASSERT_TRUE(saved.status.ok()) << saved.status.message();
      // The first layout to all others, each other one to two.
      for (size_t to = 0; to < layouts.size(); ++to) {
        const size_t ahead = (to + layouts.size() - from) % layouts.size();
        if (from == 0 ? to != 0 : ahead == 2 || to == 0) {
          // A continued run saves at its end: each goes on from a copy.
          const std::string copy = directory / absl::StrCat("run", from, "-", to);
          std::filesystem::copy(first.output, copy, std::filesystem::copy_options::recursive);
          continues(layouts[from], layouts[to], copy);
        }
      }
    }
  }
}

// Ranks that have the same key heads: their sums, what they save and what they send.
TEST(TensorTrainerCopies, FollowOneRankAndLoadAnywhere) {
  const std::vector<Layout> layouts = {
      {.tp = 4}, {.dp = 2, .tp = 3}, {.dp = 2, .tp = 4}, {.pp = 2, .tp = 4}, {}};
  for (const char* family : {"qwen2", "qwen3"}) {
    const ScratchDirectory directory;
    TrainConfig config = Uneven(directory, family, true);
    config.model.heads = 6;
    config.model.kv_heads = 2;
    config.optimizer.schedule = "constant";
    config.steps = 4;
    const RunRecord one = TrainOnThreads(1, config);
    for (size_t i = 0; i < layouts.size(); ++i) {
      TrainConfig first = With(config, layouts[i]);
      first.steps = 2;
      first.output = directory / absl::StrCat("run", i);
      const RunRecord saved =
          TrainOnThreads(layouts[i].ranks(), first, {}, [](Trainer& t) { return t.Save(); });
      ASSERT_TRUE(saved.status.ok()) << saved.status.message();
      const Layout& to = layouts[(i + 2) % layouts.size()];
      TrainConfig second = With(config, to);
      second.output = first.output;
      second.checkpoint.resume = "must";
      const RunRecord resumed = TrainOnThreads(to.ranks(), second);
      ASSERT_TRUE(resumed.status.ok()) << resumed.status.message();
      for (size_t k = 0; k < 4; ++k) {
        const StepStats& got = k < 2 ? saved.steps[k] : resumed.steps[k - 2];
        EXPECT_NEAR(got.loss / one.steps[k].loss, 1, 1e-9) << layouts[i].Name() << " " << k;
        EXPECT_NEAR(got.grad_norm / one.steps[k].grad_norm, 1, 1e-9) << layouts[i].Name();
      }
    }
    // In bf16, rounded with random numbers: they belong to elements, so copies stay alike.
    config.runtime.dtype = "bf16";
    config.optimizer.moments = "bf16";
    config.optimizer.masters = false;
    config.output = directory / "bf16";
    const RunRecord alone = TrainOnThreads(1, config);
    const RunRecord four = TrainOnThreads(4, With(config, {.tp = 4}));
    ASSERT_TRUE(alone.status.ok() && four.status.ok()) << alone.status << four.status;
    for (size_t k = 0; k < 4; ++k) {
      EXPECT_NEAR(four.steps[k].loss / alone.steps[k].loss, 1, 0.02) << k;
    }
  }
}

TEST(TensorTrainerStart, InitialWeightsReachEveryRank) {
  const ScratchDirectory directory;
  TrainConfig config = Uneven(directory, "gpt2", true);
  config.steps = 2;
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  TrainConfig next = config;
  next.seed = 99;
  next.checkpoint.initial = config.output + "/checkpoints";
  next.output = directory / "one";
  const RunRecord one = TrainOnThreads(1, next);
  next.output = directory / "two";
  ExpectNear(TrainOnThreads(8, With(next, {.dp = 2, .pp = 2, .tp = 2})), one, 1e-9);
}

// What goes over each axis is what the plan says, to the byte.
TEST(TensorTrainerTraffic, IsThatOfThePlan) {
  for (const char* recompute : {"none", "norms", "block"}) {
    for (const Layout& layout : {Layout{.tp = 2, .pieces = 2}, Layout{.dp = 2, .tp = 3},
                                 Layout{.dp = 2, .pp = 2, .tp = 2, .pieces = 3}, Layout{.tp = 8},
                                 Layout{.pp = 2, .tp = 2, .schedule = "zb-h1"},
                                 Layout{.pp = 2, .tp = 2, .schedule = "v-shaped"}}) {
      const ScratchDirectory directory;
      // With 8 ranks some of the 5 key heads are on two.
      const bool copies = layout.tp > 5;
      TrainConfig config = With(Uneven(directory, copies ? "qwen2" : "gpt2", true), layout);
      config.batch.global = 10;  // the same for all ranks
      config.batch.micro = 3;
      config.runtime.recompute = recompute;
      const absl::Status status =
          World::RunThreads(layout.ranks(), [&](World& world) -> absl::Status {
            STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
            STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                                     PlanRun(trainer->config(), world.size(), world.rank()));
            STRETTO_RETURN_IF_ERROR(trainer->Step().status());
            struct Axis {
              const char* name;
              int64_t planned, before;
            };
            std::vector<Axis> axes = {
                {"tp", plan.tensor_bytes_sent, 0},
                {"pp", plan.boundary_bytes_sent + plan.tied_bytes_sent, 0},
                {"dp", plan.gradient_bytes_sent + plan.parameter_bytes_sent, 0},
                {"all", plan.scalar_bytes_sent, 0}};
            // Asking for a parameter waits until the gather that a step has started is over.
            const std::string some = trainer->model().graph.parameters.front().spec.name;
            STRETTO_RETURN_IF_ERROR(trainer->Parameter(some).status());
            for (Axis& axis : axes) axis.before = trainer->BytesSent(axis.name);
            STRETTO_RETURN_IF_ERROR(trainer->Step().status());
            STRETTO_RETURN_IF_ERROR(trainer->Parameter(some).status());
            for (const Axis& axis : axes) {
              const int64_t sent = trainer->BytesSent(axis.name) - axis.before;
              if (sent != axis.planned) {
                return absl::InternalError(absl::StrCat("rank ", world.rank(), " sent ", sent,
                                                        " bytes over ", axis.name,
                                                        ", planned were ", axis.planned));
              }
            }
            if (plan.tensor_bytes_sent == 0) return absl::InternalError("nothing was planned");
            return trainer->Finish();
          });
      EXPECT_TRUE(status.ok()) << layout.Name() << " " << recompute << ": " << status.message();
    }
  }
}

// The formula of docs/parallelism.md, written out.
TEST(TensorTrainerTraffic, IsThatOfTheFormula) {
  const auto part = [](int64_t n, int64_t ranks) { return (n + ranks - 1) / ranks; };
  for (const std::string family : {"gpt2", "llama", "qwen3"}) {
    for (const int64_t t : {2, 3, 5}) {
      for (const char* dtype : {"f64", "f32", "bf16"}) {
        for (const char* recompute : {"none", "norms", "block"}) {
          for (const int64_t chunk : {0, 64}) {
            const ScratchDirectory directory;
            TrainConfig config = Uneven(directory, family, true);
            config.runtime.dtype = dtype;
            config.runtime.recompute = recompute;
            config.runtime.loss_chunk = chunk;
            config.parallel.tp = t;
            ASSERT_TRUE(config.Resolve(static_cast<int>(t)).ok());
            const RunPlan plan = PlanRun(config, static_cast<int>(t), 0).value();
            const int64_t b = std::string(dtype) == "f64" ? 8 : std::string(dtype) == "f32" ? 4 : 2;
            const int64_t wide = std::max<int64_t>(b, 4);
            const int64_t blocks = config.model.layers, hidden = config.model.hidden;
            const int64_t exchanges =
                (std::string(recompute) == "block" ? 11 : 10) * blocks + 2 + 2;
            const int64_t norms = (2 * blocks + 1) * (family == "gpt2" ? 2 : 1) * hidden;
            const int64_t heads = family == "qwen3" ? 2 * blocks * config.model.head_dim : 0;
            int64_t expected = 2 * (t - 1) * part(norms + heads, t) * wide;
            for (int64_t left = config.batch.global; left > 0; left -= config.batch.micro) {
              const int64_t tokens =
                  std::min(left, config.batch.micro) * config.data.sequence_length;
              expected +=
                  exchanges * (t - 1) * part(tokens, t) * hidden * b + (t - 1) * tokens * 3 * wide;
            }
            EXPECT_EQ(plan.tensor_bytes_sent, expected)
                << family << " tp " << t << " " << dtype << " " << recompute << " " << chunk;
          }
        }
      }
    }
  }
}

TEST(TensorConfig, NamesWhatDoesNotFit) {
  const auto error = [](const Layout& layout, int ranks, auto change) {
    TrainConfig config = With(TrainConfig(), layout);
    config.model.layers = 4;
    change(config);
    return std::string(config.Resolve(ranks).message());
  };
  const auto nothing = [](TrainConfig&) {};
  EXPECT_EQ(error({.dp = 0, .tp = 2}, 4, nothing), "");
  EXPECT_EQ(error({.dp = 0, .pp = 2, .tp = 2}, 8, nothing), "");
  EXPECT_THAT(error({.dp = 0, .tp = 3}, 4, nothing), HasSubstr("parallel.tp is 3 but 4 ranks run"));
  EXPECT_THAT(error({.dp = 0, .pp = 2, .tp = 2}, 6, nothing),
              HasSubstr("parallel.pp times parallel.tp is 2 x 2 but 6 ranks run"));
  EXPECT_THAT(error({.dp = 2, .tp = 2}, 6, nothing),
              HasSubstr("parallel.dp is 2 and parallel.tp 2 but 6 ranks run"));
  EXPECT_THAT(error({.dp = 2, .pp = 2, .tp = 2}, 6, nothing),
              HasSubstr("parallel.dp is 2, parallel.pp 2 and parallel.tp 2 but 6 ranks run"));
  EXPECT_THAT(error({.dp = 0, .pp = int{1} << 30, .tp = int{1} << 30}, 8, nothing),
              HasSubstr("but 8 ranks run"));
  EXPECT_THAT(error({.tp = 8}, 8, nothing),
              HasSubstr("parallel.tp is 8 but model.kv_heads 4, and each rank of a tensor axis "
                        "needs one at least"));
  const auto grouped = [](TrainConfig& c) {
    c.model.family = "llama";
    c.model.heads = 6;
    c.model.kv_heads = 2;
    c.model.head_dim = 32;
  };
  EXPECT_EQ(error({.tp = 6}, 6, grouped), "");
  EXPECT_THAT(error({.tp = 7}, 7, grouped),
              HasSubstr("parallel.tp is 7 but model.kv_heads 2 with 3 query heads each"));
  EXPECT_THAT(error({.tp = 4}, 4, [](TrainConfig& c) { c.model.vocabulary = 3; }),
              HasSubstr("model.vocabulary 3"));
  EXPECT_THAT(error({.tp = 4}, 4, [](TrainConfig& c) { c.model.ffn = 3; }),
              HasSubstr("model.ffn 3"));
  EXPECT_THAT(error({.tp = 2}, 2, [](TrainConfig& c) { c.sample.tokens = 5; }),
              HasSubstr("parallel.tp=1"));
  EXPECT_THAT(error({.tp = 2}, 2, [](TrainConfig& c) { c.runtime.graphs = true; }),
              HasSubstr("are not captured"));
  EXPECT_THAT(error({.tp = 2}, 2,
                    [](TrainConfig& c) {
                      c.runtime.dtype = "bf16";
                      c.runtime.fp8 = "e4m3";
                    }),
              HasSubstr("without a tensor axis only"));
}

TEST(TensorConfig, ATensorAxisLiesOnOneMachine) {
  TrainConfig config = With(TrainConfig(), {.pp = 2, .tp = 4});
  ASSERT_TRUE(config.Resolve(8).ok());
  for (int rank = 0; rank < 8; ++rank) {
    const Mesh mesh = MeshOf(config, 8, rank).value();
    EXPECT_TRUE(CheckMachines(mesh, {0, 0, 0, 0, 1, 1, 1, 1}).ok());
    const absl::Status uneven = CheckMachines(mesh, {0, 0, 0, 1, 1, 1, 1, 1});
    EXPECT_EQ(uneven.ok(), rank >= 4);
    if (rank < 4) {
      EXPECT_THAT(std::string(uneven.message()),
                  HasSubstr("parallel.tp is 4, but ranks 0 and 3 of one tensor axis are on "
                            "different machines; start a multiple of 4 ranks on each machine"));
    }
  }
}

TEST(TensorConfig, RanksMustAgree) {
  const ScratchDirectory directory;
  const TrainConfig config = Uneven(directory, "gpt2", true);
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    const Layout layout = {.dp = world.rank() == 0 ? 2 : 1, .tp = world.rank() == 0 ? 1 : 2};
    return Trainer::Create(world, With(config, layout)).status();
  });
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("rank 1 was started with another configuration than rank 0"));
}

}  // namespace
}  // namespace stretto
