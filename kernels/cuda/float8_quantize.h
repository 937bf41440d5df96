// Kernels that make FP8 operands; float8.cc multiplies them. Shapes as in Float8Kernels.
#ifndef STRETTO_KERNELS_CUDA_FLOAT8_QUANTIZE_H_
#define STRETTO_KERNELS_CUDA_FLOAT8_QUANTIZE_H_

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

// q, qt and amax may be absent, each.
void Float8Quantize(Stream& s, Tensor q, Tensor qt, Tensor x, Tensor scale, Tensor amax);

void Float8UpdateScales(Stream& s, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                        Tensor limit);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_FLOAT8_QUANTIZE_H_
