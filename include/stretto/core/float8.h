// The two 8-bit floating-point types of Micikevicius et al. 2022, "FP8 Formats for Deep Learning":
// E4M3 for values and weights, E5M2 where range counts for more than precision. Host code.
#ifndef STRETTO_CORE_FLOAT8_H_
#define STRETTO_CORE_FLOAT8_H_

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "stretto/core/dtype.h"

namespace stretto {

// A sign, 7 - kMantissa bits of exponent and kMantissa bits of mantissa. E5M2 has infinities as
// IEEE types have; E4M3 has none and one NaN of each sign (0x7f, 0xff), which leaves room for 448.
template <int kMantissa>
struct Float8 {
  static_assert(kMantissa == 3 || kMantissa == 2, "E4M3 or E5M2");
  static constexpr int kBias = kMantissa == 3 ? 7 : 15;
  static constexpr float kMax = kMantissa == 3 ? 448.0f : 57344.0f;  // largest finite value

  uint8_t bits = 0;

  Float8() = default;
  // Rounds to nearest, ties to even. Saturates: what is larger than kMax, infinities included,
  // becomes kMax, so that one outlier does not turn a product into NaN. NaN stays NaN.
  explicit Float8(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint8_t>(u >> 24 & 0x80u);
    const float magnitude = std::bit_cast<float>(u & 0x7fffffffu);
    if (magnitude != magnitude) {
      bits = sign | 0x7fu;
      return;
    }
    const float a = std::min(magnitude, kMax);
    uint32_t code;
    if (a < kSmallestNormal) {
      // One unit of the sum's mantissa is one step of the denormals, so the addition rounds.
      code =
          std::bit_cast<uint32_t>(a + kRoundDenormals) - std::bit_cast<uint32_t>(kRoundDenormals);
    } else {
      const uint32_t b = std::bit_cast<uint32_t>(a);
      constexpr int kDrop = 23 - kMantissa;
      const uint32_t rounded = b + ((1u << (kDrop - 1)) - 1) + (b >> kDrop & 1u);
      code = (rounded >> kDrop) - (static_cast<uint32_t>(127 - kBias) << kMantissa);
    }
    bits = static_cast<uint8_t>(sign | code);
  }

  explicit operator float() const { return kValues[bits]; }

 private:
  static constexpr float kSmallestNormal = kMantissa == 3 ? 0x1p-6f : 0x1p-14f;
  // 2^23 denormal steps.
  static constexpr float kRoundDenormals = kMantissa == 3 ? 0x1p14f : 0x1p7f;

  static constexpr std::array<float, 256> Values() {
    constexpr uint32_t kExponents = 1u << (7 - kMantissa);
    constexpr float kStep = kSmallestNormal / (1 << kMantissa);  // of the denormals
    std::array<float, 256> values = {};
    for (uint32_t code = 0; code < 256; ++code) {
      const uint32_t exponent = (code & 0x7fu) >> kMantissa;
      const uint32_t mantissa = code & ((1u << kMantissa) - 1);
      float v = static_cast<float>(mantissa) * kStep;
      if (kMantissa == 3 && (code & 0x7fu) == 0x7fu) {
        v = std::numeric_limits<float>::quiet_NaN();
      } else if (kMantissa == 2 && exponent == kExponents - 1) {
        v = mantissa == 0 ? std::numeric_limits<float>::infinity()
                          : std::numeric_limits<float>::quiet_NaN();
      } else if (exponent > 0) {
        v = std::bit_cast<float>((exponent + 127 - kBias) << 23 | mantissa << (23 - kMantissa));
      }
      values[code] = (code & 0x80u) != 0 ? -v : v;
    }
    return values;
  }
  static const std::array<float, 256> kValues;
};
template <int kMantissa>
inline constexpr std::array<float, 256> Float8<kMantissa>::kValues = Float8<kMantissa>::Values();

using E4M3 = Float8<3>;
using E5M2 = Float8<2>;
static_assert(sizeof(E4M3) == 1 && sizeof(E5M2) == 1);

template <>
struct DTypeOf<E4M3> {
  static constexpr DType value = DType::kE4M3;
};
template <>
struct DTypeOf<E5M2> {
  static constexpr DType value = DType::kE5M2;
};

constexpr bool IsFloat8(DType dtype) { return dtype == DType::kE4M3 || dtype == DType::kE5M2; }

// Largest finite value of an FP8 type; 0 for others.
constexpr float Float8Max(DType dtype) {
  return dtype == DType::kE4M3 ? E4M3::kMax : dtype == DType::kE5M2 ? E5M2::kMax : 0.0f;
}

}  // namespace stretto

#endif  // STRETTO_CORE_FLOAT8_H_
