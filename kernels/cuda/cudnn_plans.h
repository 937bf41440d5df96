// What attention asks of cuDNN: the library itself, and plans that it executes. cuDNN and its
// frontend are seen by cudnn_plans.cc alone.
#ifndef STRETTO_KERNELS_CUDA_CUDNN_PLANS_H_
#define STRETTO_KERNELS_CUDA_CUDNN_PLANS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/attention_cut.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

struct cudnnContext;

namespace stretto::cuda {

struct CudnnLibrary {
  int64_t version = 0;  // 0: not to be used
  std::string note;
  std::string path;
};
// Opened when it is first asked for.
const CudnnLibrary& Cudnn();

// This thread's handle for the device, which must be the current one, set to the stream; null when
// cuDNN refuses. What is called here and below may throw.
cudnnContext* CudnnHandle(Stream& s, int device);

// Names of a plan's operands, which are also their places in CudnnPointers.
enum CudnnOperand : int64_t {
  kQ = 1,
  kK,
  kV,
  kO,
  kStats,
  kDO,
  kDQ,
  kDK,
  kDV,
  kLengthsQ,
  kLengthsK,
  kOffsetsQ,
  kOffsetsK,
  kOffsetsV,
  kOffsetsO,
  kOffsetsStats,
  kOffsetsDQ,
  kOffsetsDK,
  kOffsetsDV,
  kOperands
};
using CudnnPointers = std::array<void*, kOperands>;

struct CudnnPlan {
  struct Graph;          // of the frontend
  absl::Status refused;  // why cuDNN does not do it; OK: it does
  std::unique_ptr<Graph> graph;
  std::vector<int64_t> operands;  // in the order of execution
  int64_t workspace = 0;
};

// The plan for a key, built when it is first asked for; plans stay, and so do refusals.
const CudnnPlan& FindCudnnPlan(const AttentionKey& key, cudnnContext* handle);
// The plan is one that cuDNN does not refuse.
absl::Status ExecuteCudnn(const CudnnPlan& plan, cudnnContext* handle,
                          const CudnnPointers& pointers, void* workspace);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_CUDNN_PLANS_H_
