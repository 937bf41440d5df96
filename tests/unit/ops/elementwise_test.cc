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

// More pairs than one launch takes, of odd lengths, some of them empty, some at odd addresses.
TEST_P(ElementwiseTest, ManyPairsAreWhatOneByOneGives) {
  constexpr int kPairs = 230;
  std::vector<int64_t> lengths, begins;
  int64_t all = 0;
  for (int i = 0; i < kPairs; ++i) {
    begins.push_back(all + (i % 3 == 0 ? 1 : 0));
    lengths.push_back(i % 7 == 3 ? 0 : i == 50 ? 30011 : 1 + i * 37 % 211);
    all = (begins.back() + lengths.back() + 7) / 4 * 4;  // something lies between them
  }
  Buffer x = run.Make({all}, Random(all, 1));
  Buffer y = run.Make({all}, Random(all, 2)), one_by_one = run.Make({all}, y.Read());
  std::vector<Tensor> from, to;
  const auto both = [&](auto many, auto one) {
    from.clear();
    to.clear();
    for (size_t i = 0; i < lengths.size(); ++i) {
      from.push_back(Tensor(x).Rows(begins[i], lengths[i]));
      to.push_back(Tensor(y).Rows(begins[i], lengths[i]));
      one(c, Tensor(one_by_one).Rows(begins[i], lengths[i]), from.back());
    }
    many(c, to, from);
    run.ExpectOk();
    EXPECT_EQ(y.Read(), one_by_one.Read());
  };
  both(ops::AddMany, ops::Add);
  both(ops::CopyMany, ops::Copy);
  both(ops::AddMany, ops::Add);
}

TEST_P(ElementwiseTest, PairsThatDoNotFitAreRefused) {
  Buffer x = run.Make({6}, Random(6, 1)), y = run.Make({7}, Random(7, 2));
  const Values before = y.Read();
  const std::vector<Tensor> longer = {Tensor(y).Rows(0, 6), y}, shorter = {x, x};
  ops::AddMany(c, longer, shorter);
  const absl::Status refused = run.Wait();
  EXPECT_NE(std::string(refused.message()).find("AddMany: each y must be shaped like its x"),
            std::string::npos)
      << refused;
  EXPECT_EQ(y.Read(), before);
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
