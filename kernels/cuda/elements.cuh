// Elements of a row as they are stored, for kernels that keep them in registers.
#ifndef STRETTO_KERNELS_CUDA_ELEMENTS_CUH_
#define STRETTO_KERNELS_CUDA_ELEMENTS_CUH_

#include <cstdint>
#include <cstring>

#include "kernels/cuda/support.cuh"

namespace stretto::cuda {

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Elements {
  T value[kWidth];

  __device__ float operator[](int k) const { return Widen(value[k]); }
  __device__ static Elements Of(const float (&from)[kWidth]) {
    Elements result;
    for (int k = 0; k < kWidth; ++k) result.value[k] = Narrow<T>(from[k]);
    return result;
  }
  __device__ void Forget() {}
};

// bf16 stays in pairs: as single elements each would fill a register.
template <>
struct alignas(16) Elements<__nv_bfloat16, 8> {
  uint32_t pairs[4];

  __device__ float operator[](int k) const {
    return __uint_as_float(k % 2 == 0 ? pairs[k / 2] << 16 : pairs[k / 2] & 0xffff0000u);
  }
  __device__ static Elements Of(const float (&from)[8]) {
    Elements result;
    for (int k = 0; k < 4; ++k) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * k], from[2 * k + 1]);
      memcpy(&result.pairs[k], &pair, sizeof(pair));
    }
    return result;
  }
  // Hides that the pairs have not changed. The compiler would otherwise keep what it has widened
  // for the next use: twice the registers, to save a shift.
  __device__ void Forget() {
    for (uint32_t& pair : pairs) asm("" : "+r"(pair));
  }
};

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_ELEMENTS_CUH_
