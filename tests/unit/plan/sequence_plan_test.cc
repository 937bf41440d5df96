// Which ranks work on which documents.
#include "stretto/plan/sequence_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/plan/context_cut.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

constexpr SequenceMethod kMethods[] = {SequenceMethod::kStatic, SequenceMethod::kUnbalanced,
                                       SequenceMethod::kBalanced,
                                       SequenceMethod::kBalancedPipelines};

// A random batch, and options in which everything plays a part.
struct Case {
  SequencePlanOptions options;
  std::vector<int64_t> lengths;
};
Case Draw(uint64_t seed, SequenceMethod method) {
  const Rng rng(seed, "sequence plan test");
  uint64_t next = 0;
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(rng.Below(next++, n)); };
  Case c;
  SequencePlanOptions& o = c.options;
  o.method = method;
  o.context = 1 + static_cast<int>(below(4));
  o.pipelines = o.context * (1 + static_cast<int>(below(6)));
  o.pipelines_per_machine = 1 + static_cast<int>(below(4));
  o.stages = 1 + static_cast<int>(below(3));
  o.capacity = 1 + below(below(2) == 0 ? 10 : 3000);
  o.cost.forward = {
      .fixed = 1e-5 * static_cast<double>(below(3)), .per_token = 1e-6, .per_pair = 1e-9};
  o.cost.backward = {.per_token = 2e-6, .per_pair = 2e-9};
  o.cost.layers = 1 + below(8);
  o.cost.ring_bytes_per_token = 100;
  o.cost.machine = {.latency = 1e-6, .bytes_per_second = 1e9};
  o.cost.network = {.latency = 1e-5, .bytes_per_second = 1e8};
  o.cost.overlapped = below(2) == 0;
  o.memory.offload = below(3) == 0;
  o.memory.bytes_per_token = 64;
  o.memory.bytes_fixed = 1000.0 * static_cast<double>(below(2));
  o.memory.host_bytes_per_second = 1e8;
  const int64_t documents = below(60);
  for (int64_t d = 0; d < documents; ++d) {
    // What the largest ring can hold in any case; most are short.
    const int ranks = method == SequenceMethod::kStatic ? o.context : o.pipelines;
    const int64_t most = std::max<int64_t>(1, ranks * (o.capacity - 2));
    const double part = std::pow(rng.Uniform(next++), 4);
    c.lengths.push_back(1 + static_cast<int64_t>(part * static_cast<double>(most - 1)));
  }
  return c;
}

