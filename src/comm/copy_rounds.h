// How the parts of an all-gather or a reduce-scatter pass through memory of a fixed size.
#ifndef STRETTO_SRC_COMM_COPY_ROUNDS_H_
#define STRETTO_SRC_COMM_COPY_ROUNDS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "src/comm/collectives.h"

namespace stretto {

// Of one rank's part of one item, what travels in a round.
struct CopyPiece {
  std::size_t item = 0;
  int64_t begin = 0, elements = 0;  // in the part
  int64_t at = 0;                   // bytes from where the round's data begin
};

// Cuts the parts of all items into rounds of at most `room` bytes, in order. Ranks of a group,
// whose parts are of one size, get the same rounds.
class CopyRounds {
 public:
  // Pieces begin at multiples of this many bytes; so does whatever is cut out of an item.
  static constexpr int64_t kAlignment = 16;
  static constexpr int kMostPieces = 64;  // in a round

  // `room` is a positive multiple of kAlignment; `items` outlives the object.
  CopyRounds(std::span<const Operation::Item> items, int64_t element_bytes, int64_t room)
      : items_(items), element_bytes_(element_bytes), room_(room) {}

  // The pieces of the next round; false, and none, after the last one.
  bool Next(std::vector<CopyPiece>* pieces);

 private:
  std::span<const Operation::Item> items_;
  int64_t element_bytes_, room_;
  std::size_t item_ = 0;
  int64_t begin_ = 0;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_COPY_ROUNDS_H_
