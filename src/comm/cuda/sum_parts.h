// The addition of a reduce-scatter whose parts have arrived.
#ifndef STRETTO_SRC_COMM_CUDA_SUM_PARTS_H_
#define STRETTO_SRC_COMM_CUDA_SUM_PARTS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "stretto/core/dtype.h"

namespace stretto {

struct SumPiece {
  const std::byte* own = nullptr;       // this rank's addend
  const std::byte* received = nullptr;  // the first other rank's, aligned to 16 bytes
  std::byte* output = nullptr;          // may be `own`
  int64_t elements = 0;
};

// An argument of the kernel by value.
struct SumTable {
  static constexpr int kMost = 64;
  SumPiece pieces[kMost];
  int count = 0;
  int ranks = 0;       // of the group
  int index = 0;       // this rank's place among them
  int64_t stride = 0;  // bytes from one other rank's addends to the next one's; a multiple of 16
};

constexpr bool CanSumParts(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

// Adds in the order of the ranks, 0 first, in f32, rounding once at the end: the bits of Reduce
// (src/comm/reduce.h). Occupies a quarter of a large GPU at most.
cudaError_t SumParts(const SumTable& table, DType dtype, cudaStream_t stream);

// Loads the kernels: the first launch of one that is not loaded may wait for the device, and the
// device for another rank.
cudaError_t LoadSumParts();

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_SUM_PARTS_H_