class EveryPlan : public ::testing::TestWithParam<SequenceMethod> {};
INSTANTIATE_TEST_SUITE_P(Methods, EveryPlan, ::testing::ValuesIn(kMethods), [](const auto& info) {
  std::string name = Name(info.param);
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

constexpr uint64_t kCases = 300;

TEST_P(EveryPlan, HasEveryDocumentOnce) {
  for (uint64_t seed = 0; seed < kCases; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, GetParam());
    const auto plan = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    std::vector<int> times(c.lengths.size(), 0);
    for (const PlanItem& item : plan->items) {
      ASSERT_EQ(item.documents.size(), item.lengths.size());
      ASSERT_FALSE(item.documents.empty());
      for (size_t i = 0; i < item.documents.size(); ++i) {
        const auto d = static_cast<size_t>(item.documents[i]);
        ASSERT_LT(d, c.lengths.size());
        ++times[d];
        EXPECT_EQ(item.lengths[i], c.lengths[d]);
      }
      EXPECT_TRUE(std::is_sorted(item.documents.begin(), item.documents.end()));
      EXPECT_EQ(item.tokens, std::accumulate(item.lengths.begin(), item.lengths.end(), int64_t{0}));
    }
    EXPECT_TRUE(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
  }
}

TEST_P(EveryPlan, KeepsTheCapacityOfEachRank) {
  for (uint64_t seed = 0; seed < kCases; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, GetParam());
    const SequencePlanOptions& o = c.options;
    const auto plan = PlanSequences(c.lengths, o);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    const double layers = static_cast<double>(o.cost.layers);
    const auto bytes = [&](double tokens) {
      return o.memory.bytes_per_token * tokens + o.memory.bytes_fixed;
    };
    int64_t largest = 0;
    for (const PlanItem& item : plan->items) {
      for (int i = 0; i < static_cast<int>(item.pipelines.size()); ++i) {
        const int64_t own = ContextTokens(item.lengths, static_cast<int>(item.pipelines.size()), i);
        largest = std::max(largest, own);
        if (item.offload == 0) {
          EXPECT_LE(own, o.capacity);
          continue;
        }
        ASSERT_TRUE(o.memory.offload);
        // Equation 3's numerator.
        EXPECT_LE((2 + (1 - item.offload) * (layers - 2)) * bytes(static_cast<double>(own)),
                  layers * bytes(static_cast<double>(o.capacity)) * (1 + 1e-12));
      }
      // The copy is over within the layer's forward.
      const SequenceClock clock(o.cost, o.stages);
      for (const int64_t length : item.lengths) {
        EXPECT_LE(item.offload * o.memory.bytes_per_token * static_cast<double>(length),
                  1e-9 * static_cast<double>(clock.LayerForward(SequenceClock::LoadOf(length))) *
                          o.memory.host_bytes_per_second +
                      1e-6);
      }
    }
    EXPECT_EQ(plan->max_tokens, largest);
  }
}

TEST_P(EveryPlan, HasRingsOfNeighboursInAscendingOrder) {
  for (uint64_t seed = 0; seed < kCases; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, GetParam());
    const auto plan = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    for (const PlanItem& item : plan->items) {
      const std::vector<int>& ring = item.pipelines;
      ASSERT_FALSE(ring.empty());
      EXPECT_TRUE(std::is_sorted(ring.begin(), ring.end()));
      EXPECT_EQ(std::set<int>(ring.begin(), ring.end()).size(), ring.size());
      EXPECT_GE(ring.front(), 0);
      EXPECT_LT(ring.back(), c.options.pipelines);
      // Algorithm 1 goes on with the first pipeline behind the last one.
      if (GetParam() != SequenceMethod::kUnbalanced) {
        EXPECT_EQ(ring.back() - ring.front() + 1, static_cast<int>(ring.size()));
      }
      if (GetParam() == SequenceMethod::kStatic) {
        EXPECT_EQ(static_cast<int>(ring.size()), c.options.context);
        EXPECT_EQ(ring.front() % c.options.context, 0);
      }
    }
  }
}

TEST_P(EveryPlan, HasLevelsOfTheItemsInTheirOrder) {
  for (uint64_t seed = 0; seed < kCases; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, GetParam());
    const auto plan = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    std::vector<PlanItem> again = plan->items;
    ASSERT_TRUE(AssignLevels(c.options.pipelines, &again).ok());
    int levels = 0;
    for (size_t i = 0; i < again.size(); ++i) {
      EXPECT_EQ(plan->items[i].level, again[i].level);
      levels = std::max(levels, again[i].level + 1);
    }
    EXPECT_EQ(plan->levels, levels);
  }
}

TEST_P(EveryPlan, IsTheSameAgainAndTakesNoLessThanTheBound) {
  for (uint64_t seed = 0; seed < kCases; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, GetParam());
    const auto plan = PlanSequences(c.lengths, c.options);
    const auto again = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(plan.ok() && again.ok());
    EXPECT_EQ(plan->Hash(), again->Hash());
    EXPECT_EQ(plan->Describe(), again->Describe());
    // Times are whole nanoseconds.
    const double grain = 1e-9 * static_cast<double>(1 + plan->items.size());
    EXPECT_GE(plan->makespan + grain, plan->lower_bound);
    EXPECT_GE(plan->makespan + grain, plan->mean);
  }
}

