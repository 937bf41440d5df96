#include <functional>

#include "support/ops_fixture.h"
#include "support/reference_ops.h"

namespace stretto::test {
namespace {

using reference::Dot;
using reference::NumericGradient;

class RotaryTest : public OpsTest {};
STRETTO_ALL_SETTINGS(RotaryTest);

constexpr double kEps = 1e-5;
constexpr int64_t kPositions = 50;

// Tables and positions of some tokens; the tables' rows may lie apart.
struct Turning {
  std::vector<int32_t> positions;
  Buffer cos, sin, index;

  Turning(DType type, int64_t tokens, int64_t half, int64_t padding = 0)
      : positions(tokens),
        cos(type, {kPositions, half}, Table(half, [](double a) { return std::cos(a); }), padding),
        sin(type, {kPositions, half}, Table(half, [](double a) { return std::sin(a); }), padding),
        index(Positions()) {}

  RotaryArgs Args() const {
    RotaryArgs args;
    args.positions = index;
    args.cos = cos;
    args.sin = sin;
    args.eps = kEps;
    return args;
  }

 private:
  Buffer Positions() {
    for (size_t t = 0; t < positions.size(); ++t) positions[t] = static_cast<int32_t>(t * 7 % 50);
    return Indices(positions);
  }
  static Values Table(int64_t half, double (*function)(double)) {
    Values values;
    for (int64_t p = 0; p < kPositions; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double exponent = -static_cast<double>(i) / static_cast<double>(half);
        values.push_back(function(static_cast<double>(p) * std::pow(10000.0, exponent)));
      }
    }
    return values;
  }
};

// Queries and keys side by side, as they lie in rows that hold more than them.
struct Shape {
  int64_t tokens, query_heads, key_heads, dim, padding = 0;

  int64_t heads() const { return query_heads + key_heads; }
  int64_t elements() const { return tokens * heads() * dim; }
  std::vector<int64_t> dims() const { return {tokens, heads(), dim}; }
};

void PrintTo(const Shape& s, std::ostream* out) {
  *out << s.tokens << " tokens, " << s.query_heads << " + " << s.key_heads << " heads of " << s.dim
       << ", padding " << s.padding;
}

// Heads that whole packs fit and that they do not, of 4 to 32 lanes and of more than those; tokens
// fewer and more than the groups of lanes that a kernel starts.
const Shape kShapes[] = {{33, 3, 2, 2},   {33, 4, 1, 6, 2},     {70, 5, 3, 64, 320},
                         {70, 14, 2, 64}, {41, 3, 1, 128, 128}, {21, 2, 2, 80, 16},
                         {19, 1, 1, 256}, {9, 2, 1, 768},       {17, 3, 3, 128, 3},
                         {1, 1, 1, 64},   {5, 9, 7, 100, 4},    {600, 7, 1, 12, 8},
                         {9000, 1, 1, 16}};

// The norm of each head in `x` [tokens, heads, dim] with the weight of its kind, then the rotation.
struct Expected {
  Values y, rstd;
};
Expected Reference(const Shape& s, const Values& x, const Turning& turning, const Values& cos,
                   const Values& sin, const Values& q_weight, const Values& k_weight) {
  Expected e{x, Values(s.tokens * s.heads())};
  for (int64_t t = 0; t < s.tokens * s.heads(); ++t) {
    const Values head(x.begin() + t * s.dim, x.begin() + (t + 1) * s.dim);
    const bool query = t % s.heads() < s.query_heads;
    const auto norm = reference::Norm(head, query ? q_weight : k_weight, {}, 1, s.dim, false, kEps);
    std::copy(norm.y.begin(), norm.y.end(), e.y.begin() + t * s.dim);
    e.rstd[t] = norm.rstd[0];
  }
  e.y = reference::Rope(e.y, turning.positions, cos, sin, s.heads(), s.dim, false);
  return e;
}

TEST_P(RotaryTest, MatchesReferenceAndTurnsBack) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const Turning turning(run.wide(), s.tokens, s.dim / 2, s.padding);
    const RotaryArgs args = turning.Args();
    Buffer x = run.Make(s.dims(), Random(s.elements(), 1), s.padding);
    const Values before = x.Read();
    Buffer y = run.Make(s.dims(), s.padding);
    ops::Rope(c, y, {}, x, args);
    ops::Rope(c, x, {}, x, args);
    run.ExpectOk();
    EXPECT_TRUE(Near(y.Read(),
                     reference::Rope(before, turning.positions, turning.cos.Read(),
                                     turning.sin.Read(), s.heads(), s.dim, false),
                     run.tolerance()));
    EXPECT_EQ(x.Read(), y.Read()) << "in place";
    ops::RopeBackwardInput(c, x, x, {}, {}, {}, args);
    run.ExpectOk();
    EXPECT_TRUE(Near(x.Read(), before, 2 * run.tolerance()));
  }
}

