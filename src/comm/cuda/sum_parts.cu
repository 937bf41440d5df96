#include <cuda_bf16.h>

#include "src/comm/cuda/sum_parts.h"

namespace stretto {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // accesses of 16 bytes that a thread has under way at a time

__device__ inline float Widen(float x) { return x; }
__device__ inline float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void Narrow(float x, float* to) { *to = x; }
__device__ inline void Narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// A sum, or what it makes of `before`, which is read only then.
template <bool kAdds, class T>
__device__ inline void Finish(float sum, T before, T* to) {
  Narrow(sum, to);
  if (kAdds) Narrow(Widen(before) + Widen(*to), to);
}

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
template <class T, int kRanks, bool kAdds>
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
    Pack<T> before[kUnroll];
    if (kAdds) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * kThreads + threadIdx.x;
        if (i < packs) before[u].bits = __ldcs(output + i);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kThreads + threadIdx.x;
      Pack<T> pack;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) Finish<kAdds>(sum[u][k], before[u].value[k], &pack.value[k]);
      if (i < packs) __stcs(output + i, pack.bits);
    }
  }
}

template <class T, int kRanks, bool kAdds>
__global__ void __launch_bounds__(kThreads) SumKernel(const __grid_constant__ SumTable table) {
  constexpr int kWidth = 16 / sizeof(T);
  for (int p = 0; p < table.count; ++p) {
    const SumPiece& piece = table.pieces[p];
    const bool aligned =
        (reinterpret_cast<uintptr_t>(piece.own) | reinterpret_cast<uintptr_t>(piece.output)) % 16 ==
        0;
    const int64_t packs = aligned ? piece.elements / kWidth : 0;
    SumPacked<T, kRanks, kAdds>(table, piece, packs);
    for (int64_t i = packs * kWidth + blockIdx.x * int64_t{kThreads} + threadIdx.x;
         i < piece.elements; i += gridDim.x * int64_t{kThreads}) {
      float sum = Widen(PartOf<T>(table, piece, 0)[i]);
      for (int r = 1; r < table.ranks; ++r) sum += Widen(PartOf<T>(table, piece, r)[i]);
      T* const output = reinterpret_cast<T*>(piece.output) + i;
      Finish<kAdds>(sum, kAdds ? *output : T(), output);
    }
  }
}

using Kernel = void (*)(SumTable);

template <class T, int kRanks>
Kernel KernelFor(bool adds) {
  return adds ? SumKernel<T, kRanks, true> : SumKernel<T, kRanks, false>;
}

Kernel KernelFor(DType dtype, int ranks, bool adds) {
  if (dtype == DType::kF32)
    return ranks == 2 ? KernelFor<float, 2>(adds) : KernelFor<float, 0>(adds);
  return ranks == 2 ? KernelFor<__nv_bfloat16, 2>(adds) : KernelFor<__nv_bfloat16, 0>(adds);
}

}  // namespace

cudaError_t SumParts(const SumTable& table, DType dtype, int multiprocessors, cudaStream_t stream) {
  int64_t most = 0;
  for (int p = 0; p < table.count; ++p) {
    if (table.pieces[p].elements > most) most = table.pieces[p].elements;
  }
  const int64_t of_block = int64_t{kThreads} * kUnroll * 16 / SizeOf(dtype);
  const int64_t blocks = (most + of_block - 1) / of_block;
  const auto grid = static_cast<unsigned>(blocks < multiprocessors ? blocks : multiprocessors);
  if (grid == 0) return cudaSuccess;
  void* arguments[] = {const_cast<SumTable*>(&table)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(KernelFor(dtype, table.ranks, table.adds)),
                          grid, kThreads, arguments, 0, stream);
}

cudaError_t LoadSumParts() {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const int ranks : {2, 3}) {
      for (const bool adds : {false, true}) {
        cudaFuncAttributes attributes;
        const cudaError_t loaded = cudaFuncGetAttributes(
            &attributes, reinterpret_cast<const void*>(KernelFor(dtype, ranks, adds)));
        if (loaded != cudaSuccess) return loaded;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace stretto
