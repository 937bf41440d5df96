// How a number of things is cut among ranks: pure, so that planners, layers and checkpoints agree.
#ifndef STRETTO_CORE_CUT_H_
#define STRETTO_CORE_CUT_H_

#include <algorithm>
#include <cstdint>

namespace stretto {

// Equal parts but for the end, for what collectives move: rank i of n has rows [i * part,
// (i + 1) * part) as far as there are any; the last ranks may have fewer, or none.
struct RowCut {
  int64_t part = 0;   // rows of a full part; storage holds ranks * part rows
  int64_t first = 0;  // of this rank
  int64_t count = 0;  // real rows of this rank, 0 <= count <= part
};
inline RowCut CutRows(int64_t rows, int ranks, int index) {
  RowCut cut;
  cut.part = (rows + ranks - 1) / ranks;
  cut.first = std::min(rows, cut.part * index);
  cut.count = std::min(rows, cut.part * (index + 1)) - cut.first;
  return cut;
}

// A range of things that lie in order.
struct Range {
  int64_t first = 0, count = 0;
  bool operator==(const Range&) const = default;
};
// Parts whose sizes differ by at most one, the larger ones first: for what stays where it is.
inline Range CutEvenly(int64_t things, int ranks, int index) {
  const int64_t each = things / ranks, more = things % ranks;
  return {index * each + std::min<int64_t>(index, more), each + (index < more ? 1 : 0)};
}

}  // namespace stretto

#endif  // STRETTO_CORE_CUT_H_