TEST_P(RotaryTest, NormsInFrontOfTheRotation) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const Turning turning(run.wide(), s.tokens, s.dim / 2, s.padding);
    Buffer x = run.Make(s.dims(), Random(s.elements(), 1, 3.0), s.padding);
    Buffer q_weight = run.Make({s.dim}, Random(s.dim, 2));
    Buffer k_weight = run.Make({s.dim}, Random(s.dim, 3));
    Buffer y = run.Make(s.dims(), s.padding), rstd = run.Wide({s.tokens, s.heads()}, 1);
    RotaryArgs args = turning.Args();
    args.q_weight = q_weight;
    args.k_weight = k_weight;
    args.query_heads = s.query_heads;
    ops::Rope(c, y, rstd, x, args);
    run.ExpectOk();
    const Expected e = Reference(s, x.Read(), turning, turning.cos.Read(), turning.sin.Read(),
                                 q_weight.Read(), k_weight.Read());
    EXPECT_TRUE(Near(y.Read(), e.y, run.tolerance()));
    EXPECT_TRUE(Near(rstd.Read(), e.rstd, run.wide_tolerance()));
    // One more query head is a difference that is seen.
    if (s.key_heads < 2) continue;
    Shape wrong = s;
    ++wrong.query_heads;
    --wrong.key_heads;
    const Expected other = Reference(wrong, x.Read(), turning, turning.cos.Read(),
                                     turning.sin.Read(), q_weight.Read(), k_weight.Read());
    EXPECT_FALSE(Near(y.Read(), other.y, run.tolerance()));
  }
}

// Gradients in the type under test against those in f64, which central differences check below.
TEST_P(RotaryTest, BackwardThroughNormMatchesF64) {
  const auto widen = [](const Buffer& b) {
    const Tensor t = b;
    const Runner on_cpu;
    return on_cpu.Make({t.dims.begin(), t.dims.begin() + t.rank}, b.Read());
  };
  for (const Shape& s : kShapes) {
    SCOPED_TRACE(::testing::PrintToString(s));
    const Turning turning(run.wide(), s.tokens, s.dim / 2, s.padding);
    Buffer x = run.Make(s.dims(), Random(s.elements(), 1), s.padding);
    Buffer dy = run.Make(s.dims(), Random(s.elements(), 2), s.padding);
    Buffer dx = run.Make(s.dims(), s.padding);
    Buffer q_weight = run.Make({s.dim}, Random(s.dim, 3));
    Buffer k_weight = run.Make({s.dim}, Random(s.dim, 4));
    Buffer rstd = run.Wide({s.tokens, s.heads()}, 1);
    Buffer partials = run.Wide({RotaryKernels::kPartials, 2, s.dim});
    partials.Write(Values(RotaryKernels::kPartials * 2 * s.dim, std::nan("")));
    Buffer dq = run.Wide({s.dim}), dk = run.Wide({s.dim});
    dq.Write(Random(s.dim, 5));
    dk.Write(Random(s.dim, 6));
    Buffer x64 = widen(x), dy64 = widen(dy), dx64 = widen(dx), y64 = widen(dx);
    Buffer q64 = widen(q_weight), k64 = widen(k_weight), dq64 = widen(dq), dk64 = widen(dk);
    Buffer cos64 = widen(turning.cos), sin64 = widen(turning.sin);
    const Runner exact;
    Buffer rstd64 = exact.Make({s.tokens, s.heads()});
    Buffer partials64 = exact.Make({RotaryKernels::kPartials, 2, s.dim});
    const Buffer index64 = Indices(turning.positions);

    RotaryArgs args = turning.Args(), args64 = args;
    args.q_weight = q_weight;
    args.k_weight = k_weight;
    args.query_heads = args64.query_heads = s.query_heads;
    args64.q_weight = q64;
    args64.k_weight = k64;
    args64.cos = cos64;
    args64.sin = sin64;
    args64.positions = index64;
    const bool acc = s.tokens % 2 == 1;
    ops::Rope(exact.context(), y64, rstd64, x64, args64);
    ops::RopeBackwardInput(exact.context(), dx64, dy64, x64, rstd64, partials64, args64);
    ops::RopeBackwardWeight(exact.context(), dq64, dk64, partials64, acc);
    exact.ExpectOk();

    rstd.Write(rstd64.Read());
    ops::RopeBackwardInput(c, dx, dy, x, rstd, partials, args);
    ops::RopeBackwardWeight(c, dq, dk, partials, acc);
    run.ExpectOk();
    EXPECT_TRUE(Near(dx.Read(), dx64.Read(), run.tolerance()));
    EXPECT_TRUE(Near(dq.Read(), dq64.Read(), run.wide_tolerance()));
    EXPECT_TRUE(Near(dk.Read(), dk64.Read(), run.wide_tolerance()));

    // In place, and again: the same bits.
    const Values sums = partials.Read();
    ops::RopeBackwardInput(c, dy, dy, x, rstd, partials, args);
    run.ExpectOk();
    EXPECT_EQ(dy.Read(), dx.Read());
    EXPECT_EQ(partials.Read(), sums);
  }
}

