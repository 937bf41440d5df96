#include <cstdint>
#include <cstring>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Through f32 on the way to bf16, as PyTorch does.
template <class Y, class X>
Y Convert(X x) {
  if constexpr (std::is_same_v<Y, BFloat16>) {
    return BFloat16(static_cast<float>(Widen(x)));
  } else {
    return static_cast<Y>(Widen(x));
  }
}

template <class Y, class X>
void CopySpan(Y* y, const X* x, int64_t n) {
  if constexpr (std::is_same_v<Acc<Y>, Acc<X>>) {
    VecLoop<Acc<X>>(n, [&](int64_t i, auto k) { Store(y + i, Load(x + i, k), k); });
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = Convert<Y>(x[i]);
  }
}

template <class Y, class X>
void AddSpan(Y* y, const X* x, int64_t n) {
  if constexpr (std::is_same_v<Acc<Y>, Acc<X>>) {
    VecLoop<Acc<X>>(n,
                    [&](int64_t i, auto k) { Store(y + i, Load(y + i, k) + Load(x + i, k), k); });
  } else {
    for (int64_t i = 0; i < n; ++i)
      y[i] = Convert<Y>(Widen(y[i]) + static_cast<Acc<Y>>(Widen(x[i])));
  }
}

class CpuElementwise final : public ElementwiseKernels {
 public:
  void Zero(Stream& s, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      int64_t rows = x.rows();
      int64_t columns = x.row_elements();
      AsOneRow(rows, columns, x);
      const int64_t size = SizeOf(x.dtype);
      ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
        std::memset(x.data + (row * x.row_stride + first) * size, 0, count * size);
      });
    });
  }

  void Copy(Stream& s, Tensor y, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      int64_t rows = x.rows();
      int64_t columns = x.row_elements();
      AsOneRow(rows, columns, y, x);
      if (y.dtype == x.dtype) {
        const int64_t size = SizeOf(x.dtype);
        ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
          std::memmove(y.data + (row * y.row_stride + first) * size,
                       x.data + (row * x.row_stride + first) * size, count * size);
        });
        return;
      }
      ForModelType(y.dtype, [&](auto to) {
        ForModelType(x.dtype, [&](auto from) {
          using Y = typename decltype(to)::type;
          using X = typename decltype(from)::type;
          ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
            CopySpan(y.as<Y>(row) + first, x.as<X>(row) + first, count);
          });
        });
      });
    });
  }

  void Add(Stream& s, Tensor y, Tensor x) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      int64_t rows = x.rows();
      int64_t columns = x.row_elements();
      AsOneRow(rows, columns, y, x);
      ForModelType(y.dtype, [&](auto to) {
        ForModelType(x.dtype, [&](auto from) {
          using Y = typename decltype(to)::type;
          using X = typename decltype(from)::type;
          ForSpans(*pool, rows, columns, [&](int64_t row, int64_t first, int64_t count) {
            AddSpan(y.as<Y>(row) + first, x.as<X>(row) + first, count);
          });
        });
      });
    });
  }

  void AddRows(Stream& s, Tensor y, Tensor x, Tensor cu, Tensor len) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      if (!CheckRows(*stream, "AddRows", cu, len, x.rows())) return;
      const int64_t columns = x.row_elements();
      ForModelType(y.dtype, [&](auto to) {
        ForModelType(x.dtype, [&](auto from) {
          using Y = typename decltype(to)::type;
          using X = typename decltype(from)::type;
          for (int64_t i = 0; i + 1 < cu.rows(); ++i) {
            const int64_t begin = cu.as<int32_t>()[i];
            ForSpans(stream->pool(), Length(cu, len, i), columns,
                     [&](int64_t row, int64_t first, int64_t count) {
                       AddSpan(y.as<Y>(begin + row) + first, x.as<X>(begin + row) + first, count);
                     });
          }
        });
      });
    });
  }
};

}  // namespace

const ElementwiseKernels* Elementwise() {
  static const CpuElementwise kernels;
  return &kernels;
}

}  // namespace stretto::cpu
