// The state registry (contract 6): every persistent tensor with its name, global shape, type and
// the boxes of it that this rank has. Checkpoints, snapshots, resharding and elastic restart work
// on this and nothing else.
#ifndef STRETTO_CORE_STATE_H_
#define STRETTO_CORE_STATE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/core/tensor.h"

namespace stretto {

// One box of a persistent tensor as this rank has it: a range of rows (of the first dimension) and,
// of a matrix, a range of columns. Ranks cut tensors on row boundaries where data-parallel ranks
// share them, and on columns where a tensor axis cuts what a matrix reads. A rank that has several
// boxes of a tensor (the queries, keys and values of some heads) registers each, under one name.
// The owned boxes of all ranks together cover the tensor, and none overlaps another.
struct StateEntry {
  std::string name;  // "model.layers.0.self_attn.q_proj.weight", "optim.exp_avg.<name>"
  DType dtype = DType::kF32;
  std::vector<int64_t> global_shape;  // at least one dimension
  int64_t first_row = 0;              // rows [first_row, first_row + local.rows())
  Tensor local;                       // contiguous; 0 rows when this rank has nothing of it
  int64_t epoch = 0;                  // step after which the content is valid
  int64_t first_column = 0;           // columns [first_column, first_column + local.dims[1])
  // false: another rank has the same box and saves it. A load fills it all the same.
  bool owned = true;
  // The part of the optimizer's update that writes it, counted in the order in which parts run; -1:
  // it is written after all of them. What copies the state copies the first parts first, and each
  // part of the next update waits for its own copy.
  int update_part = -1;

  // Elements of a row of the whole tensor.
  int64_t row_elements() const {
    int64_t n = 1;
    for (std::size_t i = 1; i < global_shape.size(); ++i) n *= global_shape[i];
    return n;
  }
};

class StateRegistry {
 public:
  // INVALID_ARGUMENT for a box outside the global shape, a local tensor of another type or shape,
  // or a name that is known already with another type or shape or with a box that overlaps this
  // one. An absent `local` is taken as 0 rows.
  absl::Status Add(StateEntry entry);
  // In the order of Add; the boxes of a tensor need not follow each other.
  const std::vector<StateEntry>& entries() const { return entries_; }
  // The first box. Null when there is none. The pointer is valid until the next Add.
  const StateEntry* Find(const std::string& name) const;
  void SetEpoch(int64_t epoch);
  // Of all boxes of that name, if there are any.
  void SetUpdatePart(const std::string& name, int part);
  // Sum of local bytes.
  int64_t LocalBytes() const;

 private:
  std::vector<StateEntry> entries_;
  std::unordered_map<std::string, std::vector<std::size_t>> index_;  // name -> entries_
};

}  // namespace stretto

#endif  // STRETTO_CORE_STATE_H_
