// A linear layer and the gate behind it, as one operation.

#include "support/ops_fixture.h"
#include "support/reference_ops.h"
#include "support/with_variable.h"

namespace stretto::test {
namespace {

class LinearSwigluTest : public OpsTest {};
STRETTO_ALL_SETTINGS(LinearSwigluTest);

struct Sizes {
  int64_t tokens, in, f;
};

// The operation's operands and results, and the same by two operations.
struct Problem {
  Sizes sizes;
  Buffer x, w, gate_up, act, two_gate_up, two_act;

  Problem(const Runner& run, const Sizes& s, int64_t padding)
      : sizes(s),
        x(run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 1), padding)),
        w(run.Make({2 * s.f, s.in}, Random(2 * s.f * s.in, 2, 0.2), padding)),
        gate_up(run.Make({s.tokens, 2 * s.f}, padding)),
        act(run.Make({s.tokens, s.f}, padding)),
        two_gate_up(run.Make({s.tokens, 2 * s.f}, padding)),
        two_act(run.Make({s.tokens, s.f}, padding)) {}

  void Together(ops::Context c) { ops::LinearSwiglu(c, act, gate_up, x, w); }
  void Apart(ops::Context c) {
    ops::Linear(c, two_gate_up, x, w, {});
    ops::Swiglu(c, two_act, two_gate_up);
  }
};

// With sizes that end inside and at the end of tiles, and rows that a tensor core's copies can take
// and cannot.
TEST_P(LinearSwigluTest, EqualsTwoOperations) {
  for (const Sizes& s : {Sizes{7, 5, 3}, {1, 64, 64}, {127, 24, 72}, {130, 200, 136}}) {
    for (int64_t padding : {0, 3, 8}) {
      Problem p(run, s, padding);
      p.Together(c);
      p.Apart(c);
      run.ExpectOk();
      const Values act = p.act.Read(), expected = p.two_act.Read();
      EXPECT_TRUE(Near(p.gate_up.Read(), p.two_gate_up.Read(), run.tolerance()));
      EXPECT_TRUE(Near(act, expected, run.tolerance())) << s.tokens << " " << s.in << " " << s.f;
      // Negative control: the halves the other way round.
      Values halves = p.two_gate_up.Read();
      for (int64_t t = 0; t < s.tokens; ++t) {
        const auto row = halves.begin() + t * 2 * s.f;
        std::swap_ranges(row, row + s.f, row + s.f);
      }
      p.two_gate_up.Write(halves);
      ops::Swiglu(c, p.two_act, p.two_gate_up);
      run.ExpectOk();
      EXPECT_FALSE(Near(act, p.two_act.Read(), run.tolerance()));
    }
  }
}

TEST_P(LinearSwigluTest, MatchesReference) {
  const Sizes s = {33, 70, 40};
  Problem p(run, s, 8);
  p.Together(c);
  run.ExpectOk();
  const Values products =
      reference::MatMul(p.x.Read(), false, p.w.Read(), true, s.tokens, 2 * s.f, s.in);
  EXPECT_TRUE(Near(p.gate_up.Read(), products, run.tolerance()));
  Values expected(s.tokens * s.f);
  for (int64_t i = 0; i < s.tokens * s.f; ++i) {
    const int64_t at = i / s.f * 2 * s.f + i % s.f;
    expected[i] = reference::Silu(products[at]) * products[at + s.f];
  }
  EXPECT_TRUE(Near(p.act.Read(), expected, 2 * run.tolerance()));  // of rounded products
}

TEST_P(LinearSwigluTest, NoTokensDoNothing) {
  Problem p(run, {0, 8, 16}, 0);
  p.Together(c);
  run.ExpectOk();
}

TEST_P(LinearSwigluTest, NoInputsGiveZero) {
  Problem p(run, {5, 0, 16}, 0);
  p.Together(c);
  run.ExpectOk();
  EXPECT_EQ(p.gate_up.Read(), Values(5 * 32, 0.0));
  EXPECT_EQ(p.act.Read(), Values(5 * 16, 0.0));
}

