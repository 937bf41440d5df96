// A linear layer and the gate behind it in one kernel, and the gradients of a gate and of the
// linear layer behind it in another, on the tensor cores of compute capability 9.0.
#ifndef STRETTO_KERNELS_CUDA_GATED_HOPPER_H_
#define STRETTO_KERNELS_CUDA_GATED_HOPPER_H_

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

// LinearKernels::ForwardSwiglu in bf16 on a Hopper GPU, where rows start at multiples of 16 bytes
// and the columns of act come in groups of 8. Sums are taken in f32 and in one order; act is what
// SwigluForward makes of gate_up, to the bit. Needs no workspace; can be captured in a graph.
//
// The environment variable STRETTO_GATED says when: `own` always, `separate` never; by default
// where there is a tile for each multiprocessor, for the kernel does not cut the summed dimension.
// False, with nothing enqueued, where it does not serve.
bool GatedLinear(Stream& s, Tensor act, Tensor gate_up, Tensor x, Tensor w);

// LinearKernels::BackwardInputSwiglu, likewise: d_gate_up is what SwigluBackward makes of dy w in
// bf16, to the bit.
bool GatedLinearBackward(Stream& s, Tensor d_gate_up, Tensor dy, Tensor w, Tensor gate_up);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_GATED_HOPPER_H_
