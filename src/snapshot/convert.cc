#include "src/snapshot/convert.h"

#include <bit>
#include <cstring>
#include <type_traits>

namespace stretto::snapshot_internal {
namespace {

struct Half {
  uint16_t bits;
};

bool IsFloating(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16 ||
         dtype == DType::kF16;
}

template <class From, class To>
To ConvertOne(From value) {
  if constexpr (std::is_same_v<To, double> && std::is_arithmetic_v<From>) {
    return static_cast<double>(value);
  } else {
    float narrow;
    if constexpr (std::is_same_v<From, Half>) {
      narrow = HalfToFloat(value.bits);
    } else {
      narrow = static_cast<float>(value);
    }
    if constexpr (std::is_same_v<To, Half>) {
      return Half{FloatToHalf(narrow)};
    } else {
      return To(narrow);
    }
  }
}

template <class From, class To>
void ConvertAll(const char* in, char* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    From from;
    std::memcpy(&from, in + i * sizeof(From), sizeof(From));
    const To to = ConvertOne<From, To>(from);
    std::memcpy(out + i * sizeof(To), &to, sizeof(To));
  }
}

template <class From>
void ConvertFrom(const char* in, DType to, char* out, int64_t count) {
  switch (to) {
    case DType::kF64:
      return ConvertAll<From, double>(in, out, count);
    case DType::kF32:
      return ConvertAll<From, float>(in, out, count);
    case DType::kBF16:
      return ConvertAll<From, BFloat16>(in, out, count);
    case DType::kF16:
      return ConvertAll<From, Half>(in, out, count);
    default:
      return;
  }
}

}  // namespace

bool CanConvert(DType from, DType to) { return from == to || (IsFloating(from) && IsFloating(to)); }

void ConvertElements(DType from, const void* in, DType to, void* out, int64_t count) {
  if (count == 0) return;
  const char* source = static_cast<const char*>(in);
  char* target = static_cast<char*>(out);
  if (from == to) {
    std::memcpy(target, source, count * SizeOf(from));
    return;
  }
  switch (from) {
    case DType::kF64:
      return ConvertFrom<double>(source, to, target, count);
    case DType::kF32:
      return ConvertFrom<float>(source, to, target, count);
    case DType::kBF16:
      return ConvertFrom<BFloat16>(source, to, target, count);
    case DType::kF16:
      return ConvertFrom<Half>(source, to, target, count);
    default:
      return;
  }
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in f32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  }
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

}  // namespace stretto::snapshot_internal
