// How the ranks of a ring share a document (context parallelism): pure, so that planner, loader and
// attention agree.
#ifndef STRETTO_PLAN_CONTEXT_CUT_H_
#define STRETTO_PLAN_CONTEXT_CUT_H_

#include <cstdint>
#include <vector>

#include "stretto/core/cut.h"

namespace stretto {

// What rank `index` of `ranks` has of a document: it is cut into 2 * ranks parts, whose sizes
// differ by at most one, and the rank has the part `index` and the part 2 * ranks - 1 - index. A
// query sees the keys before it, so early tokens cost less than late ones, and this way all ranks
// have as much to do (Grattafiori et al., "The Llama 3 herd of models", arXiv 2407.21783, section
// 3.3.2; known as zigzag). Any number of ranks; parts of short documents may be empty. A single
// rank has all, front and back being neighbours.
struct ContextPart {
  Range front, back;  // tokens of the document
  int64_t tokens() const { return front.count + back.count; }
};
inline ContextPart ContextPartOf(int64_t length, int ranks, int index) {
  const int64_t parts = 2 * int64_t{ranks};
  const auto begin = [&](int64_t part) {
    // length * part / parts without overflow.
    return length / parts * part + length % parts * part / parts;
  };
  const auto range = [&](int64_t part) {
    return Range{begin(part), begin(part + 1) - begin(part)};
  };
  return {range(index), range(parts - 1 - index)};
}

// Tokens of such documents that the rank has, all together.
inline int64_t ContextTokens(const std::vector<int64_t>& lengths, int ranks, int index) {
  int64_t tokens = 0;
  for (const int64_t length : lengths) tokens += ContextPartOf(length, ranks, index).tokens();
  return tokens;
}

}  // namespace stretto

#endif  // STRETTO_PLAN_CONTEXT_CUT_H_
