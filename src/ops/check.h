// Checks of operands before work is enqueued.
#ifndef STRETTO_SRC_OPS_CHECK_H_
#define STRETTO_SRC_OPS_CHECK_H_

#include <array>
#include <cassert>
#include <initializer_list>

#include "stretto/ops/ops.h"

namespace stretto::ops {

struct Operand {
  const char* name;
  const Tensor& tensor;  // must outlive the check
};

// Collects the requirements of one operation. The first one that fails fails the stream with a
// sentence that names the operation, the requirement and every operand; ok() then stays false and
// nothing may be enqueued. Costs comparisons only as long as everything fits.
class Check {
 public:
  // Also checks that operands are of the stream's device and that their rows do not overlap.
  Check(const Context& context, const char* op, std::initializer_list<Operand> operands);

  Check& That(bool requirement, const char* rule) {
    if (ok_ && !requirement) Fail(rule);
    return *this;
  }
  // Model types that the backend has kernels for.
  Check& Supported(DType dtype);
  bool ok() const { return ok_; }

 private:
  void Fail(const char* rule);

  static constexpr int kMaxOperands = 14;
  const Context& context_;
  const char* op_;
  std::array<const char*, kMaxOperands> names_ = {};
  std::array<const Tensor*, kMaxOperands> tensors_ = {};
  int count_ = 0;
  bool ok_ = true;
};

// Whether `t` holds `dims` elements of `dtype`. Empty operands may lack an address.
inline bool Is(const Tensor& t, DType dtype, std::initializer_list<int64_t> dims) {
  if (t.dtype != dtype || t.rank != static_cast<int>(dims.size())) return false;
  int i = 0;
  for (int64_t d : dims) {
    if (t.dims[i++] != d) return false;
  }
  return t.present() || t.elements() == 0;
}

inline bool IsOrAbsent(const Tensor& t, DType dtype, std::initializer_list<int64_t> dims) {
  return !t.present() || Is(t, dtype, dims);
}

// Whether `t` has the type and dimensions of `like`.
inline bool Like(const Tensor& t, const Tensor& like, DType dtype) {
  return t.dtype == dtype && SameShape(t, like) && (t.present() || t.elements() == 0);
}

// Whether `cu` and `len` name the rows of sequences: i32 [sequences + 1] and [sequences].
inline bool AreRows(const Tensor& cu, const Tensor& len) {
  return cu.rank == 1 && cu.rows() >= 1 && Is(cu, DType::kI32, {cu.rows()}) &&
         (!len.present() || Is(len, DType::kI32, {cu.rows() - 1}));
}

inline bool IsMatrix(const Tensor& t) { return t.rank == 2 && (t.present() || t.elements() == 0); }

}  // namespace stretto::ops

#endif  // STRETTO_SRC_OPS_CHECK_H_
