// What a rank of a ring has of a micro-batch (context parallelism).
#ifndef STRETTO_DATA_RING_SHARE_H_
#define STRETTO_DATA_RING_SHARE_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "stretto/core/cut.h"
#include "stretto/core/status.h"
#include "stretto/data/batch.h"

namespace stretto {

// Writes ids and targets of tokens `range` of a document to those of the share, from `at` on. It
// may change weights and positions there, which are 1 and those in the document.
using ShareReader = std::function<absl::Status(Range range, int64_t at)>;

// Adds a document of `length` tokens to the share of rank `share->ring.index` of
// `share->ring.ranks`, which have been set after Clear: its front and its back, as
// PackedBatch::Ring tells, or all of it without a ring. An error of `read` leaves the share half
// filled.
absl::Status AppendRingShare(int64_t length, const ShareReader& read, PackedBatch* share);

// `share` becomes what rank `index` of `ranks` (places along the data axis, in ring order; at least
// one) has of all sequences of `whole`, each a document as a whole. With one rank it is `whole`.
void SliceForRing(const PackedBatch& whole, const std::vector<int>& ranks, int index,
                  PackedBatch* share);

}  // namespace stretto

#endif  // STRETTO_DATA_RING_SHARE_H_
