// The CUDA backend's only door.
#ifndef STRETTO_KERNELS_CUDA_TABLE_H_
#define STRETTO_KERNELS_CUDA_TABLE_H_

#include "stretto/ops/kernels.h"

namespace stretto {

// Never null; lives for the whole program.
const KernelTable* CudaKernels();

}  // namespace stretto

#endif  // STRETTO_KERNELS_CUDA_TABLE_H_
