// What the kernel files share: choosing a C++ type, per-thread scratch memory, and walking strided
// matrices.
#ifndef STRETTO_KERNELS_CPU_SUPPORT_H_
#define STRETTO_KERNELS_CPU_SUPPORT_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/simd.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cpu {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>) for a model type; ops has refused every other type.
template <class F>
void ForModelType(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF64:
      return f(Type<double>{});
    case DType::kF32:
      return f(Type<float>{});
    case DType::kBF16:
      return f(Type<BFloat16>{});
    default:
      return;
  }
}

// Who uses a piece of scratch; a kernel may hold several at once.
enum ScratchUse : int { kScratchA, kScratchB, kScratchC, kScratchD, kScratchUses };

// At least `bytes` bytes aligned to 64, owned by the calling thread, kept until it ends and grown
// only when a larger request comes: a step that was run before allocates nothing. The content does
// not survive the next request for the same use on the same thread.
std::byte* ScratchBytes(ScratchUse use, int64_t bytes);

template <class T>
T* Scratch(ScratchUse use, int64_t count) {
  return reinterpret_cast<T*>(ScratchBytes(use, count * static_cast<int64_t>(sizeof(T))));
}

// Work below this many elements is not worth waking the pool for.
inline constexpr int64_t kSerialElements = 8192;

// Cuts a matrix of rows x columns over the pool and calls body(row, first column, columns) for
// spans inside one row. A caller whose operands are all contiguous passes one long row (see
// AsOneRow).
template <class Body>
void ForSpans(ThreadPool& pool, int64_t rows, int64_t columns, const Body& body) {
  pool.ParallelFor(
      rows * columns, 64,
      [&](int64_t begin, int64_t end, int) {
        while (begin < end) {
          const int64_t row = begin / columns;
          const int64_t column = begin - row * columns;
          const int64_t count = std::min(columns - column, end - begin);
          body(row, column, count);
          begin += count;
        }
      },
      kSerialElements);
}

// The same elements as one row when every operand is contiguous.
template <class... Tensors>
void AsOneRow(int64_t& rows, int64_t& columns, const Tensors&... tensors) {
  if ((tensors.contiguous() && ...)) {
    columns *= rows;
    rows = 1;
  }
}

}  // namespace stretto::cpu

#endif  // STRETTO_KERNELS_CPU_SUPPORT_H_
