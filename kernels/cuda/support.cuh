// What the kernels share: choosing a C++ type, 16-byte accesses, and reductions in a fixed order.
#ifndef STRETTO_KERNELS_CUDA_SUPPORT_CUH_
#define STRETTO_KERNELS_CUDA_SUPPORT_CUH_

#include <cuda_bf16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/launch.h"
#include "src/core/device_fault.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for a model type; ops has refused every other type.
template <class F>
void ForModelType(DType dtype, const F& f) {
  if (dtype == DType::kF32) return f(Type<float>{});
  if (dtype == DType::kBF16) return f(Type<__nv_bfloat16>{});
}

template <class T>
T* Data(const Tensor& t) {
  return reinterpret_cast<T*>(t.data);
}

// 16 bytes that are read or written in one access.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

__device__ inline float Widen(float x) { return x; }
__device__ inline float Widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ T Narrow(float x);
template <>
__device__ inline float Narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 Narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float WarpSum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline double WarpSum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float WarpMax(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// The first fault of a stream is kept.
__device__ inline void Report(DeviceFault* fault, DeviceFault::Code code, int64_t value,
                              int64_t row, int64_t rows) {
  if (atomicCAS(fault->claim, 0, 1) != 0) return;
  fault->value = value;
  fault->row = row;
  fault->rows = rows;
  __threadfence_system();
  *static_cast<volatile int32_t*>(&fault->code) = code;
}

// --- Streaming kernels: every element is read and written once, where it lies. ---

__device__ inline double Widen(double x) { return x; }

// N elements that are read or written together: up to 16 bytes in one access.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vec {
  T value[N];
};

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};

// *p in accesses as wide as can be: the compiler likes to split structs into their elements.
template <class V>
__device__ inline V Read(const V* p) {
  constexpr int kBytes = sizeof(V) < 16 ? sizeof(V) : 16;
  typename WordOf<kBytes>::type words[sizeof(V) / kBytes];
  for (int i = 0; i < static_cast<int>(sizeof(V) / kBytes); ++i) {
    words[i] = reinterpret_cast<const typename WordOf<kBytes>::type*>(p)[i];
  }
  V v;
  memcpy(&v, words, sizeof(V));
  return v;
}
// The same for *p = v.
template <class V>
__device__ inline void Write(V* p, const V& v) {
  constexpr int kBytes = sizeof(V) < 16 ? sizeof(V) : 16;
  using Word = typename WordOf<kBytes>::type;
  Word words[sizeof(V) / kBytes];
  memcpy(words, &v, sizeof(V));
  // A plain store, but one that the compiler cannot split.
  for (int i = 0; i < static_cast<int>(sizeof(V) / kBytes); ++i) {
    __stwb(reinterpret_cast<Word*>(p) + i, words[i]);
  }
}
// The first n of N elements at p, widened; zero behind them. N of them are read as a Vec.
template <class A, int N, class T>
__device__ inline void LoadVec(A (&to)[N], const T* p, int n) {
  if (n == N) {
    const auto v = Read(reinterpret_cast<const Vec<T, N>*>(p));
    for (int i = 0; i < N; ++i) to[i] = static_cast<A>(Widen(v.value[i]));
  } else {
    for (int i = 0; i < N; ++i) to[i] = i < n ? static_cast<A>(Widen(p[i])) : A{0};
  }
}
template <int N, class T, class A>
__device__ inline void StoreVec(T* p, const A (&from)[N], int n) {
  const auto narrow = [](A x) {
    if constexpr (std::is_same_v<A, T>) {
      return x;
    } else {
      return Narrow<T>(x);
    }
  };
  if (n == N) {
    Vec<T, N> v;
    for (int i = 0; i < N; ++i) v.value[i] = narrow(from[i]);
    Write(reinterpret_cast<Vec<T, N>*>(p), v);
  } else {
    for (int i = 0; i < N; ++i) {
      if (i < n) p[i] = narrow(from[i]);
    }
  }
}

// A matrix as kernels see it.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t stride = 0;

  explicit Rows(const Tensor& t) : data(Data<T>(t)), stride(t.row_stride) {}
  __device__ T* At(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// How operands of one shape are walked: as one long row when all are contiguous.
struct Walk {
  int64_t rows = 0;
  int64_t columns = 0;
  bool aligned = true;  // every row of every operand starts at a multiple of 16 bytes

  template <class... Tensors>
  explicit Walk(const Tensor& first, const Tensors&... others)
      : rows(first.rows()), columns(first.row_elements()) {
    if (first.contiguous() && (others.contiguous() && ...)) {
      columns *= rows;
      rows = rows > 0 ? 1 : 0;
    }
    const auto fits = [this](const Tensor& t) {
      return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
             (rows <= 1 || t.row_stride * SizeOf(t.dtype) % 16 == 0);
    };
    aligned = fits(first) && (fits(others) && ...);
  }
};

// One thread for each N columns (fewer at the end of a row).
template <int N, class Body>
__global__ void __launch_bounds__(256) WalkKernel(Body body, int64_t rows, int64_t columns) {
  const uint64_t per_row = (columns + N - 1) / N;
  const uint64_t index = uint64_t{blockIdx.x} * 256 + threadIdx.x;
  uint64_t row = 0, at = index;
  if (rows > 1) {
    row = index / per_row;
    at = index - row * per_row;
  }
  if (row >= static_cast<uint64_t>(rows) || at >= per_row) return;
  const int64_t column = static_cast<int64_t>(at) * N;
  const int n = columns - column < N ? static_cast<int>(columns - column) : N;
  body.template Do<N>(static_cast<int64_t>(row), column, n);
}

// Runs body.Do<N>(row, column, n) over all columns, n <= N of them from `column` on: N is kStep
// (elements of the widest operand in 16 bytes) when the rows are aligned, else 1.
template <int kStep, class Body>
void ForWalk(Stream& s, const char* name, const Walk& walk, const Body& body) {
  const auto blocks = [&](int64_t step) {
    return static_cast<unsigned>((walk.rows * ((walk.columns + step - 1) / step) + 255) / 256);
  };
  if (walk.rows == 0 || walk.columns == 0) return;
  if (walk.aligned) {
    WalkKernel<kStep><<<blocks(kStep), 256, 0, Native(s)>>>(body, walk.rows, walk.columns);
  } else {
    WalkKernel<1><<<blocks(1), 256, 0, Native(s)>>>(body, walk.rows, walk.columns);
  }
  Launched(s, name);
}

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_SUPPORT_CUH_
