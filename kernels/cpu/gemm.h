// Matrix products on the calling thread.
#ifndef STRETTO_KERNELS_CPU_GEMM_H_
#define STRETTO_KERNELS_CPU_GEMM_H_

#include <cstdint>

namespace stretto::cpu {

// c [m, n] = alpha op(a) op(b) + beta c, row-major; op transposes when trans_a / trans_b is set.
// One OpenBLAS thread: its results differ between thread counts, so callers cut the output
// themselves. With k = 0 only the beta part is done.
void Gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
void Gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, double alpha,
          const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
          int64_t ldc);

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_GEMM_H_
