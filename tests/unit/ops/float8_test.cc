#include "stretto/core/float8.h"

#include <cmath>
#include <limits>

#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

using reference::MatMul;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr DType kFormats[] = {DType::kE4M3, DType::kE5M2};

class Float8OpsTest : public OpsTest {
 protected:
  // One number on the device.
  Buffer One(double value) const { return run.Of(DType::kF32, {1}, Values{value}); }
  // Sums of f32 products on the CPU; the tensor cores' sums have fewer bits.
  double SumTolerance() const { return run.on_cpu() ? 4e-6 : 2e-3; }
};
INSTANTIATE_TEST_SUITE_P(, Float8OpsTest, ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.dtype == DType::kBF16;
                         })),
                         SettingName);

double Converted(double x, double scale, DType format) {
  const float y = static_cast<float>(x) * static_cast<float>(scale);
  return format == DType::kE4M3 ? static_cast<float>(E4M3(y)) : static_cast<float>(E5M2(y));
}

double Largest(const Values& x) {
  double largest = 0;
  for (double v : x) largest = std::max(largest, std::fabs(v));
  return largest;
}

// [columns, padded rows] with zeros behind the rows.
Values PaddedTranspose(const Values& x, int64_t rows, int64_t columns) {
  const int64_t padded = Float8Kernels::Padded(rows);
  Values y(columns * padded, 0.0);
  for (int64_t i = 0; i < rows * columns; ++i) y[i % columns * padded + i / columns] = x[i];
  return y;
}

struct Shape {
  int64_t rows, columns;
};
// One row, rows that are and are not whole groups of 16, one and several tiles of a GPU's blocks,
// and a last tile of 16 columns.
const Shape kShapes[] = {{1, 16}, {7, 48}, {16, 64}, {130, 80}, {300, 208}, {129, 16}, {64, 1040}};

TEST_P(Float8OpsTest, QuantizeRoundsTransposesAndMeasures) {
  for (const Shape& s : kShapes) {
    for (DType format : kFormats) {
      for (double scale : {64.0, 37.7}) {
        Buffer x = run.Make({s.rows, s.columns}, Random(s.rows * s.columns, 1, 3), 8);
        Buffer q = run.Of(format, {s.rows, s.columns}, 16);
        Buffer qt = run.Of(format, {s.columns, Float8Kernels::Padded(s.rows)}, 32);
        Buffer factor = One(scale), amax = One(0.25);
        ops::Float8Quantize(c, q, qt, x, factor, amax);
        run.ExpectOk();
        Values expected = x.Read();
        EXPECT_EQ(amax.Read()[0], std::max(0.25, Largest(expected)));
        for (double& v : expected) v = Converted(v, scale, format);
        EXPECT_EQ(q.Read(), expected) << s.rows << " " << s.columns;
        EXPECT_EQ(qt.Read(), PaddedTranspose(expected, s.rows, s.columns))
            << s.rows << " " << s.columns;
      }
    }
  }
}

TEST_P(Float8OpsTest, EachResultMayBeLeftOut) {
  const int64_t rows = 37, columns = 96;
  Buffer x = run.Make({rows, columns}, Random(rows * columns, 2)), factor = One(16);
  Buffer q = run.Of(DType::kE4M3, {rows, columns}), qt = run.Of(DType::kE4M3, {columns, 48});
  Buffer both_q = run.Of(DType::kE4M3, {rows, columns});
  Buffer both_qt = run.Of(DType::kE4M3, {columns, 48});
  Buffer amax = One(0), alone = One(0), larger = One(100);
  ops::Float8Quantize(c, both_q, both_qt, x, factor, amax);
  ops::Float8Quantize(c, q, {}, x, factor, {});
  ops::Float8Quantize(c, {}, qt, x, factor, larger);
  ops::Float8AbsMax(c, alone, x);
  run.ExpectOk();
  EXPECT_EQ(q.Read(), both_q.Read());
  EXPECT_EQ(qt.Read(), both_qt.Read());
  EXPECT_EQ(alone.Read(), amax.Read());
  EXPECT_EQ(amax.Read()[0], Largest(x.Read()));
  EXPECT_EQ(larger.Read()[0], 100);  // a larger one of an earlier micro-batch stays
}

TEST_P(Float8OpsTest, OutliersSaturateAndNaNIsSeen) {
  Values values = Random(20 * 32, 3);
  values[77] = -1e30;
  values[200] = kInfinity;
  Buffer x = run.Make({20, 32}, values), factor = One(1), amax = One(0);
  Buffer q = run.Of(DType::kE4M3, {20, 32}), qt = run.Of(DType::kE4M3, {32, 32});
  ops::Float8Quantize(c, q, qt, x, factor, amax);
  run.ExpectOk();
  EXPECT_EQ(q.Read()[77], -448);
  EXPECT_EQ(q.Read()[200], 448);
  EXPECT_EQ(amax.Read()[0], kInfinity);
  values[5] = kNaN;
  x.Write(values);
  ops::Float8Quantize(c, q, qt, x, factor, amax);
  run.ExpectOk();
  EXPECT_TRUE(std::isnan(q.Read()[5]));
  EXPECT_TRUE(std::isnan(amax.Read()[0]));
}

