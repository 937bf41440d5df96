#include "kernels/cuda/launch.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "src/core/cuda/errors.h"

namespace stretto::cuda {

bool FailedBefore(Stream& s, cudaError_t error) {
  // The stream words it, or what a kernel has reported about its data.
  return ContextLost(error) && !s.Synchronize().ok();
}

void Launched(Stream& s, const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess || FailedBefore(s, error)) return;
  s.Fail(absl::InternalError(absl::StrCat("CUDA kernel ", kernel, " on ", Name(s.device()),
                                          " could not be launched: ", cudaGetErrorName(error), " (",
                                          cudaGetErrorString(error), ")")));
}

std::byte* Workspace(Stream& s, int64_t bytes, const char* kernel) {
  const Stream::Workspace workspace = s.workspace();
  if (bytes <= workspace.bytes) return workspace.data;
  s.Fail(absl::ResourceExhaustedError(
      absl::StrCat("CUDA kernel ", kernel, " needs ", bytes, " bytes of workspace, the stream has ",
                   workspace.bytes, "; create it with a larger workspace")));
  return nullptr;
}

int Multiprocessors() {
  static const int count = [] {
    int device = 0, n = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    return n > 0 ? n : 132;
  }();
  return count;
}

}  // namespace stretto::cuda
