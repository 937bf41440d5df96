// Small matrix products without OpenBLAS, whose own kernel for them allocates scratch on every call
// (sgemm_small_kernel_nn of 0.3.21), which a training step must not.
#ifndef STRETTO_KERNELS_CPU_SMALL_GEMM_H_
#define STRETTO_KERNELS_CPU_SMALL_GEMM_H_

#include <cstdint>

#include "kernels/cpu/simd.h"

namespace stretto::cpu {

// The sizes OpenBLAS calls small.
constexpr bool IsSmallGemm(int64_t m, int64_t n, int64_t k) { return m * n * k <= 100 * 100 * 100; }

// A block of kRows rows and kVectors vectors of columns, the last of them `lanes` wide. Its sums
// are an array whose every index is a constant after unrolling, so they live in registers.
template <int kRows, int kVectors, class A, class N>
inline void SmallGemmBlock(int64_t k, A alpha, const A* a, int64_t lda, const A* b, int64_t ldb,
                           A beta, A* c, int64_t ldc, N lanes) {
  Vec<A> sums[kRows][kVectors] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vec<A> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) row[v] = Load(b + p * ldb + v * kLanes<A>, Full<A>{});
    row[kVectors - 1] = Load(b + p * ldb + (kVectors - 1) * kLanes<A>, lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const A x = a[r * lda + p];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += row[v] * x;
    }
  }
  const auto put = [&](A* out, Vec<A> sum, auto width) {
    sum = sum * alpha;
    if (beta != 0) sum += Load(out, width) * beta;
    Store(out, sum, width);
  };
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors - 1; ++v) put(c + r * ldc + v * kLanes<A>, sums[r][v], Full<A>{});
    put(c + r * ldc + (kVectors - 1) * kLanes<A>, sums[r][kVectors - 1], lanes);
  }
}

// All rows of one panel of columns: six at a time (twelve sums, two vectors of b and one of a fill
// the sixteen registers of AVX2), then one by one.
template <int kVectors, class A, class N>
inline void SmallGemmPanel(int64_t m, int64_t k, A alpha, const A* a, int64_t lda, const A* b,
                           int64_t ldb, A beta, A* c, int64_t ldc, N lanes) {
  int64_t i = 0;
  for (; i + 6 <= m; i += 6) {
    SmallGemmBlock<6, kVectors>(k, alpha, a + i * lda, lda, b, ldb, beta, c + i * ldc, ldc, lanes);
  }
  for (; i + 2 <= m; i += 2) {
    SmallGemmBlock<2, kVectors>(k, alpha, a + i * lda, lda, b, ldb, beta, c + i * ldc, ldc, lanes);
  }
  if (i < m) {
    SmallGemmBlock<1, kVectors>(k, alpha, a + i * lda, lda, b, ldb, beta, c + i * ldc, ldc, lanes);
  }
}

// c [m, n] = alpha a [m, k] b [k, n] + beta c, row-major. Each element is summed in ascending k.
template <class A>
void SmallGemm(int64_t m, int64_t n, int64_t k, A alpha, const A* a, int64_t lda, const A* b,
               int64_t ldb, A beta, A* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>) {
    SmallGemmPanel<2>(m, k, alpha, a, lda, b + j, ldb, beta, c + j, ldc, Full<A>{});
  }
  for (; j + kLanes<A> <= n; j += kLanes<A>) {
    SmallGemmPanel<1>(m, k, alpha, a, lda, b + j, ldb, beta, c + j, ldc, Full<A>{});
  }
  if (j < n) {
    SmallGemmPanel<1>(m, k, alpha, a, lda, b + j, ldb, beta, c + j, ldc, static_cast<int>(n - j));
  }
}

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_SMALL_GEMM_H_
