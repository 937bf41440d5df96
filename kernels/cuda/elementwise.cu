#include <cstddef>
#include <cstdint>

#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

// f64 is no model type here, but step scalars are f64.
template <class F>
void ForRealType(DType dtype, const F& f) {
  if (dtype == DType::kF64) return f(Type<double>{});
  ForModelType(dtype, f);
}

// What the result is computed in: f64 goes to bf16 through f32, as on the CPU.
template <class Y>
using Acc = std::conditional_t<std::is_same_v<Y, double>, double, float>;

// Elements of the wider type that fit one access.
template <class Y, class X>
inline constexpr int kStep = 16 / static_cast<int>(sizeof(Y) > sizeof(X) ? sizeof(Y) : sizeof(X));

template <class Y, class X, bool kAdd>
struct ConvertBody {
  Rows<Y> y;
  Rows<X> x;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    Acc<Y> v[N], old[N];
    LoadVec(v, x.At(row, column), n);
    if constexpr (kAdd) {
      LoadVec(old, y.At(row, column), n);
      for (int i = 0; i < N; ++i) v[i] += old[i];
    }
    StoreVec(y.At(row, column), v, n);
  }
};

template <bool kAdd>
void Convert(Stream& s, const char* name, const Tensor& y, const Tensor& x) {
  ForRealType(y.dtype, [&](auto to) {
    ForRealType(x.dtype, [&](auto from) {
      using Y = typename decltype(to)::type;
      using X = typename decltype(from)::type;
      ForWalk<kStep<Y, X>>(s, name, Walk(y, x), ConvertBody<Y, X, kAdd>{Rows<Y>(y), Rows<X>(x)});
    });
  });
}

class CudaElementwise final : public ElementwiseKernels {
 public:
  void Zero(Stream& s, Tensor x) const override {
    if (x.elements() == 0) return;
    const size_t size = SizeOf(x.dtype);
    if (x.contiguous()) {
      cudaMemsetAsync(x.data, 0, x.elements() * size, Native(s));
    } else {
      cudaMemset2DAsync(x.data, x.row_stride * size, 0, x.row_elements() * size, x.rows(),
                        Native(s));
    }
    Launched(s, "Zero");
  }

  void Copy(Stream& s, Tensor y, Tensor x) const override {
    if (x.elements() == 0) return;
    if (y.dtype != x.dtype) return Convert<false>(s, "Copy", y, x);
    // Bytes as they are, of any type: NaN keeps its bits.
    const size_t size = SizeOf(x.dtype);
    if (y.contiguous() && x.contiguous()) {
      if (y.data == x.data) return;
      cudaMemcpyAsync(y.data, x.data, x.elements() * size, cudaMemcpyDeviceToDevice, Native(s));
    } else {
      cudaMemcpy2DAsync(y.data, y.row_stride * size, x.data, x.row_stride * size,
                        x.row_elements() * size, x.rows(), cudaMemcpyDeviceToDevice, Native(s));
    }
    Launched(s, "Copy");
  }

  void Add(Stream& s, Tensor y, Tensor x) const override { Convert<true>(s, "Add", y, x); }
};

}  // namespace

const ElementwiseKernels* Elementwise() {
  static const CudaElementwise kernels;
  return &kernels;
}

}  // namespace stretto::cuda
