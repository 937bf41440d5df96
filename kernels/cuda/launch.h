// What host code of this backend shares: the stream's handle, and errors of launches.
#ifndef STRETTO_KERNELS_CUDA_LAUNCH_H_
#define STRETTO_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

inline cudaStream_t Native(Stream& s) { return static_cast<cudaStream_t>(s.native()); }

// Whether `error`, met by a call of now, is of work that ran earlier; the stream has then failed
// with a message of its own.
bool FailedBefore(Stream& s, cudaError_t error);

// Fails the stream when the launch just made was refused; `kernel` is named in the message. Called
// after every launch.
void Launched(Stream& s, const char* kernel);

// Scratch memory of at least `bytes` bytes that belongs to what runs on the stream next, aligned to
// 256 bytes; null, with the stream failed, when the stream's workspace is smaller. Each call hands
// out the same memory.
std::byte* Workspace(Stream& s, int64_t bytes, const char* kernel);

// Whether every row of the operand starts at a multiple of 16 bytes (absent operands do).
inline bool RowsAligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.rows() <= 1 || t.row_stride * SizeOf(t.dtype) % 16 == 0);
}

// Multiprocessors of the device that the calling thread uses.
int Multiprocessors();

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_LAUNCH_H_
