// Predictions from planted costs: bubbles by formula, communication by the plan's bytes, parts that
// add up; and suggestions that the memory plan agrees with.
#include "stretto/train/prediction.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/train/suggest.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

constexpr double kBytesPerSecond = 1e6;

// Eight equal blocks and ends that count for little.
TrainConfig Small() {
  TrainConfig config;
  config.model.family = "llama";
  config.model.layers = 8;
  config.model.hidden = 32;
  config.model.vocabulary = 40;
  config.model.tie_embeddings = false;
  config.data.sequence_length = 16;
  config.batch.global = 32;
  config.batch.micro = 2;
  config.parallel.bucket_bytes = 20000;
  config.runtime.device = "cpu";
  return config;
}

TrainConfig Resolved(TrainConfig config, int ranks) {
  const absl::Status status = config.Resolve(ranks);
  EXPECT_TRUE(status.ok()) << status.message();
  return config;
}

// A block takes 1 s forward and as much for each half of backward, in equal parts of its linear
// layers and the activation, which is in the gated one.
CostModel Planted(TrainConfig config) {
  CostModel cost;
  DeviceCost& parts = cost.parts.emplace();
  config.parallel = {};
  config = Resolved(config, 1);
  parts.model = ModelKey(config);
  const RunPlan plan = PlanRun(config, 1, 0).value();
  std::set<std::string> kinds;
  for (const std::string& name : plan.stages[0].model.graph.layer_names) {
    kinds.insert(LayerKind(name));
  }
  for (const std::string& kind : kinds) parts.layers.push_back({.name = kind});
  for (LayerCost& layer : parts.layers) {
    if (layer.name.find('.') == std::string::npos) continue;
    const double seconds = layer.name == "mlp.gate_up" ? 0.4 : 0.2;
    layer.forward = layer.backward_input = layer.backward_weight = {.fixed = seconds};
  }
  return cost;
}
LinkCost Link(double latency, double bytes_per_second) {
  const OperationCost o = {.latency = latency, .bytes_per_second = bytes_per_second};
  return {o, o, o, o};
}

StepPrediction Predict(const TrainConfig& config, int ranks, const CostModel& cost) {
  const auto step = PredictStep(Resolved(config, ranks), ranks, cost);
  EXPECT_TRUE(step.ok()) << step.status().message();
  return step.value_or(StepPrediction());
}

TEST(PredictStep, BubblesAreThoseOfTheFormulas) {
  struct Case {
    const char* schedule;
    int chunks;
    double pair;
  };
  for (const int pp : {2, 4}) {
    for (const Case& c : {Case{"gpipe", 1, 0}, Case{"1f1b", 1, 0}, Case{"interleaved", 2, 0},
                          Case{"zb-h1", 1, 0}, Case{"v-shaped", 2, 1.5}}) {
      TrainConfig config = Small();
      config.parallel.pp = pp;
      config.parallel.schedule = c.schedule;
      const StepPrediction step = Predict(config, pp, Planted(config));
      const double half = 8.0 / pp;  // seconds of a half of one micro-batch on a rank
      EXPECT_NEAR(step.bubble,
                  PublishedBubble(ParseScheduleKind(c.schedule).value(), pp, c.chunks, half, half,
                                  half, c.pair * half),
                  1e-9)
          << c.schedule << " on " << pp;
      EXPECT_NEAR(step.compute, 16 * 3 * half, 1e-9);
      EXPECT_NEAR(step.seconds, step.compute + step.bubble, 1e-9);
      EXPECT_EQ(step.exposed(), 0);
    }
  }
}

TEST(PredictStep, WhatTravelsBetweenStagesIsToldFromTheBubble) {
  TrainConfig config = Small();
  config.parallel.pp = 4;
  CostModel cost = Planted(config);
  const StepPrediction free = Predict(config, 4, cost);
  cost.parts->machine.point_to_point.latency = 0.25;
  const StepPrediction slow = Predict(config, 4, cost);
  EXPECT_NEAR(slow.bubble, free.bubble, 1e-9);
  // Up and down the pipeline at least.
  EXPECT_GE(slow.pipeline, 2 * 3 * 0.25 - 1e-9);
  EXPECT_NEAR(slow.seconds, free.seconds + slow.pipeline, 1e-9);
}