TEST_P(RotaryTest, NoTokensLeaveNoSums) {
  const Turning turning(run.wide(), 0, 32);
  Buffer x = run.Make({0, 3, 64}), rstd = run.Wide({0, 3}), weight = run.Make({64}, Random(64, 1));
  Buffer partials = run.Wide({RotaryKernels::kPartials, 2, 64});
  Buffer dq = run.Wide({64}), dk = run.Wide({64});
  RotaryArgs args = turning.Args();
  args.q_weight = args.k_weight = weight;
  args.query_heads = 2;
  for (bool acc : {true, false}) {
    dq.Write(Values(64, 3.0));
    dk.Write(Values(64, -2.0));
    ops::RopeBackwardInput(c, x, x, x, rstd, partials, args);
    ops::RopeBackwardWeight(c, dq, dk, partials, acc);
    run.ExpectOk();
    EXPECT_EQ(dq.Read(), Values(64, acc ? 3.0 : 0.0));
    EXPECT_EQ(dk.Read(), Values(64, acc ? -2.0 : 0.0));
  }
}

TEST_P(RotaryTest, ThreadsDoNotChangeTheBits) {
  const Shape s = {301, 3, 2, 64};
  const auto backward = [&](const Runner& r) {
    const Turning turning(r.wide(), s.tokens, s.dim / 2);
    Buffer x = r.Make(s.dims(), Random(s.elements(), 1));
    Buffer dy = r.Make(s.dims(), Random(s.elements(), 2));
    Buffer weight = r.Make({s.dim}, Random(s.dim, 3));
    Buffer rstd = r.Wide({s.tokens, s.heads()}), dq = r.Wide({s.dim}), dk = r.Wide({s.dim});
    Buffer partials = r.Wide({RotaryKernels::kPartials, 2, s.dim});
    RotaryArgs args = turning.Args();
    args.q_weight = args.k_weight = weight;
    args.query_heads = s.query_heads;
    rstd.Write(Values(s.tokens * s.heads(), 0.75));
    ops::RopeBackwardInput(r.context(), dy, dy, x, rstd, partials, args);
    ops::RopeBackwardWeight(r.context(), dq, dk, partials, false);
    r.ExpectOk();
    return Plus(dq.Read(), dk.Read());
  };
  const Values sums = backward(run);
  const Runner serial(run.serial());
  EXPECT_EQ(sums, backward(serial));
}

