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
// Why cuDNN refused last what this thread asked of it.
std::string& CudnnRefusal();

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
  struct Graph;                   // of the frontend
  std::unique_ptr<Graph> graph;   // null: cuDNN refuses
  std::vector<int64_t> operands;  // in the order of execution
  int64_t workspace = 0;
};

// The plan for a key, built when it is first asked for; plans stay. Null when cuDNN refuses, and
// so does every later call; only the first one says why (CudnnRefusal).
const CudnnPlan* FindCudnnPlan(const AttentionKey& key, cudnnContext* handle);
// False when cuDNN refuses.
bool ExecuteCudnn(const CudnnPlan& plan, cudnnContext* handle, const CudnnPointers& pointers,
                  void* workspace);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_CUDNN_PLANS_H_
