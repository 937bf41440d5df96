#include "kernels/cpu/gemm.h"

#include <cblas.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/small_gemm.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

void OneThread() {
  static const bool once = [] {
    openblas_set_num_threads(1);
    return true;
  }();
  (void)once;
}

template <class A>
void ScaleOnly(int64_t m, int64_t n, A beta, A* c, int64_t ldc) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = beta == 0 ? A{0} : c[i * ldc + j] * beta;
  }
}

CBLAS_TRANSPOSE Op(bool trans) { return trans ? CblasTrans : CblasNoTrans; }

// BLAS insists on a leading dimension of at least one row, also where there is a single row.
blasint Lead(int64_t ld, bool trans, int64_t rows, int64_t columns) {
  return static_cast<blasint>(std::max(ld, std::max<int64_t>(1, trans ? rows : columns)));
}

}  // namespace

void Gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  if (k == 0) return ScaleOnly(m, n, beta, c, ldc);
  if (!trans_a && !trans_b && IsSmallGemm(m, n, k)) {
    return SmallGemm(m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  OneThread();
  cblas_sgemm(CblasRowMajor, Op(trans_a), Op(trans_b), m, n, k, alpha, a, Lead(lda, trans_a, m, k),
              b, Lead(ldb, trans_b, k, n), beta, c, Lead(ldc, false, m, n));
}

void Gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, double alpha,
          const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
          int64_t ldc) {
  if (m == 0 || n == 0) return;
  if (k == 0) return ScaleOnly(m, n, beta, c, ldc);
  if (!trans_a && !trans_b && IsSmallGemm(m, n, k)) {
    return SmallGemm(m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
  OneThread();
  cblas_dgemm(CblasRowMajor, Op(trans_a), Op(trans_b), m, n, k, alpha, a, Lead(lda, trans_a, m, k),
              b, Lead(ldb, trans_b, k, n), beta, c, Lead(ldc, false, m, n));
}

std::byte* ScratchBytes(ScratchUse use, int64_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  struct Piece {
    std::unique_ptr<std::byte, Free> data;
    int64_t bytes = 0;
  };
  thread_local Piece pieces[kScratchUses];
  Piece& piece = pieces[use];
  if (bytes > piece.bytes) {
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    piece.data.reset();
    piece.data.reset(static_cast<std::byte*>(std::aligned_alloc(64, rounded)));
    piece.bytes = rounded;
  }
  return piece.data.get();
}

}  // namespace stretto::cpu
