#include "support/ops_fixture.h"

namespace stretto::test {
namespace {

class OptimizerTest : public OpsTest {};
STRETTO_ALL_SETTINGS(OptimizerTest);

TEST_P(OptimizerTest, SumSquaresMatchesReference) {
  const int64_t rows = 39, n = 1003;
  for (int64_t padding : {0, 5}) {
    Buffer x = run.Make({rows, n}, Random(rows * n, 1), padding);
    Buffer total(DType::kF64, {1}, Values{7});
    double expected = 0;
    for (double v : x.Read()) expected += v * v;
    ops::SumSquares(c, total, x, false);
    run.ExpectOk();
    EXPECT_NEAR(total.Read()[0], expected, 1e-10 * expected);
    ops::SumSquares(c, total, x, true);
    run.ExpectOk();
    EXPECT_NEAR(total.Read()[0], 2 * expected, 1e-10 * expected);
  }
}

TEST_P(OptimizerTest, SumSquaresDoesNotDependOnThreads) {
  Runner one(run.serial());
  Buffer x = run.Make({200003}, Random(200003, 1));
  Buffer a(DType::kF64, {1}), b(DType::kF64, {1});
  ops::SumSquares(c, a, x, false);
  ops::SumSquares(one.context(), b, x, false);
  run.ExpectOk();
  EXPECT_EQ(a.Read()[0], b.Read()[0]);
}

Values Prepared(Values scalars, double max_norm, double max_loss) {
  Runner run;
  scalars.resize(StepScalars::kCount);
  Buffer s(DType::kF64, {StepScalars::kCount}, scalars);
  ops::PrepareStep(run.context(), s, max_norm, max_loss);
  run.ExpectOk();
  return s.Read();
}

TEST(PrepareStepTest, ScalesAndClips) {
  Values s = Prepared({30, 10, 400}, 0, 0);
  EXPECT_DOUBLE_EQ(s[StepScalars::kGradNorm], 2);
  EXPECT_DOUBLE_EQ(s[StepScalars::kScale], 0.1);
  EXPECT_EQ(s[StepScalars::kSkip], 0);
  s = Prepared({30, 10, 400}, 0.5, 0);
  EXPECT_NEAR(s[StepScalars::kScale], 0.025, 1e-7);
  s = Prepared({30, 10, 400}, 5, 0);
  EXPECT_DOUBLE_EQ(s[StepScalars::kScale], 0.1) << "a small norm is not raised";
}

TEST(PrepareStepTest, SkipsWhatMustNotBeApplied) {
  EXPECT_EQ(Prepared({NAN, 10, 400}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, INFINITY}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({0, 0, 0}, 1, 0)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, 400}, 1, 2.9)[StepScalars::kSkip], 1);
  EXPECT_EQ(Prepared({30, 10, 400}, 1, 3.1)[StepScalars::kSkip], 0);
}

Values Scalars(bool skip) {
  Values scalars(StepScalars::kCount, 0.0);
  scalars[StepScalars::kScale] = 0.1;
  scalars[StepScalars::kSkip] = skip;
  return scalars;
}

struct AdamWProblem {
  Buffer param, master, grad, m, v, scalars;
  AdamWProblem(const Runner& run, int64_t rows, int64_t n, bool skip)
      : param(run.Make({rows, n}, Random(rows * n, 1), 3)),
        master(run.wide(), {rows, n}, param.Read(), 2),
        grad(run.wide(), {rows, n}, Random(rows * n, 2, 5.0), 1),
        m(run.wide(), {rows, n}, Values(rows * n, 0.0)),
        v(run.wide(), {rows, n}, Values(rows * n, 0.0)),
        scalars(DType::kF64, {StepScalars::kCount}, Scalars(skip)) {}
  AdamWArgs Args(bool with_master, int64_t step) const {
    AdamWArgs a;
    a.param = param;
    if (with_master) a.master = master;
    a.grad = grad;
    a.m = m;
    a.v = v;
    a.scalars = scalars;
    a.lr = 0.01;
    a.weight_decay = 0.1;
    a.step = step;
    return a;
  }
};

TEST_P(OptimizerTest, AdamWMatchesReference) {
  const int64_t rows = 19, n = 523;
  for (bool with_master : {false, true}) {
    AdamWProblem p(run, rows, n, false);
    Values w = p.param.Read(), m(rows * n), v(rows * n);
    const Values g = p.grad.Read();
    for (int step = 1; step <= 3; ++step) {
      ops::AdamW(c, p.Args(with_master, step));
      for (int64_t i = 0; i < rows * n; ++i) {
        const double scaled = 0.1 * g[i];
        m[i] = 0.9 * m[i] + 0.1 * scaled;
        v[i] = 0.95 * v[i] + 0.05 * scaled * scaled;
        const double m_hat = m[i] / (1 - std::pow(0.9, step));
        const double v_hat = v[i] / (1 - std::pow(0.95, step));
        w[i] -= 0.01 * (0.1 * w[i] + m_hat / (std::sqrt(v_hat) + 1e-8));
      }
    }
    run.ExpectOk();
    // Without a master the parameter itself is rounded in each step.
    EXPECT_TRUE(Near(p.param.Read(), w, with_master ? run.tolerance() : 3 * run.tolerance()));
    EXPECT_TRUE(Near(p.m.Read(), m, run.wide_tolerance()));
    EXPECT_TRUE(Near(p.v.Read(), v, run.wide_tolerance()));
    if (with_master) {
      EXPECT_TRUE(Near(p.master.Read(), w, run.wide_tolerance()));
    }
  }
}

TEST_P(OptimizerTest, SkippedStepChangesNothing) {
  AdamWProblem p(run, 3, 5, true);
  const auto before = p.param.bytes();
  ops::AdamW(c, p.Args(true, 1));
  run.ExpectOk();
  EXPECT_EQ(p.param.bytes(), before);
  EXPECT_EQ(p.m.Read(), Values(15, 0.0));
}

}  // namespace
}  // namespace stretto::test
