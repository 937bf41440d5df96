#include <algorithm>
#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/product.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

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

  void ForwardSwiglu(Stream& s, Tensor act, Tensor gate_up, Tensor x, Tensor w) const override {
    Forward(s, gate_up, x, w, {});
    Activation()->SwigluForward(s, act, gate_up);
  }

  void BackwardInputGelu(Stream& s, Tensor dpre, Tensor dy, Tensor w, Tensor pre) const override {
    BackwardInput(s, dpre, dy, w, false);
    Activation()->GeluBackward(s, dpre, dpre, pre, false);
  }

  void BackwardInputSwiglu(Stream& s, Tensor d_gate_up, Tensor dy, Tensor w,
                           Tensor gate_up) const override {
    const Tensor d_act = d_gate_up.Columns(0, w.dims[1]);
    BackwardInput(s, d_act, dy, w, false);
    Activation()->SwigluBackward(s, d_gate_up, d_act, gate_up, false);
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

  void BackwardBias(Stream& s, Tensor db, Tensor dy, bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(dy.dtype, [&](auto type) {
        ColumnSums<typename decltype(type)::type>(*pool, db, dy, acc);
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
