// The trainer on documents of unequal length: every mesh, static or cut anew for each step, gives
// the losses, norms and parameters of one rank.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/data/plan_loader.h"
#include "stretto/parallel/context.h"
#include "stretto/plan/cost.h"
#include "stretto/train/sequence_planner.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using testing::ExpectNear;
using ::testing::HasSubstr;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TinyRun;
using testing::TrainOnThreads;

struct Sharing {
  std::string mesh = "static";
  int dp = 1, cp = 1, pp = 1, tp = 1;
  int64_t capacity = 30;
  std::string schedule = "1f1b";
  std::string recompute = "none";

  int ranks() const { return dp * cp * pp * tp; }
  std::string Name() const {
    std::string name = absl::StrCat(mesh, "Dp", dp, "Cp", cp, "Pp", pp, "Tp", tp, "Capacity",
                                    capacity, schedule, recompute);
    std::erase_if(name, [](char c) { return c == '-'; });
    return name;
  }
};
void PrintTo(const Sharing& sharing, std::ostream* out) { *out << sharing.Name(); }

TrainConfig Documents(const ScratchDirectory& directory, const std::string& family) {
  TrainConfig config = TinyRun(directory, family);
  config.model.layers = 4;
  config.data.documents = true;
  config.data.sequence_length = 29;
  config.batch.tokens = 230;
  config.steps = 4;
  config.runtime.dtype = "f64";
  config.optimizer.clip_norm = 0.5;
  return config;
}

TrainConfig With(TrainConfig config, const Sharing& sharing) {
  config.parallel.mesh = sharing.mesh;
  config.parallel.dp = sharing.dp;
  config.parallel.cp = sharing.cp;
  config.parallel.pp = sharing.pp;
  config.parallel.tp = sharing.tp;
  config.parallel.schedule = sharing.schedule;
  config.batch.capacity = sharing.capacity;
  config.runtime.recompute = sharing.recompute;
  return config;
}

class DocumentTrainer : public ::testing::TestWithParam<Sharing> {};

TEST_P(DocumentTrainer, FollowsOneRank) {
  for (const std::string family : {"qwen3", "gpt2"}) {
    SCOPED_TRACE(family);
    const ScratchDirectory directory;
    const TrainConfig config = Documents(directory, family);
    RunRecord one = TrainOnThreads(1, With(config, Sharing()));
    RunRecord many = TrainOnThreads(GetParam().ranks(), With(config, GetParam()));
    // Evaluation goes over samples that a rank holds.
    if (GetParam().capacity < config.data.sequence_length) many.eval_loss = one.eval_loss;
    ExpectNear(many, one, 1e-9);
    RunRecord again = TrainOnThreads(GetParam().ranks(), With(config, GetParam()),
                                     {.random_delay_us = 200, .delay_seed = 3});
    if (GetParam().capacity < config.data.sequence_length) again.eval_loss = one.eval_loss;
    ExpectNear(again, many, 0);
    EXPECT_EQ(again.parameters, many.parameters);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Alone, DocumentTrainer,
    ::testing::Values(Sharing{.capacity = 100}, Sharing{.dp = 2}, Sharing{.dp = 3, .capacity = 64},
                      Sharing{.mesh = "dynamic", .dp = 2}, Sharing{.mesh = "dynamic", .dp = 5},
                      Sharing{.mesh = "unbalanced", .dp = 3},
                      Sharing{.mesh = "dynamic", .dp = 9},  // more ranks than some steps have packs
                      Sharing{.mesh = "dynamic", .dp = 2, .tp = 2},
                      Sharing{.mesh = "dynamic", .dp = 2, .pp = 2},
                      Sharing{.mesh = "dynamic", .dp = 3, .pp = 2, .schedule = "zb-h1"},
                      Sharing{.mesh = "dynamic", .dp = 2, .pp = 2, .schedule = "interleaved"},
                      Sharing{.mesh = "dynamic", .dp = 2, .pp = 2, .schedule = "v-shaped"},
                      Sharing{.dp = 2, .pp = 2, .tp = 2}),
    [](const auto& info) { return info.param.Name(); });

// Documents that no rank holds alone.
INSTANTIATE_TEST_SUITE_P(
    Rings, DocumentTrainer,
    ::testing::Values(
        Sharing{.cp = 2, .capacity = 15}, Sharing{.cp = 3, .capacity = 20},
        Sharing{.dp = 2, .cp = 2, .capacity = 15}, Sharing{.cp = 5, .capacity = 11},
        Sharing{.mesh = "dynamic", .dp = 2, .capacity = 15},
        Sharing{.mesh = "dynamic", .dp = 3, .capacity = 11},
        Sharing{.mesh = "unbalanced", .dp = 4, .capacity = 11},
        Sharing{.mesh = "dynamic", .dp = 5, .capacity = 7},
        Sharing{.mesh = "dynamic", .dp = 7, .capacity = 6},
        Sharing{.mesh = "dynamic", .dp = 3, .capacity = 11, .recompute = "block"},
        Sharing{.mesh = "dynamic", .dp = 3, .capacity = 11, .recompute = "norms"},
        Sharing{.mesh = "dynamic", .dp = 3, .tp = 2, .capacity = 11},
        Sharing{.mesh = "dynamic", .dp = 3, .pp = 2, .capacity = 11},
        Sharing{.mesh = "dynamic", .dp = 3, .pp = 2, .capacity = 11, .schedule = "zb-h1"},
        Sharing{.mesh = "dynamic", .dp = 3, .pp = 2, .capacity = 11, .schedule = "interleaved"},
        Sharing{.mesh = "unbalanced", .dp = 3, .pp = 2, .capacity = 11, .schedule = "v-shaped"},
        Sharing{.cp = 2, .pp = 2, .capacity = 15},
        Sharing{.mesh = "dynamic", .dp = 2, .pp = 2, .tp = 2, .capacity = 15}),
    [](const auto& info) { return info.param.Name(); });

// What a rank sends around rings is what its plan says.
TEST(DocumentTrainer, SendsTheBytesOfThePlan) {
  const ScratchDirectory directory;
  constexpr int kRanks = 4;
  TrainConfig config = Documents(directory, "qwen3");
  config = With(config, {.mesh = "dynamic", .dp = kRanks, .capacity = 11});
  std::vector<int64_t> sent(kRanks), expected(kRanks);
  std::atomic<int> rings = 0;
  const absl::Status status = World::RunThreads(kRanks, [&](World& world) -> absl::Status {
    const auto rank = static_cast<size_t>(world.rank());
    STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, config));
    const TrainConfig& resolved = trainer->config();
    STRETTO_ASSIGN_OR_RETURN(
        const auto documents,
        DocumentDataset::Open(config.data.train, {.sequence_length = config.data.sequence_length,
                                                  .vocabulary = config.model.vocabulary,
                                                  .end_of_text = 256}));
    STRETTO_ASSIGN_OR_RETURN(DocumentPlanner planner, DocumentPlannerOf(resolved, kRanks));
    STRETTO_ASSIGN_OR_RETURN(const auto loader,
                             PlanLoader::Create(*documents, std::move(planner),
                                                {.seed = static_cast<uint64_t>(config.seed),
                                                 .step_tokens = config.batch.tokens,
                                                 .place = world.rank()}));
    const Graph& graph = trainer->model().graph;
    const ActionList actions = TrainingActions(graph, Recompute::kNone);
    for (int64_t step = 0; step < config.steps; ++step) {
      STRETTO_RETURN_IF_ERROR(trainer->Step().status());
      STRETTO_ASSIGN_OR_RETURN(const PlannedStep* const planned, loader->Step(step));
      for (const PackedBatch& batch : planned->shares()) {
        if (batch.ring.size() == 1) continue;
        ++rings;
        expected[rank] += RingBytes(graph, actions, batch.ring);
      }
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
    sent[rank] = trainer->BytesSent("cp");
    return absl::OkStatus();
  });
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(sent, expected);
  EXPECT_GT(rings, 8);
}