// A token takes a microsecond in forward and two in backward, nothing else counts.
SequencePlanOptions Linear(int pipelines, int64_t capacity, SequenceMethod method) {
  SequencePlanOptions o = {.pipelines = pipelines, .capacity = capacity, .method = method};
  o.cost.forward.per_token = 1e-6;
  o.cost.backward.per_token = 2e-6;
  return o;
}

// "0 1-2: 3 4" for each item: level, pipelines, documents.
std::string Text(const std::vector<int64_t>& lengths, const SequencePlanOptions& options) {
  const auto plan = PlanSequences(lengths, options);
  if (!plan.ok()) return std::string(plan.status().message());
  std::string text;
  for (const PlanItem& item : plan->items) {
    text += std::to_string(item.level) + " " + std::to_string(item.pipelines.front());
    if (item.pipelines.size() > 1) text += "-" + std::to_string(item.pipelines.back());
    text += ":";
    for (const int64_t d : item.documents) text += " " + std::to_string(d);
    text += "\n";
  }
  return text;
}

TEST(PlanSequences, StaticFillsRingsInTurn) {
  SequencePlanOptions o = Linear(4, 10, SequenceMethod::kStatic);
  o.context = 2;
  // 20 tokens a ring: 16 + 4, 12 + 8, 10 + 6.
  EXPECT_EQ(Text({16, 10, 4, 12, 8, 6}, o), "0 0-1: 0 2\n0 2-3: 3 4\n1 0-1: 1 5\n");
}

// A ring of three ranks has room for six tokens, and each rank for a description of two documents.
TEST(PlanSequences, StaticRingsHaveNoMoreDocumentsThanARankHasTokens) {
  SequencePlanOptions o = Linear(3, 2, SequenceMethod::kStatic);
  o.context = 3;
  EXPECT_EQ(Text({2, 2, 2}, o), "0 0-2: 0 1\n1 0-2: 2\n");
}

TEST(PlanSequences, DynamicGoesRoundInTheOrderOfTheBatch) {
  // 25 needs 3 ranks; 4 and 6 are a pack; 12 goes on behind it and over the end.
  SequencePlanOptions o = Linear(5, 10, SequenceMethod::kUnbalanced);
  EXPECT_EQ(Text({25, 4, 12, 6}, o), "0 0-2: 0\n0 3: 1 3\n1 0-4: 2\n");
}

TEST(PlanSequences, BalancedGivesTheRestToThoseWhoEndFirst) {
  // 16 on two ranks takes as long as 8 on one.
  SequencePlanOptions o = Linear(4, 10, SequenceMethod::kBalanced);
  const auto plan = PlanSequences({3, 16, 8, 5}, o);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  EXPECT_EQ(Text({3, 16, 8, 5}, o), "0 0-1: 1\n0 2: 2\n0 3: 0 3\n");
  EXPECT_DOUBLE_EQ(plan->makespan, 24e-6);
  EXPECT_DOUBLE_EQ(plan->mean, 24e-6);
  EXPECT_THAT(plan->pipeline_seconds, ::testing::Each(::testing::DoubleEq(24e-6)));
}

TEST(PlanSequences, TheTimeOfAStepAsksForMoreRanksThanMemory) {
  // Attention alone counts: 100 tokens on one rank last as long as all others together.
  SequencePlanOptions o = Linear(8, 100, SequenceMethod::kBalanced);
  o.cost.forward = {.per_pair = 1e-9};
  o.cost.backward = {.per_pair = 2e-9};
  std::vector<int64_t> lengths(40, 10);
  lengths.push_back(100);
  const auto plan = PlanSequences(lengths, o);
  ASSERT_TRUE(plan.ok());
  EXPECT_GT(plan->items.front().pipelines.size(), 4u);
  EXPECT_LT(plan->makespan, 1.3 * plan->lower_bound);
  // By memory alone it is on one.
  o.method = SequenceMethod::kUnbalanced;
  o.ranks_from_memory = true;
  const auto published = PlanSequences(lengths, o);
  ASSERT_TRUE(published.ok());
  for (const PlanItem& item : published->items) EXPECT_EQ(item.pipelines.size(), 1u);
  EXPECT_GT(published->makespan, 4 * published->lower_bound);
}

