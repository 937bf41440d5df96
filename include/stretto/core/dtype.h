// Element types, their sizes and names, and the scalar bf16 conversions used on the host.
#ifndef STRETTO_CORE_DTYPE_H_
#define STRETTO_CORE_DTYPE_H_

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace stretto {

enum class DType : uint8_t { kF64, kF32, kBF16, kF16, kE4M3, kE5M2, kI32, kI64, kU8 };

// Bytes per element.
constexpr int64_t SizeOf(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kE4M3:
    case DType::kE5M2:
    case DType::kU8:
      return 1;
  }
  return 0;
}

// "f64", "f32", "bf16", "f16", "e4m3", "e5m2", "i32", "i64", "u8".
const char* Name(DType dtype);
std::optional<DType> ParseDType(const std::string& name);

// A bfloat16 as stored: the upper half of an f32. Arithmetic is done in f32.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  // Rounds to nearest, ties to even; NaN stays NaN.
  explicit BFloat16(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) {
      bits = static_cast<uint16_t>((u >> 16) | 0x0040u);
    } else {
      bits = static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
  }
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
};
static_assert(sizeof(BFloat16) == 2);

// The DType that stores a C++ type: DTypeOf<float>::value.
template <class T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};

}  // namespace stretto

#endif  // STRETTO_CORE_DTYPE_H_
