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

constexpr SequenceMethod kMethods[] = {SequenceMethod::kStatic, SequenceMethod::kDynamic,
                                       SequenceMethod::kBalanced,
                                       SequenceMethod::kBalancedPipelines};

// A random batch, and options in which everything plays a part.
struct Case {
  SequencePlanOptions options;
  std::vector<int64_t> lengths;
};
Case Draw(uint64_t seed) {
  const Rng rng(seed, "sequence plan test");
  uint64_t next = 0;
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(rng.Below(next++, n)); };
  Case c;
  SequencePlanOptions& o = c.options;
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
    // What a ring of `context` can hold in any case; most are short.
    const int64_t most = std::max<int64_t>(1, o.context * (o.capacity - 1));
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
    Case c = Draw(seed);
    c.options.method = GetParam();
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
    Case c = Draw(seed);
    const SequencePlanOptions& o = c.options;
    c.options.method = GetParam();
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
    Case c = Draw(seed);
    c.options.method = GetParam();
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
      if (GetParam() != SequenceMethod::kDynamic) {
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
    Case c = Draw(seed);
    c.options.method = GetParam();
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
    Case c = Draw(seed);
    c.options.method = GetParam();
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

}  // namespace
}  // namespace stretto
