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
  bool adds = false;   // the sum is added to `output`, which is not `own` then
};

constexpr bool CanSumParts(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

// Adds in the order of the ranks, 0 first, in f32, rounding once at the end: the bits of Reduce
// (src/comm/reduce.h). With `adds` what it rounded is added to the output and rounded again.
// `multiprocessors`: the device's, all of which it takes for as short as it can. A product beside
// it holds them until it ends, and what follows it comes after the sum: on a few of them the sum
// would hold back the product's blocks there, and with them its end, for longer.
cudaError_t SumParts(const SumTable& table, DType dtype, int multiprocessors, cudaStream_t stream);

// Loads the kernels: the first launch of one that is not loaded may wait for the device, and the
// device for another rank.
cudaError_t LoadSumParts();

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_SUM_PARTS_H_