TEST(PlanSequences, HostMemoryMakesRingsSmaller) {
  SequencePlanOptions o = Linear(16, 10, SequenceMethod::kUnbalanced);
  o.cost.layers = 32;
  o.ranks_from_memory = true;
  o.memory = {.bytes_per_token = 1, .offload = true, .host_bytes_per_second = 1e9};
  const auto ranks = [&] {
    const auto plan = PlanSequences({156}, o);
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    return plan->items.front();
  };
  // 2 of 32 layers stay: one rank has room for 160 tokens (156 are easier to share).
  EXPECT_EQ(ranks().pipelines.size(), 1u);
  EXPECT_EQ(ranks().offload, 1.0);
  // A link that copies a quarter of the activations within forward: 2 + 30 * 3 / 4 of 32 layers
  // stay.
  o.memory.host_bytes_per_second = 0.25e6;
  EXPECT_EQ(ranks().pipelines.size(), 12u);  // of 13 tokens
  o.memory.offload = false;
  EXPECT_EQ(ranks().pipelines.size(), 16u);
  EXPECT_EQ(ranks().offload, 0.0);
}

// Shares differ by one token at most: as many ranks as the length divided by the room, rounded up.
TEST(PlanSequences, RoundingCounts) {
  EXPECT_EQ(SequencePlan::TokensOf({.lengths = {9}, .pipelines = {0, 1, 2, 3}}, 0), 3);
  EXPECT_EQ(SequencePlan::TokensOf({.lengths = {9}, .pipelines = {0, 1, 2, 3}}, 1), 2);
  // Several documents together, too.
  EXPECT_EQ(SequencePlan::TokensOf({.lengths = {1, 1, 1, 1}, .pipelines = {0, 1, 2}}, 0), 2);
  EXPECT_EQ(SequencePlan::TokensOf({.lengths = {1, 1, 1, 1}, .pipelines = {0, 1, 2}}, 2), 1);
  SequencePlanOptions o = Linear(3, 5, SequenceMethod::kUnbalanced);
  o.ranks_from_memory = true;
  EXPECT_EQ(Text({10}, o), "0 0-1: 0\n");
  EXPECT_EQ(Text({11}, o), "0 0-2: 0\n");
  o = Linear(8, 3, SequenceMethod::kUnbalanced);
  o.ranks_from_memory = true;
  EXPECT_EQ(Text({12}, o), "0 0-3: 0\n");
  EXPECT_EQ(Text({11}, o), "0 0-3: 0\n");
  o = Linear(8, 2, SequenceMethod::kUnbalanced);
  o.ranks_from_memory = true;
  EXPECT_EQ(Text({8}, o), "0 0-3: 0\n");
  EXPECT_EQ(Text({9}, o), "0 0-4: 0\n");
}

// 18 tokens on seven ranks are 3 for four of them, on eight for two.
TEST(PlanSequences, MoreRanksForTimeDoNotBreakTheCapacity) {
  SequencePlanOptions o = Linear(7, 3, SequenceMethod::kBalanced);
  o.cost.forward = {.per_pair = 1e-6};
  EXPECT_EQ(Text({18}, o), "0 0-6: 0\n");
  o.pipelines = 8;
  EXPECT_EQ(Text({18}, o), "0 0-7: 0\n");
}

TEST(PlanSequences, RingsStayOnMachinesWhereTheyCan) {
  SequencePlanOptions o = Linear(12, 10, SequenceMethod::kBalanced);
  o.pipelines_per_machine = 4;
  const auto plan = PlanSequences({30, 30, 30, 9, 9, 9}, o);
  ASSERT_TRUE(plan.ok());
  for (const PlanItem& item : plan->items) {
    EXPECT_EQ(item.pipelines.front() / 4, item.pipelines.back() / 4);
  }
  EXPECT_LE(plan->max_peers, 1);
}

