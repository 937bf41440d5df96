#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

using reference::MatMul;

class LinearTest : public OpsTest {};
STRETTO_ALL_SETTINGS(LinearTest);

struct Shape {
  int64_t tokens, in, out;
};
// Odd, single, more than one grain of 48, more than one bf16 tile of 480, and few rows and columns.
const Shape kShapes[] = {{7, 5, 3},     {1, 33, 130},   {130, 1, 1},
                         {65, 70, 149}, {3, 1030, 500}, {490, 9, 7}};

TEST_P(LinearTest, ForwardMatchesReference) {
  for (const Shape& s : kShapes) {
    for (bool with_bias : {false, true}) {
      Buffer x = run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 1), 3);
      Buffer w = run.Make({s.out, s.in}, Random(s.out * s.in, 2), 5);
      Buffer bias = run.Make({s.out}, Random(s.out, 3));
      Buffer y = run.Make({s.tokens, s.out}, 2);
      ops::Linear(c, y, x, w, with_bias ? bias.view() : Tensor{});
      run.ExpectOk();
      Values expected = MatMul(x.Read(), false, w.Read(), true, s.tokens, s.out, s.in);
      const Values b = bias.Read();
      for (size_t i = 0; with_bias && i < expected.size(); ++i) expected[i] += b[i % s.out];
      EXPECT_TRUE(Near(y.Read(), expected, run.tolerance()))
          << s.tokens << " " << s.in << " " << s.out;
    }
  }
}

TEST_P(LinearTest, BackwardInputMatchesReference) {
  for (const Shape& s : kShapes) {
    for (bool acc : {false, true}) {
      Buffer dy = run.Make({s.tokens, s.out}, Random(s.tokens * s.out, 1), 1);
      Buffer w = run.Make({s.out, s.in}, Random(s.out * s.in, 2), 4);
      Buffer dx = run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 3), 3);
      Values expected = MatMul(dy.Read(), false, w.Read(), false, s.tokens, s.in, s.out);
      if (acc) expected = Plus(expected, dx.Read());
      ops::LinearBackwardInput(c, dx, dy, w, acc);
      run.ExpectOk();
      EXPECT_TRUE(Near(dx.Read(), expected, run.tolerance()));
    }
  }
}

TEST_P(LinearTest, BackwardWeightMatchesReference) {
  for (const Shape& s : kShapes) {
    for (bool acc : {false, true}) {
      Buffer dy = run.Make({s.tokens, s.out}, Random(s.tokens * s.out, 1), 1);
      Buffer x = run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 2), 6);
      Buffer dw = run.Wide({s.out, s.in}, 2);
      Buffer db = run.Wide({s.out});
      dw.Write(Random(s.out * s.in, 3));
      db.Write(Random(s.out, 4));
      Values expected_w = MatMul(dy.Read(), true, x.Read(), false, s.out, s.in, s.tokens);
      Values expected_b = MatMul(dy.Read(), true, Values(s.tokens, 1.0), false, s.out, 1, s.tokens);
      if (acc) {
        expected_w = Plus(expected_w, dw.Read());
        expected_b = Plus(expected_b, db.Read());
      }
      ops::LinearBackwardWeight(c, dw, db, dy, x, acc);
      run.ExpectOk();
      EXPECT_TRUE(Near(dw.Read(), expected_w, run.wide_tolerance()));
      EXPECT_TRUE(Near(db.Read(), expected_b, run.wide_tolerance()));
    }
  }
}

// Shapes of the fused operations: also one that fused epilogues of a GPU serve, with strides of
// whole 16-byte groups.
struct FusedCase {
  Shape shape;
  int64_t padding;
};
std::vector<FusedCase> FusedCases() {
  std::vector<FusedCase> cases = {{{40, 64, 72}, 0}, {{33, 72, 136}, 8}, {{1, 16, 24}, 16}};
  for (const Shape& s : kShapes) cases.push_back({s, 3});
  return cases;
}

TEST_P(LinearTest, GeluBehindTheLayerEqualsTwoOperations) {
  for (const auto& [s, padding] : FusedCases()) {
    for (bool with_bias : {false, true}) {
      Buffer x = run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 1, 0.3), padding);
      Buffer w = run.Make({s.out, s.in}, Random(s.out * s.in, 2, 0.3), padding);
      Buffer bias = run.Make({s.out}, Random(s.out, 3));
      const Tensor b = with_bias ? bias.view() : Tensor{};
      Buffer y = run.Make({s.tokens, s.out}, padding), pre = run.Make({s.tokens, s.out}, padding);
      Buffer two_y = run.Make({s.tokens, s.out}), two_pre = run.Make({s.tokens, s.out});
      ops::LinearGelu(c, y, pre, x, w, b);
      ops::Linear(c, two_pre, x, w, b);
      ops::Gelu(c, two_y, two_pre);
      run.ExpectOk();
      EXPECT_TRUE(Near(pre.Read(), two_pre.Read(), run.tolerance()));
      EXPECT_TRUE(Near(y.Read(), two_y.Read(), run.tolerance()))
          << s.tokens << " " << s.in << " " << s.out;
      EXPECT_NE(y.Read(), pre.Read());
    }
  }
}

