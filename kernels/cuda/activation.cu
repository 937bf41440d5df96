#include <cstdint>

#include "kernels/cuda/families.h"
#include "kernels/cuda/sigmoid.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

// gelu(x) = x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): the
// sigmoid form loses no digits where tanh(u) is near -1.
constexpr float kTwoU = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kTwoUCubic = static_cast<float>(1.5957691216057308 * 0.044715);

template <class T>
__device__ float Gelu(float x) {
  return x * Sigmoid<T>(x * (x * x * kTwoUCubic + kTwoU));
}

template <class T>
__device__ float GeluDerivative(float x) {
  // 0 and 1 exactly outside; keeps x^2 finite, and NaN, which fminf would drop.
  x = x < -40.0f ? -40.0f : x;
  x = x > 40.0f ? 40.0f : x;
  const float square = x * x;
  // 1 - s cancels only where s is near 1, and is then small against the s it is added to.
  const float s = Sigmoid<T>(x * (square * kTwoUCubic + kTwoU));
  return s + x * (s * (1.0f - s)) * (square * (3.0f * kTwoUCubic) + kTwoU);
}

template <class T>
struct GeluForwardBody {
  Rows<T> y, x;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    float v[N];
    LoadVec(v, x.At(row, column), n);
    for (int i = 0; i < N; ++i) v[i] = Gelu<T>(v[i]);
    StoreVec(y.At(row, column), v, n);
  }
};

template <class T>
struct GeluBackwardBody {
  Rows<T> dx, dy, x;
  bool acc;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    float v[N], d[N], old[N] = {};
    LoadVec(v, x.At(row, column), n);
    LoadVec(d, dy.At(row, column), n);
    if (acc) LoadVec(old, dx.At(row, column), n);
    for (int i = 0; i < N; ++i) d[i] = d[i] * GeluDerivative<T>(v[i]) + old[i];
    StoreVec(dx.At(row, column), d, n);
  }
};

template <class T>
struct SwigluForwardBody {
  Rows<T> y, x;
  int64_t f;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    float gate[N], up[N];
    LoadVec(gate, x.At(row, column), n);
    LoadVec(up, x.At(row, f + column), n);
    for (int i = 0; i < N; ++i) up[i] *= gate[i] * Sigmoid<T>(gate[i]);
    StoreVec(y.At(row, column), up, n);
  }
};

template <class T>
struct SwigluBackwardBody {
  Rows<T> dx, dy, x;
  int64_t f;
  bool acc;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    float gate[N], up[N], d[N], old_gate[N] = {}, old_up[N] = {};
    LoadVec(gate, x.At(row, column), n);
    LoadVec(up, x.At(row, f + column), n);
    LoadVec(d, dy.At(row, column), n);
    if (acc) {
      LoadVec(old_gate, dx.At(row, column), n);
      LoadVec(old_up, dx.At(row, f + column), n);
    }
    for (int i = 0; i < N; ++i) {
      const GateUp g = SwigluGradient<T>(d[i], {gate[i], up[i]}, {old_gate[i], old_up[i]});
      gate[i] = g.gate;
      up[i] = g.up;
    }
    StoreVec(dx.At(row, column), gate, n);
    StoreVec(dx.At(row, f + column), up, n);
  }
};

// Columns of y and the two halves of x go together; the second half has to be aligned as well.
Walk SwigluWalk(const Tensor& y, const Tensor& x, const Tensor& dx) {
  Walk walk(y);
  walk.rows = y.rows();
  walk.columns = y.dims[1];
  walk.aligned = RowsAligned(y) && RowsAligned(x) && RowsAligned(dx) &&
                 walk.columns * SizeOf(y.dtype) % 16 == 0;
  return walk;
}

class CudaActivation final : public ActivationKernels {
 public:
  void GeluForward(Stream& s, Tensor y, Tensor x) const override {
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ForWalk<Pack<T>::kSize>(s, "GeluForward", Walk(y, x),
                              GeluForwardBody<T>{Rows<T>(y), Rows<T>(x)});
    });
  }

  void GeluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const override {
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ForWalk<Pack<T>::kSize>(s, "GeluBackward", Walk(dx, dy, x),
                              GeluBackwardBody<T>{Rows<T>(dx), Rows<T>(dy), Rows<T>(x), acc});
    });
  }

  void SwigluForward(Stream& s, Tensor y, Tensor x) const override {
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ForWalk<Pack<T>::kSize>(s, "SwigluForward", SwigluWalk(y, x, x),
                              SwigluForwardBody<T>{Rows<T>(y), Rows<T>(x), y.dims[1]});
    });
  }

  void SwigluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const override {
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ForWalk<Pack<T>::kSize>(
          s, "SwigluBackward", SwigluWalk(dy, x, dx),
          SwigluBackwardBody<T>{Rows<T>(dx), Rows<T>(dy), Rows<T>(x), dy.dims[1], acc});
    });
  }
};

}  // namespace

const ActivationKernels* Activation() {
  static const CudaActivation kernels;
  return &kernels;
}

}  // namespace stretto::cuda
