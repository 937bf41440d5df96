// How parameters and their gradients lie in storage.
#ifndef STRETTO_SRC_PARALLEL_PARAMETER_STORAGE_H_
#define STRETTO_SRC_PARALLEL_PARAMETER_STORAGE_H_

#include <algorithm>
#include <cstdint>

#include "stretto/core/tensor.h"
#include "stretto/model/graph.h"
#include "stretto/parallel/data_parallel.h"

namespace stretto::internal {

inline int64_t Aligned(int64_t bytes) {
  constexpr int64_t kAlignment = 64;
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Elements of a parameter that lies in full on a rank, with the rows that equal parts and
// Builder::PadRows ask for.
inline int64_t StoredElements(const ParameterInfo& p, int ranks) {
  return std::max(CutRows(p.rows(), ranks, 0).part * ranks, p.padded_rows) * p.columns();
}

// A tensor of a parameter's rank: [rows, columns], or [rows] for vectors.
inline Tensor View(const ParameterInfo& p, std::byte* data, DType dtype, int64_t rows,
                   Device device) {
  return p.spec.shape.size() > 1 ? Tensor::Of(data, dtype, {rows, p.columns()}, device)
                                 : Tensor::Of(data, dtype, {rows}, device);
}

}  // namespace stretto::internal

#endif  // STRETTO_SRC_PARALLEL_PARAMETER_STORAGE_H_
