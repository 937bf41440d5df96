#include "stretto/data/ngram.h"

#include <gtest/gtest.h>

#include <cmath>

#include "stretto/core/rng.h"

namespace stretto {
namespace {

// By hand, from the formula in ngram.h.
TEST(NgramTest, MatchesHandComputedProbabilities) {
  auto model = NgramModel::Train({0, 1, 0, 1, 0, 2}, 4);
  ASSERT_TRUE(model.ok()) << model.status();
  // Unigrams: counts 3 2 1 0 of 6, three different.
  const double p1 = (2 + 3 * 0.25) / 9;
  EXPECT_DOUBLE_EQ((*model)->Probability({}, 1), p1);
  EXPECT_DOUBLE_EQ((*model)->Probability({}, 3), (0 + 3 * 0.25) / 9);
  // After 0: 1 twice, 2 once.
  const double p01 = (2 + 2 * p1) / 5;
  EXPECT_DOUBLE_EQ((*model)->Probability({0}, 1), p01);
  // After 1 0: 1 once, 2 once.
  EXPECT_DOUBLE_EQ((*model)->Probability({1, 0}, 1), (1 + 2 * p01) / 4);
  EXPECT_DOUBLE_EQ((*model)->Probability({3, 3, 1, 0}, 1), (1 + 2 * p01) / 4);
  // 2 0 was never seen: the shorter context decides.
  EXPECT_DOUBLE_EQ((*model)->Probability({2, 0}, 1), p01);
  auto loss = (*model)->Loss({0, 1});
  ASSERT_TRUE(loss.ok());
  const double p0 = (3 + 3 * 0.25) / 9;
  EXPECT_DOUBLE_EQ(*loss, -(std::log(p0) + std::log(p01)) / 2);
}

TEST(NgramTest, ProbabilitiesOfEachContextSumToOne) {
  const Rng rng(1, "ngram test");
  std::vector<int32_t> ids;
  for (int i = 0; i < 500; ++i) ids.push_back(static_cast<int32_t>(rng.Below(i, 11)));
  for (const int order : {1, 2, 3}) {
    auto model = NgramModel::Train(ids, 13, order);
    ASSERT_TRUE(model.ok());
    for (int32_t a = 0; a < 13; ++a) {
      for (int32_t b = 0; b < 13; ++b) {
        double sum = 0;
        for (int32_t w = 0; w < 13; ++w) {
          const double p = (*model)->Probability({a, b}, w);
          EXPECT_GT(p, 0);
          sum += p;
        }
        EXPECT_NEAR(sum, 1, 1e-12);
      }
    }
  }
}

TEST(NgramTest, LearnsWhatIsThere) {
  std::vector<int32_t> cycle, noise;
  const Rng rng(2, "ngram test");
  for (int i = 0; i < 20000; ++i) {
    cycle.push_back(i % 3 == 0 ? 0 : i % 3 == 1 ? 0 : 1);  // 0 0 1: needs two tokens of context
    noise.push_back(static_cast<int32_t>(rng.Below(i, 8)));
  }
  auto trigram = NgramModel::Train(cycle, 2, 3), bigram = NgramModel::Train(cycle, 2, 2);
  EXPECT_LT(*(*trigram)->Loss(cycle), 0.01);
  EXPECT_NEAR(*(*bigram)->Loss(cycle), std::log(2.0) * 2 / 3, 0.01);  // a coin after every 0
  auto model = NgramModel::Train(noise, 8, 1);
  EXPECT_NEAR(*(*model)->Loss(noise), std::log(8.0), 0.005);
}

TEST(NgramTest, Refuses) {
  EXPECT_FALSE(NgramModel::Train({}, 4).ok());
  EXPECT_FALSE(NgramModel::Train({4}, 4).ok());
  EXPECT_FALSE(NgramModel::Train({-1}, 4).ok());
  EXPECT_FALSE(NgramModel::Train({0}, 4, 0).ok());
  EXPECT_FALSE(NgramModel::Train({0}, 4, 4).ok());
  EXPECT_FALSE(NgramModel::Train({0}, int64_t{1} << 22).ok());
  auto model = NgramModel::Train({0}, 4);
  ASSERT_TRUE(model.ok());
  EXPECT_FALSE((*model)->Loss({}).ok());
  EXPECT_FALSE((*model)->Loss({9}).ok());
}

}  // namespace
}  // namespace stretto
