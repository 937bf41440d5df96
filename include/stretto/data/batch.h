// Tokens of one micro-batch, packed without padding, on the host.
#ifndef STRETTO_DATA_BATCH_H_
#define STRETTO_DATA_BATCH_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace stretto {

// Sequences (documents, or pieces of them) back to back. Vectors keep their capacity when cleared,
// so a batch that is refilled allocates nothing.
struct PackedBatch {
  std::vector<int32_t> ids;         // [tokens] input ids
  std::vector<int32_t> targets;     // [tokens] id that follows; any valid id where the weight is 0
  std::vector<float> weights;       // [tokens] 1: counts for the loss, 0: masked
  std::vector<int32_t> positions;   // [tokens] position inside the document piece, from 0
  std::vector<int32_t> cu_seqlens;  // [sequences + 1], starts with 0, ends with tokens
  int64_t max_length = 0;           // longest sequence

  // Ranks that share the documents of this micro-batch (context parallelism). What is above is then
  // this rank's share: of each document its front part and, behind it, its back part
  // (plan/context_cut.h), as one sequence, which may be empty; positions are those in the document.
  struct Ring {
    std::vector<int> ranks;        // places along the data axis, in ring order; empty: one rank
    int index = 0;                 // this rank's place in `ranks`
    std::vector<int64_t> lengths;  // of the documents as a whole
    int size() const { return ranks.empty() ? 1 : static_cast<int>(ranks.size()); }
  } ring;

  int64_t tokens() const { return static_cast<int64_t>(ids.size()); }
  int64_t sequences() const {
    return cu_seqlens.empty() ? 0 : static_cast<int64_t>(cu_seqlens.size()) - 1;
  }
  // Makes room for so many tokens.
  void Reserve(int64_t tokens) {
    const auto count = static_cast<std::size_t>(tokens);
    ids.reserve(count);
    targets.reserve(count);
    weights.reserve(count);
    positions.reserve(count);
    cu_seqlens.reserve(count + 1);
  }
  void Clear() {
    ids.clear();
    targets.clear();
    weights.clear();
    positions.clear();
    cu_seqlens.assign(1, 0);
    max_length = 0;
    ring.ranks.clear();
    ring.index = 0;
    ring.lengths.clear();
  }
};

}  // namespace stretto

#endif  // STRETTO_DATA_BATCH_H_