// Where nothing is hidden all bytes that the plan counts take their time.
TEST(PredictStep, UnhiddenCommunicationIsThatOfTheBytes) {
  for (const int zero : {1, 2, 3}) {
    TrainConfig config = Small();
    config.parallel.dp = 3;
    config.parallel.zero = zero;
    CostModel cost = Planted(config);
    cost.parts->machine = Link(0, kBytesPerSecond);
    const RunPlan plan = PlanRun(Resolved(config, 3), 3, 0).value();
    const auto bytes = static_cast<double>(plan.gradient_bytes_sent + plan.parameter_bytes_sent);
    const StepPrediction step = Predict(config, 3, cost);
    EXPECT_NEAR(step.data, bytes / kBytesPerSecond, 1e-9 * bytes) << "zero " << zero;
    EXPECT_NEAR(step.compute, 6 * 8 * 3, 1e-9);  // 11 samples of 2 each at most
    // The rest is the step's few scalars.
    EXPECT_NEAR(step.seconds, step.compute + step.data + step.update, 1e-9);
  }
  TrainConfig config = Small();
  config.parallel.tp = 2;
  CostModel cost = Planted(config);
  cost.parts->machine = Link(0, kBytesPerSecond);
  const auto bytes =
      static_cast<double>(PlanRun(Resolved(config, 2), 2, 0).value().tensor_bytes_sent);
  EXPECT_NEAR(Predict(config, 2, cost).tensor, bytes / kBytesPerSecond, 1e-9 * bytes);
}

TEST(PredictStep, HiddenCommunicationCostsWhatIsLeftOver) {
  TrainConfig config = Small();
  config.parallel.dp = 2;
  for (const int zero : {1, 2, 3}) {
    config.parallel.zero = zero;
    CostModel cost = Planted(config);
    cost.parts->machine = Link(0, kBytesPerSecond);
    const StepPrediction serial = Predict(config, 2, cost);
    cost.parts->hidden = 1;
    const StepPrediction hidden = Predict(config, 2, cost);
    EXPECT_GT(hidden.data, 0) << zero;  // the last bucket has nothing to hide under
    EXPECT_LT(hidden.data, 0.5 * serial.data) << zero;
    EXPECT_NEAR(hidden.seconds - hidden.data, serial.seconds - serial.data, 1e-9);
    TrainConfig waits = config;
    waits.parallel.overlap = waits.parallel.prefetch = false;
    EXPECT_NEAR(Predict(waits, 2, cost).data, serial.data, 1e-6 * serial.data) << zero;
  }
}

// What starts and ends apart travels under weights' halves, and pieces under products.
TEST(PredictStep, ATensorAxisHidesWhatTravelsUnderProducts) {
  TrainConfig config = Small();
  config.parallel.tp = 2;
  CostModel cost = Planted(config);
  cost.parts->machine = Link(0, kBytesPerSecond);
  const StepPrediction serial = Predict(config, 2, cost);
  cost.parts->hidden = 1;
  const StepPrediction apart = Predict(config, 2, cost);
  EXPECT_GT(apart.tensor, 0);  // forward waits
  EXPECT_LT(apart.tensor, 0.8 * serial.tensor);
  EXPECT_NEAR(apart.seconds - apart.tensor, serial.seconds - serial.tensor, 1e-9);
  config.parallel.tp_chunks = 4;
  EXPECT_LT(Predict(config, 2, cost).tensor, 0.9 * apart.tensor);
  config.parallel.tp_chunks = 1;
  config.parallel.tp_overlap = false;
  EXPECT_NEAR(Predict(config, 2, cost).tensor, serial.tensor, 1e-6 * serial.tensor);
}

// What is waited for where weights' halves are apart, at a step's ends, does not grow with the
// step.
TEST(PredictStep, ZeroBubbleHidesWhatOneF1BHidesInTheMiddle) {
  const auto tensor = [](const char* schedule, int zero, int64_t samples) {
    TrainConfig config = Small();
    config.parallel.pp = config.parallel.tp = config.parallel.dp = 2;
    config.parallel.zero = zero;
    config.parallel.schedule = schedule;
    config.batch.global = samples;
    CostModel cost = Planted(config);
    cost.parts->machine = Link(0, kBytesPerSecond);
    cost.parts->hidden = 1;
    return Predict(config, 8, cost).tensor;
  };
  const double few = tensor("zb-h1", 1, 32) - tensor("1f1b", 1, 32);
  const double many = tensor("zb-h1", 1, 128) - tensor("1f1b", 1, 128);
  EXPECT_GT(few, 0);
  EXPECT_NEAR(many, few, 1e-6 * few);
  // With ZeRO-2 one list of actions is there for both.
  EXPECT_GT(tensor("zb-h1", 2, 128) - tensor("1f1b", 2, 128), 2 * few);
}

