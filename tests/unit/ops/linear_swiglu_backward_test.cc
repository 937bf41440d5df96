// The gradients of a gate and of the linear layer behind it, as one operation.

#include "absl/strings/str_cat.h"
#include "support/ops_fixture.h"
#include "support/reference_ops.h"
#include "support/with_variable.h"

namespace stretto::test {
namespace {

class LinearSwigluBackwardTest : public OpsTest {};
STRETTO_ALL_SETTINGS(LinearSwigluBackwardTest);

struct Sizes {
  int64_t tokens, out, f;
};

// The operation's operands and result, and the same by two operations.
struct Problem {
  Sizes sizes;
  Buffer dy, w, gate_up, d_gate_up, d_act, two_d_gate_up;

  Problem(const Runner& run, const Sizes& s, int64_t padding)
      : sizes(s),
        dy(run.Make({s.tokens, s.out}, Random(s.tokens * s.out, 1), padding)),
        w(run.Make({s.out, s.f}, Random(s.out * s.f, 2, 0.2), padding)),
        gate_up(run.Make({s.tokens, 2 * s.f}, Random(s.tokens * 2 * s.f, 3), padding)),
        d_gate_up(run.Make({s.tokens, 2 * s.f}, padding)),
        d_act(run.Make({s.tokens, s.f}, padding)),
        two_d_gate_up(run.Make({s.tokens, 2 * s.f}, padding)) {}

  void Together(ops::Context c) { ops::LinearBackwardInputSwiglu(c, d_gate_up, dy, w, gate_up); }
  void Apart(ops::Context c) {
    ops::LinearBackwardInput(c, d_act, dy, w, false);
    ops::SwigluBackward(c, two_d_gate_up, d_act, gate_up, false);
  }
  // `v` with the halves of its rows the other way round.
  Values Swapped(Values v) const {
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      const auto row = v.begin() + t * 2 * sizes.f;
      std::swap_ranges(row, row + sizes.f, row + sizes.f);
    }
    return v;
  }
};

// With sizes that end inside and at the end of tiles, and rows that a tensor core's copies can take
// and cannot.
TEST_P(LinearSwigluBackwardTest, EqualsTwoOperations) {
  for (const Sizes& s : {Sizes{7, 5, 3}, {1, 64, 64}, {127, 24, 72}, {130, 200, 136}}) {
    for (int64_t padding : {0, 3, 8}) {
      Problem p(run, s, padding);
      p.Together(c);
      p.Apart(c);
      run.ExpectOk();
      const Values d = p.d_gate_up.Read(), expected = p.two_d_gate_up.Read();
      EXPECT_TRUE(Near(d, expected, run.tolerance())) << s.tokens << " " << s.out << " " << s.f;
      // Negative control: the halves the other way round.
      EXPECT_FALSE(Near(p.Swapped(d), expected, run.tolerance()));
    }
  }
}

TEST_P(LinearSwigluBackwardTest, MatchesReference) {
  const Sizes s = {33, 70, 40};
  Problem p(run, s, 8);
  p.Together(c);
  run.ExpectOk();
  const Values d_act =
      reference::MatMul(p.dy.Read(), false, p.w.Read(), false, s.tokens, s.f, s.out);
  const Values x = p.gate_up.Read();
  Values expected(x.size());
  for (int64_t i = 0; i < s.tokens * s.f; ++i) {
    const int64_t at = i / s.f * 2 * s.f + i % s.f;
    const double sigmoid = 1 / (1 + std::exp(-x[at]));
    expected[at] = d_act[i] * x[at + s.f] * sigmoid * (1 + x[at] * (1 - sigmoid));
    expected[at + s.f] = d_act[i] * reference::Silu(x[at]);
  }
  EXPECT_TRUE(Near(p.d_gate_up.Read(), expected, 2 * run.tolerance()));  // of rounded products
}

TEST_P(LinearSwigluBackwardTest, NoTokensDoNothing) {
  Problem p(run, {0, 8, 16}, 0);
  p.Together(c);
  run.ExpectOk();
}

TEST_P(LinearSwigluBackwardTest, NoOutputsGiveZero) {
  Problem p(run, {5, 0, 16}, 0);
  p.Together(c);
  run.ExpectOk();
  EXPECT_EQ(p.d_gate_up.Read(), Values(5 * 32, 0.0));
}

TEST_P(LinearSwigluBackwardTest, RefusesOperandsThatDoNotFit) {
  const auto refused = [&](Tensor d_gate_up, Tensor dy, Tensor w, Tensor gate_up) {
    const Runner once(GetParam());
    ops::LinearBackwardInputSwiglu(once.context(), d_gate_up, dy, w, gate_up);
    return once.Wait().code() == absl::StatusCode::kInvalidArgument;
  };
  Buffer dy = run.Make({5, 8}), w = run.Make({8, 16}), narrow = run.Make({8, 15});
  Buffer gate_up = run.Make({5, 32}), d_gate_up = run.Make({5, 32}), half = run.Make({5, 16});
  EXPECT_FALSE(refused(d_gate_up, dy, w, gate_up));
  EXPECT_TRUE(refused(gate_up, dy, w, gate_up));
  EXPECT_TRUE(refused(d_gate_up, dy, narrow, gate_up));
  EXPECT_TRUE(refused(half, dy, w, gate_up));
  EXPECT_TRUE(refused(d_gate_up, dy, w, half));
  EXPECT_TRUE(refused(d_gate_up, w, dy, gate_up));
}

// By this project's kernel for tensor cores, where the GPU has them.
class GpuLinearSwigluBackwardTest : public OpsTest {
 protected:
  // The kernel's own sums, rounded: where the gate lets everything through (its sigmoid is 1) and
  // the other half is 1, they are the gradient of the gate.
  Values Sums(const Problem& p) {
    Buffer open = run.Make({p.sizes.tokens, 2 * p.sizes.f});
    Buffer d = run.Make({p.sizes.tokens, 2 * p.sizes.f});
    Values values(open.view().elements(), 1.0), sums;
    for (size_t i = 0; i < values.size(); ++i) {
      if (static_cast<int64_t>(i) / p.sizes.f % 2 == 0) values[i] = 30;
    }
    open.Write(values);
    ops::LinearBackwardInputSwiglu(c, d, p.dy, p.w, open);
    run.ExpectOk();
    const Values all = d.Read();
    for (int64_t i = 0; i < p.sizes.tokens * p.sizes.f; ++i) {
      sums.push_back(all[i / p.sizes.f * 2 * p.sizes.f + i % p.sizes.f]);
    }
    return sums;
  }
  // Whether the kernel makes of its own sums what SwigluBackward does, bit by bit, and the sums are
  // those of the library but for their order.
  void ExpectTwoOperations(Problem& p) {
    p.Together(c);
    p.Apart(c);
    run.ExpectOk();
    const Values sums = Sums(p);
    EXPECT_TRUE(Near(sums, p.d_act.Read(), run.tolerance()));
    p.d_act.Write(sums);
    ops::SwigluBackward(c, p.two_d_gate_up, p.d_act, p.gate_up, false);
    run.ExpectOk();
    EXPECT_TRUE(p.d_gate_up.Read() == p.two_d_gate_up.Read());
  }
};
INSTANTIATE_TEST_SUITE_P(, GpuLinearSwigluBackwardTest,
                         ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.mode == StreamMode::kDevice && s.dtype == DType::kBF16;
                         })),
                         SettingName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(
    GpuLinearSwigluBackwardTest);  // in a build without CUDA

