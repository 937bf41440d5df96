// Matrix products of strided operands over the thread pool; operands narrower than f32 are widened
// piece by piece.
#ifndef STRETTO_KERNELS_CPU_PRODUCT_H_
#define STRETTO_KERNELS_CPU_PRODUCT_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/support.h"
#include "stretto/core/float8.h"

namespace stretto::cpu {

// Products are cut in multiples of this: it divides by the register blocks of OpenBLAS's kernels.
inline constexpr int64_t kProductGrain = 48;
// Products of fewer multiply-adds stay on the caller's thread.
inline constexpr int64_t kSerialProducts = int64_t{1} << 17;
// Tile of a bf16 or FP8 product: its operands are widened to f32 piece by piece.
inline constexpr int64_t kTile = 480;
inline constexpr int64_t kTileDepth = 1024;

// One operand of a product: element (i, j) of the m x k (or k x n) matrix.
template <class T>
struct Operand {
  const T* data;
  int64_t ld;
  bool trans;  // stored transposed

  const T* At(int64_t i, int64_t j) const { return data + (trans ? j * ld + i : i * ld + j); }
};

template <class T>
Operand<T> Plain(const Tensor& t) {
  return {t.as<T>(), t.row_stride, false};
}
template <class T>
Operand<T> Transposed(const Tensor& t) {
  return {t.as<T>(), t.row_stride, true};
}

// Cuts an m x n result over the pool: whole columns or whole rows, whichever balances better, the
// preferred one when both are about equal. The cut depends on the shape and the thread count only.
template <class Body>
void SplitResult(ThreadPool& pool, int64_t m, int64_t n, int64_t k, bool prefer_columns,
                 const Body& body) {
  if (m == 0 || n == 0) return;
  const int64_t threads = pool.threads();
  if (threads == 1 || m * n * std::max<int64_t>(k, 1) <= kSerialProducts) {
    body(int64_t{0}, m, int64_t{0}, n);
    return;
  }
  // The largest part's share of the whole.
  const auto share = [threads](int64_t size) {
    const int64_t units = (size + kProductGrain - 1) / kProductGrain;
    const int64_t part = (units + threads - 1) / threads * kProductGrain;
    return std::min(1.0, static_cast<double>(part) / static_cast<double>(size));
  };
  const double by_columns = share(n);
  const double by_rows = share(m);
  const bool columns = prefer_columns ? by_columns <= 1.1 * by_rows : by_rows > 1.1 * by_columns;
  if (columns) {
    pool.ParallelFor(n, kProductGrain,
                     [&](int64_t b, int64_t e, int) { body(int64_t{0}, m, b, e); });
  } else {
    pool.ParallelFor(m, kProductGrain,
                     [&](int64_t b, int64_t e, int) { body(b, e, int64_t{0}, n); });
  }
}

// c [m, n] (acc)= a b + bias on the calling thread, for operands of the arithmetic type.
template <class A>
void DenseProduct(Operand<A> a, Operand<A> b, int64_t m, int64_t n, int64_t k, A* c, int64_t ldc,
                  bool acc, const A* bias) {
  if (bias != nullptr) {
    // Costs what OpenBLAS's own clearing of c would.
    for (int64_t i = 0; i < m; ++i) std::copy_n(bias, n, c + i * ldc);
    acc = true;
  }
  Gemm(a.trans, b.trans, m, n, k, A{1}, a.data, a.ld, b.data, b.ld, acc ? A{1} : A{0}, c, ldc);
}

// Widens rows x columns elements, as they are stored, into a dense block.
template <class T>
void WidenBlock(const T* from, int64_t ld, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      VecLoop<float>(columns, [&](int64_t j, auto lanes) {
        Store(to + i * columns + j, Load(from + i * ld + j, lanes), lanes);
      });
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        to[i * columns + j] = static_cast<float>(from[i * ld + j]);
      }
    }
  }
}

template <class T>
Operand<float> WidenOperand(Operand<T> a, int64_t i, int64_t j, int64_t rows, int64_t columns,
                            float* to) {
  if (a.trans) std::swap(rows, columns);
  WidenBlock(a.At(i, j), a.ld, rows, columns, to);
  return {to, columns, a.trans};
}

// c [m, n] (acc)= alpha a b + bias for bf16 or FP8 operands and a bf16 or f32 result: tiles
// accumulate in f32.
template <class TA, class TB, class C>
void WidenedProduct(Operand<TA> a, Operand<TB> b, int64_t m, int64_t n, int64_t k, float alpha,
                    C* c, int64_t ldc, bool acc, const BFloat16* bias) {
  const int64_t depth = std::min(k, kTileDepth);
  float* wide_a = Scratch<float>(kScratchA, std::min(m, kTile) * depth);
  float* wide_b = Scratch<float>(kScratchB, std::min(n, kTile) * depth);
  float* tile = Scratch<float>(kScratchC, std::min(m, kTile) * std::min(n, kTile));
  for (int64_t j0 = 0; j0 < n; j0 += kTile) {
    const int64_t columns = std::min(kTile, n - j0);
    for (int64_t i0 = 0; i0 < m; i0 += kTile) {
      const int64_t rows = std::min(kTile, m - i0);
      for (int64_t i = 0; i < rows; ++i) {
        VecLoop<float>(columns, [&](int64_t j, auto lanes) {
          Vec<float> start = {};
          if (bias != nullptr) start = Load(bias + j0 + j, lanes);
          if (acc) start += Load(c + (i0 + i) * ldc + j0 + j, lanes);
          Store(tile + i * columns + j, start, lanes);
        });
      }
      for (int64_t p0 = 0; p0 < k; p0 += kTileDepth) {
        const int64_t inner = std::min(kTileDepth, k - p0);
        const Operand<float> fa = WidenOperand(a, i0, p0, rows, inner, wide_a);
        const Operand<float> fb = WidenOperand(b, p0, j0, inner, columns, wide_b);
        Gemm(fa.trans, fb.trans, rows, columns, inner, alpha, fa.data, fa.ld, fb.data, fb.ld, 1.0f,
             tile, columns);
      }
      for (int64_t i = 0; i < rows; ++i) {
        VecLoop<float>(columns, [&](int64_t j, auto lanes) {
          Store(c + (i0 + i) * ldc + j0 + j, Load(tile + i * columns + j, lanes), lanes);
        });
      }
    }
  }
}

// The same over the pool, for operands of any type; alpha counts for narrow ones only.
template <class TA, class TB, class C, class Bias>
void ParallelProduct(ThreadPool& pool, Operand<TA> a, Operand<TB> b, int64_t m, int64_t n,
                     int64_t k, C* c, int64_t ldc, bool acc, const Bias* bias, bool prefer_columns,
                     float alpha = 1.0f) {
  SplitResult(pool, m, n, k, prefer_columns,
              [&](int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
                const Operand<TA> part_a{a.At(i, 0), a.ld, a.trans};
                const Operand<TB> part_b{b.At(0, j), b.ld, b.trans};
                const Bias* part_bias = bias == nullptr ? nullptr : bias + j;
                if constexpr (sizeof(TA) < sizeof(float)) {
                  WidenedProduct(part_a, part_b, i_end - i, j_end - j, k, alpha, c + i * ldc + j,
                                 ldc, acc, part_bias);
                } else {
                  DenseProduct(part_a, part_b, i_end - i, j_end - j, k, c + i * ldc + j, ldc, acc,
                               part_bias);
                }
              });
}

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_PRODUCT_H_
