#include "stretto/data/ring_share.h"

#include <algorithm>
#include <cstddef>
#include <numeric>

#include "stretto/plan/context_cut.h"

namespace stretto {

absl::Status AppendRingShare(int64_t length, const ShareReader& read, PackedBatch* share) {
  const std::vector<int64_t>& earlier = share->ring.lengths;
  const int64_t before = std::accumulate(earlier.begin(), earlier.end(), int64_t{0});
  const ContextPart part = ContextPartOf(length, before, share->ring.size(), share->ring.index);
  auto at = share->tokens();
  const auto end = static_cast<size_t>(at + part.tokens());
  share->ids.resize(end);
  share->targets.resize(end);
  share->weights.resize(end, 1.0f);
  share->positions.resize(end);
  for (const Range& range : {part.front, part.back}) {
    const auto positions = share->positions.begin() + static_cast<ptrdiff_t>(at);
    std::iota(positions, positions + static_cast<ptrdiff_t>(range.count),
              static_cast<int32_t>(range.first));
    STRETTO_RETURN_IF_ERROR(read(range, at));
    at += range.count;
  }
  share->cu_seqlens.push_back(static_cast<int32_t>(end));
  share->max_length = std::max(share->max_length, part.tokens());
  share->ring.lengths.push_back(length);
  return absl::OkStatus();
}

void SliceForRing(const PackedBatch& whole, const std::vector<int>& ranks, int index,
                  PackedBatch* share) {
  share->Clear();
  share->ring.ranks = ranks;
  share->ring.index = index;
  for (size_t i = 0; i + 1 < whole.cu_seqlens.size(); ++i) {
    const int64_t first = whole.cu_seqlens[i];
    const auto read = [&](Range range, int64_t at) {
      const auto copy = [&](const auto& from, auto* to) {
        std::copy_n(from.begin() + static_cast<ptrdiff_t>(first + range.first), range.count,
                    to->begin() + static_cast<ptrdiff_t>(at));
      };
      copy(whole.ids, &share->ids);
      copy(whole.targets, &share->targets);
      copy(whole.weights, &share->weights);
      copy(whole.positions, &share->positions);
      return absl::OkStatus();
    };
    AppendRingShare(whole.cu_seqlens[i + 1] - first, read, share).IgnoreError();  // it has none
  }
}

}  // namespace stretto
