// What an optimizer updates, as a table in the device's memory, so that one launch walks all of it.
#ifndef STRETTO_OPS_OPTIMIZER_TABLE_H_
#define STRETTO_OPS_OPTIMIZER_TABLE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/device.h"
#include "stretto/core/dtype.h"
#include "stretto/core/status.h"
#include "stretto/core/tensor.h"

namespace stretto {

// Rows of one parameter with their gradient and optimizer state: contiguous tensors of one shape.
struct OptimizerItem {
  Tensor param;        // model type; written
  Tensor grad;         // f32 / f64, sums over tokens
  Tensor m, v;         // f32 / f64, or bf16
  Tensor master;       // f32, for bf16 parameters; absent: param itself is what is updated
  bool decay = false;  // whether weight decay applies
  // Whose random numbers round the item (AdamWArgs): Rng(seed, "round/<name>").key(), and the place
  // of its first element in the whole parameter.
  std::array<uint32_t, 2> key = {};
  uint64_t first_element = 0;
};

// An item as kernels read it.
struct OptimizerEntry {
  std::byte* param = nullptr;
  const std::byte* grad = nullptr;
  std::byte* m = nullptr;
  std::byte* v = nullptr;
  std::byte* master = nullptr;
  int64_t elements = 0;
  uint64_t first_element = 0;
  uint32_t key[2] = {};
  int64_t decay = 0;  // 0 or 1
};

// Elements [index * kElements, (index + 1) * kElements) of an entry, as far as there are that many:
// pieces of one size, so that work is balanced whatever the shapes.
struct OptimizerChunk {
  static constexpr int64_t kElements = 16384;
  int32_t entry = 0;
  int32_t index = 0;
};

// The table's content; a view, cheap to copy.
struct OptimizerShards {
  const OptimizerEntry* entries = nullptr;
  const OptimizerChunk* chunks = nullptr;
  int64_t chunk_count = 0;
  DType param = DType::kF32;
  DType moments = DType::kF32;
  bool masters = false;
};

// Owns the memory of the table, not that of the items.
class OptimizerTable {
 public:
  OptimizerTable() = default;
  // Items of one model type, one type of moments, and all of them with a master or none; empty ones
  // are left out. INVALID_ARGUMENT names the first item that does not fit.
  static absl::StatusOr<OptimizerTable> Create(Device device,
                                               const std::vector<OptimizerItem>& items);
  // Bytes of a table for items of these numbers of elements.
  static int64_t Bytes(const std::vector<int64_t>& elements);

  const OptimizerShards& shards() const { return shards_; }
  // Items [first, first + count) of those that Create was given, in their order.
  OptimizerShards Part(int64_t first, int64_t count) const;
  Device device() const { return memory_.device(); }

 private:
  Arena memory_;
  OptimizerShards shards_;
  std::vector<int64_t> chunks_before_;  // each item of Create, and at the end all chunks
};

}  // namespace stretto

#endif  // STRETTO_OPS_OPTIMIZER_TABLE_H_
