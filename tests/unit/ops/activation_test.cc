#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

using reference::Dot;
using reference::NumericGradient;

class ActivationTest : public OpsTest {};
STRETTO_ALL_SETTINGS(ActivationTest);

double Derivative(double (*f)(double), double x) { return (f(x + 1e-5) - f(x - 1e-5)) / 2e-5; }

TEST_P(ActivationTest, GeluMatchesReference) {
  const int64_t rows = 91, n = 203;
  Values input = Random(rows * n, 1, 3.0);
  input[0] = 0;
  input[1] = -40;
  input[2] = 40;
  input[3] = -1e4;
  input[4] = 1e4;
  for (int64_t padding : {0, 3}) {
    Buffer x = run.Make({rows, n}, input, padding), y = run.Make({rows, n}, 2 * padding);
    ops::Gelu(c, y, x);
    run.ExpectOk();
    const Values in = x.Read(), out = y.Read();
    for (size_t i = 0; i < in.size(); ++i) {
      const double expected = reference::Gelu(in[i]);
      ASSERT_NEAR(out[i], expected, run.tolerance() * std::max(std::fabs(expected), 1e-2)) << in[i];
    }
    for (bool acc : {false, true}) {
      Buffer dy = run.Make({rows, n}, Random(rows * n, 2), padding);
      Buffer dx = run.Make({rows, n}, Random(rows * n, 3), padding);
      const Values g = dy.Read();
      Values expected = acc ? dx.Read() : Values(rows * n, 0.0);
      for (size_t i = 0; i < g.size(); ++i) {
        expected[i] += std::fabs(in[i]) > 1e3 ? (in[i] > 0) * g[i]
                                              : g[i] * Derivative(&reference::Gelu, in[i]);
      }
      ops::GeluBackward(c, dx, dy, x, acc);
      run.ExpectOk();
      EXPECT_TRUE(Near(dx.Read(), expected, std::max(run.tolerance(), 1e-8)));
    }
  }
}

TEST_P(ActivationTest, SwigluMatchesReference) {
  const int64_t rows = 67, f = 131;
  Buffer x = run.Make({rows, 2 * f}, Random(rows * 2 * f, 1, 2.0), 5);
  Buffer y = run.Make({rows, f}, 3);
  ops::Swiglu(c, y, x);
  run.ExpectOk();
  const Values in = x.Read();
  Values expected(rows * f);
  for (int64_t i = 0; i < rows * f; ++i) {
    const int64_t at = i / f * 2 * f + i % f;
    expected[i] = reference::Silu(in[at]) * in[at + f];
  }
  EXPECT_TRUE(Near(y.Read(), expected, run.tolerance()));
  for (bool acc : {false, true}) {
    Buffer dy = run.Make({rows, f}, Random(rows * f, 2), 1);
    Buffer dx = run.Make({rows, 2 * f}, Random(rows * 2 * f, 3), 7);
    const Values g = dy.Read();
    Values gradient = acc ? dx.Read() : Values(rows * 2 * f, 0.0);
    for (int64_t i = 0; i < rows * f; ++i) {
      const int64_t at = i / f * 2 * f + i % f;
      gradient[at] += g[i] * in[at + f] * Derivative(&reference::Silu, in[at]);
      gradient[at + f] += g[i] * reference::Silu(in[at]);
    }
    ops::SwigluBackward(c, dx, dy, x, acc);
    run.ExpectOk();
    EXPECT_TRUE(Near(dx.Read(), gradient, std::max(run.tolerance(), 1e-8)));
  }
}

// The vectorised exponential, seen through the sigmoid: relative error of a few units in the last
// place over the whole range where the result is a normal number.
TEST(ActivationAccuracyTest, F32SigmoidIsAccurate) {
  Runner run({DType::kF32});
  const int64_t n = 40001;
  Values input(2 * n, 1.0);
  for (int64_t i = 0; i < n; ++i) input[i] = -80 + 100.0 * i / (n - 1);
  Buffer x = run.Make({1, 2 * n}, input), y = run.Make({1, n});
  ops::Swiglu(run.context(), y, x);
  run.ExpectOk();
  const Values in = x.Read(), out = y.Read();
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (in[i] == 0) continue;
    const double expected = reference::Silu(in[i]);
    worst = std::max(worst, std::fabs(out[i] - expected) / std::fabs(expected));
  }
  EXPECT_LT(worst, 4e-7);
  EXPECT_GT(worst, 0);
}

TEST(ActivationAccuracyTest, NanStaysNan) {
  Runner run({DType::kF32});
  Buffer x = run.Make({1, 3}, {NAN, 1, 2}), y = run.Make({1, 3});
  ops::Gelu(run.context(), y, x);
  run.ExpectOk();
  EXPECT_TRUE(std::isnan(y.Read()[0]));
  EXPECT_FALSE(std::isnan(y.Read()[1]));
}

// Where a range is cut must not change an element: one thread and three give the same bits.
TEST(ActivationAccuracyTest, BitsDoNotDependOnThreads) {
  Runner one({DType::kF32, 1}), three({DType::kF32, 3});
  Buffer x = one.Make({101, 211}, Random(101 * 211, 1));
  Buffer a = one.Make({101, 211}), b = three.Make({101, 211});
  ops::Gelu(one.context(), a, x);
  ops::Gelu(three.context(), b, x);
  one.ExpectOk();
  three.ExpectOk();
  EXPECT_EQ(a.bytes(), b.bytes());
}

TEST(ActivationGradientTest, SwigluMatchesCentralDifferences) {
  Runner run;
  const int64_t rows = 3, f = 5;
  Values x = Random(rows * 2 * f, 1);
  const Values r = Random(rows * f, 2);
  Buffer dx = run.Make({rows, 2 * f});
  Buffer dy = run.Make({rows, f}, r), xs = run.Make({rows, 2 * f}, x);
  ops::SwigluBackward(run.context(), dx, dy, xs, false);
  run.ExpectOk();
  const auto objective = [&] {
    Buffer input = run.Make({rows, 2 * f}, x), y = run.Make({rows, f});
    ops::Swiglu(run.context(), y, input);
    return Dot(y.Read(), r);
  };
  EXPECT_TRUE(Near(dx.Read(), NumericGradient(x, objective), 1e-8));
}

}  // namespace
}  // namespace stretto::test
