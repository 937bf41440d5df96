#include <algorithm>
#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Products are cut in multiples of this: it divides by the register blocks of OpenBLAS's kernels.
constexpr int64_t kGrain = 48;
// Products of fewer multiply-adds stay on the caller's thread.
constexpr int64_t kSerialProducts = int64_t{1} << 17;
// Tile of a bf16 product: its operands are widened to f32 piece by piece.
constexpr int64_t kTile = 480;
constexpr int64_t kTileDepth = 1024;

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
    const int64_t units = (size + kGrain - 1) / kGrain;
    const int64_t part = (units + threads - 1) / threads * kGrain;
    return std::min(1.0, static_cast<double>(part) / static_cast<double>(size));
  };
  const double by_columns = share(n);
  const double by_rows = share(m);
  const bool columns = prefer_columns ? by_columns <= 1.1 * by_rows : by_rows > 1.1 * by_columns;
  if (columns) {
    pool.ParallelFor(n, kGrain, [&](int64_t b, int64_t e, int) { body(int64_t{0}, m, b, e); });
  } else {
    pool.ParallelFor(m, kGrain, [&](int64_t b, int64_t e, int) { body(b, e, int64_t{0}, n); });
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
void WidenBlock(const BFloat16* from, int64_t ld, int64_t rows, int64_t columns, float* to) {
  for (int64_t i = 0; i < rows; ++i) {
    VecLoop<float>(columns, [&](int64_t j, auto lanes) {
      Store(to + i * columns + j, Load(from + i * ld + j, lanes), lanes);
    });
  }
}

Operand<float> WidenOperand(Operand<BFloat16> a, int64_t i, int64_t j, int64_t rows,
                            int64_t columns, float* to) {
  if (a.trans) std::swap(rows, columns);
  WidenBlock(a.At(i, j), a.ld, rows, columns, to);
  return {to, columns, a.trans};
}

// The same for bf16 operands and a bf16 or f32 result: tiles accumulate in f32.
template <class C>
void WidenedProduct(Operand<BFloat16> a, Operand<BFloat16> b, int64_t m, int64_t n, int64_t k, C* c,
                    int64_t ldc, bool acc, const BFloat16* bias) {
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
        Gemm(fa.trans, fb.trans, rows, columns, inner, 1.0f, fa.data, fa.ld, fb.data, fb.ld, 1.0f,
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

template <class T, class C>
void ParallelProduct(ThreadPool& pool, Operand<T> a, Operand<T> b, int64_t m, int64_t n, int64_t k,
                     C* c, int64_t ldc, bool acc, const T* bias, bool prefer_columns) {
  SplitResult(pool, m, n, k, prefer_columns,
              [&](int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
                const Operand<T> part_a{a.At(i, 0), a.ld, a.trans};
                const Operand<T> part_b{b.At(0, j), b.ld, b.trans};
                const T* part_bias = bias == nullptr ? nullptr : bias + j;
                if constexpr (std::is_same_v<T, BFloat16>) {
                  WidenedProduct(part_a, part_b, i_end - i, j_end - j, k, c + i * ldc + j, ldc, acc,
                                 part_bias);
                } else {
                  DenseProduct(part_a, part_b, i_end - i, j_end - j, k, c + i * ldc + j, ldc, acc,
                               part_bias);
                }
              });
}

// db (acc)= sum of the rows of dy, in f64, rows in order.
template <class T>
void ColumnSums(ThreadPool& pool, Tensor db, Tensor dy, bool acc) {
  pool.ParallelFor(
      db.dims[0], 16,
      [&](int64_t begin, int64_t end, int) {
        const int64_t n = end - begin;
        double* sums = Scratch<double>(kScratchA, n);
        std::fill_n(sums, n, 0.0);
        for (int64_t t = 0; t < dy.rows(); ++t) {
          const T* row = dy.as<T>(t) + begin;
          for (int64_t j = 0; j < n; ++j) sums[j] += Widen(row[j]);
        }
        Acc<T>* out = db.as<Acc<T>>() + begin;
        for (int64_t j = 0; j < n; ++j) {
          out[j] = static_cast<Acc<T>>((acc ? out[j] : 0) + sums[j]);
        }
      },
      dy.rows() * db.dims[0] <= kSerialElements ? db.dims[0] : 0);
}

class CpuLinear final : public LinearKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor x, Tensor w, Tensor bias) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(y.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        ParallelProduct(*pool, Plain<T>(x), Transposed<T>(w), y.dims[0], y.dims[1], x.dims[1],
                        y.as<T>(), y.row_stride, false, bias.present() ? bias.as<T>() : nullptr,
                        true);
      });
    });
  }

  // A product and then a pass over its result: on the CPU the pass is a small part of both.
  void ForwardGelu(Stream& s, Tensor y, Tensor pre, Tensor x, Tensor w,
                   Tensor bias) const override {
    Forward(s, pre, x, w, bias);
    Activation()->GeluForward(s, y, pre);
  }

  void BackwardInputGelu(Stream& s, Tensor dpre, Tensor dy, Tensor w, Tensor pre) const override {
    BackwardInput(s, dpre, dy, w, false);
    Activation()->GeluBackward(s, dpre, dpre, pre, false);
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor w, bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(dx.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        ParallelProduct(*pool, Plain<T>(dy), Plain<T>(w), dx.dims[0], dx.dims[1], dy.dims[1],
                        dx.as<T>(), dx.row_stride, acc, static_cast<const T*>(nullptr), true);
      });
    });
  }

  void BackwardWeight(Stream& s, Tensor dw, Tensor db, Tensor dy, Tensor x,
                      bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(dy.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        ParallelProduct(*pool, Transposed<T>(dy), Plain<T>(x), dw.dims[0], dw.dims[1], dy.dims[0],
                        dw.as<Acc<T>>(), dw.row_stride, acc, static_cast<const T*>(nullptr), false);
        if (db.present()) ColumnSums<T>(*pool, db, dy, acc);
      });
    });
  }
};

}  // namespace

const LinearKernels* Linear() {
  static const CpuLinear kernels;
  return &kernels;
}

}  // namespace stretto::cpu
