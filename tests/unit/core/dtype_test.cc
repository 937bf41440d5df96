#include "stretto/core/dtype.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "gtest/gtest.h"

namespace stretto {
namespace {

TEST(DTypeTest, NamesRoundTripAndSizesAgree) {
  const struct {
    DType dtype;
    const char* name;
    int64_t size;
  } kAll[] = {{DType::kF64, "f64", 8}, {DType::kF32, "f32", 4},   {DType::kBF16, "bf16", 2},
              {DType::kF16, "f16", 2}, {DType::kE4M3, "e4m3", 1}, {DType::kE5M2, "e5m2", 1},
              {DType::kI32, "i32", 4}, {DType::kI64, "i64", 8},   {DType::kU8, "u8", 1}};
  for (const auto& [dtype, name, size] : kAll) {
    EXPECT_STREQ(Name(dtype), name);
    EXPECT_EQ(ParseDType(name), dtype);
    EXPECT_EQ(SizeOf(dtype), size);
  }
  EXPECT_EQ(ParseDType("float32"), std::nullopt);
  EXPECT_EQ(ParseDType(""), std::nullopt);
}

float FromBits(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

TEST(BFloat16Test, EveryBFloat16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    BFloat16 value;
    value.bits = static_cast<uint16_t>(bits);
    const float f = static_cast<float>(value);
    const BFloat16 back(f);
    if (std::isnan(f)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(back)));
      EXPECT_EQ(back.bits >> 15, value.bits >> 15);
    } else {
      EXPECT_EQ(back.bits, value.bits);
    }
  }
}

// For every pair of neighbouring finite bfloat16 values: the exact middle goes to the even one, and
// the floats beside the middle go to the near one. Between them the rounding is monotonic, so this
// covers every finite float. The middle is found by arithmetic in double, not by bits.
TEST(BFloat16Test, RoundsToNearestEven) {
  int64_t wrong = 0;
  int64_t truncation_would_fail = 0;
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t magnitude = 0; magnitude < 0x7f7f; ++magnitude) {
      const auto low = static_cast<uint16_t>(sign | magnitude);
      const auto high = static_cast<uint16_t>(low + 1);
      const double middle = (double{FromBits(low)} + double{FromBits(high)}) / 2;
      const auto tie = static_cast<float>(middle);
      ASSERT_EQ(double{tie}, middle);
      const float toward_low = std::nextafter(tie, FromBits(low));
      const float toward_high = std::nextafter(tie, FromBits(high));
      wrong += BFloat16(tie).bits != (low % 2 == 0 ? low : high);
      wrong += BFloat16(toward_low).bits != low;
      wrong += BFloat16(toward_high).bits != high;
      truncation_would_fail += std::bit_cast<uint32_t>(toward_high) >> 16 != high;
    }
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(truncation_would_fail, 0);  // the check tells rounding from truncation
}

TEST(BFloat16Test, OverflowInfinityAndNan) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(BFloat16(kInf).bits, 0x7f80);
  EXPECT_EQ(BFloat16(-kInf).bits, 0xff80);
  EXPECT_EQ(BFloat16(std::numeric_limits<float>::max()).bits, 0x7f80);
  // The last float below the middle of the largest finite value and 2^128.
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x7f7f7fffu)).bits, 0x7f7f);
  EXPECT_EQ(BFloat16(std::bit_cast<float>(0x7f7f8000u)).bits, 0x7f80);
  // NaNs whose payload lies in the lower half only, or would carry into the sign.
  for (uint32_t bits : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u}) {
    const BFloat16 nan(std::bit_cast<float>(bits));
    EXPECT_TRUE(std::isnan(static_cast<float>(nan))) << std::hex << bits;
    EXPECT_EQ(nan.bits >> 15, bits >> 31);
  }
  EXPECT_EQ(BFloat16(-0.0f).bits, 0x8000);
}

}  // namespace
}  // namespace stretto
