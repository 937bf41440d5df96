#include "stretto/data/ring_share.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "stretto/plan/context_cut.h"

namespace stretto {
namespace {

// Documents of these lengths whose tokens are all different.
PackedBatch Documents(const std::vector<int64_t>& lengths) {
  PackedBatch batch;
  batch.Clear();
  for (const int64_t length : lengths) {
    for (int64_t i = 0; i < length; ++i) {
      const auto n = static_cast<int32_t>(batch.ids.size());
      batch.ids.push_back(100 + n);
      batch.targets.push_back(101 + n);
      batch.weights.push_back(static_cast<float>(n % 3));
      batch.positions.push_back(static_cast<int32_t>(i));
    }
    batch.cu_seqlens.push_back(static_cast<int32_t>(batch.ids.size()));
    batch.max_length = std::max(batch.max_length, length);
  }
  return batch;
}

TEST(RingShareTest, RanksTogetherHaveEveryTokenOnceInItsPlace) {
  const std::vector<int64_t> lengths = {17, 1, 0, 5, 64, 3};
  const PackedBatch whole = Documents(lengths);
  for (const int ranks : {1, 2, 3, 5, 7}) {
    std::vector<int> ring(static_cast<size_t>(ranks));
    std::iota(ring.rbegin(), ring.rend(), 4);
    std::vector<int> seen(whole.ids.size(), 0);
    for (int index = 0; index < ranks; ++index) {
      PackedBatch share;
      SliceForRing(whole, ring, index, &share);
      EXPECT_EQ(share.ring.ranks, ring);
      EXPECT_EQ(share.ring.index, index);
      EXPECT_EQ(share.ring.lengths, lengths);
      EXPECT_EQ(share.tokens(), ContextTokens(lengths, ranks, index));
      ASSERT_EQ(share.sequences(), whole.sequences());
      int64_t longest = 0, before = 0;
      for (size_t d = 0; d < lengths.size(); ++d) {
        const ContextPart part = ContextPartOf(lengths[d], before, ranks, index);
        before += lengths[d];
        const int32_t first = share.cu_seqlens[d];
        ASSERT_EQ(share.cu_seqlens[d + 1] - first, part.tokens());
        longest = std::max(longest, part.tokens());
        for (int64_t i = 0; i < part.tokens(); ++i) {
          const int64_t position =
              i < part.front.count ? part.front.first + i : part.back.first + i - part.front.count;
          const auto from = static_cast<size_t>(whole.cu_seqlens[d] + position);
          const auto to = static_cast<size_t>(first + i);
          EXPECT_EQ(share.ids[to], whole.ids[from]);
          EXPECT_EQ(share.targets[to], whole.targets[from]);
          EXPECT_EQ(share.weights[to], whole.weights[from]);
          EXPECT_EQ(share.positions[to], position);
          ++seen[from];
        }
      }
      EXPECT_EQ(share.max_length, longest);
    }
    for (const int times : seen) EXPECT_EQ(times, 1);
  }
}

TEST(RingShareTest, OneRankHasTheBatchAsItIs) {
  const PackedBatch whole = Documents({9, 2, 30});
  PackedBatch share;
  SliceForRing(whole, {3}, 0, &share);
  EXPECT_EQ(share.ids, whole.ids);
  EXPECT_EQ(share.targets, whole.targets);
  EXPECT_EQ(share.weights, whole.weights);
  EXPECT_EQ(share.positions, whole.positions);
  EXPECT_EQ(share.cu_seqlens, whole.cu_seqlens);
  EXPECT_EQ(share.max_length, whole.max_length);
}

TEST(RingShareTest, PositionsOfAPieceOfADocumentStay) {
  PackedBatch whole = Documents({8});
  for (int32_t& position : whole.positions) position += 40;
  PackedBatch share;
  SliceForRing(whole, {0, 1}, 1, &share);
  EXPECT_EQ(share.positions, (std::vector<int32_t>{42, 43, 44, 45}));
}

}  // namespace
}  // namespace stretto
