#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/cuda/families.h"
#include "kernels/cuda/named_rows.cuh"
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

// Pairs of f32 tensors, handed over with the launch.
struct Pairs {
  static constexpr int kMost = 100;  // 2.8 KiB of the 4 KiB that a launch takes
  float* y[kMost];
  const float* x[kMost];
  int64_t elements[kMost];
  int first_block[kMost];
  int count = 0;
};
constexpr int kPairThreads = 256;
constexpr int64_t kPairBlock = 8192;  // elements

// N elements at a time.
template <int N, bool kAdd>
__device__ void PairRange(float* y, const float* x, int64_t begin, int64_t end) {
  for (int64_t i = begin + int64_t{threadIdx.x} * N; i < end; i += kPairThreads * N) {
    const int n = end - i >= N ? N : static_cast<int>(end - i);
    float v[N], old[N];
    LoadVec(v, x + i, n);
    if constexpr (kAdd) {
      LoadVec(old, y + i, n);
      for (int k = 0; k < N; ++k) v[k] += old[k];
    }
    StoreVec(y + i, v, n);
  }
}

template <bool kAdd>
__global__ void __launch_bounds__(kPairThreads) PairsKernel(const __grid_constant__ Pairs pairs) {
  const int block = static_cast<int>(blockIdx.x);
  int pair = 0;  // the last one that begins at this block or before
  for (int end = pairs.count; end - pair > 1;) {
    const int middle = (pair + end) / 2;
    (pairs.first_block[middle] <= block ? pair : end) = middle;
  }
  float* const y = pairs.y[pair];
  const float* const x = pairs.x[pair];
  const int64_t begin = (block - pairs.first_block[pair]) * kPairBlock;
  const int64_t end = min(pairs.elements[pair], begin + kPairBlock);
  const auto places = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x);
  if (places % alignof(Vec<float, 4>) == 0) {
    PairRange<4, kAdd>(y, x, begin, end);
  } else {
    PairRange<1, kAdd>(y, x, begin, end);
  }
}

template <bool kAdd>
void ForPairs(Stream& s, const char* name, std::span<const Tensor> y, std::span<const Tensor> x) {
  Pairs pairs;
  int blocks = 0;
  const auto launch = [&] {
    if (blocks == 0) return;
    PairsKernel<kAdd><<<blocks, kPairThreads, 0, Native(s)>>>(pairs);
    Launched(s, name);
    pairs.count = blocks = 0;
  };
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t elements = x[i].elements();
    if (elements == 0) continue;
    const int more = static_cast<int>((elements + kPairBlock - 1) / kPairBlock);
    pairs.y[pairs.count] = y[i].as<float>();
    pairs.x[pairs.count] = x[i].as<float>();
    pairs.elements[pairs.count] = elements;
    pairs.first_block[pairs.count++] = blocks;
    blocks += more;
    if (pairs.count == Pairs::kMost) launch();
  }
  launch();
}

// One block for each row, of which a thread has kWidth elements at a time.
template <class Y, class X, int kWidth>
__global__ void AddRowsKernel(Y* y, int64_t y_stride, const X* x, int64_t x_stride, int64_t columns,
                              NamedRows rows) {
  const int64_t row = blockIdx.x;
  if (!rows.Has(row)) return;
  y += row * y_stride;
  x += row * x_stride;
  for (int64_t i = int64_t{threadIdx.x} * kWidth; i < columns; i += int64_t{blockDim.x} * kWidth) {
    Acc<Y> v[kWidth], old[kWidth];
    LoadVec(v, x + i, kWidth);
    LoadVec(old, y + i, kWidth);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] += old[j];
    StoreVec(y + i, v, kWidth);
  }
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

  void AddRows(Stream& s, Tensor y, Tensor x, Tensor cu, Tensor len) const override {
    if (x.elements() == 0) return;
    ForRealType(y.dtype, [&](auto to) {
      ForRealType(x.dtype, [&](auto from) {
        using Y = typename decltype(to)::type;
        using X = typename decltype(from)::type;
        constexpr int kWidth = kStep<Y, X>;
        const int64_t columns = x.row_elements();
        const bool wide = RowsAligned(y) && RowsAligned(x) && columns % kWidth == 0;
        const auto kernel = wide ? &AddRowsKernel<Y, X, kWidth> : &AddRowsKernel<Y, X, 1>;
        kernel<<<static_cast<unsigned>(x.rows()), 128, 0, Native(s)>>>(
            Data<Y>(y), y.row_stride, Data<const X>(x), x.row_stride, columns, NamedRows(cu, len));
        Launched(s, "AddRows");
      });
    });
  }

  void CopyMany(Stream& s, std::span<const Tensor> y, std::span<const Tensor> x) const override {
    if (!AllF32(y, x)) return ElementwiseKernels::CopyMany(s, y, x);
    ForPairs<false>(s, "CopyMany", y, x);
  }

  void AddMany(Stream& s, std::span<const Tensor> y, std::span<const Tensor> x) const override {
    if (!AllF32(y, x)) return ElementwiseKernels::AddMany(s, y, x);
    ForPairs<true>(s, "AddMany", y, x);
  }

 private:
  static bool AllF32(std::span<const Tensor> y, std::span<const Tensor> x) {
    return y.empty() || (y[0].dtype == DType::kF32 && x[0].dtype == DType::kF32);
  }
};

}  // namespace

const ElementwiseKernels* Elementwise() {
  static const CudaElementwise kernels;
  return &kernels;
}

}  // namespace stretto::cuda
