#include "src/ops/check.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace stretto::ops {

Check::Check(const Context& context, const char* op, std::initializer_list<Operand> operands)
    : context_(context), op_(op) {
  assert(operands.size() <= kMaxOperands);
  // All are known before the first requirement: a failure lists every operand.
  for (const Operand& operand : operands) {
    names_[count_] = operand.name;
    tensors_[count_++] = &operand.tensor;
  }
  for (const Operand& operand : operands) {
    const Tensor& t = operand.tensor;
    if (!t.present()) continue;
    That(t.device.kind == context.kernels->device, "operands must be on the kernels' device");
    That(t.rows() <= 1 || t.row_stride >= t.row_elements(), "rows must not overlap");
  }
}

Check& Check::Supported(DType dtype) {
  return That(context_.kernels->supports(dtype), "the backend has no kernels for this type");
}

void Check::Fail(const char* rule) {
  ok_ = false;
  std::string text = absl::StrCat(op_, ": ", rule, "; got ");
  const char* separator = "";
  for (int i = 0; i < count_; ++i) {
    const Tensor& t = *tensors_[i];
    absl::StrAppend(&text, separator, names_[i], " ",
                    t.rank == 0 && !t.present() ? std::string("absent") : Describe(t));
    separator = ", ";
  }
  context_.stream->Fail(absl::InvalidArgumentError(text));
}

}  // namespace stretto::ops
