// Vectors of 32 bytes in the compiler's own vector types: 8 f32 or 4 f64 lanes, bf16 widened to f32
// on load. Full and partial vectors run the same lane-wise code, so an element's bits do not depend
// on where a range was cut.
#ifndef STRETTO_KERNELS_CPU_SIMD_H_
#define STRETTO_KERNELS_CPU_SIMD_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "stretto/core/dtype.h"

namespace stretto::cpu {

// The type that arithmetic on T is done in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(32)));
  typedef int32_t mask __attribute__((vector_size(32)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(32)));
  typedef int64_t mask __attribute__((vector_size(32)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
inline constexpr int kLanes = 32 / static_cast<int>(sizeof(A));

typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));

// A lane count known to be a whole vector.
template <class A>
using Full = std::integral_constant<int, kLanes<A>>;

inline float Widen(BFloat16 x) { return static_cast<float>(x); }
inline float Widen(float x) { return x; }
inline double Widen(double x) { return x; }
template <class T>
inline T Narrow(Acc<T> x) {
  return static_cast<T>(x);
}

// The first `n` elements at p in the low lanes, zero elsewhere. n: Full<A> or an int below it.
template <class T, class N>
inline Vec<Acc<T>> Load(const T* p, N n) {
  using A = Acc<T>;
  if constexpr (std::is_same_v<T, BFloat16>) {
    U16x8 raw = {};
    std::memcpy(&raw, p, sizeof(BFloat16) * n);
    return std::bit_cast<Vec<float>>(__builtin_convertvector(raw, U32x8) << 16);
  } else {
    Vec<A> v = {};
    std::memcpy(&v, p, sizeof(A) * n);
    return v;
  }
}

template <class T, class N>
inline void Store(T* p, Vec<Acc<T>> v, N n) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    // Round to nearest even; a NaN keeps its upper half and becomes quiet.
    const U32x8 u = std::bit_cast<U32x8>(v);
    const U32x8 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U32x8 nan = (u >> 16) | 0x40u;
    const U16x8 raw =
        __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16x8);
    std::memcpy(static_cast<void*>(p), &raw, sizeof(BFloat16) * n);
  } else {
    std::memcpy(p, &v, sizeof(T) * n);
  }
}

// Calls body(i, lanes) over [0, n) in steps of a vector; `lanes` is Full<A> but for a rest.
template <class A, class Body>
inline void VecLoop(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) body(i, Full<A>{});
  if (i < n) body(i, static_cast<int>(n - i));
}

template <class A>
inline Vec<A> Splat(A x) {
  return Vec<A>{} + x;
}

// Zeroes the lanes from n on.
template <class A, class N>
inline Vec<A> KeepFirst(Vec<A> v, N n) {
  if constexpr (std::is_same_v<N, Full<A>>) {
    return v;
  } else {
    for (int i = n; i < kLanes<A>; ++i) v[i] = 0;
    return v;
  }
}

template <class A>
inline A Sum(Vec<A> v) {
  A half[kLanes<A> / 2];
  for (int i = 0; i < kLanes<A> / 2; ++i) half[i] = v[i] + v[i + kLanes<A> / 2];
  if constexpr (kLanes<A> == 8) {
    return (half[0] + half[2]) + (half[1] + half[3]);
  } else {
    return half[0] + half[1];
  }
}

template <class A>
inline A Max(Vec<A> v) {
  A m = v[0];
  for (int i = 1; i < kLanes<A>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// NaN stays NaN.
template <class V, class A>
inline V Clamp(V x, A low, A high) {
  x = x < low ? V{} + low : x;
  return x > high ? V{} + high : x;
}

// exp to about 1 ulp. Below the smallest normal number the result is 0; above 88.3 it saturates at
// 2.3e38 instead of overflowing, so e / (1 + e) forms need no guards. NaN stays NaN. Range
// reduction and polynomial after Moshier's Cephes library.
inline Vec<float> Exp(Vec<float> x0) {
  using V = Vec<float>;
  const V x = Clamp(x0, -87.33f, 88.3f);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * 1.44269504088896341f + kRound) - kRound;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const auto exponent = (__builtin_convertvector(n, VecOf<float>::mask) + 127) << 23;
  const V y = p * std::bit_cast<V>(exponent);
  return x0 < -87.33f ? V{} : y;
}

inline Vec<double> Exp(Vec<double> x) {
  x = Clamp(x, -745.0, 709.0);
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_SIMD_H_
