#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the
// sigmoid form loses no digits where tanh(u) is near -1.
constexpr double kTwoU = 1.5957691216057308;  // 2 sqrt(2 / pi)
constexpr double kCubic = 0.044715;

template <class A>
struct Sigmoid {
  Vec<A> value;       // 1 / (1 + e)
  Vec<A> complement;  // 1 - value = e / (1 + e), without cancellation

  explicit Sigmoid(Vec<A> z) {
    const Vec<A> e = Exp(-z);
    value = A{1} / (e + A{1});
    complement = e * value;
  }
};

template <class A>
Vec<A> Gelu(Vec<A> x) {
  const Vec<A> two_u = x * (x * x * static_cast<A>(kTwoU * kCubic) + static_cast<A>(kTwoU));
  return x * Sigmoid<A>(two_u).value;
}

template <class A>
Vec<A> GeluDerivative(Vec<A> x) {
  x = Clamp(x, A{-40}, A{40});  // 0 and 1 exactly outside; keeps x^2 finite
  const Vec<A> square = x * x;
  const Sigmoid<A> s(x * (square * static_cast<A>(kTwoU * kCubic) + static_cast<A>(kTwoU)));
  const Vec<A> slope = square * static_cast<A>(3 * kTwoU * kCubic) + static_cast<A>(kTwoU);
  return s.value + x * (s.value * s.complement) * slope;
}

class CpuActivation final : public ActivationKernels {
 public:
  void GeluForward(Stream& s, Tensor y, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        int64_t rows = x.rows();
        int64_t columns = x.row_elements();
        AsOneRow(rows, columns, y, x);
        ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
          T* to = y.as<T>(row) + first;
          const T* from = x.as<T>(row) + first;
          VecLoop<A>(count,
                     [&](int64_t i, auto k) { Store(to + i, Gelu<A>(Load(from + i, k)), k); });
        });
      });
    });
  }

  void GeluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        int64_t rows = x.rows();
        int64_t columns = x.row_elements();
        AsOneRow(rows, columns, dx, dy, x);
        ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
          T* to = dx.as<T>(row) + first;
          const T* grad = dy.as<T>(row) + first;
          const T* from = x.as<T>(row) + first;
          VecLoop<A>(count, [&](int64_t i, auto k) {
            Vec<A> d = Load(grad + i, k) * GeluDerivative<A>(Load(from + i, k));
            if (acc) d += Load(to + i, k);
            Store(to + i, d, k);
          });
        });
      });
    });
  }

  void SwigluForward(Stream& s, Tensor y, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t f = y.dims[1];
        ForSpans(*pool, y.rows(), f, [&](int64_t row, int64_t first, int64_t count) {
          T* to = y.as<T>(row) + first;
          const T* gate = x.as<T>(row) + first;
          const T* up = gate + f;
          VecLoop<A>(count, [&](int64_t i, auto k) {
            const Vec<A> g = Load(gate + i, k);
            Store(to + i, g * Sigmoid<A>(g).value * Load(up + i, k), k);
          });
        });
      });
    });
  }

  void SwigluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t f = dy.dims[1];
        ForSpans(*pool, dy.rows(), f, [&](int64_t row, int64_t first, int64_t count) {
          T* dgate = dx.as<T>(row) + first;
          T* dup = dgate + f;
          const T* grad = dy.as<T>(row) + first;
          const T* gate = x.as<T>(row) + first;
          const T* up = gate + f;
          VecLoop<A>(count, [&](int64_t i, auto k) {
            const Vec<A> g = Load(gate + i, k);
            const Vec<A> d = Load(grad + i, k);
            const Sigmoid<A> sig(g);
            Vec<A> d_up = d * g * sig.value;
            Vec<A> d_gate = d * Load(up + i, k) * sig.value * (g * sig.complement + A{1});
            if (acc) {
              d_up += Load(dup + i, k);
              d_gate += Load(dgate + i, k);
            }
            Store(dup + i, d_up, k);
            Store(dgate + i, d_gate, k);
          });
        });
      });
    });
  }
};

}  // namespace

const ActivationKernels* Activation() {
  static const CpuActivation kernels;
  return &kernels;
}

}  // namespace stretto::cpu
