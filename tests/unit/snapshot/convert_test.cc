#include "src/snapshot/convert.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace stretto::snapshot_internal {
namespace {

TEST(ConvertTest, EveryHalfSurvivesTheWayThroughFloat) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    const bool is_nan = (half & 0x7c00) == 0x7c00 && (half & 0x3ff) != 0;
    ASSERT_EQ(std::isnan(value), is_nan) << bits;
    if (is_nan) {
      ASSERT_TRUE(std::isnan(HalfToFloat(FloatToHalf(value)))) << bits;
    } else {
      ASSERT_EQ(FloatToHalf(value), half);
    }
  }
}

TEST(ConvertTest, HalvesRoundToNearestEven) {
  // Between each pair of neighbours: the midpoint goes to the even one, a nudge decides otherwise.
  for (uint16_t low = 0; low < 0x7bff; ++low) {
    const float a = HalfToFloat(low), b = HalfToFloat(low + 1);
    const float middle = a + (b - a) / 2;  // exact in f32
    ASSERT_EQ(FloatToHalf(middle), low % 2 == 0 ? low : low + 1) << low;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, 1e9f)), low + 1) << low;
    ASSERT_EQ(FloatToHalf(std::nextafter(middle, -1e9f)), low) << low;
  }
  EXPECT_EQ(FloatToHalf(65519.996f), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0f), 0x7c00);
  EXPECT_EQ(FloatToHalf(-1e30f), 0xfc00);
  EXPECT_EQ(FloatToHalf(std::numeric_limits<float>::infinity()), 0x7c00);
  EXPECT_EQ(FloatToHalf(-0.0f), 0x8000);
}

TEST(ConvertTest, AllPairsOfFloatingTypesKeepWhatBothHold) {
  const std::vector<DType> types = {DType::kF64, DType::kF32, DType::kBF16, DType::kF16};
  const std::vector<double> values = {0.0, -1.5, 0.25, 96.0, -0.0078125};
  for (DType from : types) {
    for (DType to : types) {
      ASSERT_TRUE(CanConvert(from, to));
      std::vector<char> a(values.size() * 8), b(values.size() * 8);
      std::vector<double> back(values.size());
      ConvertElements(DType::kF64, values.data(), from, a.data(), values.size());
      ConvertElements(from, a.data(), to, b.data(), values.size());
      ConvertElements(to, b.data(), DType::kF64, back.data(), values.size());
      EXPECT_EQ(back, values) << Name(from) << " to " << Name(to);
    }
  }
}

TEST(ConvertTest, WideningIsExactAndNarrowingRounds) {
  const double third = 1.0 / 3;
  float f = 0;
  ConvertElements(DType::kF64, &third, DType::kF32, &f, 1);
  EXPECT_EQ(f, static_cast<float>(third));
  BFloat16 b;
  ConvertElements(DType::kF32, &f, DType::kBF16, &b, 1);
  EXPECT_EQ(b.bits, BFloat16(f).bits);
  double wide = 0;
  ConvertElements(DType::kBF16, &b, DType::kF64, &wide, 1);
  EXPECT_EQ(wide, static_cast<double>(static_cast<float>(b)));
}

TEST(ConvertTest, IntegersAreNotConverted) {
  EXPECT_TRUE(CanConvert(DType::kI64, DType::kI64));
  EXPECT_TRUE(CanConvert(DType::kE4M3, DType::kE4M3));
  EXPECT_FALSE(CanConvert(DType::kI64, DType::kI32));
  EXPECT_FALSE(CanConvert(DType::kI32, DType::kF32));
  EXPECT_FALSE(CanConvert(DType::kF32, DType::kE4M3));
}

}  // namespace
}  // namespace stretto::snapshot_internal
