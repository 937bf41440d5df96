#include "stretto/snapshot/parity.h"

#include "absl/strings/str_cat.h"

namespace stretto {

absl::StatusOr<ParityLayout> ParityLayout::Create(int nodes, int data, int parity) {
  if (nodes < 1 || data < 1 || parity < 0 || data > nodes - parity ||
      nodes % (data + parity) != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        nodes, nodes == 1 ? " node does" : " nodes do", " not divide into groups of ", data,
        " with data and ", parity, " with parity; choose data + parity that divides the nodes"));
  }
  return ParityLayout(nodes, data, parity);
}

std::vector<int> ParityLayout::Members(int group) const {
  std::vector<int> nodes;
  for (int place = 0; place < group_size(); ++place) nodes.push_back(NodeAt(group, place));
  return nodes;
}

int64_t ParityLayout::BlockBytes(int64_t bytes) const {
  constexpr int64_t kAlignment = 64;
  const int64_t block = bytes / data_ + (bytes % data_ != 0 ? 1 : 0);
  return (block + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace stretto
