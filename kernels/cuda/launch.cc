#include "kernels/cuda/launch.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace stretto::cuda {

void Launched(Stream& s, const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
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