TEST_P(RotaryTest, PositionOutsideTheTableIsNamed) {
  for (int64_t dim : {2, 128}) {
    for (const bool norm : {false, true}) {
      Runner fresh(GetParam());
      const Turning turning(run.wide(), 3, dim / 2);
      Buffer x = run.Make({3, 2, dim}, Random(6 * dim, 1)), y = run.Make({3, 2, dim});
      Buffer weight = run.Make({dim}, Random(dim, 2)), rstd = run.Wide({3, 2});
      Buffer index = Indices({0, kPositions, 1});
      RotaryArgs args = turning.Args();
      args.positions = index;
      args.query_heads = 1;
      if (norm) args.q_weight = args.k_weight = weight;
      ops::Rope(fresh.context(), y, rstd, x, args);
      const absl::Status status = fresh.Wait();
      EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
      EXPECT_NE(std::string(status.message()).find("position 50 of row 1"), std::string::npos)
          << status.message();
    }
  }
}

TEST(RotaryGradientTest, MatchesCentralDifferences) {
  const Shape s = {5, 2, 1, 6};
  Runner run;
  const Turning turning(DType::kF64, s.tokens, s.dim / 2);
  Values x = Random(s.elements(), 1), wq = Random(s.dim, 2), wk = Random(s.dim, 3);
  const Values r = Random(s.elements(), 4);
  Buffer input = run.Make(s.dims(), x), y = run.Make(s.dims()), dy = run.Make(s.dims(), r);
  Buffer q_weight = run.Make({s.dim}, wq), k_weight = run.Make({s.dim}, wk);
  Buffer rstd = run.Make({s.tokens, s.heads()}), dx = run.Make(s.dims());
  Buffer partials = run.Make({RotaryKernels::kPartials, 2, s.dim});
  Buffer dq = run.Make({s.dim}), dk = run.Make({s.dim});
  RotaryArgs args = turning.Args();
  args.q_weight = q_weight;
  args.k_weight = k_weight;
  args.query_heads = s.query_heads;
  ops::Rope(run.context(), y, rstd, input, args);
  ops::RopeBackwardInput(run.context(), dx, dy, input, rstd, partials, args);
  ops::RopeBackwardWeight(run.context(), dq, dk, partials, false);
  run.ExpectOk();
  const Values cos = turning.cos.Read(), sin = turning.sin.Read();
  const auto objective = [&] { return Dot(Reference(s, x, turning, cos, sin, wq, wk).y, r); };
  EXPECT_TRUE(Near(dx.Read(), NumericGradient(x, objective), 1e-8));
  EXPECT_TRUE(Near(dq.Read(), NumericGradient(wq, objective), 1e-8));
  EXPECT_TRUE(Near(dk.Read(), NumericGradient(wk, objective), 1e-8));
  // The same check rejects a gradient that is 0.1 % off.
  Values wrong = dx.Read();
  for (double& v : wrong) v *= 1.001;
  EXPECT_FALSE(Near(wrong, NumericGradient(x, objective), 1e-8));
}

TEST(RotaryCheckTest, RefusesWhatDoesNotFit) {
  const auto refusal = [](const std::function<void(RotaryArgs*)>& change, bool in_place = false) {
    Runner run;
    const Turning turning(DType::kF64, 3, 2);
    Buffer x = run.Make({3, 2, 4}, Random(24, 1)), y = run.Make({3, 2, 4});
    Buffer weight = run.Make({4}), rstd = run.Make({3, 2});
    RotaryArgs args = turning.Args();
    args.q_weight = args.k_weight = weight;
    args.query_heads = 1;
    change(&args);
    ops::Rope(run.context(), in_place ? x : y, rstd, x, args);
    return std::string(run.Wait().message());
  };
  const auto expect = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  EXPECT_EQ(refusal([](RotaryArgs*) {}), "");
  expect(refusal([](RotaryArgs* a) { a->k_weight = {}; }), "both be present (QK-norm) or both");
  expect(refusal([](RotaryArgs* a) { a->query_heads = 0; }), "between 1 and x's heads");
  expect(refusal([](RotaryArgs* a) { a->query_heads = 3; }), "between 1 and x's heads");
  expect(refusal([](RotaryArgs* a) { a->q_weight.dims[0] = 3; }), "must be [head_dim]");
  expect(refusal([](RotaryArgs* a) { a->cos.dims[1] = 1; }), "cos and sin must be");
  expect(refusal([](RotaryArgs*) {}, true), "with a norm y must not be x");
}

}  // namespace
}  // namespace stretto::test
