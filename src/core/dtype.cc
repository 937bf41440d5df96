#include "stretto/core/dtype.h"

#include <optional>
#include <string>

namespace stretto {

const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "f64";
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kE4M3:
      return "e4m3";
    case DType::kE5M2:
      return "e5m2";
    case DType::kI32:
      return "i32";
    case DType::kI64:
      return "i64";
    case DType::kU8:
      return "u8";
  }
  return "unknown";
}

std::optional<DType> ParseDType(const std::string& name) {
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kE4M3,
                      DType::kE5M2, DType::kI32, DType::kI64, DType::kU8}) {
    if (name == Name(dtype)) return dtype;
  }
  return std::nullopt;
}

}  // namespace stretto
