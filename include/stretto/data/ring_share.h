// What a rank of a ring has of a micro-batch (context parallelism).
#ifndef STRETTO_DATA_RING_SHARE_H_
#define STRETTO_DATA_RING_SHARE_H_

#include <cstddef>
#include <vector>

#include "stretto/core/cut.h"
#include "stretto/data/batch.h"

namespace stretto {

// Adds one document to the share of rank `share->ring.index` of `share->ring.ranks`: tokens
// `document` of `whole` (any batch that holds it as one piece), of which the share receives front
// and back as PackedBatch::Ring tells. Ranks and index have been set after Clear.
void AppendRingShare(const PackedBatch& whole, Range document, PackedBatch* share);

// `share` becomes what rank `index` of `ranks` (places along the data axis, in ring order; at least
// one) has of all sequences of `whole`, each a document as a whole. With one rank it is `whole`.
void SliceForRing(const PackedBatch& whole, const std::vector<int>& ranks, int index,
                  PackedBatch* share);

}  // namespace stretto

#endif  // STRETTO_DATA_RING_SHARE_H_
