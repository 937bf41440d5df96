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

struct BackwardCase {
  int64_t rows, dim, padding;
};

// What NormBackwardInput may leave for NormBackwardWeight; empty where the backend keeps nothing.
Buffer Partials(const Runner& run, int64_t dim, bool center) {
  const int64_t bytes = run.context().kernels->norm->PartialBytes(run.dtype(), dim, center);
  Buffer partials = run.Wide({bytes / SizeOf(run.wide())});
  partials.Write(Values(partials.view().elements(), std::nan("")));
  return partials;
}

// Analytic gradients in the type under test against the same operation in f64, whose gradients are
// checked against central differences below.
class NormBackwardTest : public NormTest {
 protected:
  void Check(const BackwardCase& at, bool center, bool acc, bool keep) {
    const auto& [rows, dim, padding] = at;
    const int64_t n = rows * dim;
    Runner exact;
    const std::vector<int64_t> dims = {rows, dim};
    Buffer h = run.Make(dims, Random(n, 1), padding);
    Buffer dy = run.Make(dims, Random(n, 2), padding);
    Buffer weight = run.Make({dim}, Random(dim, 3)), bias = run.Make({dim}, Random(dim, 4));
    Buffer y = run.Make(dims), dx = run.Make(dims, Random(n, 5), padding);
    Buffer mean = run.Wide({rows}), rstd = run.Wide({rows});
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
    Buffer y64 = exact.Make(dims), dx64 = widen(dx);
    Buffer mean64 = exact.Make({rows}), rstd64 = exact.Make({rows});
    Buffer dweight64 = widen(dweight), dbias64 = widen(dbias);
    Buffer partials = Partials(run, dim, center);
    const auto backward = [&](ops::Context to, Tensor py, Tensor pdx, Tensor pdy, Tensor ph,
                              Tensor pmean, Tensor prstd, Tensor pw, Tensor pb, Tensor pdw,
                              Tensor pdb, Tensor kept) {
      if (!center) pmean = pb = pdb = Tensor{};
      ops::Norm(to, py, {}, pmean, prstd, ph, {}, pw, pb, kEps);
      ops::NormBackwardInput(to, pdx, pdy, ph, pmean, prstd, pw, acc, kept);
      ops::NormBackwardWeight(to, pdw, pdb, pdy, ph, pmean, prstd, acc, kept);
    };
    backward(c, y, dx, dy, h, mean, rstd, weight, bias, dweight, dbias,
             keep ? partials.view() : Tensor{});
    backward(exact.context(), y64, dx64, dy64, h64, mean64, rstd64, weight64, bias64, dweight64,
             dbias64, {});
    run.ExpectOk();
    exact.ExpectOk();
    EXPECT_TRUE(Near(dx.Read(), dx64.Read(), run.tolerance()));
    EXPECT_TRUE(Near(dweight.Read(), dweight64.Read(), run.wide_tolerance()));
    EXPECT_TRUE(Near(dbias.Read(), dbias64.Read(), run.wide_tolerance()));
  }
};
STRETTO_ALL_SETTINGS(NormBackwardTest);

TEST_P(NormBackwardTest, MatchesF64) {
  // Rows shared by 8 to 32 lanes and by blocks, too long ones, and such as vectors do not fit.
  const BackwardCase cases[] = {{63, 11, 2},   {1200, 64, 8}, {70, 104, 0},  {501, 256, 0},
                                {900, 768, 0}, {90, 768, 3},  {67, 896, 16}, {35, 1544, 8},
                                {19, 4864, 0}, {6, 12800, 0}, {1, 768, 0},   {700, 771, 0}};
  for (const BackwardCase& at : cases) {
    for (bool center : {false, true}) {
      for (bool acc : {false, true}) {
        for (bool keep : {false, true}) {
          if (keep && Partials(run, at.dim, center).view().elements() == 0) continue;
          SCOPED_TRACE(::testing::Message() << at.rows << " x " << at.dim << " + " << at.padding
                                            << (center ? " center" : "") << (acc ? " acc" : "")
                                            << (keep ? " keep" : ""));
          Check(at, center, acc, keep);
        }
      }
    }
  }
}

TEST_P(NormBackwardTest, NoRowsKeepNothing) {
  Buffer x = run.Make({0, 16}), mean = run.Wide({0}), rstd = run.Wide({0});
  Buffer weight = run.Make({16}, Random(16, 1));
  Buffer dweight = run.Wide({16}), dbias = run.Wide({16});
  Buffer partials = Partials(run, 16, true);
  for (bool acc : {true, false}) {
    dweight.Write(Values(16, 3.0));
    dbias.Write(Values(16, -2.0));
    ops::NormBackwardInput(c, x, x, x, mean, rstd, weight, acc, partials);
    ops::NormBackwardWeight(c, dweight, dbias, x, x, mean, rstd, acc, partials);
    run.ExpectOk();
    EXPECT_EQ(dweight.Read(), Values(16, acc ? 3.0 : 0.0));
    EXPECT_EQ(dbias.Read(), Values(16, acc ? -2.0 : 0.0));
  }
}

// dx may take the place of dy, also where vectors do not fit.
TEST_P(NormBackwardTest, KeepsBeforeItOverwrites) {
  for (int64_t padding : {0, 3}) {
    const int64_t rows = 45, n = 136;
    Buffer h = run.Make({rows, n}, Random(rows * n, 1), padding);
    Buffer dy = run.Make({rows, n}, Random(rows * n, 2), padding);
    Buffer dx = run.Make({rows, n}, padding), weight = run.Make({n}, Random(n, 3));
    Buffer mean = run.Wide({rows}), rstd = run.Wide({rows});
    mean.Write(Random(rows, 4, 0.1));
    rstd.Write(Values(rows, 0.75));
    Buffer dweight = run.Wide({n}), dbias = run.Wide({n});
    Buffer again = run.Wide({n}), again_bias = run.Wide({n});
    Buffer partials = Partials(run, n, true);
    const auto backward = [&](Tensor to, Tensor dw, Tensor db) {
      ops::NormBackwardInput(c, to, dy, h, mean, rstd, weight, false, partials);
      // Without partials BackwardWeight would read dy.
      const bool kept = partials.view().elements() > 0;
      if (kept || to.data != dy.view().data) {
        ops::NormBackwardWeight(c, dw, db, dy, h, mean, rstd, false, partials);
      }
      return kept;
    };
    backward(dx, dweight, dbias);
    const bool kept = backward(dy, again, again_bias);
    run.ExpectOk();
    EXPECT_EQ(dy.Read(), dx.Read());
    if (!kept) continue;
    EXPECT_EQ(again.Read(), dweight.Read());
    EXPECT_EQ(again_bias.Read(), dbias.Read());
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
