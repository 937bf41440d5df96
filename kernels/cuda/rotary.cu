#include <cstdint>

#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

constexpr int kThreads = 256;

struct RotaryShape {
  int64_t tokens;
  int64_t heads;
  int64_t half;       // pairs in a head
  int64_t positions;  // rows of the tables
  float sign;         // of the sine
};

// One thread turns N neighbouring pairs of one head: element i of the first half goes with element
// i of the second. The table row of a token is shared by all its heads, which find it in L1.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    RotaryKernel(Rows<T> y, Rows<T> x, const int32_t* __restrict__ positions, Rows<float> cos,
                 Rows<float> sin, RotaryShape shape, DeviceFault* fault) {
  const uint64_t chunks = shape.half / N;
  const uint64_t units = shape.heads * chunks;  // of a token
  const uint64_t index = uint64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t token = index / units;
  if (token >= shape.tokens) return;
  const uint64_t unit = index - token * units;
  const int64_t head = unit / chunks;
  const int64_t at = (unit - head * chunks) * N;

  const int32_t position = positions[token];
  if (position < 0 || position >= shape.positions) {
    if (unit == 0) Report(fault, DeviceFault::kRotaryPosition, position, token, shape.positions);
    return;
  }
  const int64_t column = head * 2 * shape.half + at;
  float a[N], b[N], c[N], s[N];
  LoadVec(a, x.At(token, column), N);
  LoadVec(b, x.At(token, column + shape.half), N);
  LoadVec(c, cos.At(position, at), N);
  LoadVec(s, sin.At(position, at), N);
  for (int i = 0; i < N; ++i) {
    const float turned = s[i] * shape.sign;
    const float first = a[i] * c[i] - b[i] * turned;
    b[i] = b[i] * c[i] + a[i] * turned;
    a[i] = first;
  }
  StoreVec(y.At(token, column), a, N);
  StoreVec(y.At(token, column + shape.half), b, N);
}

template <class T, int N>
void Launch(Stream& s, const Tensor& y, const Tensor& x, const Tensor& positions, const Tensor& cos,
            const Tensor& sin, const RotaryShape& shape) {
  const int64_t threads = shape.tokens * shape.heads * (shape.half / N);
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  RotaryKernel<T, N><<<blocks, kThreads, 0, Native(s)>>>(Rows<T>(y), Rows<T>(x),
                                                         Data<int32_t>(positions), Rows<float>(cos),
                                                         Rows<float>(sin), shape, s.fault());
  Launched(s, "Rotary");
}

class CudaRotary final : public RotaryKernels {
 public:
  void Apply(Stream& s, Tensor y, Tensor x, Tensor positions, Tensor cos, Tensor sin,
             bool inverse) const override {
    if (x.elements() == 0) return;
    const RotaryShape shape = {.tokens = x.dims[0],
                               .heads = x.dims[1],
                               .half = x.dims[2] / 2,
                               .positions = cos.rows(),
                               .sign = inverse ? -1.0f : 1.0f};
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int kStep = Pack<T>::kSize;
      const bool aligned = shape.half % kStep == 0 && RowsAligned(y) && RowsAligned(x) &&
                           RowsAligned(cos) && RowsAligned(sin);
      if (aligned) {
        Launch<T, kStep>(s, y, x, positions, cos, sin, shape);
      } else {
        Launch<T, 1>(s, y, x, positions, cos, sin, shape);
      }
    });
  }
};

}  // namespace

const RotaryKernels* Rotary() {
  static const CudaRotary kernels;
  return &kernels;
}

}  // namespace stretto::cuda