TEST(PlanSequences, NamesWhatIsWrong) {
  const auto error = [](const std::vector<int64_t>& lengths, const SequencePlanOptions& options) {
    const auto plan = PlanSequences(lengths, options);
    EXPECT_FALSE(plan.ok());
    return std::string(plan.status().message());
  };
  const SequencePlanOptions good = Linear(4, 10, SequenceMethod::kBalanced);
  EXPECT_THAT(error({5, 41}, good),
              HasSubstr("document 1 has 41 tokens, 4 ranks with room for 10 each"));
  EXPECT_THAT(error({5, 41}, good), HasSubstr("raise the capacity"));
  EXPECT_THAT(error({5, 0}, good), HasSubstr("document 1 has 0 tokens"));
  SequencePlanOptions o = good;
  o.capacity = 0;
  EXPECT_THAT(error({5}, o), HasSubstr("capacity of a rank"));
  o = good;
  o.pipelines = 0;
  EXPECT_THAT(error({5}, o), HasSubstr("pipelines, not 0"));
  o = good;
  o.method = SequenceMethod::kStatic;
  o.context = 3;
  EXPECT_THAT(error({5}, o), HasSubstr("rings of 3 do not divide 4 pipelines"));
  o.context = 2;
  EXPECT_THAT(error({21}, o), HasSubstr("document 0 has 21 tokens, 2 ranks of a ring"));
  o = good;
  o.cost.layers = 2;
  o.memory = {.bytes_per_token = 3, .device_bytes = 59};
  EXPECT_THAT(error({5}, o),
              HasSubstr("take 60 bytes, a rank has 59 for them; lower the capacity to 9"));
  o = good;
  o.memory.offload = true;
  EXPECT_THAT(error({5}, o), HasSubstr("bytes per second"));
  o = good;
  o.cost.forward.per_pair = -1;
  EXPECT_THAT(error({5}, o), HasSubstr("seconds of a pair"));
  o.cost.forward.per_pair = std::nan("");
  EXPECT_THAT(error({5}, o), HasSubstr("seconds of a pair"));
  o.cost.forward.per_pair = 1e-6;
  o.capacity = int64_t{1} << 31;
  EXPECT_THAT(error({int64_t{1} << 31}, o), HasSubstr("seconds one after the other"));
  o = good;
  o.cost.backward_messages = 9;
  EXPECT_THAT(error({5}, o), HasSubstr("backward messages of 9; give 0 to 8"));
  o = good;
  o.cost.layers = 10000;
  o.cost.backward_sums = 4e-3;
  EXPECT_THAT(error({5}, o), HasSubstr("seconds of a token in a ring's sums 0.004"));
  o.cost.backward_sums = 1e-3;
  o.capacity = 400000;
  EXPECT_THAT(error({400000}, o), HasSubstr("seconds one after the other"));
  o.cost.backward_sums = 0;
  EXPECT_TRUE(PlanSequences({400000}, o).ok());
  o = good;
  o.cost = {};
  EXPECT_THAT(error({5}, o), HasSubstr("take no time; fit it"));
  o = good;
  o.capacity = int64_t{1} << 31;
  EXPECT_THAT(error({int64_t{1} << 31, int64_t{1} << 31}, o), HasSubstr("pairs of a query"));
  o = good;
  o.cost.machine.bytes_per_second = 1;
  EXPECT_THAT(error({5}, o), HasSubstr("bytes per second of 1"));
  EXPECT_THAT(std::string(ParseSequenceMethod("best").status().message()), HasSubstr("'best'"));
}

TEST(PlanSequences, AnEmptyBatchIsAnEmptyPlan) {
  for (const SequenceMethod method : kMethods) {
    const auto plan = PlanSequences({}, Linear(4, 10, method));
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    EXPECT_TRUE(plan->items.empty());
    EXPECT_EQ(plan->makespan, 0);
    EXPECT_EQ(*ParseSequenceMethod(Name(method)), method);
  }
}