// A product is not made again where only the activation behind it is dropped.
TEST(PredictStep, AnActivationIsRecomputedWithoutItsProduct) {
  TrainConfig config = Small();
  config.model.family = "gpt2";
  CostModel cost = Planted(config);
  for (LayerCost& layer : cost.parts->layers) {
    layer.forward.fixed = layer.name == "mlp.up" ? 1 : 0;
    layer.backward_input = layer.backward_weight = {};
  }
  const auto compute = [&](const char* recompute) {
    config.runtime.recompute = recompute;
    return Predict(config, 1, cost).compute;
  };
  EXPECT_EQ(compute("norms"), compute("none"));
  EXPECT_EQ(compute("block"), 2 * compute("none"));
}

TEST(PredictStep, PartialGradientsAreTwoOperations) {
  TrainConfig config = Small();
  config.parallel.tp = 2;
  CostModel cost = Planted(config);
  const double free = Predict(config, 2, cost).tensor;
  cost.parts->machine.all_reduce.latency = 0.5;
  EXPECT_NEAR(Predict(config, 2, cost).tensor, free, 1e-9);  // only the step's scalars
}

TEST(PredictStep, PartsAddUp) {
  for (const char* schedule : {"1f1b", "interleaved", "zb-h1", "v-shaped"}) {
    for (const int zero : {1, 2, 3}) {
      TrainConfig config = Small();
      config.parallel.dp = config.parallel.tp = config.parallel.pp = 2;
      config.parallel.zero = zero;
      config.parallel.schedule = schedule;
      config.batch.global = 27;  // the last micro-batch is not full
      config.model.tie_embeddings = true;
      CostModel cost = Planted(config);
      cost.parts->machine = Link(1e-3, kBytesPerSecond);
      cost.parts->hidden = 0.5;
      cost.parts->update_per_element = 1e-3;
      cost.parts->step_fixed = 0.25;
      const StepPrediction s = Predict(config, 8, cost);
      EXPECT_NEAR(s.compute + s.update + s.bubble + s.exposed(), s.seconds, 1e-9 * s.seconds)
          << schedule << " zero " << zero;
      for (const double part : {s.compute, s.update, s.bubble, s.data, s.tensor, s.pipeline}) {
        EXPECT_GT(part, 0) << schedule << " zero " << zero;
      }
    }
  }
}

TEST(PredictStep, LinksBetweenMachinesCountWhereAnAxisLeavesOne) {
  TrainConfig config = Small();
  config.parallel.dp = 4;
  CostModel cost = Planted(config);
  cost.parts->machine = Link(0, kBytesPerSecond);
  cost.parts->network = Link(0, kBytesPerSecond / 10);
  const TrainConfig resolved = Resolved(config, 4);
  const double inside = PredictStep(resolved, 4, cost, 4)->data;
  EXPECT_NEAR(PredictStep(resolved, 4, cost, 2)->data, 10 * inside, 1e-6 * inside);
  // Two ranks of an axis of three on one machine, one on the next.
  config.parallel.dp = 3;
  config.parallel.pp = 2;
  const TrainConfig across = Resolved(config, 6);
  EXPECT_GT(PredictStep(across, 6, cost, 4)->data, 5 * PredictStep(across, 6, cost, 3)->data);
}

TEST(PredictStep, RefusesCostsThatAreNotForIt) {
  const TrainConfig config = Resolved(Small(), 1);
  const auto error = [&](const CostModel& cost) {
    return std::string(PredictStep(config, 1, cost).status().message());
  };
  EXPECT_THAT(error(UniformCost(1, 1, 1)), HasSubstr("stages only"));
  CostModel cost = Planted(config);
  cost.parts->layers.pop_back();
  EXPECT_THAT(error(cost), HasSubstr("has no layer"));
  cost = Planted(config);
  TrainConfig wider = Small();
  wider.model.hidden = 64;
  EXPECT_THAT(std::string(PredictStep(Resolved(wider, 1), 1, cost).status().message()),
              HasSubstr("hidden 32"));
}

