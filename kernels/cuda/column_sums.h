// Kernels for the bias of a linear layer, where cuBLASLt's epilogues do not do it.
#ifndef STRETTO_KERNELS_CUDA_COLUMN_SUMS_H_
#define STRETTO_KERNELS_CUDA_COLUMN_SUMS_H_

#include <cstddef>
#include <cstdint>

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

// Bytes of scratch memory that ColumnSums needs for this operand.
int64_t ColumnSumsScratch(const Tensor& dy);

// db[j] (acc)= sum over t of dy[t, j]; dy [tokens, n] f32 or bf16, db f32 [n]. The order of the
// additions depends on dy's shape, type and alignment alone. `scratch` is aligned to 16 bytes.
void ColumnSums(Stream& s, Tensor db, Tensor dy, bool acc, std::byte* scratch);

// y[t, j] += bias[j], both f32 or both bf16.
void AddToRows(Stream& s, Tensor y, Tensor bias);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_COLUMN_SUMS_H_
