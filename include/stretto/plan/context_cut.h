// How the ranks of a ring share a document (context parallelism): pure, so that planner, loader and
// attention agree.
#ifndef STRETTO_PLAN_CONTEXT_CUT_H_
#define STRETTO_PLAN_CONTEXT_CUT_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "stretto/core/cut.h"

namespace stretto {

// What rank `index` of `ranks` has of a document: it is cut into 2 * ranks parts, whose sizes
// differ by at most one, and the rank has the part `index` and the part 2 * ranks - 1 - index. A
// query sees the keys before it, so early tokens cost less than late ones, and this way all ranks
// have as much to do (Grattafiori et al., "The Llama 3 herd of models", arXiv 2407.21783, section
// 3.3.2; known as zigzag). Any number of ranks; parts of short documents may be empty. A single
// rank has all, front and back being neighbours.
//
// `before`: tokens of the documents that the ranks share in front of this one. What does not divide
// is dealt to the ranks in turn, and each document goes on where the one before it stopped: all
// documents together are shared as evenly as can be.
struct ContextPart {
  Range front, back;  // tokens of the document
  int64_t tokens() const { return front.count + back.count; }
};
inline ContextPart ContextPartOf(int64_t length, int64_t before, int ranks, int index) {
  const int64_t parts = 2 * int64_t{ranks}, whole = length / parts;
  // Turns of dealing, front parts of all ranks and then their back parts: this document takes
  // [first, end), and beyond the last turn those from 0 on.
  const int64_t first = before % parts, end = first + length % parts;
  // How many of the turns [0, turn) it takes.
  const auto taken = [&](int64_t turn) {
    const int64_t at_end = std::clamp(turn, first, std::min(end, parts)) - first;
    return at_end + std::clamp<int64_t>(end - parts, 0, turn);
  };
  const int64_t front = index, back = ranks + index;
  const int64_t behind = taken(parts) - taken(back + 1);  // back parts of later ranks come earlier
  return {.front = {whole * front + taken(front), whole + taken(front + 1) - taken(front)},
          .back = {whole * (parts - 1 - index) + taken(ranks) + behind,
                   whole + taken(back + 1) - taken(back)}};
}

// Tokens of documents that the rank has, all together, when these have `tokens`: they differ by at
// most one, and the first ranks have more.
inline int64_t ContextTokens(int64_t tokens, int ranks, int index) {
  return tokens / ranks + (index < tokens % ranks ? 1 : 0);
}
inline int64_t ContextTokens(const std::vector<int64_t>& lengths, int ranks, int index) {
  return ContextTokens(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}), ranks, index);
}

}  // namespace stretto

#endif  // STRETTO_PLAN_CONTEXT_CUT_H_
