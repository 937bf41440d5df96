// Plans of sequences on the virtual clock: the planner's time is the executor's, and how good plans
// are.
#include "stretto/sim/sequence_simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/data/length_distribution.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

SequencePlanOptions Figures(int pipelines, int stages, SequenceMethod method) {
  SequencePlanOptions o = {
      .pipelines = pipelines, .stages = stages, .capacity = 8192, .method = method};
  o.pipelines_per_machine = 4;
  o.cost = ByteScaleCost(2);
  o.memory = ByteScaleMemory(2);
  return o;
}

std::vector<int64_t> Batch(const std::string& name, uint64_t step, int64_t tokens,
                           int64_t longest) {
  const auto distribution = LengthDistribution::Named(name);
  EXPECT_TRUE(distribution.ok());
  return distribution->Batch(1, step, tokens, longest);
}

// The planner adds up whole nanoseconds in its own pass over the one order; the simulator runs the
// executor's program event by event.
TEST(SimulateSequences, TakesTheTimeThatThePlanSays) {
  for (const int stages : {1, 3}) {
    for (const auto method : {SequenceMethod::kStatic, SequenceMethod::kUnbalanced,
                              SequenceMethod::kBalanced, SequenceMethod::kBalancedPipelines}) {
      for (uint64_t step = 0; step < 3; ++step) {
        SequencePlanOptions o = Figures(24, stages, method);
        o.context = 8;
        const auto plan = PlanSequences(Batch("byted", step, 1 << 20, 60000), o);
        ASSERT_TRUE(plan.ok()) << plan.status().message();
        const auto simulation = SimulateSequences(*plan);
        ASSERT_TRUE(simulation.ok()) << simulation.status().message();
        EXPECT_NEAR(simulation->makespan(), plan->makespan, 1e-9 * plan->makespan);
        EXPECT_NEAR(simulation->mean(), plan->mean, 1e-6 * plan->mean);
        EXPECT_THAT(DrawSequences(*simulation, "a title"), HasSubstr("a title"));
      }
    }
  }
}

TEST(SimulateSequences, BalancedPlansOf512RanksComeCloseToTheBound) {
  for (const char* name : {"github", "byted"}) {
    for (uint64_t step = 0; step < 3; ++step) {
      SequencePlanOptions o = Figures(512, 1, SequenceMethod::kBalanced);
      const auto lengths = Batch(name, step, int64_t{1} << 25, int64_t{1} << 21);
      const auto balanced = PlanSequences(lengths, o);
      ASSERT_TRUE(balanced.ok()) << balanced.status().message();
      EXPECT_LE(balanced->makespan, 1.05 * balanced->lower_bound);
      EXPECT_LE(balanced->makespan, 1.05 * balanced->mean);
      // Without balance it is another matter, so the bound says something.
      o.method = SequenceMethod::kUnbalanced;
      const auto dynamic = PlanSequences(lengths, o);
      ASSERT_TRUE(dynamic.ok());
      EXPECT_GE(dynamic->makespan, 1.5 * dynamic->lower_bound);
    }
  }
}

TEST(SimulateSequences, PipelinesWantTheirOwnBalance) {
  double plain = 0, own = 0;
  for (uint64_t step = 0; step < 2; ++step) {
    const auto lengths = Batch("github", step, int64_t{1} << 23, int64_t{1} << 18);
    plain += PlanSequences(lengths, Figures(64, 4, SequenceMethod::kBalanced))->makespan;
    own += PlanSequences(lengths, Figures(64, 4, SequenceMethod::kBalancedPipelines))->makespan;
  }
  EXPECT_LT(own, 0.97 * plain);
}

// The constants are those of the figures (see ByteScaleCost).
TEST(ByteScaleCost, GivesTheTimesOfTheFigures) {
  SequenceCost cost = ByteScaleCost(8);
  cost.layers = 1;
  const SequenceClock clock(cost, 1);
  // 64 Ki tokens: attention 48.2 ms, MLP 15.1 ms.
  EXPECT_NEAR(1e-6 * static_cast<double>(clock.Forward(SequenceClock::LoadOf(65536), 1, true)),
              63.3, 2);
  // 128 Ki: 175.5 and 28.2 ms.
  EXPECT_NEAR(1e-6 * static_cast<double>(clock.Forward(SequenceClock::LoadOf(131072), 1, true)),
              203.7, 4);
  // 312 Ki tokens on 256 ranks of a tensor axis of 2: a ring of 405 ms.
  cost = ByteScaleCost(2);
  cost.layers = 1;
  cost.forward.per_token = 0;
  const auto load = SequenceClock::LoadOf(312 * 1024);
  EXPECT_NEAR(1e-6 * static_cast<double>(SequenceClock(cost, 1).Forward(load, 256, true)), 405, 30);
  // On 39 ranks a step hides its message: 110 ms.
  EXPECT_NEAR(1e-6 * static_cast<double>(SequenceClock(cost, 1).Forward(load, 39, true)), 110, 15);
}

}  // namespace
}  // namespace stretto
