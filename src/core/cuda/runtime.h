// The CUDA runtime behind Arena, Stream, Event and the copies.
#ifndef STRETTO_SRC_CORE_CUDA_RUNTIME_H_
#define STRETTO_SRC_CORE_CUDA_RUNTIME_H_

#include "src/core/device_runtime.h"

namespace stretto {

// Never null; lives for the whole program. Works without a driver: Describe then says so.
const DeviceRuntime* CudaRuntime();

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_CUDA_RUNTIME_H_
