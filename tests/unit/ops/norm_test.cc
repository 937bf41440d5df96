#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

using reference::Dot;
using reference::NumericGradient;

class NormTest : public OpsTest {};
STRETTO_ALL_SETTINGS(NormTest);

constexpr double kEps = 1e-5;

TEST_P(NormTest, ForwardMatchesReference) {
  for (int64_t n : {1, 5, 16, 771}) {
    for (bool center : {false, true}) {
      for (bool with_residual : {false, true}) {
        const int64_t rows = 37;
        Buffer x = run.Make({rows, n}, Random(rows * n, 1, 3.0), 3);
        Buffer residual = run.Make({rows, n}, Random(rows * n, 2), 1);
        Buffer weight = run.Make({n}, Random(n, 3)), bias = run.Make({n}, Random(n, 4));
        Buffer y = run.Make({rows, n}, 5), h = run.Make({rows, n}, 2);
        Buffer mean = run.Wide({rows}), rstd = run.Wide({rows});
        const Tensor none;
        ops::Norm(c, y, with_residual ? h.view() : none, center ? mean.view() : none, rstd, x,
                  with_residual ? residual.view() : none, weight, center ? bias.view() : none,
                  kEps);
        run.ExpectOk();
        const Values input = with_residual ? h.Read() : x.Read();
        if (with_residual) {
          EXPECT_TRUE(Near(input, Plus(x.Read(), residual.Read()), run.tolerance()));
        }
        const auto expected =
            reference::Norm(input, weight.Read(), bias.Read(), rows, n, center, kEps);
        EXPECT_TRUE(Near(y.Read(), expected.y, run.tolerance())) << n;
        // With one column the variance is what rounding left of the mean.
        EXPECT_TRUE(Near(rstd.Read(), expected.rstd, run.wide_tolerance()));
        if (center) {
          EXPECT_TRUE(Near(mean.Read(), expected.mean, run.wide_tolerance()));
        }
      }
    }
  }
}

TEST_P(NormTest, HeadsAreNormalisedOneByOne) {
  const int64_t tokens = 9, heads = 3, dim = 10;
  Buffer x = run.Make({tokens, heads, dim}, Random(tokens * heads * dim, 1), 7);
  Buffer weight = run.Make({dim}, Random(dim, 2));
  Buffer y = run.Make({tokens, heads, dim}, 4), rstd = run.Wide({tokens, heads}, 1);
  ops::Norm(c, y, {}, {}, rstd, x, {}, weight, {}, kEps);
  run.ExpectOk();
  const auto expected =
      reference::Norm(x.Read(), weight.Read(), {}, tokens * heads, dim, false, kEps);
  EXPECT_TRUE(Near(y.Read(), expected.y, run.tolerance()));
  EXPECT_TRUE(Near(rstd.Read(), expected.rstd, run.wide_tolerance()));
}

// Analytic gradients in the type under test against the same operation in f64, whose gradients are
// checked against central differences below.
TEST_P(NormTest, BackwardMatchesF64) {
  const int64_t tokens = 21, heads = 3, dim = 11, n = tokens * heads * dim;
  Runner exact;
  for (bool center : {false, true}) {
    for (bool acc : {false, true}) {
      Buffer h = run.Make({tokens, heads, dim}, Random(n, 1), 2);
      Buffer dy = run.Make({tokens, heads, dim}, Random(n, 2), 3);
      Buffer weight = run.Make({dim}, Random(dim, 3)), bias = run.Make({dim}, Random(dim, 4));
      Buffer y = run.Make({tokens, heads, dim}),
             dx = run.Make({tokens, heads, dim}, Random(n, 5), 1);
      Buffer mean = run.Wide({tokens, heads}), rstd = run.Wide({tokens, heads});
      Buffer dweight = run.Wide({dim}), dbias = run.Wide({dim});
      dweight.Write(Random(dim, 6));
      dbias.Write(Random(dim, 7));
      const auto widen = [](const Buffer& b) {
        const Tensor t = b.view();
        std::vector<int64_t> dims(t.dims.begin(), t.dims.begin() + t.rank);
        Runner on_cpu;
        return on_cpu.Make(dims, b.Read());
      };
      Buffer h64 = widen(h), dy64 = widen(dy), weight64 = widen(weight), bias64 = widen(bias);
      Buffer y64 = exact.Make({tokens, heads, dim}), dx64 = widen(dx);
      Buffer mean64 = exact.Make({tokens, heads}), rstd64 = exact.Make({tokens, heads});
      Buffer dweight64 = widen(dweight), dbias64 = widen(dbias);
      const auto backward = [&](ops::Context to, Tensor py, Tensor pdx, Tensor pdy, Tensor ph,
                                Tensor pmean, Tensor prstd, Tensor pw, Tensor pb, Tensor pdw,
                                Tensor pdb) {
        if (!center) pmean = pb = pdb = Tensor{};
        ops::Norm(to, py, {}, pmean, prstd, ph, {}, pw, pb, kEps);
        ops::NormBackwardInput(to, pdx, pdy, ph, pmean, prstd, pw, acc);
        ops::NormBackwardWeight(to, pdw, pdb, pdy, ph, pmean, prstd, acc);
      };
      backward(c, y, dx, dy, h, mean, rstd, weight, bias, dweight, dbias);
      backward(exact.context(), y64, dx64, dy64, h64, mean64, rstd64, weight64, bias64, dweight64,
               dbias64);
      run.ExpectOk();
      exact.ExpectOk();
      EXPECT_TRUE(Near(dx.Read(), dx64.Read(), run.tolerance()));
      EXPECT_TRUE(Near(dweight.Read(), dweight64.Read(), run.wide_tolerance()));
      EXPECT_TRUE(Near(dbias.Read(), dbias64.Read(), run.wide_tolerance()));
    }
  }
}

TEST(NormGradientTest, MatchesCentralDifferences) {
  const int64_t rows = 4, n = 7;
  Runner run;
  for (bool center : {false, true}) {
    Values x = Random(rows * n, 1), w = Random(n, 2), b = Random(n, 3);
    const Values r = Random(rows * n, 4);
    Buffer y = run.Make({rows, n}), mean = run.Make({rows}), rstd = run.Make({rows});
    Buffer dx = run.Make({rows, n}), dw = run.Make({n}), db = run.Make({n});
    Buffer h = run.Make({rows, n}, x), weight = run.Make({n}, w), bias = run.Make({n}, b);
    Buffer dy = run.Make({rows, n}, r);
    const Tensor none;
    const Tensor m = center ? mean.view() : none;
    ops::Norm(run.context(), y, {}, m, rstd, h, {}, weight, center ? bias.view() : none, kEps);
    ops::NormBackwardInput(run.context(), dx, dy, h, m, rstd, weight, false);
    ops::NormBackwardWeight(run.context(), dw, center ? db.view() : none, dy, h, m, rstd, false);
    run.ExpectOk();
    const auto objective = [&] {
      return Dot(reference::Norm(x, w, b, rows, n, center, kEps).y, r);
    };
    EXPECT_TRUE(Near(dx.Read(), NumericGradient(x, objective), 1e-8));
    EXPECT_TRUE(Near(dw.Read(), NumericGradient(w, objective), 1e-8));
    if (center) {
      EXPECT_TRUE(Near(db.Read(), NumericGradient(b, objective), 1e-8));
    }
    // The same check rejects a gradient that is 0.1 % off.
    Values wrong = dx.Read();
    for (double& v : wrong) v *= 1.001;
    EXPECT_FALSE(Near(wrong, NumericGradient(x, objective), 1e-8));
  }
}

}  // namespace
}  // namespace stretto::test