struct Sizes {
  int64_t m, n, k;
};
const Sizes kSizes[] = {{1, 16, 16},   {7, 48, 80},     {33, 144, 160},
                        {130, 64, 48}, {16, 496, 1040}, {500, 32, 16}};
struct Types {
  DType a, b;
};
const Types kTypes[] = {
    {DType::kE4M3, DType::kE4M3}, {DType::kE5M2, DType::kE4M3}, {DType::kE4M3, DType::kE5M2}};

TEST_P(Float8OpsTest, ProductEqualsThatOfTheCodes) {
  for (const Sizes& s : kSizes) {
    for (const Types& t : kTypes) {
      Buffer a = run.Of(t.a, {s.m, s.k}, Random(s.m * s.k, 1, 20), 16);
      Buffer b = run.Of(t.b, {s.n, s.k}, Random(s.n * s.k, 2, 30), 32);
      Buffer inverse_a = One(0.125), inverse_b = One(0.03);
      Buffer bias = run.Make({s.n}, Random(s.n, 3, 10));
      Values expected = MatMul(a.Read(), false, b.Read(), true, s.m, s.n, s.k);
      for (double& v : expected) v *= 0.125 * static_cast<double>(0.03f);
      for (bool with_bias : {false, true}) {
        for (bool fast : {false, true}) {
          Buffer d = run.Make({s.m, s.n}, 8);
          ops::Float8Product(c, d, a, b, inverse_a, inverse_b, with_bias ? bias.view() : Tensor{},
                             false, fast);
          run.ExpectOk();
          Values biased = expected;
          const Values plus = bias.Read();
          for (size_t i = 0; with_bias && i < biased.size(); ++i) biased[i] += plus[i % s.n];
          EXPECT_TRUE(Near(d.Read(), biased, run.tolerance()))
              << s.m << " " << s.n << " " << s.k << " " << Name(t.a) << " " << Name(t.b);
        }
      }
      for (DType type : {DType::kF32, DType::kBF16}) {  // added to what is there
        Buffer d = run.Of(type, {s.m, s.n}, Random(s.m * s.n, 4, 5), 8);
        const Values sum = Plus(d.Read(), expected);
        ops::Float8Product(c, d, a, b, inverse_a, inverse_b, {}, true, false);
        run.ExpectOk();
        EXPECT_TRUE(Near(d.Read(), sum, type == DType::kF32 ? SumTolerance() : run.tolerance()))
            << s.m << " " << s.n << " " << s.k << " " << Name(t.a) << " " << Name(t.b);
      }
    }
  }
}

// The tolerance must be tight enough to notice a mistake.
TEST_P(Float8OpsTest, WrongScaleIsCaught) {
  Buffer a = run.Of(DType::kE4M3, {9, 80}, Random(9 * 80, 1));
  Buffer b = run.Of(DType::kE4M3, {32, 80}, Random(32 * 80, 2));
  Buffer d = run.Of(DType::kF32, {9, 32});
  Buffer one = One(1), wrong = One(1 + 4 * SumTolerance());
  ops::Float8Product(c, d, a, b, one, wrong, {}, false, false);
  run.ExpectOk();
  EXPECT_FALSE(Near(d.Read(), MatMul(a.Read(), false, b.Read(), true, 9, 32, 80), SumTolerance()));
}

TEST_P(Float8OpsTest, NoTokensLeaveAccumulatedGradientsAlone) {
  Buffer a = run.Of(DType::kE5M2, {32, 0}), b = run.Of(DType::kE4M3, {16, 0}), one = One(1);
  Buffer d = run.Of(DType::kF32, {32, 16}, Random(512, 1));
  const Values before = d.Read();
  ops::Float8Product(c, d, a, b, one, one, {}, true, false);
  run.ExpectOk();
  EXPECT_EQ(d.Read(), before);
  ops::Float8Product(c, d, a, b, one, one, {}, false, false);
  run.ExpectOk();
  EXPECT_EQ(d.Read(), Values(512, 0.0));
}

TEST_P(Float8OpsTest, SameBitsOnEveryRun) {
  Buffer x = run.Make({130, 208}, Random(130 * 208, 1)), factor = One(32), one = One(1);
  Buffer w = run.Of(DType::kE4M3, {48, 208}, Random(48 * 208, 2));
  Buffer q = run.Of(DType::kE4M3, {130, 208});
  Buffer first = run.Of(DType::kF32, {130, 48}), again = run.Of(DType::kF32, {130, 48});
  ops::Float8Quantize(c, q, {}, x, factor, {});
  ops::Float8Product(c, first, q, w, one, one, {}, false, false);
  run.ExpectOk();
  for (int i = 0; i < 5; ++i) {
    ops::Float8Product(c, again, q, w, one, one, {}, false, false);
    run.ExpectOk();
    EXPECT_EQ(first.bytes(), again.bytes());
  }
}

