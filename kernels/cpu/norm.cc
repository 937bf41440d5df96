#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

int64_t SerialRows(int64_t dim) { return kSerialElements / std::max<int64_t>(dim, 1); }

// One row; `mean` null means RMSNorm, `residual` null means that x itself is normalised.
template <class T, class A>
void ForwardRow(T* y, T* h, A* mean, A* rstd, const T* x, const T* residual, const T* weight,
                const T* bias, int64_t n, A eps) {
  if (residual != nullptr) {
    // The norm reads the sum as it is stored, rounded: backward will see nothing else.
    VecLoop<A>(n,
               [&](int64_t i, auto k) { Store(h + i, Load(x + i, k) + Load(residual + i, k), k); });
    x = h;
  }
  A mu = 0;
  if (mean != nullptr) {
    Vec<A> sum = {};
    VecLoop<A>(n, [&](int64_t i, auto k) { sum += Load(x + i, k); });
    mu = Sum<A>(sum) / static_cast<A>(n);
    *mean = mu;
  }
  Vec<A> squares = {};
  VecLoop<A>(n, [&](int64_t i, auto k) {
    const Vec<A> d = KeepFirst<A>(Load(x + i, k) - mu, k);
    squares += d * d;
  });
  const A r = 1 / std::sqrt(Sum<A>(squares) / static_cast<A>(n) + eps);
  *rstd = r;
  VecLoop<A>(n, [&](int64_t i, auto k) {
    Vec<A> v = (Load(x + i, k) - mu) * r * Load(weight + i, k);
    if (bias != nullptr) v += Load(bias + i, k);
    Store(y + i, v, k);
  });
}

// With g = dy * weight and n = (h - mean) * rstd:
// dx = rstd * (g - mean(g) - n * mean(g * n)); RMSNorm lacks the mean(g) term.
template <class T, class A>
void BackwardRow(T* dx, const T* dy, const T* h, const A* mean, A r, const T* weight, int64_t n,
                 bool acc) {
  const A mu = mean != nullptr ? *mean : A{0};
  Vec<A> sum_g = {};
  Vec<A> sum_gn = {};
  VecLoop<A>(n, [&](int64_t i, auto k) {
    const Vec<A> g = Load(dy + i, k) * Load(weight + i, k);
    sum_g += g;
    sum_gn += g * ((Load(h + i, k) - mu) * r);
  });
  const A mean_g = mean != nullptr ? Sum<A>(sum_g) / static_cast<A>(n) : A{0};
  const A mean_gn = Sum<A>(sum_gn) / static_cast<A>(n);
  VecLoop<A>(n, [&](int64_t i, auto k) {
    const Vec<A> g = Load(dy + i, k) * Load(weight + i, k);
    Vec<A> d = (g - mean_g - (Load(h + i, k) - mu) * r * mean_gn) * r;
    if (acc) d += Load(dx + i, k);
    Store(dx + i, d, k);
  });
}

// Columns [begin, end) of dweight and dbias: sums over all rows in order, in f64.
template <class T>
void BackwardColumns(Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                     bool acc, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t n = end - begin;
  double* sum_w = Scratch<double>(kScratchA, 2 * n);
  double* sum_b = sum_w + n;
  std::fill_n(sum_w, 2 * n, 0.0);
  for (int64_t row = 0; row < dy.rows(); ++row) {
    const T* g = dy.as<T>(row) + begin;
    const T* x = h.as<T>(row) + begin;
    const A mu = mean.present() ? *mean.as<A>(row) : A{0};
    const A r = *rstd.as<A>(row);
    if (dbias.present()) {
      for (int64_t j = 0; j < n; ++j) sum_b[j] += Widen(g[j]);
    }
    for (int64_t j = 0; j < n; ++j) sum_w[j] += Widen(g[j]) * ((Widen(x[j]) - mu) * r);
  }
  const auto put = [&](const Tensor& out, const double* sums) {
    A* to = out.as<A>() + begin;
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<A>((acc ? to[j] : 0) + sums[j]);
  };
  put(dweight, sum_w);
  if (dbias.present()) put(dbias, sum_b);
}

class CpuNorm final : public NormKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
               Tensor weight, Tensor bias, double eps) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const auto at = [](const Tensor& t, int64_t row) {
          return t.present() ? t.as<T>(row) : nullptr;
        };
        const T* w = weight.as<T>();
        const T* b = bias.present() ? bias.as<T>() : nullptr;
        pool->ParallelFor(
            x.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t row = begin; row < end; ++row) {
                ForwardRow<T, A>(y.as<T>(row), at(h, row),
                                 mean.present() ? mean.as<A>(row) : nullptr, rstd.as<A>(row),
                                 x.as<T>(row), at(residual, row), w, b, x.dims[1],
                                 static_cast<A>(eps));
              }
            },
            SerialRows(x.dims[1]));
      });
    });
  }

  // Rows are read from caches again: reading them twice costs less than further sums at hand.
  int64_t PartialBytes(DType, int64_t, bool) const override { return 0; }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                     Tensor weight, bool acc, Tensor) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(dx.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        pool->ParallelFor(
            dx.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t row = begin; row < end; ++row) {
                BackwardRow<T, A>(dx.as<T>(row), dy.as<T>(row), h.as<T>(row),
                                  mean.present() ? mean.as<A>(row) : nullptr, *rstd.as<A>(row),
                                  weight.as<T>(), dx.dims[1], acc);
              }
            },
            SerialRows(dx.dims[1]));
      });
    });
  }

  void BackwardWeight(Stream& s, Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean,
                      Tensor rstd, bool acc, Tensor) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(dy.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const int64_t dim = dy.dims[1];
        pool->ParallelFor(
            dim, 16,
            [&](int64_t begin, int64_t end, int) {
              BackwardColumns<T>(dweight, dbias, dy, h, mean, rstd, acc, begin, end);
            },
            dy.elements() <= kSerialElements ? dim : 0);
      });
    });
  }
};

}  // namespace

const NormKernels* Norm() {
  static const CpuNorm kernels;
  return &kernels;
}

}  // namespace stretto::cpu
