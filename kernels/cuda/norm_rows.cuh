// Rows of a norm's operands, and their elements as they are stored.
#ifndef STRETTO_KERNELS_CUDA_NORM_ROWS_CUH_
#define STRETTO_KERNELS_CUDA_NORM_ROWS_CUH_

#include <cstdint>
#include <cstring>

#include "kernels/cuda/support.cuh"

namespace stretto::cuda::norm {

// Rows of a [rows, n] or [tokens, heads, head_dim] operand, head by head.
struct HeadRows {
  int64_t heads;
  int64_t dim;
  int64_t rows;

  explicit HeadRows(const Tensor& t)
      : heads(t.rank == 3 ? t.dims[1] : 1),
        dim(t.rank == 3 ? t.dims[2] : t.row_elements()),
        rows(t.rows() * heads) {}
  bool empty() const { return rows == 0 || dim == 0; }
};

// Where a row lies: head `head` of token `token`.
struct Place {
  int64_t token;
  int64_t head;

  __device__ Place(const HeadRows& at, int64_t row) : token(row), head(0) {
    if (at.heads > 1) {
      // Unsigned: the quotient of two numbers below 2^32 is then found without the long division.
      token = static_cast<uint64_t>(row) / static_cast<uint64_t>(at.heads);
      head = row - token * at.heads;
    }
  }
  template <class T>
  __device__ T* Row(const Rows<T>& operand, const HeadRows& at) const {
    return operand.At(token, head * at.dim);
  }
  // The statistic of the row in [tokens] or [tokens, heads].
  __device__ float* Statistic(const Rows<float>& operand) const { return operand.At(token, head); }
};

// kWidth elements of a row as they are stored.
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

}  // namespace stretto::cuda::norm

#endif  // STRETTO_KERNELS_CUDA_NORM_ROWS_CUH_