// Four operands: growing, falling, always zero, and broken in the second step.
TEST_P(Float8OpsTest, ScalesFollowTheLargestOfTheHistory) {
  const int64_t steps = 3;
  Buffer scale = run.Of(DType::kF32, {4}, Values(4, 1.0));
  Buffer inverse = run.Of(DType::kF32, {4}, Values(4, 1.0));
  Buffer history = run.Of(DType::kF32, {4, steps}, Values(4 * steps, 0.0));
  Buffer limit = run.Of(DType::kF32, {4}, {448, 57344, 448, 448});
  Buffer amax = run.Of(DType::kF32, {4});
  const auto step = [&](const Values& magnitudes) {
    amax.Write(magnitudes);
    ops::Float8UpdateScales(c, scale, inverse, history, amax, limit);
    run.ExpectOk();
    EXPECT_EQ(amax.Read(), Values(4, 0.0));
    const Values s = scale.Read(), i = inverse.Read();
    for (int o = 0; o < 4; ++o) EXPECT_EQ(s[o] * i[o], 1);
    return s;
  };
  EXPECT_EQ(step({1, 8, 0, 3}), (Values{256, 4096, 1, 128}));  // 448 / 3 = 149.3
  EXPECT_EQ(step({2, 4, 0, kNaN}), (Values{128, 4096, 1, 128}));
  EXPECT_EQ(step({448, 2, 0, kInfinity}), (Values{1, 4096, 1, 128}));
  EXPECT_EQ(step({449, 1, 0, 1}), (Values{0.5, 8192, 1, 128}));  // the 8 has left the history
  EXPECT_EQ(history.Read(), (Values{449, 448, 2, 1, 2, 4, 0, 0, 0, 1, 3, 0}));
  EXPECT_EQ(step({1e-30, 1e35, 0, 0})[3], 128);
  // Extremes stay within what f32 can hold twice.
  Buffer tiny = run.Of(DType::kF32, {4}, {1e-35, 3e38, 1e-45, 5});
  ops::Float8UpdateScales(c, scale, inverse, {}, tiny, limit);
  run.ExpectOk();
  EXPECT_EQ(scale.Read(), (Values{0x1p60, 0x1p-60, 0x1p60, 64}));
  EXPECT_EQ(tiny.Read()[3], 5);  // without a history magnitudes are kept
}

TEST_P(Float8OpsTest, BiasGradientEqualsThatOfTheWholeLayer) {
  for (bool acc : {false, true}) {
    Buffer dy = run.Make({301, 48}, Random(301 * 48, 1), 8), x = run.Make({301, 3});
    x.Write(Random(301 * 3, 2));
    Buffer dw = run.Wide({48, 3}), db = run.Wide({48}), alone = run.Wide({48});
    dw.Write(Values(48 * 3, 0.0));
    db.Write(Random(48, 3));
    alone.Write(db.Read());
    ops::LinearBackwardWeight(c, dw, db, dy, x, acc);
    ops::LinearBackwardBias(c, alone, dy, acc);
    run.ExpectOk();
    EXPECT_TRUE(Near(alone.Read(), db.Read(), run.wide_tolerance()));
  }
}

TEST_P(Float8OpsTest, RefusesWhatTheTensorCoresCannotDo) {
  Buffer one = One(1), d = run.Make({32, 32});
  const auto refused = [&](const auto& enqueue) {
    Runner other(GetParam());
    enqueue(other.context());
    return other.Wait().code() == absl::StatusCode::kInvalidArgument;
  };
  Buffer e5m2 = run.Of(DType::kE5M2, {32, 32}), e4m3 = run.Of(DType::kE4M3, {32, 32});
  EXPECT_TRUE(refused(
      [&](ops::Context o) { ops::Float8Product(o, d, e5m2, e5m2, one, one, {}, false, false); }));
  Buffer narrow = run.Of(DType::kE4M3, {32, 24});
  EXPECT_TRUE(refused([&](ops::Context o) {
    ops::Float8Product(o, d, narrow, narrow, one, one, {}, false, false);
  }));
  Buffer odd = run.Of(DType::kE4M3, {32, 32}, 5);  // rows at odd addresses
  EXPECT_TRUE(refused(
      [&](ops::Context o) { ops::Float8Product(o, d, e4m3, odd, one, one, {}, false, false); }));
  EXPECT_TRUE(refused(
      [&](ops::Context o) { ops::Float8Quantize(o, e4m3, e5m2, d, one, {}); }));  // two types
  Buffer factors = run.Of(DType::kF32, {8}, Values(8, 1.0));
  for (const int64_t at : {1, 4}) {
    EXPECT_EQ(at % 4 != 0, refused([&](ops::Context o) {
                ops::Float8Product(o, d, e4m3, e4m3, one, factors.view().Rows(at, 1), {}, false,
                                   false);
              }));
  }
  EXPECT_FALSE(refused(
      [&](ops::Context o) { ops::Float8Product(o, d, e4m3, e5m2, one, one, {}, false, false); }));
}

}  // namespace
}  // namespace stretto::test
