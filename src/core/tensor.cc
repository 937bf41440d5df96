#include "stretto/core/tensor.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace stretto {

std::string Describe(const Tensor& tensor) {
  if (!tensor.present() && tensor.rank == 0) return "absent";
  std::string out = absl::StrCat(Name(tensor.dtype), "[");
  for (int i = 0; i < tensor.rank; ++i) {
    absl::StrAppend(&out, i == 0 ? "" : ", ", tensor.dims[i]);
  }
  absl::StrAppend(&out, "]");
  if (!tensor.contiguous()) absl::StrAppend(&out, " stride ", tensor.row_stride);
  absl::StrAppend(&out, " on ", Name(tensor.device));
  return out;
}

bool SameShape(const Tensor& a, const Tensor& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; ++i) {
    if (a.dims[i] != b.dims[i]) return false;
  }
  return true;
}

}  // namespace stretto