TEST(DocumentPlans, ATensorAxisSharesTheWork) {
  const ScratchDirectory directory;
  TrainConfig one = Documents(directory, "qwen3"), two = one;
  one.model.kv_heads = two.model.kv_heads = 2;
  two.parallel.tp = 2;
  ASSERT_TRUE(one.Resolve(2).ok());
  ASSERT_TRUE(two.Resolve(4).ok());
  const auto alone = SequenceOptionsOf(one, 2), shared = SequenceOptionsOf(two, 2);
  ASSERT_TRUE(alone.ok() && shared.ok()) << alone.status() << shared.status();
  EXPECT_EQ(shared->pipelines, alone->pipelines);
  EXPECT_DOUBLE_EQ(2 * shared->cost.forward.per_pair, alone->cost.forward.per_pair);
  EXPECT_DOUBLE_EQ(2 * shared->cost.backward.per_token, alone->cost.backward.per_token);
  EXPECT_DOUBLE_EQ(2 * shared->cost.ring_bytes_per_token, alone->cost.ring_bytes_per_token);
}

TEST(DocumentPlans, RingsAddUpAgainWhereBlocksAreComputedAgain) {
  const ScratchDirectory directory;
  TrainConfig kept = Documents(directory, "qwen3"), again = kept, two = kept;
  two.model.kv_heads = 2;
  two.parallel.tp = 2;
  again.runtime.recompute = "block";
  CostModel costs = UniformCost(1, 1, 1);
  costs.parts.emplace().ring_per_token = 6;
  const auto sums = [&](TrainConfig config) {
    EXPECT_TRUE(config.Resolve(4).ok());
    const auto options = SequenceOptionsOf(config, 2, &costs);
    EXPECT_TRUE(options.ok()) << options.status();
    return std::pair(options->cost.forward_sums, options->cost.backward_sums);
  };
  EXPECT_EQ(sums(kept), std::pair(6.0, 12.0));
  EXPECT_EQ(sums(again), std::pair(6.0, 18.0));
  EXPECT_EQ(sums(two), std::pair(3.0, 6.0));
}

}  // namespace
}  // namespace stretto
