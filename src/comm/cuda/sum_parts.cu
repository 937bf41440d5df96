#include <cuda_bf16.h>

#include "src/comm/cuda/sum_parts.h"

namespace stretto {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocks = 32;  // a block a multiprocessor; the rest stays with the products beside it
constexpr int kUnroll = 4;   // accesses of 16 bytes that a thread has under way at a time

__device__ inline float Widen(float x) { return x; }
__device__ inline float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void Narrow(float x, float* to) { *to = x; }
__device__ inline void Narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// The addends of rank `r` of the group.
template <class T>
__device__ inline const T* PartOf(const SumTable& table, const SumPiece& piece, int r) {
  if (r == table.index) return reinterpret_cast<const T*>(piece.own);
  const int place = r < table.index ? r : r - 1;
  return reinterpret_cast<const T*>(piece.received + place * table.stride);
}

template <class T>
union Pack {
  uint4 bits;
  T value[16 / sizeof(T)];
  __device__ Pack() : bits() {}
};

// kRanks is 0 where it is not known when compiling.
template <class T, int kRanks>
__device__ void SumPacked(const SumTable& table, const SumPiece& piece, int64_t packs) {
  constexpr int kWidth = 16 / sizeof(T);
  const int ranks = kRanks > 0 ? kRanks : table.ranks;
  const int64_t tile = int64_t{kThreads} * kUnroll;
  for (int64_t first = blockIdx.x * tile; first < packs; first += gridDim.x * tile) {
    float sum[kUnroll][kWidth];
#pragma unroll
    for (int r = 0; r < ranks; ++r) {
      const uint4* const part = reinterpret_cast<const uint4*>(PartOf<T>(table, piece, r));
      Pack<T> pack[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * kThreads + threadIdx.x;
        if (i < packs) pack[u].bits = __ldcs(part + i);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const float x = Widen(pack[u].value[k]);
          sum[u][k] = r == 0 ? x : sum[u][k] + x;
        }
      }
    }
    uint4* const output = reinterpret_cast<uint4*>(piece.output);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads + threadIdx.x;
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) Narrow(sum[u][k], &pack.value[k]);
      if (i < packs) __stcs(output + i, pack.bits);
    }
  }
}

template <class T, int kRanks>
__global__ void __launch_bounds__(kThreads) SumKernel(const __grid_constant__ SumTable table) {
  constexpr int kWidth = 16 / sizeof(T);
  for (int p = 0; p < table.count; ++p) {
    const SumPiece& piece = table.pieces[p];
    const bool aligned =
        (reinterpret_cast<uintptr_t>(piece.own) | reinterpret_cast<uintptr_t>(piece.output)) % 16 ==
        0;
    const int64_t packs = aligned ? piece.elements / kWidth : 0;
    SumPacked<T, kRanks>(table, piece, packs);
    for (int64_t i = packs * kWidth + blockIdx.x * int64_t{kThreads} + threadIdx.x;
         i < piece.elements; i += gridDim.x * int64_t{kThreads}) {
      float sum = Widen(PartOf<T>(table, piece, 0)[i]);
      for (int r = 1; r < table.ranks; ++r) sum += Widen(PartOf<T>(table, piece, r)[i]);
      Narrow(sum, reinterpret_cast<T*>(piece.output) + i);
    }
  }
}

using Kernel = void (*)(SumTable);

Kernel KernelFor(DType dtype, int ranks) {
  if (dtype == DType::kF32) return ranks == 2 ? SumKernel<float, 2> : SumKernel<float, 0>;
  return ranks == 2 ? SumKernel<__nv_bfloat16, 2> : SumKernel<__nv_bfloat16, 0>;
}

}  // namespace

cudaError_t SumParts(const SumTable& table, DType dtype, cudaStream_t stream) {
  void* arguments[] = {const_cast<SumTable*>(&table)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(KernelFor(dtype, table.ranks)), kBlocks,
                          kThreads, arguments, 0, stream);
}

cudaError_t LoadSumParts() {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int ranks : {2, 3}) {
      cudaFuncAttributes attributes;
      const cudaError_t loaded = cudaFuncGetAttributes(
          &attributes, reinterpret_cast<const void*>(KernelFor(dtype, ranks)));
      if (loaded != cudaSuccess) return loaded;
    }
  }
  return cudaSuccess;
}

}  // namespace stretto
