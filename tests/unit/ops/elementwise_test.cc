#include "support/ops_fixture.h"

namespace stretto::test {
namespace {

class ElementwiseTest : public OpsTest {};
STRETTO_ALL_SETTINGS(ElementwiseTest);

TEST_P(ElementwiseTest, CopyAndAddConvert) {
  const int64_t rows = 103, n = 107;
  for (DType from : {DType::kF64, DType::kF32, DType::kBF16}) {
    if (from == DType::kF64 && !run.on_cpu()) continue;  // no such model type elsewhere
    for (int64_t padding : {0, 3}) {
      Buffer x(from, {rows, n}, Random(rows * n, 1), padding);
      Buffer y = run.Make({rows, n}, 2 * padding);
      ops::Copy(c, y, x);
      run.ExpectOk();
      // Rounded exactly once, so equal to what the test's own conversion stores.
      EXPECT_EQ(y.Read(), run.Make({rows, n}, x.Read()).Read());
      Buffer z = run.Make({rows, n}, Random(rows * n, 2), padding);
      const Values expected = Plus(z.Read(), x.Read());
      ops::Add(c, z, x);
      run.ExpectOk();
      EXPECT_TRUE(Near(z.Read(), expected, run.tolerance()));
    }
  }
}

TEST_P(ElementwiseTest, ZeroStaysInsideTheRows) {
  Buffer x = run.Make({31, 7}, Random(217, 1), 4);
  ops::Zero(c, x);
  run.ExpectOk();
  EXPECT_EQ(x.Read(), Values(217, 0.0));
}

TEST(Bf16Test, RoundsToNearestEvenAndKeepsNan) {
  Runner run({DType::kF32});
  const Values in = {1.00390625, 1.01171875, -1.00390625, 1e-40, 3.4e38, INFINITY, NAN, 0, 1, 2};
  Buffer x = run.Make({10}, in), y(DType::kBF16, {10});
  ops::Copy(run.context(), y, x);
  run.ExpectOk();
  const Values out = y.Read();
  EXPECT_EQ(out[0], 1.0);       // a tie: down to even
  EXPECT_EQ(out[1], 1.015625);  // a tie: up to even
  EXPECT_EQ(out[2], -1.0);
  EXPECT_EQ(out[4], INFINITY);
  EXPECT_EQ(out[5], INFINITY);
  EXPECT_TRUE(std::isnan(out[6]));
  EXPECT_EQ(out[9], 2);
}

}  // namespace
}  // namespace stretto::test
