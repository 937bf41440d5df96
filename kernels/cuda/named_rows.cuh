// Rows of sequences among all rows, as operations on a part of them are told.
#ifndef STRETTO_KERNELS_CUDA_NAMED_ROWS_CUH_
#define STRETTO_KERNELS_CUDA_NAMED_ROWS_CUH_

#include <cstdint>

#include "kernels/cuda/support.cuh"

namespace stretto::cuda {

// Rows [cu[i], cu[i] + len[i]) of sequence i, without `len` up to cu[i + 1].
struct NamedRows {
  const int32_t* cu;
  const int32_t* len;  // or null
  int sequences;

  NamedRows(const Tensor& begins, const Tensor& lengths)
      : cu(Data<const int32_t>(begins)),
        len(Data<const int32_t>(lengths)),
        sequences(static_cast<int>(begins.rows()) - 1) {}

  __device__ bool Has(int64_t row) const {
    // The last sequence that begins at the row or before; those of its begin before it are empty.
    int low = 0, high = sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cu[middle] <= row ? low : high) = middle;
    }
    if (sequences == 0 || row < cu[low]) return false;
    return row - cu[low] < (len != nullptr ? len[low] : cu[low + 1] - cu[low]);
  }
};

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_NAMED_ROWS_CUH_