// Rings send what was counted: all tokens' keys and values to all others of the ring.
TEST(PlanSequences, CountsTheBytesOfRings) {
  SequencePlanOptions o = Linear(4, 10, SequenceMethod::kUnbalanced);
  o.ranks_from_memory = true;
  o.cost.layers = 3;
  o.cost.ring_bytes_per_token = 100;
  const auto plan = PlanSequences({30, 7}, o);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->ring_bytes, int64_t{3} * (3 - 1) * 30 * 100 * 3);
}

TEST(SequenceClock, HidesMessagesOrAddsThem) {
  SequenceCost cost;
  cost.forward = {.fixed = 1e-6, .per_token = 1e-6, .per_pair = 1e-8};
  cost.ring_bytes_per_token = 1000;
  cost.machine = {.latency = 2e-6, .bytes_per_second = 1e9};
  cost.network = {.latency = 100e-6, .bytes_per_second = 1e9};
  const auto load = SequenceClock::LoadOf(100);  // 5050 pairs
  const SequenceClock clock(cost, 1);
  EXPECT_EQ(clock.Forward(load, 1, false), 1000 + 100000 + 50500);
  // Steps of 12.625 us hide none of the 52 us that 50 tokens' message takes.
  EXPECT_EQ(clock.Forward(load, 2, false), 1000 + 50000 + 52000 + 12625);
  EXPECT_EQ(clock.Forward(load, 2, true), 1000 + 50000 + 150000 + 12625);
  cost.overlapped = false;
  EXPECT_EQ(SequenceClock(cost, 1).Forward(load, 2, false), 1000 + 50000 + 52000 + 2 * 12625);
  cost.overlapped = true;
  cost.forward.per_pair = 1e-7;  // steps of 126.25 us hide all of it
  EXPECT_EQ(SequenceClock(cost, 1).Forward(load, 2, false), 1000 + 50000 + 2 * 126250);
  // Each of a ring's steps but the first adds to the sums of a rank's tokens.
  cost.forward_sums = 2e-9;
  EXPECT_EQ(SequenceClock(cost, 1).Forward(load, 2, false), 1000 + 50000 + 2 * 126250 + 100);
  EXPECT_EQ(SequenceClock(cost, 1).Forward(load, 1, false), 1000 + 100000 + 505000);
  EXPECT_EQ(SequenceClock(cost, 1).Backward(load, 2, false), 102000);  // messages alone
  cost.backward_sums = 4e-9;
  EXPECT_EQ(SequenceClock(cost, 1).Backward(load, 2, false), 102200);
  // The slowest stage has two of three layers.
  cost.layers = 3;
  EXPECT_EQ(SequenceClock(cost, 2).Forward(load, 1, false), 2 * (1000 + 100000 + 505000));
}

TEST(SequenceClock, TheLargestCostsDoNotOverflow) {
  SequenceCost cost = {.ring_bytes_per_token = 1e6, .backward_messages = 8};
  cost.backward = {.fixed = 1, .per_token = 1e-3, .per_pair = 1e-6};
  cost.backward_sums = 1e-3;
  cost.machine = {.latency = 1, .bytes_per_second = 1e6};
  ASSERT_TRUE(SequenceClock::Check(cost).ok());
  // Two tokens on each rank: a layer, a message of 16 s and one of its latency, sums, the last
  // step.
  const int64_t micro = 1000;
  EXPECT_EQ(SequenceClock(cost, 1).Backward(SequenceClock::LoadOf(4), 2, false),
            (1000000 + 2000 + 17000000 + 2000) * micro + 10 * micro / 4);
}

