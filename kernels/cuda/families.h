// One instance of each kernel family; table.cc collects them.
#ifndef STRETTO_KERNELS_CUDA_FAMILIES_H_
#define STRETTO_KERNELS_CUDA_FAMILIES_H_

#include "stretto/ops/kernels.h"

namespace stretto::cuda {

const LinearKernels* Linear();
const Float8Kernels* Float8Products();
const NormKernels* Norm();
const ActivationKernels* Activation();
const RotaryKernels* Rotary();
const AttentionKernels* Attention();       // through cuDNN where it has the case, else the next
const AttentionKernels* PlainAttention();  // our own kernels
const EmbeddingKernels* Embedding();
const LossKernels* Loss();
const OptimizerKernels* Optimizer();
const ElementwiseKernels* Elementwise();

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_FAMILIES_H_
