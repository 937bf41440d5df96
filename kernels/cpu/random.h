// Random words of the project's generator (core/rng.h), eight blocks at a time, and rounding by
// them.
#ifndef STRETTO_KERNELS_CPU_RANDOM_H_
#define STRETTO_KERNELS_CPU_RANDOM_H_

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/simd.h"

namespace stretto::cpu {

typedef uint64_t U64x8 __attribute__((vector_size(64)));

// Philox 4x32-10 of the counters {first + lane * stride, index}: word j of lane b in out[j][b], as
// Rng::Words(first + b * stride)[j] with this key and index.
inline void PhiloxLanes(uint64_t first, uint64_t stride, uint64_t index,
                        std::array<uint32_t, 2> key, U32x8 (&out)[4]) {
  const U64x8 counters = U64x8{0, 1, 2, 3, 4, 5, 6, 7} * stride + first;
  U32x8 c[4];
  c[0] = __builtin_convertvector(counters, U32x8);
  c[1] = __builtin_convertvector(counters >> 32, U32x8);
  c[2] = U32x8{} + static_cast<uint32_t>(index);
  c[3] = U32x8{} + static_cast<uint32_t>(index >> 32);
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const U64x8 p0 = __builtin_convertvector(c[0], U64x8) * 0xd2511f53u;
    const U64x8 p1 = __builtin_convertvector(c[2], U64x8) * 0xcd9e8d57u;
    c[0] = __builtin_convertvector(p1 >> 32, U32x8) ^ c[1] ^ key[0];
    c[1] = __builtin_convertvector(p1, U32x8);
    c[2] = __builtin_convertvector(p0 >> 32, U32x8) ^ c[3] ^ key[1];
    c[3] = __builtin_convertvector(p0, U32x8);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  for (int j = 0; j < 4; ++j) out[j] = c[j];
}

// bf16 from f32: the 16 bits that are cut off round up with a probability of their own value. Only
// the low 16 bits of a lane of `random` count. A NaN keeps its upper half and becomes quiet.
template <class N>
inline void StoreStochastic(BFloat16* p, Vec<float> x, U32x8 random, N n) {
  const U32x8 u = std::bit_cast<U32x8>(x);
  const U32x8 rounded = (u + (random & 0xffffu)) >> 16;
  const U32x8 nan = (u >> 16) | 0x40u;
  const U16x8 raw = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16x8);
  std::memcpy(static_cast<void*>(p), &raw, sizeof(BFloat16) * n);
}

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_RANDOM_H_