TEST(AssumedH100, KnowsEveryLayerAndSaysThatItIsAssumed) {
  for (const char* family : {"gpt2", "qwen3"}) {
    TrainConfig config = Small();
    config.model.family = family;
    config.runtime.device = "cuda";
    config.runtime.dtype = "bf16";
    config = Resolved(config, 1);
    const CostModel cost = AssumedH100(config).value();
    EXPECT_TRUE(cost.parts->assumed);
    const auto step = PredictStep(config, 1, cost);
    ASSERT_TRUE(step.ok()) << step.status().message();
    EXPECT_GT(step->compute, 0);
    EXPECT_TRUE(ParseCostModel(ToJson(cost), "assumed").ok());
  }
}

// Most micro-batches of a long step are not simulated: they are like others.
TEST(PredictStep, LongStepsAddWhatOneMoreMicroBatchTakes) {
  for (const int zero : {1, 2, 3}) {
    for (const double hidden : {0.0, 0.5, 1.0}) {
      TrainConfig config = Small();
      config.parallel.dp = config.parallel.tp = 2;
      config.parallel.zero = zero;
      CostModel cost = Planted(config);
      cost.parts->machine = Link(1e-3, kBytesPerSecond);
      cost.parts->hidden = hidden;
      const auto seconds = [&](int64_t micro_batches) {
        config.batch.global = 2 * 2 * micro_batches - 1;
        return Predict(config, 4, cost);
      };
      // The first few run one by one.
      const StepPrediction a = seconds(19), b = seconds(20), c = seconds(1000019);
      EXPECT_NEAR(c.seconds, a.seconds + 1e6 * (b.seconds - a.seconds), 1e-9 * c.seconds)
          << "zero " << zero << " hidden " << hidden;
      EXPECT_NEAR(c.data, a.data + 1e6 * (b.data - a.data), 1e-9 * c.seconds);
      EXPECT_NEAR(c.tensor, a.tensor + 1e6 * (b.tensor - a.tensor), 1e-9 * c.seconds);
      EXPECT_NEAR(c.compute, 1e6 * 8 * 3, 1e-4 * c.compute);
    }
  }
}

// The activation of a gated layer is measured with it or apart, and runs with it or apart.
TEST(PredictStep, ActivationsCountOnceHoweverTheyWereMeasured) {
  TrainConfig config = Small();
  const CostModel together = Planted(config);
  CostModel apart = together;
  LayerCost activation = {.name = "mlp.act"};
  for (LayerCost& layer : apart.parts->layers) {
    if (layer.name != "mlp.gate_up") continue;
    layer.forward = layer.backward_input = layer.backward_weight = {.fixed = 0.3};
    activation.forward = activation.backward_input = activation.backward_weight = {.fixed = 0.1};
  }
  apart.parts->layers.push_back(activation);
  const double whole = Predict(config, 1, together).compute;
  EXPECT_GT(whole, 0);
  EXPECT_NEAR(Predict(config, 1, apart).compute, whole, 1e-9 * whole);
  config.parallel.tp = 2;  // there the activation is a layer
  EXPECT_NEAR(Predict(config, 2, together).compute, whole, 1e-9 * whole);
  EXPECT_NEAR(Predict(config, 2, apart).compute, whole, 1e-9 * whole);
}

TEST(PredictStep, RefusesAStepWithoutTime) {
  const TrainConfig config = Resolved(Small(), 1);
  CostModel cost = Planted(config);
  for (LayerCost& layer : cost.parts->layers) {
    layer.forward = layer.backward_input = layer.backward_weight = {};
  }
  EXPECT_THAT(std::string(PredictStep(config, 1, cost).status().message()),
              HasSubstr("a step of 0 s; fit it again"));
  cost.parts->step_fixed = INFINITY;
  EXPECT_THAT(std::string(PredictStep(config, 1, cost).status().message()), HasSubstr("inf s"));
}

class Suggestion8 : public ::testing::Test {
 protected:
  Suggestion8() : cost_(Planted(Small())) {
    cost_.parts->machine = Link(1e-4, 1e7);
    cost_.parts->network = Link(1e-3, 1e6);
    cost_.parts->hidden = 0.8;
    cost_.parts->update_per_element = 1e-6;
  }
  Suggestions Find(int64_t memory, const std::vector<std::string>& fixed = {}) {
    const auto found = Suggest(Small(), cost_, Options(memory, fixed));
    EXPECT_TRUE(found.ok()) << found.status().message();
    return found.value_or(Suggestions());
  }
  static SuggestOptions Options(int64_t memory, const std::vector<std::string>& fixed = {}) {
    return {.ranks = 8, .memory_bytes = memory, .machine_ranks = 4, .fixed = fixed};
  }
  static int64_t Refused(const Suggestions& found, const std::string& reason) {
    int64_t count = 0;
    for (const Refusal& r : found.refused) {
      if (r.reason.find(reason) != std::string::npos) count += r.count;
    }
    return count;
  }
  CostModel cost_;
};