TEST_P(LinearTest, GeluInFrontOfTheLayerEqualsTwoOperations) {
  for (const auto& [s, padding] : FusedCases()) {
    Buffer dy = run.Make({s.tokens, s.out}, Random(s.tokens * s.out, 1), padding);
    Buffer w = run.Make({s.out, s.in}, Random(s.out * s.in, 2), padding);
    Buffer pre = run.Make({s.tokens, s.in}, Random(s.tokens * s.in, 3), padding);
    Buffer dpre = run.Make({s.tokens, s.in}, padding);
    Buffer dx = run.Make({s.tokens, s.in}), two = run.Make({s.tokens, s.in});
    const Values before = pre.Read();
    ops::LinearBackwardInputGelu(c, dpre, dy, w, pre);
    ops::LinearBackwardInput(c, dx, dy, w, false);
    ops::GeluBackward(c, two, dx, pre, false);
    run.ExpectOk();
    EXPECT_TRUE(Near(dpre.Read(), two.Read(), run.tolerance()))
        << s.tokens << " " << s.in << " " << s.out;
    EXPECT_NE(dpre.Read(), dx.Read());
    EXPECT_EQ(pre.Read(), before);
  }
}

TEST_P(LinearTest, GeluOfNoTokensDoesNothing) {
  Buffer x = run.Make({0, 3}), y = run.Make({0, 4}), pre = run.Make({0, 4});
  Buffer w = run.Make({4, 3}, Random(12, 1));
  ops::LinearGelu(c, y, pre, x, w, {});
  ops::LinearBackwardInputGelu(c, run.Make({0, 3}), y, w, x);
  run.ExpectOk();
}

TEST_P(LinearTest, GeluRefusesToOverwriteThePreactivation) {
  Buffer x = run.Make({5, 3}, Random(15, 1)), w = run.Make({3, 3}, Random(9, 2));
  const Values before = x.Read();
  ops::LinearBackwardInputGelu(c, x, run.Make({5, 3}), w, x);
  EXPECT_EQ(run.Wait().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(x.Read(), before);
}

TEST_P(LinearTest, GeluNeedsAPlaceOfItsOwnForThePreactivation) {
  Buffer x = run.Make({5, 3}, Random(15, 1)), w = run.Make({4, 3}, Random(12, 2));
  Buffer y = run.Make({5, 4});
  ops::LinearGelu(c, y, y, x, w, {});
  EXPECT_EQ(run.Wait().code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(LinearTest, NoInputsLeaveTheBias) {
  Buffer x = run.Make({5, 0}), w = run.Make({3, 0}), bias = run.Make({3}, {1, -2, 3});
  Buffer y = run.Make({5, 3}, Random(15, 1), 2);
  ops::Linear(c, y, x, w, bias);
  run.ExpectOk();
  Values expected;
  for (int i = 0; i < 5; ++i) expected.insert(expected.end(), {1, -2, 3});
  EXPECT_EQ(y.Read(), expected);
}

// More rows than one part of a cut, and columns that are and are not whole 16-byte groups.
TEST_P(LinearTest, BiasGradientOfManyTokens) {
  const int64_t tokens = 3001;
  for (int64_t out : {1, 24, 33, 304}) {
    for (int64_t padding : {0, 3, 8}) {
      Buffer dy = run.Make({tokens, out}, Random(tokens * out, 1), padding);
      Buffer x = run.Make({tokens, 2}, Random(tokens * 2, 2));
      Buffer dw = run.Wide({out, 2}), db = run.Wide({out});
      db.Write(Random(out, 3));
      Values expected = db.Read();
      const Values values = dy.Read();
      for (size_t i = 0; i < values.size(); ++i) expected[i % out] += values[i];
      dw.Write(Values(out * 2, 0.0));
      ops::LinearBackwardWeight(c, dw, db, dy, x, true);
      run.ExpectOk();
      EXPECT_TRUE(Near(db.Read(), expected, run.wide_tolerance())) << out << " " << padding;
    }
  }
}

TEST_P(LinearTest, NoTokensClearTheGradientsUnlessTheyAccumulate) {
  Buffer x = run.Make({0, 3}), dy = run.Make({0, 4});
  Buffer dw = run.Wide({4, 3}), db = run.Wide({4});
  dw.Write(Random(12, 1));
  db.Write(Random(4, 2));
  const Values before = dw.Read();
  ops::LinearBackwardWeight(c, dw, {}, dy, x, true);
  run.ExpectOk();
  EXPECT_EQ(dw.Read(), before);
  ops::LinearBackwardWeight(c, dw, db, dy, x, false);
  run.ExpectOk();
  EXPECT_EQ(dw.Read(), Values(12, 0.0));
  EXPECT_EQ(db.Read(), Values(4, 0.0));
}

TEST_P(LinearTest, SameBitsOnEveryRun) {
  Buffer x = run.Make({130, 70}, Random(130 * 70, 1)), w = run.Make({149, 70}, Random(149 * 70, 2));
  Buffer first = run.Make({130, 149}), again = run.Make({130, 149});
  ops::Linear(c, first, x, w, {});
  run.ExpectOk();
  for (int i = 0; i < 5; ++i) {
    ops::Linear(c, again, x, w, {});
    run.ExpectOk();
    EXPECT_EQ(first.bytes(), again.bytes());
  }
}

// The tolerance must be tight enough to notice a mistake.
TEST_P(LinearTest, WrongScaleIsCaught) {
  Buffer x = run.Make({9, 70}, Random(9 * 70, 1)), w = run.Make({11, 70}, Random(11 * 70, 2));
  Buffer y = run.Make({9, 11});
  ops::Linear(c, y, x, w, {});
  run.ExpectOk();
  Values wrong = MatMul(x.Read(), false, w.Read(), true, 9, 11, 70);
  for (double& v : wrong) v *= 1 + 4 * run.tolerance();
  EXPECT_FALSE(Near(y.Read(), wrong, run.tolerance()));
}

}  // namespace
}  // namespace stretto::test
