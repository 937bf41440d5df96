// One instance of each kernel family; table.cc collects them.
#ifndef STRETTO_KERNELS_CPU_FAMILIES_H_
#define STRETTO_KERNELS_CPU_FAMILIES_H_

#include "stretto/ops/kernels.h"

namespace stretto::cpu {

const LinearKernels* Linear();
const Float8Kernels* Float8Products();
const NormKernels* Norm();
const ActivationKernels* Activation();
const RotaryKernels* Rotary();
const AttentionKernels* Attention();
const EmbeddingKernels* Embedding();
const LossKernels* Loss();
const OptimizerKernels* Optimizer();
const ElementwiseKernels* Elementwise();

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_FAMILIES_H_