TEST_F(Suggestion8, AllFitByTheMemoryPlanAndTheFastestIsFirst) {
  const Suggestions roomy = Find(int64_t{1} << 40);
  int64_t least = INT64_MAX, most = 0;
  for (const Suggestion& s : roomy.feasible) {
    least = std::min(least, s.memory_bytes);
    most = std::max(most, s.memory_bytes);
  }
  ASSERT_LT(least, most);
  const int64_t memory = least + (most - least) / 3;
  const Suggestions found = Find(memory);
  ASSERT_FALSE(found.feasible.empty());
  ASSERT_LT(found.feasible.size(), roomy.feasible.size());
  EXPECT_GT(Refused(found, "memory"), 0);
  EXPECT_EQ(Refused(roomy, "memory"), 0);
  std::set<std::string> seen;
  double before = 0;
  for (const Suggestion& s : found.feasible) {
    EXPECT_GE(s.step.seconds, before);
    before = s.step.seconds;
    TrainConfig config = s.config;
    ASSERT_TRUE(config.Resolve(8).ok());
    const std::string text = PrintConfig(ConfigRef(&config));
    EXPECT_TRUE(seen.insert(text).second) << text;
    EXPECT_EQ(config.parallel.dp * config.parallel.tp * config.parallel.pp, 8);
    EXPECT_LE(config.parallel.tp, 4);
    int64_t largest = 0;
    for (int rank = 0; rank < 8; ++rank) {
      const RunPlan plan = PlanRun(config, 8, rank).value();
      largest = std::max(largest, plan.arena_bytes + plan.overhead_bytes);
    }
    EXPECT_EQ(largest, s.memory_bytes) << text;
    EXPECT_LE(largest, memory);
    EXPECT_EQ(PredictStep(config, 8, cost_, 4)->seconds, s.step.seconds) << text;
  }
}

TEST_F(Suggestion8, EveryAxisIsTriedAndRefusalsAreCounted) {
  const Suggestions found = Find(int64_t{1} << 40);
  std::set<std::string> layouts, schedules;
  std::set<int64_t> zeros;
  for (const Suggestion& s : found.feasible) {
    const TrainConfig::Parallel& p = s.config.parallel;
    layouts.insert(absl::StrCat(p.dp, " ", p.tp, " ", p.pp));
    if (p.pp > 1) schedules.insert(absl::StrCat(p.schedule, p.chunks));
    zeros.insert(p.zero);
    EXPECT_EQ(s.config.runtime.recompute, "none");  // there is memory enough
  }
  // 8 = dp tp pp in 10 ways, but for the one with tp 8; pp 8 with one stage a rank.
  EXPECT_EQ(layouts.size(), 9u);
  EXPECT_EQ(schedules, (std::set<std::string>{"1f1b1", "interleaved2", "interleaved4", "zb-h11",
                                              "v-shaped2"}));
  EXPECT_EQ(zeros, (std::set<int64_t>{1, 2, 3}));
  EXPECT_EQ(Refused(found, "ranks of a machine"), 1);
  EXPECT_EQ(Refused(found, "more than model.layers"), 2);  // pp 8 with two chunks, and the V shape
}

// A run refuses a tensor axis on two machines.
TEST_F(Suggestion8, TensorAxesStayInsideMachines) {
  SuggestOptions options = Options(int64_t{1} << 40);
  options.ranks = 12;
  const auto found = Suggest(Small(), cost_, options);
  ASSERT_TRUE(found.ok()) << found.status();
  std::set<int64_t> seen;
  for (const Suggestion& s : found->feasible) seen.insert(s.config.parallel.tp);
  EXPECT_EQ(seen, (std::set<int64_t>{1, 2, 4}));
  EXPECT_GT(Refused(*found, "parallel.tp 3 does not divide the 4 ranks of a machine"), 0);
}

TEST_F(Suggestion8, LittleMemoryIsMetByRecomputation) {
  const Suggestions roomy = Find(int64_t{1} << 40, {"parallel.zero", "batch.micro"});
  int64_t least = INT64_MAX;
  for (const Suggestion& s : roomy.feasible) least = std::min(least, s.memory_bytes);
  const Suggestions tight = Find(least - 1, {"parallel.zero", "batch.micro"});
  ASSERT_FALSE(tight.feasible.empty());
  for (const Suggestion& s : tight.feasible) EXPECT_NE(s.config.runtime.recompute, "none");
  const Suggestions fixed = Find(least - 1, {"parallel.zero", "batch.micro", "runtime.recompute"});
  EXPECT_TRUE(fixed.feasible.empty());
}

