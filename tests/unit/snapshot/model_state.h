// A small model state with odd sizes, cut over any number of ranks.
#ifndef STRETTO_TESTS_UNIT_SNAPSHOT_MODEL_STATE_H_
#define STRETTO_TESTS_UNIT_SNAPSHOT_MODEL_STATE_H_

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "src/snapshot/convert.h"
#include "stretto/core/state.h"

namespace stretto {

struct GlobalTensor {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  int only_rank = -1;  // >= 0: this rank (modulo the world) owns all rows, the others none
};

inline std::vector<GlobalTensor> OddModel() {
  return {{"wte.weight", DType::kF32, {13, 5}},
          {"h.0.attn.weight", DType::kBF16, {7, 3, 2}},
          {"h.0.bias", DType::kF64, {3}},       // fewer rows than some worlds have ranks
          {"ln.weight", DType::kF32, {11}, 2},  // replicated in training, owned by one
          {"steps", DType::kI64, {1}, 0},
          {"empty", DType::kF32, {0, 4}},
          {"optim.exp_avg.wte.weight", DType::kF32, {13, 5}}};
}

// Every element of the global tensor has a value of its own, exact in bf16.
inline double ValueOf(const std::string& name, int64_t element, int64_t step) {
  int64_t seed = step * 31;
  for (const char c : name) seed = (seed * 7 + c) % 113;
  return static_cast<double>((seed + element * 3) % 127) - 60.0;
}

// The slices of rank `rank` of `size`, in memory of their own.
class ModelState {
 public:
  ModelState(const std::vector<GlobalTensor>& model, int rank, int size) {
    for (const GlobalTensor& tensor : model) {
      int64_t first = tensor.shape[0] * rank / size;
      int64_t rows = tensor.shape[0] * (rank + 1) / size - first;
      if (tensor.only_rank >= 0) {
        first = 0;
        rows = tensor.only_rank % size == rank ? tensor.shape[0] : 0;
      }
      StateEntry entry;
      entry.name = tensor.name;
      entry.dtype = tensor.dtype;
      entry.global_shape = tensor.shape;
      entry.first_row = first;
      entry.local.dtype = tensor.dtype;
      entry.local.rank = static_cast<int>(tensor.shape.size());
      for (size_t d = 0; d < tensor.shape.size(); ++d) entry.local.dims[d] = tensor.shape[d];
      entry.local.dims[0] = rows;
      entry.local.row_stride = entry.local.row_elements();
      memory_.push_back(std::make_unique<char[]>(entry.local.bytes() + 1));
      entry.local.data = reinterpret_cast<std::byte*>(memory_.back().get());
      const absl::Status added = registry_.Add(entry);
      EXPECT_TRUE(added.ok()) << added;
    }
  }
  const StateRegistry& registry() const { return registry_; }
  StateRegistry& registry() { return registry_; }

  void Fill(int64_t step) {
    for (const StateEntry& entry : registry_.entries()) {
      for (int64_t i = 0; i < entry.local.elements(); ++i) {
        SetElement(entry, i, Expected(entry, i, step));
      }
    }
  }
  void Clear() {
    for (const StateEntry& entry : registry_.entries()) {
      std::memset(entry.local.data, 0xee, entry.local.bytes());
    }
  }
  // Empty when all is as Fill(step) would have it, else the first difference.
  std::string Difference(int64_t step) const {
    for (const StateEntry& entry : registry_.entries()) {
      for (int64_t i = 0; i < entry.local.elements(); ++i) {
        if (Element(entry, i) != Expected(entry, i, step)) {
          return entry.name + " element " + std::to_string(i) + " of the slice is " +
                 std::to_string(Element(entry, i)) + ", not " +
                 std::to_string(Expected(entry, i, step));
        }
      }
    }
    return "";
  }

 private:
  static double Expected(const StateEntry& entry, int64_t i, int64_t step) {
    return ValueOf(entry.name, entry.first_row * entry.local.row_elements() + i, step);
  }
  static void SetElement(const StateEntry& entry, int64_t i, double value) {
    std::byte* place = entry.local.data + i * SizeOf(entry.dtype);
    if (entry.dtype == DType::kI64) {
      const int64_t whole = static_cast<int64_t>(value);
      std::memcpy(place, &whole, sizeof(whole));
    } else {
      snapshot_internal::ConvertElements(DType::kF64, &value, entry.dtype, place, 1);
    }
  }
  static double Element(const StateEntry& entry, int64_t i) {
    const std::byte* place = entry.local.data + i * SizeOf(entry.dtype);
    if (entry.dtype == DType::kI64) {
      int64_t whole;
      std::memcpy(&whole, place, sizeof(whole));
      return static_cast<double>(whole);
    }
    double value;
    snapshot_internal::ConvertElements(entry.dtype, place, DType::kF64, &value, 1);
    return value;
  }

  StateRegistry registry_;
  std::vector<std::unique_ptr<char[]>> memory_;
};

}  // namespace stretto

#endif  // STRETTO_TESTS_UNIT_SNAPSHOT_MODEL_STATE_H_
