// Attention's backward pass on the tensor cores of compute capability 9.0.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_H_
#define STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_H_

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"
#include "stretto/ops/kernels.h"

namespace stretto::cuda {

// AttentionKernels::Backward in bf16 with heads of 64 or 128 numbers, on a Hopper GPU. Rows that
// take no part are read, and must be finite.
//
// Two sets of kernels: narrow ones for heads of 64 with a mask, and wide ones for all else. They
// come before the library's; with `cudnn` in the environment variable STRETTO_ATTENTION_BACKWARD
// they do what it refuses. `library_refused`: it has been asked. False, with nothing enqueued,
// where that is not so or the workspace is too small for two f32 a token and head.
bool HopperAttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor d_o, Tensor o,
                             Tensor lse, Tensor q, Tensor k, Tensor v, const AttentionShape& shape,
                             bool library_refused);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_H_
