#include "src/comm/copy_rounds.h"

#include <algorithm>

namespace stretto {

bool CopyRounds::Next(std::vector<CopyPiece>* pieces) {
  pieces->clear();
  int64_t at = 0;
  while (item_ < items_.size() && pieces->size() < kMostPieces) {
    const int64_t left = items_[item_].elements - begin_;
    const int64_t fit = std::min(left, (room_ - at) / element_bytes_);
    if (left > 0 && fit <= 0) break;
    if (fit > 0) {
      pieces->push_back({item_, begin_, fit, at});
      at += (fit * element_bytes_ + kAlignment - 1) / kAlignment * kAlignment;
      begin_ += fit;
    }
    if (fit == left) {
      ++item_;
      begin_ = 0;
    }
  }
  return !pieces->empty();
}

}  // namespace stretto