TEST_F(Suggestion8, WhatIsFixedStays) {
  for (const Suggestion& s : Find(int64_t{1} << 40, {"parallel.tp", "parallel.zero"}).feasible) {
    EXPECT_EQ(s.config.parallel.tp, 1);
    EXPECT_EQ(s.config.parallel.zero, 1);
  }
  TrainConfig config = Small();
  config.parallel.tp = 3;
  const auto found = Suggest(config, cost_, Options(int64_t{1} << 40, {"parallel.tp"}));
  EXPECT_TRUE(found->feasible.empty());
  EXPECT_GT(Refused(*found, "does not divide"), 0);
}

TEST_F(Suggestion8, LongStepsArePredictedFromShorterOnes) {
  TrainConfig config = Small();
  config.batch.global = 2027;
  config.parallel.pp = 2;
  const SuggestOptions options = Options(int64_t{1} << 40, {"parallel.pp", "batch.micro"});
  const Suggestions found = Suggest(config, cost_, options).value();
  ASSERT_FALSE(found.feasible.empty());
  for (const Suggestion& s : found.feasible) {
    EXPECT_EQ(s.config.batch.global, 2027);
    const StepPrediction all = PredictStep(s.config, 8, cost_, 4).value();
    EXPECT_NEAR(s.step.seconds, all.seconds, 1e-9 * all.seconds) << s.config.parallel.schedule;
    EXPECT_NEAR(s.step.bubble, all.bubble, 1e-9 * all.seconds) << s.config.parallel.schedule;
    EXPECT_NEAR(s.step.exposed(), all.exposed(), 1e-9 * all.seconds);
    int64_t largest = 0;
    for (int rank = 0; rank < 8; ++rank) {
      const RunPlan plan = PlanRun(s.config, 8, rank).value();
      largest = std::max(largest, plan.arena_bytes + plan.overhead_bytes);
    }
    EXPECT_EQ(largest, s.memory_bytes);
  }
}

TEST_F(Suggestion8, FixedAxesOfAnySizeAreRefused) {
  TrainConfig config = Small();
  config.parallel.tp = int64_t{1} << 62;  // times pp: 0 in 64 bits
  config.parallel.pp = 4;
  const auto found =
      Suggest(config, cost_, Options(int64_t{1} << 40, {"parallel.tp", "parallel.pp"}));
  EXPECT_EQ(Refused(*found, "does not divide"), 1);
}

TEST_F(Suggestion8, WrongOptionsAreOneSentence) {
  TrainConfig large = Small();
  large.batch.global = INT64_MAX;
  EXPECT_THAT(std::string(Suggest(large, cost_, Options(int64_t{1} << 40)).status().message()),
              HasSubstr("batch.global is 9223372036854775807"));
  large = Small();
  large.model.layers = 10000;
  EXPECT_THAT(std::string(Suggest(large, cost_, Options(int64_t{1} << 40)).status().message()),
              HasSubstr("model.layers is 10000"));
  EXPECT_THAT(std::string(Suggest(Small(), cost_, {.ranks = 0}).status().message()),
              HasSubstr("1 to 4096 devices, not 0"));
  EXPECT_FALSE(Suggest(Small(), cost_, {.ranks = 2}).ok());
  CostModel other = cost_;
  other.parts->model = "another";
  EXPECT_THAT(std::string(Suggest(Small(), other, Options(int64_t{1} << 40)).status().message()),
              HasSubstr("fit it to this one"));
}

TEST(WhySlower, NamesTheLargestDifferenceFirst) {
  const StepPrediction fast = {.seconds = 1, .compute = 1};
  const StepPrediction slow = {
      .seconds = 1.3, .compute = 0.9, .bubble = 0.3, .data = 0.02, .tensor = 0.08};
  EXPECT_EQ(WhySlower(fast, slow), "bubble +300 ms");
  EXPECT_EQ(WhySlower(fast, {.seconds = 1.2, .compute = 1.1, .data = 0.1}),
            "compute +100 ms, exposed data axis +100 ms");
  EXPECT_EQ(WhySlower(fast, fast), "as fast");
}

}  // namespace
}  // namespace stretto
