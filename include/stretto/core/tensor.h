// A typed, shaped view of memory that somebody else owns.
#ifndef STRETTO_CORE_TENSOR_H_
#define STRETTO_CORE_TENSOR_H_

#include <array>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "stretto/core/device.h"
#include "stretto/core/dtype.h"

namespace stretto {

// A view: owns nothing, trivially copyable, at most five dimensions. The elements of one row (all
// dimensions but the first) are contiguous; consecutive rows are `row_stride` elements apart, so a
// tensor can be the `q` columns inside a packed `qkv` matrix. A default-constructed Tensor is
// "absent": ops take it where an operand is optional.
struct Tensor {
  static constexpr int kMaxRank = 5;

  std::byte* data = nullptr;
  DType dtype = DType::kF32;
  Device device;
  int rank = 0;
  std::array<int64_t, kMaxRank> dims = {};
  int64_t row_stride = 0;  // elements between row i and row i + 1; >= row_elements()

  // A contiguous view of `data`.
  static Tensor Of(void* data, DType dtype, std::initializer_list<int64_t> dims,
                   Device device = Device::Cpu()) {
    Tensor t;
    t.data = static_cast<std::byte*>(data);
    t.dtype = dtype;
    t.device = device;
    for (int64_t d : dims) t.dims[t.rank++] = d;
    t.row_stride = t.row_elements();
    return t;
  }

  bool present() const { return data != nullptr; }
  int64_t rows() const { return rank == 0 ? 1 : dims[0]; }
  // Elements in one row: the product of all dimensions but the first.
  int64_t row_elements() const {
    int64_t n = 1;
    for (int i = 1; i < rank; ++i) n *= dims[i];
    return n;
  }
  int64_t elements() const { return rows() * row_elements(); }
  int64_t bytes() const { return elements() * SizeOf(dtype); }
  bool contiguous() const { return rows() <= 1 || row_stride == row_elements(); }

  // The first element of row `row`, as T. T must be the stored type.
  template <class T>
  T* as(int64_t row = 0) const {
    assert(DTypeOf<T>::value == dtype);
    return reinterpret_cast<T*>(data) + row * row_stride;
  }

  // Rows [begin, begin + count).
  Tensor Rows(int64_t begin, int64_t count) const {
    assert(begin >= 0 && count >= 0 && begin + count <= rows());
    Tensor t = *this;
    t.data += begin * row_stride * SizeOf(dtype);
    t.dims[0] = count;
    return t;
  }
  // Columns [begin, begin + count) of a matrix; the row stride stays.
  Tensor Columns(int64_t begin, int64_t count) const {
    assert(rank == 2 && begin >= 0 && count >= 0 && begin + count <= dims[1]);
    Tensor t = *this;
    t.data += begin * SizeOf(dtype);
    t.dims[1] = count;
    return t;
  }
  // The same elements seen as rows of `heads` heads: [rows, heads, row_elements / heads].
  Tensor Heads(int64_t heads) const {
    assert(rank == 2 && heads > 0 && dims[1] % heads == 0);
    Tensor t = *this;
    t.rank = 3;
    t.dims[1] = heads;
    t.dims[2] = dims[1] / heads;
    return t;
  }
  // A contiguous tensor as one dimension.
  Tensor Flat() const {
    assert(contiguous());
    Tensor t = *this;
    t.rank = 1;
    t.dims = {elements()};
    t.row_stride = 1;
    return t;
  }
};

// "bf16[256, 768] stride 2304 on cpu".
std::string Describe(const Tensor& tensor);

// True when both have the same rank and dimensions (strides and types may differ).
bool SameShape(const Tensor& a, const Tensor& b);

}  // namespace stretto

#endif  // STRETTO_CORE_TENSOR_H_
