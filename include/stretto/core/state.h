// The state registry (contract 6): every persistent tensor with its name, global shape, type and
// owned slice. Checkpoints, snapshots, resharding and elastic restart work on this and nothing
// else.
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

// One persistent tensor as this rank sees it. The owned slice is one box, a range of rows: ranks
// cut tensors on row boundaries. The slices of all ranks together cover the tensor; where several
// ranks hold the same rows, exactly one of them owns them.
struct StateEntry {
  std::string name;  // "model.layers.0.self_attn.q_proj.weight", "optim.exp_avg.<name>"
  DType dtype = DType::kF32;
  std::vector<int64_t> global_shape;  // at least one dimension
  int64_t first_row = 0;              // owned rows [first_row, first_row + local.rows())
  Tensor local;                       // contiguous; 0 rows when this rank owns nothing of it
  int64_t epoch = 0;                  // step after which the content is valid
};

class StateRegistry {
 public:
  // INVALID_ARGUMENT for a repeated name, a slice outside the global shape, or a local tensor of
  // another type or shape. An absent `local` is taken as 0 rows.
  absl::Status Add(StateEntry entry);
  const std::vector<StateEntry>& entries() const { return entries_; }
  // Null when there is none. The pointer is valid until the next Add.
  const StateEntry* Find(const std::string& name) const;
  void SetEpoch(int64_t epoch);
  // Sum of local bytes.
  int64_t LocalBytes() const;

 private:
  std::vector<StateEntry> entries_;
  std::unordered_map<std::string, std::size_t> index_;  // name -> place in entries_
};

}  // namespace stretto

#endif  // STRETTO_CORE_STATE_H_