// Which kernels do it while it lives.
struct Choose : WithVariable {
  explicit Choose(const char* kernels) : WithVariable("STRETTO_GATED", kernels) {}
};

TEST_P(GpuLinearSwigluBackwardTest, OwnKernelEqualsTwoOperations) {
  const Choose own("own");
  const int64_t inner[] = {64, 192, 1536};
  int i = 0;
  for (int64_t tokens : {1, 127, 129, 300, 1000}) {
    for (int64_t f : {64, 256, 328, 1088}) {
      SCOPED_TRACE(absl::StrCat(tokens, " ", f));
      Problem p(run, {tokens, inner[i++ % 3], f}, 8);
      ExpectTwoOperations(p);
    }
  }
}

// Tiles that end inside a block of the summed dimension and inside what a warp stores, rows that
// are further apart than they are long, and rows that copies cannot take.
TEST_P(GpuLinearSwigluBackwardTest, OwnKernelTakesWhatEndsInsideTilesOrLeavesIt) {
  const Choose own("own");
  for (const Sizes& s : {Sizes{127, 24, 72}, {130, 200, 136}, {257, 72, 8}, {64, 5, 72}}) {
    for (int64_t padding : {0, 3, 8}) {
      SCOPED_TRACE(absl::StrCat(s.tokens, " ", padding));
      Problem p(run, s, padding);
      ExpectTwoOperations(p);
    }
  }
}

TEST_P(GpuLinearSwigluBackwardTest, ManyTilesAreTheSameAgain) {
  const Choose own("own");
  Problem p(run, {5000, 512, 1088}, 0);
  ExpectTwoOperations(p);
  const auto d_gate_up = p.d_gate_up.bytes();
  for (int again = 0; again < 20; ++again) {
    p.Together(c);
    run.ExpectOk();
    EXPECT_TRUE(p.d_gate_up.bytes() == d_gate_up) << again;
  }
}

}  // namespace
}  // namespace stretto::test
