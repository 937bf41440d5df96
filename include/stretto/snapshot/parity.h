// Where the blocks of an erasure code lie: which node keeps parity of whom.
#ifndef STRETTO_SNAPSHOT_PARITY_H_
#define STRETTO_SNAPSHOT_PARITY_H_

#include <cstdint>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// Nodes form groups of k + m. In a group there are as many stripes as nodes, and every node is in
// each stripe once: with parity in m of them, with a block of its own data in the other k. So a
// node's data is cut into k blocks, and beside them it keeps m blocks of parity: m / k of its data,
// and losing m nodes of a group loses m members of every stripe. (With m = 1 that is RAID 5 over
// the nodes' memory, as in REFT, arXiv:2310.12670.)
//
// Neighbours in the list of nodes, which may share a rack or a power supply, are in different
// groups where there are several.
class ParityLayout {
 public:
  // INVALID_ARGUMENT unless `nodes` is a multiple of data + parity.
  static absl::StatusOr<ParityLayout> Create(int nodes, int data, int parity);

  int nodes() const { return nodes_; }
  int data() const { return data_; }
  int parity() const { return parity_; }
  int group_size() const { return data_ + parity_; }
  int groups() const { return nodes_ / group_size(); }
  int GroupOf(int node) const { return node % groups(); }
  int PlaceOf(int node) const { return node / groups(); }  // in its group
  int NodeAt(int group, int place) const { return place * groups() + group; }
  std::vector<int> Members(int group) const;  // nodes by place

  // The member (as erasure.h numbers them) that the node at `place` is of a stripe. A data member j
  // is block j of that node's data, a parity member k + p is block p of its parity.
  int MemberOf(int place, int stripe) const {
    const int distance = (place - stripe + group_size()) % group_size();
    return distance < parity_ ? data_ + distance : distance - parity_;
  }
  // The stripe of which the node at `place` is that member.
  int StripeOf(int place, int member) const {
    const int distance = member < data_ ? member + parity_ : member - data_;
    return (place - distance + group_size()) % group_size();
  }
  // Bytes of a block where the largest node of a group has `bytes` of data: k blocks hold them. A
  // multiple of 64; what lies behind a node's data counts as zeros.
  int64_t BlockBytes(int64_t bytes) const;

 private:
  ParityLayout(int nodes, int data, int parity) : nodes_(nodes), data_(data), parity_(parity) {}
  int nodes_, data_, parity_;
};

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_PARITY_H_
