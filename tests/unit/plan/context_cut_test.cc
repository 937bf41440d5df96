// How ranks share a document.
#include "stretto/plan/context_cut.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace stretto {
namespace {

TEST(ContextCut, GivesEveryTokenToOneRankInParts) {
  for (int ranks = 1; ranks <= 9; ++ranks) {
    int64_t before = 0;
    for (const int64_t length : {0, 1, 2, 7, 16, 17, 100, 1013, 3, 1, 1, 5}) {
      SCOPED_TRACE(testing::Message()
                   << ranks << " ranks, " << length << " tokens behind " << before);
      std::vector<int> owners(static_cast<size_t>(length), 0);
      int64_t least = length, most = 0;
      int64_t front_end = 0, back_begin = length;
      for (int i = 0; i < ranks; ++i) {
        const ContextPart part = ContextPartOf(length, before, ranks, i);
        for (const Range& range : {part.front, part.back}) {
          least = std::min(least, range.count);
          most = std::max(most, range.count);
          for (int64_t t = range.first; t < range.first + range.count; ++t) {
            ++owners[static_cast<size_t>(t)];
          }
        }
        // From both ends to the middle.
        EXPECT_EQ(part.front.first, front_end);
        EXPECT_EQ(part.back.first + part.back.count, back_begin);
        front_end += part.front.count;
        back_begin = part.back.first;
      }
      EXPECT_EQ(front_end, back_begin);
      EXPECT_TRUE(std::all_of(owners.begin(), owners.end(), [](int n) { return n == 1; }));
      EXPECT_LE(most - least, 1);
      before += length;
    }
  }
}

// Short ones, too: not all of them begin with the same rank.
TEST(ContextCut, SharesDocumentsTogetherEvenly) {
  const std::vector<int64_t> lengths = {1, 1, 2, 1, 9, 1, 30, 1, 1, 3, 1};
  for (int ranks = 1; ranks <= 7; ++ranks) {
    std::vector<int64_t> own(static_cast<size_t>(ranks), 0);
    int64_t before = 0;
    std::vector<int64_t> shared;
    for (const int64_t length : lengths) {
      shared.push_back(length);
      for (int i = 0; i < ranks; ++i) {
        own[static_cast<size_t>(i)] += ContextPartOf(length, before, ranks, i).tokens();
        EXPECT_EQ(own[static_cast<size_t>(i)], ContextTokens(shared, ranks, i));
      }
      before += length;
      const auto [least, most] = std::minmax_element(own.begin(), own.end());
      EXPECT_LE(*most - *least, 1) << ranks;
    }
  }
}

TEST(ContextCut, GivesRanksAsManyPairsOfQueriesAndKeys) {
  const auto pairs = [](const Range& queries) {
    double sum = 0;
    for (int64_t t = queries.first; t < queries.first + queries.count; ++t) {
      sum += static_cast<double>(t + 1);
    }
    return sum;
  };
  constexpr int kRanks = 5;
  constexpr int64_t kLength = 10007;
  for (int i = 0; i < kRanks; ++i) {
    const ContextPart part = ContextPartOf(kLength, 0, kRanks, i);
    EXPECT_NEAR((pairs(part.front) + pairs(part.back)) * kRanks, pairs({0, kLength}),
                0.001 * pairs({0, kLength}));
  }
}

TEST(ContextCut, OneRankHasAllInOrder) {
  const ContextPart part = ContextPartOf(11, 3, 1, 0);
  EXPECT_EQ(part.front.first, 0);
  EXPECT_EQ(part.back.first, part.front.count);
  EXPECT_EQ(part.tokens(), 11);
  EXPECT_EQ(ContextTokens({11, 0, 3}, 1, 0), 14);
}

TEST(ContextCut, DoesNotOverflow) {
  const int64_t length = int64_t{1} << 60;
  EXPECT_EQ(ContextPartOf(length, length, 1000, 0).front.first, 0);
  const ContextPart last = ContextPartOf(length, length, 1000, 0);
  EXPECT_EQ(last.back.first + last.back.count, length);
}

}  // namespace
}  // namespace stretto
