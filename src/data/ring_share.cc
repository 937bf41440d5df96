#include "stretto/data/ring_share.h"

#include <algorithm>

#include "stretto/plan/context_cut.h"

namespace stretto {

void AppendRingShare(const PackedBatch& whole, Range document, PackedBatch* share) {
  const ContextPart part = ContextPartOf(document.count, share->ring.size(), share->ring.index);
  for (const Range& range : {part.front, part.back}) {
    const auto append = [&](const auto& from, auto* to) {
      const auto begin = from.begin() + static_cast<ptrdiff_t>(document.first + range.first);
      to->insert(to->end(), begin, begin + static_cast<ptrdiff_t>(range.count));
    };
    append(whole.ids, &share->ids);
    append(whole.targets, &share->targets);
    append(whole.weights, &share->weights);
    append(whole.positions, &share->positions);
  }
  share->cu_seqlens.push_back(static_cast<int32_t>(share->ids.size()));
  share->max_length = std::max(share->max_length, part.tokens());
  share->ring.lengths.push_back(document.count);
}

void SliceForRing(const PackedBatch& whole, const std::vector<int>& ranks, int index,
                  PackedBatch* share) {
  share->Clear();
  share->ring.ranks = ranks;
  share->ring.index = index;
  for (size_t i = 0; i + 1 < whole.cu_seqlens.size(); ++i) {
    const int64_t first = whole.cu_seqlens[i];
    AppendRingShare(whole, {first, whole.cu_seqlens[i + 1] - first}, share);
  }
}

}  // namespace stretto