TEST(SequenceCostOf, TakesBlocksAndLinksOfAFit) {
  CostModel model;
  model.forward = {{.fixed = 1, .per_token = 2, .per_pair = 3}};
  model.backward_input = {{.fixed = 10, .per_token = 20, .per_pair = 30}};
  model.backward_weight = {{.fixed = 100, .per_token = 200, .per_pair = 300}};
  model.link_latency = 7;
  // A single stage is the whole model.
  SequenceCost cost = SequenceCostOf(model, 2, 5);
  EXPECT_EQ(cost.forward.per_token, 1);
  EXPECT_EQ(cost.backward.per_pair, 165);
  EXPECT_EQ(cost.network.latency, 7);
  EXPECT_EQ(cost.layers, 2);
  EXPECT_EQ(cost.ring_bytes_per_token, 5);
  model.parts.emplace();
  model.parts->machine.point_to_point.latency = 3;
  cost = SequenceCostOf(model, 2, 5);
  EXPECT_EQ(cost.forward.per_token, 2);
  EXPECT_EQ(cost.machine.latency, 3);
  EXPECT_EQ(cost.network.latency, 3);
  model.parts->network.emplace().point_to_point.latency = 4;
  EXPECT_EQ(SequenceCostOf(model, 2, 5).network.latency, 4);
  EXPECT_EQ(SequenceCostOf(model, 2, 5).forward_sums, 0);
  model.parts->ring_per_token = 6;
  EXPECT_EQ(SequenceCostOf(model, 2, 5).forward_sums, 6);
  EXPECT_EQ(SequenceCostOf(model, 2, 5).backward_sums, 12);
  // What a file may say is what a clock takes.
  model.forward = {{.per_token = 1e-6}};
  model.backward_input = model.backward_weight = {};
  model.parts->machine.point_to_point = model.parts->network->point_to_point = {};
  model.parts->ring_per_token = DeviceCost::kMostRingPerToken;
  EXPECT_TRUE(SequenceClock::Check(SequenceCostOf(model, 2, 5)).ok());
}

// On few pipelines a balanced plan is no worse than any fixed mesh.
TEST(SequencePlan, FixedMeshesAreTriedOnFewPipelines) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    Case c = Draw(seed, SequenceMethod::kBalanced);
    c.options.memory.offload = false;
    const absl::StatusOr<SequencePlan> balanced = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(balanced.ok()) << balanced.status();
    SequencePlanOptions fixed = c.options;
    fixed.method = SequenceMethod::kStatic;
    for (fixed.context = 1; fixed.context <= fixed.pipelines; ++fixed.context) {
      if (fixed.pipelines % fixed.context != 0) continue;
      const absl::StatusOr<SequencePlan> other = PlanSequences(c.lengths, fixed);
      if (!other.ok()) continue;
      EXPECT_LE(balanced->makespan, other->makespan * (1 + 1e-12));
    }
    c.options.most_shares = 0;  // none may be described
    const absl::StatusOr<SequencePlan> without = PlanSequences(c.lengths, c.options);
    ASSERT_TRUE(without.ok()) << without.status();
    for (const PlanItem& item : without->items) {
      EXPECT_TRUE(item.pipelines.size() == 1 || item.documents.size() == 1);
    }
  }
}

// One that shares a ring among short documents, where nothing else is as even.
TEST(SequencePlan, AFixedMeshIsTakenWhereItIsBetter) {
  SequencePlanOptions o;
  o.pipelines = 4;
  o.capacity = 8000;
  o.cost.forward = {.per_token = 1e-6, .per_pair = 1e-9};
  o.cost.backward = {.per_token = 2e-6, .per_pair = 2e-9};
  const std::vector<int64_t> lengths = {16000, 8000, 3000, 5000};
  const absl::StatusOr<SequencePlan> plan = PlanSequences(lengths, o);
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->items.size(), 1u);
  EXPECT_EQ(plan->items[0].pipelines.size(), 4u);
  EXPECT_EQ(plan->items[0].documents.size(), 4u);
  o.most_shares = 15;
  const absl::StatusOr<SequencePlan> without = PlanSequences(lengths, o);
  ASSERT_TRUE(without.ok()) << without.status();
  EXPECT_GT(without->items.size(), 1u);
  EXPECT_GT(without->makespan, plan->makespan);
}

}  // namespace
}  // namespace stretto
