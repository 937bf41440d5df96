#include "stretto/core/float8.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace stretto {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
class Float8Test : public ::testing::Test {
 protected:
  static float Value(int code) {
    T t;
    t.bits = static_cast<uint8_t>(code);
    return static_cast<float>(t);
  }
  // Codes of the finite values >= 0, ascending.
  static std::vector<int> Finite() {
    std::vector<int> codes;
    for (int code = 0; code < 128; ++code) {
      if (std::isfinite(Value(code))) codes.push_back(code);
    }
    return codes;
  }
};
using Types = ::testing::Types<E4M3, E5M2>;
TYPED_TEST_SUITE(Float8Test, Types);

// From the tables of the paper, not from the formula in the header.
TEST(Float8Values, AreThoseOfThePaper) {
  const auto e4m3 = [](uint8_t bits) {
    E4M3 x;
    x.bits = bits;
    return static_cast<float>(x);
  };
  const auto e5m2 = [](uint8_t bits) {
    E5M2 x;
    x.bits = bits;
    return static_cast<float>(x);
  };
  EXPECT_EQ(e4m3(0x7e), 448.0f);
  EXPECT_EQ(e4m3(0x08), 0x1p-6f);           // smallest normal number
  EXPECT_EQ(e4m3(0x07), 0.875f * 0x1p-6f);  // largest denormal
  EXPECT_EQ(e4m3(0x01), 0x1p-9f);           // smallest denormal
  EXPECT_EQ(e4m3(0x38), 1.0f);
  EXPECT_EQ(e4m3(0xb9), -1.125f);
  EXPECT_TRUE(std::isnan(e4m3(0x7f)) && std::isnan(e4m3(0xff)));
  EXPECT_EQ(e4m3(0x78), 256.0f);  // no infinity here
  EXPECT_EQ(e5m2(0x7b), 57344.0f);
  EXPECT_EQ(e5m2(0x04), 0x1p-14f);
  EXPECT_EQ(e5m2(0x03), 0.75f * 0x1p-14f);
  EXPECT_EQ(e5m2(0x01), 0x1p-16f);
  EXPECT_EQ(e5m2(0x3c), 1.0f);
  EXPECT_EQ(e5m2(0x7c), kInfinity);
  EXPECT_EQ(e5m2(0xfc), -kInfinity);
  EXPECT_TRUE(std::isnan(e5m2(0x7d)) && std::isnan(e5m2(0x7e)) && std::isnan(e5m2(0xff)));
}

TYPED_TEST(Float8Test, EveryCodeSurvivesTheRoundTrip) {
  for (int code = 0; code < 256; ++code) {
    const float value = this->Value(code);
    const TypeParam back(value);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(back))) << code;
      EXPECT_EQ(back.bits >> 7, code >> 7);
    } else if (std::isinf(value)) {
      EXPECT_EQ(static_cast<float>(back), std::copysign(TypeParam::kMax, value));
    } else {
      EXPECT_EQ(back.bits, code);
    }
  }
}

// Between neighbours: the middle goes to the even code, and the floats beside it to the near one.
// Rounding is monotonic, so this covers every float up to the largest value.
TYPED_TEST(Float8Test, RoundsToNearestEven) {
  const std::vector<int> codes = this->Finite();
  ASSERT_EQ(codes.size(), sizeof(TypeParam) == 1 && TypeParam::kBias == 7 ? 127u : 124u);
  int truncation_would_fail = 0;
  for (size_t i = 0; i + 1 < codes.size(); ++i) {
    const float low = this->Value(codes[i]), high = this->Value(codes[i + 1]);
    ASSERT_LT(low, high);
    const float middle = (low + high) / 2;  // exact
    for (int sign : {0, 0x80}) {
      const float s = sign == 0 ? 1.0f : -1.0f;
      EXPECT_EQ(TypeParam(s * middle).bits, sign | (codes[i] % 2 == 0 ? codes[i] : codes[i + 1]));
      EXPECT_EQ(TypeParam(s * std::nextafter(middle, low)).bits, sign | codes[i]);
      EXPECT_EQ(TypeParam(s * std::nextafter(middle, high)).bits, sign | codes[i + 1]);
    }
    truncation_would_fail += TypeParam(std::nextafter(middle, high)).bits != codes[i];
  }
  EXPECT_GT(truncation_would_fail, 100);
}

TYPED_TEST(Float8Test, SaturatesAndKeepsNaN) {
  const float most = TypeParam::kMax;
  for (float large : {std::nextafter(most, kInfinity), 1.03f * most, 1.2f * most, 1e9f,
                      std::numeric_limits<float>::max(), kInfinity}) {
    EXPECT_EQ(static_cast<float>(TypeParam(large)), most) << large;
    EXPECT_EQ(static_cast<float>(TypeParam(-large)), -most) << large;
  }
  EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(std::nanf("")))));
  EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(-std::nanf("")))));
  EXPECT_EQ(TypeParam(0.0f).bits, 0);
  EXPECT_EQ(TypeParam(-0.0f).bits, 0x80);
  EXPECT_EQ(TypeParam(std::numeric_limits<float>::denorm_min()).bits, 0);
}

TEST(Float8Types, AreKnownByTheirNumbers) {
  EXPECT_EQ(Float8Max(DType::kE4M3), 448.0f);
  EXPECT_EQ(Float8Max(DType::kE5M2), 57344.0f);
  EXPECT_EQ(Float8Max(DType::kBF16), 0.0f);
  EXPECT_TRUE(IsFloat8(DType::kE5M2));
  EXPECT_FALSE(IsFloat8(DType::kU8));
}

}  // namespace
}  // namespace stretto
