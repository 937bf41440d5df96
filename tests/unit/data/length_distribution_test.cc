// Lengths of documents: what was published about them, and files.
#include "stretto/data/length_distribution.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kKi = 1024;

// Shares of the documents that `is` says, and of their tokens.
struct Shares {
  double documents = 0, tokens = 0;
};
template <class Is>
Shares SharesOf(const std::vector<int64_t>& lengths, const Is& is) {
  Shares shares;
  double tokens = 0;
  for (const int64_t length : lengths) {
    tokens += static_cast<double>(length);
    if (!is(length)) continue;
    shares.documents += 1;
    shares.tokens += static_cast<double>(length);
  }
  return {shares.documents / static_cast<double>(lengths.size()), shares.tokens / tokens};
}

std::vector<int64_t> Draws(const std::string& name, uint64_t documents) {
  const auto distribution = LengthDistribution::Named(name);
  EXPECT_TRUE(distribution.ok()) << distribution.status().message();
  const Rng rng(1, "length test");
  std::vector<int64_t> lengths;
  for (uint64_t i = 0; i < documents; ++i) lengths.push_back(distribution->Draw(rng, i));
  return lengths;
}

TEST(LengthDistribution, GitHubHasThePublishedSharesOfTokens) {
  const std::vector<int64_t> lengths = Draws("github", 2000000);
  const auto beyond = [&](int64_t ki) {
    return SharesOf(lengths, [&](int64_t n) { return n > ki * kKi; }).tokens;
  };
  // One in a thousand documents is that long; of so many the shares vary by some percent.
  EXPECT_NEAR(beyond(128), 0.162, 0.008);
  EXPECT_NEAR(beyond(256), 0.098, 0.008);
}

TEST(LengthDistribution, BytedHasThePublishedShares) {
  const std::vector<int64_t> lengths = Draws("byted", 400000);
  const auto from = [&](int64_t ki) {
    return SharesOf(lengths, [&](int64_t n) { return n >= ki * kKi; });
  };
  EXPECT_NEAR(1 - from(4).documents, 0.80, 0.01);
  EXPECT_NEAR(from(128).documents, 0.01, 0.001);
  EXPECT_NEAR(from(128).tokens, 0.443, 0.03);
  EXPECT_NEAR(from(256).tokens, 0.37, 0.03);
  EXPECT_NEAR(from(2048).documents, 0.0005, 0.0001);
  EXPECT_NEAR(from(2048).tokens, 0.121, 0.02);
}

TEST(LengthDistribution, LogNormalHasItsMedianAndSpread) {
  const auto distribution = LengthDistribution::LogNormal(1024, 1.5);
  ASSERT_TRUE(distribution.ok());
  const Rng rng(3, "length test");
  std::vector<int64_t> lengths;
  for (uint64_t i = 0; i < 20000; ++i) lengths.push_back(distribution->Draw(rng, i));
  std::sort(lengths.begin(), lengths.end());
  EXPECT_NEAR(static_cast<double>(lengths[10000]), 1024, 50);
  // One deviation up.
  EXPECT_NEAR(static_cast<double>(lengths[16827]), 1024 * std::exp(1.5), 300);
  EXPECT_THAT(std::string(LengthDistribution::LogNormal(0, 1).status().message()),
              HasSubstr("median"));
}

