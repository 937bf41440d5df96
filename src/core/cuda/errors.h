// Which errors of the CUDA runtime end a process's use of a GPU.
#ifndef STRETTO_SRC_CORE_CUDA_ERRORS_H_
#define STRETTO_SRC_CORE_CUDA_ERRORS_H_

#include <cuda_runtime_api.h>

namespace stretto {

// Whether `error` is of work that ran earlier and has left the context unusable: every later call
// returns it again, whatever it asks for. All others belong to the call that returned them.
inline bool ContextLost(cudaError_t error) {
  switch (error) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorContained:
      return true;
    default:
      return false;
  }
}

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_CUDA_ERRORS_H_