TEST_P(LinearSwigluTest, RefusesOperandsThatDoNotFit) {
  const auto refused = [&](Tensor act, Tensor gate_up, Tensor x, Tensor w) {
    const Runner once(GetParam());
    ops::LinearSwiglu(once.context(), act, gate_up, x, w);
    return once.Wait().code() == absl::StatusCode::kInvalidArgument;
  };
  Buffer x = run.Make({5, 8}), w = run.Make({32, 8}), odd = run.Make({33, 8});
  Buffer gate_up = run.Make({5, 32}), act = run.Make({5, 16});
  EXPECT_FALSE(refused(act, gate_up, x, w));
  EXPECT_TRUE(refused(gate_up, gate_up, x, w));
  EXPECT_TRUE(refused(act, act, x, w));
  EXPECT_TRUE(refused(act, gate_up, x, odd));
  EXPECT_TRUE(refused(act, gate_up, w, x));
  Tensor front = gate_up;
  front.dims[1] = 16;
  EXPECT_TRUE(refused(front, gate_up, x, w));
}

// By this project's kernel for tensor cores, where the GPU has them.
class GpuLinearSwigluTest : public OpsTest {};
INSTANTIATE_TEST_SUITE_P(, GpuLinearSwigluTest,
                         ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.mode == StreamMode::kDevice && s.dtype == DType::kBF16;
                         })),
                         SettingName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuLinearSwigluTest);  // in a build without CUDA

// Which kernels do it while it lives.
struct Choose : WithVariable {
  explicit Choose(const char* kernels) : WithVariable("STRETTO_GATED", kernels) {}
};

TEST_P(GpuLinearSwigluTest, OwnKernelEqualsTwoOperations) {
  const Choose own("own");
  const int64_t inner[] = {64, 192, 1536};
  int i = 0;
  for (int64_t tokens : {1, 127, 300, 1000}) {
    for (int64_t f : {64, 128, 192, 1088}) {
      Problem p(run, {tokens, inner[i++ % 3], f}, 8);
      p.Together(c);
      p.Apart(c);
      run.ExpectOk();
      EXPECT_TRUE(Near(p.gate_up.Read(), p.two_gate_up.Read(), run.tolerance()))
          << tokens << " " << f;
      ops::Swiglu(c, p.two_act, p.gate_up);
      run.ExpectOk();
      EXPECT_TRUE(p.act.Read() == p.two_act.Read()) << tokens << " " << f;
    }
  }
}

// Tiles that end inside a block of the summed dimension and inside what is stored at once, rows
// that are further apart than they are long, and rows that copies cannot take.
TEST_P(GpuLinearSwigluTest, OwnKernelTakesWhatEndsInsideTilesOrLeavesIt) {
  const Choose own("own");
  for (const Sizes& s : {Sizes{127, 24, 72}, {130, 200, 136}, {257, 72, 8}, {64, 5, 72}}) {
    for (int64_t padding : {0, 3, 8}) {
      Problem p(run, s, padding);
      p.Together(c);
      p.Apart(c);
      run.ExpectOk();
      EXPECT_TRUE(Near(p.gate_up.Read(), p.two_gate_up.Read(), run.tolerance())) << s.tokens;
      EXPECT_TRUE(Near(p.act.Read(), p.two_act.Read(), run.tolerance())) << s.tokens;
    }
  }
}

TEST_P(GpuLinearSwigluTest, ManyTilesAreTheSameAgain) {
  const Choose own("own");
  Problem p(run, {5000, 512, 1088}, 0);
  p.Together(c);
  p.Apart(c);
  run.ExpectOk();
  EXPECT_TRUE(Near(p.gate_up.Read(), p.two_gate_up.Read(), run.tolerance()));
  const auto gate_up = p.gate_up.bytes(), act = p.act.bytes();
  for (int again = 0; again < 20; ++again) {
    p.Together(c);
    run.ExpectOk();
    EXPECT_TRUE(p.gate_up.bytes() == gate_up) << again;
    EXPECT_TRUE(p.act.bytes() == act) << again;
  }
}

}  // namespace
}  // namespace stretto::test
