// Constants that were planted come back out of synthetic measurements.
#include "stretto/plan/fit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "stretto/core/rng.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

// Sizes as stretto-bench fit takes them; `noise` is the largest relative error.
std::vector<StageSample> Measure(const StageCost& truth, double noise) {
  const Rng rng(7, "fit/noise");
  std::vector<StageSample> samples;
  for (const double documents : {1, 2, 4}) {
    for (const double length : {256, 512, 1024}) {
      StageSample s = {.tokens = documents * length,
                       .pairs = documents * length * (length + 1) / 2};
      const double error =
          static_cast<double>(rng.Below(samples.size(), 2001)) / 1000 - 1;  // -1 to 1
      s.seconds = truth.Seconds(s.tokens, s.pairs) * (1 + noise * error);
      samples.push_back(s);
    }
  }
  return samples;
}

TEST(FitStage, RecoversWhatWasPlanted) {
  for (const StageCost& truth :
       {StageCost{1e-4, 2e-7, 3e-11}, StageCost{0, 2e-7, 0}, StageCost{5e-5, 0, 0},
        StageCost{0, 0, 4e-10}, StageCost{2e-5, 3e-8, 0}, StageCost{}}) {
    const StageCost fitted = FitStage(Measure(truth, 0)).value();
    EXPECT_NEAR(fitted.fixed, truth.fixed, 1e-9 * truth.Seconds(1024, 524800));
    EXPECT_NEAR(fitted.per_token, truth.per_token, 1e-12 * (truth.fixed + truth.per_token) + 1e-18);
    EXPECT_NEAR(fitted.per_pair, truth.per_pair, 1e-8 * truth.per_pair + 1e-18);
  }
}

TEST(FitStage, NoiseMovesPredictionsByNoMoreThanItself) {
  const StageCost truth = {1e-4, 2e-7, 3e-10};
  const StageCost fitted = FitStage(Measure(truth, 0.03)).value();
  for (const StageSample& s : Measure(truth, 0)) {
    EXPECT_NEAR(fitted.Seconds(s.tokens, s.pairs) / s.seconds, 1, 0.03);
  }
  EXPECT_NEAR(fitted.per_token / truth.per_token, 1, 0.2);
}

TEST(FitStage, NothingIsNegative) {
  // Less than proportional to the tokens where a negative per_pair would fit best.
  std::vector<StageSample> samples;
  for (const double t : {100, 200, 400, 800}) {
    samples.push_back({.tokens = t, .pairs = t * t / 2, .seconds = 1e-6 * (t - 2e-4 * t * t)});
  }
  const StageCost fitted = FitStage(samples).value();
  EXPECT_GE(fitted.fixed, 0);
  EXPECT_GE(fitted.per_token, 0);
  EXPECT_EQ(fitted.per_pair, 0);
}

TEST(FitStage, WhatSamplesDoNotTellApartIsStillPredicted) {
  std::vector<StageSample> samples;  // one length: pairs are a multiple of the tokens
  for (const double documents : {1, 2, 3}) {
    samples.push_back(
        {.tokens = 100 * documents, .pairs = 5050 * documents, .seconds = 1e-4 + 2e-3 * documents});
  }
  const StageCost fitted = FitStage(samples).value();
  EXPECT_TRUE(fitted.per_token == 0 || fitted.per_pair == 0);
  for (const StageSample& s : samples) {
    EXPECT_NEAR(fitted.Seconds(s.tokens, s.pairs), s.seconds, 1e-12);
  }
}

TEST(FitOperation, RecoversLatencyAndBandwidth) {
  std::vector<OperationSample> samples;
  for (const int ranks : {2, 4}) {
    for (double bytes = 1024; bytes <= 1e8; bytes *= 4) {
      samples.push_back(
          {.ranks = ranks, .bytes_sent = bytes, .seconds = 5e-6 * (ranks - 1) + bytes / 40e9});
    }
  }
  const OperationCost fitted = FitOperation(samples).value();
  EXPECT_NEAR(fitted.latency, 5e-6, 1e-12);
  EXPECT_NEAR(fitted.bytes_per_second, 40e9, 1);
  EXPECT_NEAR(fitted.Seconds(4, 4000), 15e-6 + 1e-7, 1e-12);
  EXPECT_EQ(fitted.Seconds(1, 4000), 0);
}

TEST(Fit, RefusesWhatIsNoMeasurement) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THAT(std::string(FitStage({}).status().message()), HasSubstr("no measurements"));
  EXPECT_THAT(std::string(FitStage({{.tokens = 1, .pairs = 1, .seconds = -1}}).status().message()),
              HasSubstr("measurement 0"));
  EXPECT_FALSE(FitOperation({{.bytes_sent = nan, .seconds = 1}}).ok());
  EXPECT_FALSE(FitStage({{.tokens = 1, .pairs = 1, .seconds = nan}}).ok());
}

}  // namespace
}  // namespace stretto
