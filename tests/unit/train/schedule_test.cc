#include "stretto/train/schedule.h"

#include <cmath>
#include <limits>
#include <string>

#include "gtest/gtest.h"

namespace stretto {
namespace {

LearningRate Make(const std::string& schedule, int64_t steps, int64_t warmup,
                  double final_fraction = 0.1, double decay_fraction = 0.2) {
  TrainConfig::Optimizer o;
  o.lr = 2.0;
  o.schedule = schedule;
  o.warmup = warmup;
  o.final_fraction = final_fraction;
  o.decay_fraction = decay_fraction;
  absl::StatusOr<LearningRate> rate = LearningRate::Create(o, steps);
  EXPECT_TRUE(rate.ok()) << rate.status();
  return *rate;
}

TEST(LearningRate, WarmsUpLinearly) {
  for (const char* schedule : {"constant", "linear", "cosine", "wsd"}) {
    const LearningRate rate = Make(schedule, 20, 4);
    EXPECT_DOUBLE_EQ(rate.At(0), 0.5) << schedule;
    EXPECT_DOUBLE_EQ(rate.At(1), 1.0) << schedule;
    EXPECT_DOUBLE_EQ(rate.At(2), 1.5) << schedule;
    EXPECT_DOUBLE_EQ(rate.At(3), 2.0) << schedule;
    EXPECT_DOUBLE_EQ(rate.At(4), 2.0) << schedule;  // decay begins from the peak
  }
}

TEST(LearningRate, WithoutWarmUpStartsAtThePeak) {
  for (const char* schedule : {"constant", "linear", "cosine", "wsd"}) {
    EXPECT_DOUBLE_EQ(Make(schedule, 20, 0).At(0), 2.0) << schedule;
  }
  EXPECT_DOUBLE_EQ(Make("cosine", 20, 1).At(0), 2.0);
}

TEST(LearningRate, Constant) {
  const LearningRate rate = Make("constant", 10, 2);
  EXPECT_DOUBLE_EQ(rate.At(9), 2.0);
  EXPECT_DOUBLE_EQ(rate.At(1000), 2.0);
}

TEST(LearningRate, Linear) {
  const LearningRate rate = Make("linear", 12, 2, 0.1);  // low 0.2, 10 updates of decay
  EXPECT_DOUBLE_EQ(rate.At(7), 1.1);
  EXPECT_DOUBLE_EQ(rate.At(11), 0.2 + 1.8 * 0.1);
  EXPECT_DOUBLE_EQ(rate.At(12), 0.2);
  EXPECT_DOUBLE_EQ(rate.At(99), 0.2);
}

TEST(LearningRate, Cosine) {
  const LearningRate rate = Make("cosine", 12, 0, 0.0);
  EXPECT_NEAR(rate.At(2), 1 + std::sqrt(3.0) / 2, 1e-12);  // x = 1/6, cos 30 degrees
  EXPECT_NEAR(rate.At(4), 1.5, 1e-12);                     // cos 60 degrees
  EXPECT_NEAR(rate.At(6), 1.0, 1e-12);
  EXPECT_NEAR(rate.At(8), 0.5, 1e-12);
  EXPECT_GT(rate.At(11), 0);  // the last update still moves
  EXPECT_DOUBLE_EQ(rate.At(12), 0);
}

TEST(LearningRate, WarmupStableDecay) {
  const LearningRate rate = Make("wsd", 100, 10, 0.0, 0.16);  // decays over updates 84..99
  EXPECT_DOUBLE_EQ(rate.At(9), 2.0);
  EXPECT_DOUBLE_EQ(rate.At(83), 2.0);
  EXPECT_DOUBLE_EQ(rate.At(84), 2.0);
  EXPECT_DOUBLE_EQ(rate.At(85), 2.0 * (1 - 0.25));  // sqrt(1/16)
  EXPECT_DOUBLE_EQ(rate.At(88), 2.0 * (1 - 0.5));   // sqrt(4/16)
  EXPECT_DOUBLE_EQ(rate.At(93), 2.0 * (1 - 0.75));  // sqrt(9/16)
  EXPECT_DOUBLE_EQ(rate.At(100), 0);
}

TEST(LearningRate, WarmupStableDecayEdges) {
  EXPECT_DOUBLE_EQ(Make("wsd", 10, 0, 0.5, 0.0).At(9), 2.0);   // no decay
  EXPECT_DOUBLE_EQ(Make("wsd", 10, 0, 0.5, 0.0).At(10), 1.0);  // ... until it is over
  const LearningRate all = Make("wsd", 16, 0, 0.0, 1.0);
  EXPECT_DOUBLE_EQ(all.At(0), 2.0);
  EXPECT_DOUBLE_EQ(all.At(4), 1.0);
  // A decay that would begin inside the warm-up begins after it.
  const LearningRate tight = Make("wsd", 10, 6, 0.0, 0.9);
  EXPECT_DOUBLE_EQ(tight.At(5), 2.0);
  EXPECT_DOUBLE_EQ(tight.At(6), 2.0);
  EXPECT_DOUBLE_EQ(tight.At(7), 2.0 * (1 - 0.5));  // 1 of 4
}

TEST(LearningRate, WarmUpThatFillsTheRun) {
  for (const char* schedule : {"linear", "cosine", "wsd"}) {
    const LearningRate exact = Make(schedule, 5, 5);
    EXPECT_DOUBLE_EQ(exact.At(4), 2.0) << schedule;
    EXPECT_DOUBLE_EQ(exact.At(5), 0.2) << schedule;
    const LearningRate longer = Make(schedule, 5, 50);
    EXPECT_DOUBLE_EQ(longer.At(4), 0.2) << schedule;
    EXPECT_DOUBLE_EQ(longer.At(49), 2.0) << schedule;
  }
}

TEST(LearningRate, NeverRisesAfterTheWarmUp) {
  for (const char* schedule : {"constant", "linear", "cosine", "wsd"}) {
    const LearningRate rate = Make(schedule, 137, 13, 0.05, 0.3);
    double before = std::numeric_limits<double>::infinity();
    for (int64_t s = 12; s < 150; ++s) {
      EXPECT_LE(rate.At(s), before) << schedule << " at " << s;
      EXPECT_GE(rate.At(s), 0.1 - 1e-15) << schedule << " at " << s;
      before = rate.At(s);
    }
  }
}

TEST(LearningRate, RefusesWhatItDoesNotKnow) {
  TrainConfig::Optimizer o;
  EXPECT_FALSE(LearningRate::Create(o, 0).ok());
  o.schedule = "polynomial";
  EXPECT_EQ(LearningRate::Create(o, 10).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace stretto
