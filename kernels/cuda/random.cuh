// Random words of the project's generator (core/rng.h) on the device, and rounding by them.
#ifndef STRETTO_KERNELS_CUDA_RANDOM_CUH_
#define STRETTO_KERNELS_CUDA_RANDOM_CUH_

#include <cuda_bf16.h>

#include <cstdint>

namespace stretto::cuda {

// One block of Philox 4x32-10: words j of Rng::Words(counter) with this key and index.
__device__ inline void Philox(uint64_t counter, uint64_t index, uint32_t key0, uint32_t key1,
                              uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(index), c3 = static_cast<uint32_t>(index >> 32);
  constexpr int kRounds = 10;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{0xd2511f53u} * c0;
    const uint64_t p1 = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(p0);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// bf16 from f32: the 16 bits that are cut off round up with a probability of their own value. Only
// the low 16 bits of `random` count. A NaN keeps its upper half and becomes quiet.
__device__ inline __nv_bfloat16 RoundStochastic(float x, uint32_t random) {
  const uint32_t u = __float_as_uint(x);
  const uint32_t rounded = (u + (random & 0xffffu)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  return __ushort_as_bfloat16(
      static_cast<unsigned short>((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded));
}

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_RANDOM_CUH_
