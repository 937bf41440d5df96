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
