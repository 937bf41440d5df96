#include "src/comm/reduce.h"

#include <algorithm>
#include <type_traits>

namespace stretto {
namespace {

// Elements that are accumulated at a time: they stay in the first-level cache.
constexpr int64_t kBlock = 1024;

struct Sum {
  template <class A>
  static A Apply(A a, A b) {
    if constexpr (std::is_integral_v<A>) {
      using U = std::make_unsigned_t<A>;  // wraps instead of overflowing
      return static_cast<A>(static_cast<U>(a) + static_cast<U>(b));
    } else {
      return a + b;
    }
  }
};
struct Max {
  template <class A>
  static A Apply(A a, A b) {
    return (b > a || b != b) ? b : a;
  }
};
struct Min {
  template <class A>
  static A Apply(A a, A b) {
    return (b < a || b != b) ? b : a;
  }
};

template <class T, class A, class Op>
void ReduceAs(std::byte* output, const std::byte* const* sources, int n, int64_t elements) {
  T* out = reinterpret_cast<T*>(output);
  if constexpr (std::is_same_v<T, A>) {
    if (n == 2) {  // by far the most frequent case, and no accumulator is needed
      const T* a = reinterpret_cast<const T*>(sources[0]);
      const T* b = reinterpret_cast<const T*>(sources[1]);
      for (int64_t i = 0; i < elements; ++i) out[i] = Op::Apply(a[i], b[i]);
      return;
    }
  }
  alignas(64) A sum[kBlock];
  for (int64_t begin = 0; begin < elements; begin += kBlock) {
    const int64_t count = std::min(kBlock, elements - begin);
    const T* first = reinterpret_cast<const T*>(sources[0]) + begin;
    for (int64_t i = 0; i < count; ++i) sum[i] = static_cast<A>(first[i]);
    for (int s = 1; s < n; ++s) {
      const T* next = reinterpret_cast<const T*>(sources[s]) + begin;
      for (int64_t i = 0; i < count; ++i) sum[i] = Op::Apply(sum[i], static_cast<A>(next[i]));
    }
    for (int64_t i = 0; i < count; ++i) out[begin + i] = static_cast<T>(sum[i]);
  }
}

template <class T, class A>
void ReduceWith(ReduceOp op, std::byte* output, const std::byte* const* sources, int n,
                int64_t elements) {
  switch (op) {
    case ReduceOp::kSum:
      return ReduceAs<T, A, Sum>(output, sources, n, elements);
    case ReduceOp::kMax:
      return ReduceAs<T, A, Max>(output, sources, n, elements);
    case ReduceOp::kMin:
      return ReduceAs<T, A, Min>(output, sources, n, elements);
  }
}

}  // namespace

bool CanReduce(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16 ||
         dtype == DType::kI32 || dtype == DType::kI64;
}

void Reduce(DType dtype, ReduceOp op, std::byte* output, const std::byte* const* sources, int n,
            int64_t elements) {
  switch (dtype) {
    case DType::kF64:
      return ReduceWith<double, double>(op, output, sources, n, elements);
    case DType::kF32:
      return ReduceWith<float, float>(op, output, sources, n, elements);
    case DType::kBF16:
      return ReduceWith<BFloat16, float>(op, output, sources, n, elements);
    case DType::kI32:
      return ReduceWith<int32_t, int32_t>(op, output, sources, n, elements);
    case DType::kI64:
      return ReduceWith<int64_t, int64_t>(op, output, sources, n, elements);
    default:
      return;  // refused when the operation was submitted
  }
}

}  // namespace stretto