TEST(LengthDistribution, RangesHaveTheirMeans) {
  const auto distribution =
      LengthDistribution::FromRanges({{10, 20, 0.25, 13}, {100, 900, 0.75, 200}});
  ASSERT_TRUE(distribution.ok()) << distribution.status().message();
  const Rng rng(3, "length test");
  double count[2] = {}, sum[2] = {};
  for (uint64_t i = 0; i < 50000; ++i) {
    const int64_t length = distribution->Draw(rng, i);
    ASSERT_GE(length, 10);
    ASSERT_LT(length, 900);
    ASSERT_TRUE(length < 20 || length >= 100);
    count[length >= 100] += 1;
    sum[length >= 100] += static_cast<double>(length);
  }
  // Draws are rounded down.
  EXPECT_NEAR(sum[0] / count[0], 12.5, 0.2);
  EXPECT_NEAR(sum[1] / count[1], 199.5, 3);
  EXPECT_NEAR(sum[1] / (sum[0] + sum[1]), 0.75, 0.02);
  const auto error = [](std::vector<LengthDistribution::Range> ranges) {
    return std::string(LengthDistribution::FromRanges(ranges).status().message());
  };
  EXPECT_THAT(error({{10, 20, 1, 21}}), HasSubstr("from 10 to 20"));
  EXPECT_THAT(error({{10, 20, 0.5, 13}}), HasSubstr("0.5 of all tokens"));
  EXPECT_THAT(error({{10, 20, 0.5, 13}, {15, 30, 0.5, 20}}), HasSubstr("from 15"));
}

TEST(LengthDistribution, BatchesHaveTheirTokensAndLongestDocument) {
  for (const char* name : {"github", "byted"}) {
    const auto distribution = LengthDistribution::Named(name);
    ASSERT_TRUE(distribution.ok());
    for (const int64_t longest : {1 * kKi, 256 * kKi}) {
      const int64_t tokens = 4096 * kKi + 17;
      const auto batch = distribution->Batch(7, 3, tokens, longest);
      EXPECT_EQ(std::accumulate(batch.begin(), batch.end(), int64_t{0}), tokens);
      EXPECT_EQ(*std::max_element(batch.begin(), batch.end()), longest);
      EXPECT_GE(*std::min_element(batch.begin(), batch.end()), 1);
      EXPECT_EQ(batch, distribution->Batch(7, 3, tokens, longest));
      EXPECT_NE(batch, distribution->Batch(7, 4, tokens, longest));
      EXPECT_NE(batch, distribution->Batch(8, 3, tokens, longest));
    }
  }
  EXPECT_THAT(std::string(LengthDistribution::Named("books").status().message()),
              HasSubstr("'books'; choose github or byted"));
}

TEST(LengthDistribution, DrawsFromAList) {
  EXPECT_THAT(std::string(LengthDistribution::Of({}).status().message()), HasSubstr("no lengths"));
  EXPECT_THAT(std::string(LengthDistribution::Of({3, 0}).status().message()),
              HasSubstr("a length of 0"));
  const auto distribution = LengthDistribution::Of({5, 9});
  ASSERT_TRUE(distribution.ok());
  const auto batch = distribution->Batch(1, 1, 1000, 100);
  EXPECT_EQ(std::accumulate(batch.begin(), batch.end(), int64_t{0}), 1000);
  EXPECT_TRUE(
      std::all_of(batch.begin(), batch.end() - 1, [](int64_t n) { return n == 5 || n == 9; }));
}

TEST(ParseLengths, ReadsOneNumberToALine) {
  const auto lengths = ParseLengths("12\n7\r\n\n2097152", "x.txt");
  ASSERT_TRUE(lengths.ok()) << lengths.status().message();
  EXPECT_THAT(*lengths, ElementsAre(12, 7, 2097152));
}

TEST(ParseLengths, NamesWhatIsWrong) {
  const auto error = [](const std::string& text) {
    const auto lengths = ParseLengths(text, "x.txt");
    EXPECT_FALSE(lengths.ok());
    return std::string(lengths.status().message());
  };
  EXPECT_THAT(error("12\n0\n"), HasSubstr("x.txt, line 2: '0' is no length"));
  EXPECT_THAT(error("12\n\n1.5\n"), HasSubstr("line 3: '1.5'"));
  EXPECT_THAT(error("12 13\n"), HasSubstr("line 1: '12 13'"));
  EXPECT_THAT(error("99999999999999999999\n"), HasSubstr("line 1"));
  EXPECT_THAT(error("-4\n"), HasSubstr("'-4'"));
  EXPECT_THAT(error("\n"), HasSubstr("x.txt has no lengths"));
  EXPECT_THAT(error(std::string(1000, 'x')), HasSubstr("line 1: '" + std::string(40, 'x') + "'"));
}

}  // namespace
}  // namespace stretto
