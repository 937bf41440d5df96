#include <array>
#include <vector>

#include "support/ops_fixture.h"
#include "support/reference_ops.h"
#include "support/with_variable.h"

namespace stretto::test {
namespace {

using reference::AttentionSizes;
using reference::Dot;
using reference::NumericGradient;

class AttentionTest : public OpsTest {};
STRETTO_ALL_SETTINGS(AttentionTest);

int64_t Longest(const std::vector<int32_t>& cu) {
  int64_t longest = 0;
  for (size_t i = 0; i + 1 < cu.size(); ++i)
    longest = std::max<int64_t>(longest, cu[i + 1] - cu[i]);
  return longest;
}

// Operands of one call. q, k and v lie side by side in one packed matrix when there are as many
// keys as queries, as a model has them; outputs have padding of their own.
struct Problem {
  AttentionSizes a;
  int64_t tq, tk;
  Buffer cu_q, cu_k, len_q, len_k;
  Buffer q, k, v, o, lse, d_o, dq, dk, dv, delta;

  Problem(const Runner& run, AttentionSizes sizes, double scale = 1.0)
      : a(std::move(sizes)),
        tq(a.cu_q.back()),
        tk(a.cu_k.back()),
        cu_q(Indices(a.cu_q)),
        cu_k(Indices(a.cu_k)),
        len_q(Indices(a.len_q)),
        len_k(Indices(a.len_k)),
        q(run.Make({tq, a.heads, a.dim}, Random(tq * a.heads * a.dim, 1, scale), Gap(3))),
        k(run.Make({tk, a.kv_heads, a.dim}, Random(tk * a.kv_heads * a.dim, 2, scale), Gap(7))),
        v(run.Make({tk, a.kv_heads, a.dim}, Random(tk * a.kv_heads * a.dim, 3), Gap(1))),
        o(run.Make({tq, a.heads, a.dim}, Gap(2))),
        lse(run.Wide({tq, a.heads}, a.neat ? 0 : 1)),
        d_o(run.Make({tq, a.heads, a.dim}, Random(tq * a.heads * a.dim, 4), Gap(5))),
        dq(run.Make({tq, a.heads, a.dim}, Gap(4))),
        dk(run.Make({tk, a.kv_heads, a.dim}, Gap(6))),
        dv(run.Make({tk, a.kv_heads, a.dim}, Gap(8))),
        delta(run.Wide({tq, a.heads}, 2)) {}

  // Elements between rows.
  int64_t Gap(int64_t gap) const { return a.neat ? 8 : gap; }
  AttentionShape shape() const {
    const int64_t sequences = static_cast<int64_t>(a.cu_q.size()) - 1;
    const bool uniform = a.neat && Longest(a.cu_q) * sequences == tq;
    // As a model has it, and as a GPU's fast kernels want it: one tensor for both.
    const bool self = a.neat && a.cu_q == a.cu_k;
    return {cu_q,
            self ? cu_q.view() : cu_k.view(),
            Longest(a.cu_q),
            Longest(a.cu_k),
            a.causal,
            a.scale,
            uniform ? Longest(a.cu_q) : 0,
            a.len_q.empty() ? Tensor() : len_q.view(),
            a.len_k.empty() ? Tensor() : len_k.view()};
  }
  void Forward(ops::Context c) const { ops::Attention(c, o, lse, q, k, v, shape()); }
  void Backward(ops::Context c) const {
    ops::AttentionBackward(c, dq, dk, dv, delta, d_o, o, lse, q, k, v, shape());
  }
};

std::vector<AttentionSizes> Cases() {
  return {
      // Packed, one empty sequence, more than one tile of queries (64) and keys (128).
      {4, 2, 16, {0, 3, 3, 170, 171}, {0, 3, 3, 170, 171}, true, 0.25},
      {3, 1, 5, {0, 65, 70}, {0, 65, 70}, true, 0.4},
      {2, 2, 64, {0, 140}, {0, 140}, true, 0.125},
      // Heads of 64 and rows that a GPU's tensor cores take: tiles of 128, some of them cut.
      {4, 2, 64, {0, 1, 130, 130, 515}, {0, 1, 130, 130, 515}, true, 0.125, true},
      {2, 1, 64, {0, 384, 768}, {0, 384, 768}, true, 0.125, true},
      {3, 3, 64, {0, 100, 200, 300}, {0, 100, 200, 300}, true, 0.2, true},
      {4, 2, 64, {0, 64, 128, 192}, {0, 64, 128, 192}, true, 0.125, true},
      {4, 2, 128, {0, 1, 130, 130, 515}, {0, 1, 130, 130, 515}, true, 0.1, true},
      {6, 1, 128, {0, 384, 768}, {0, 384, 768}, true, 0.1, true},
      {5, 5, 5, {0, 9, 80}, {0, 9, 80}, false, 0.5},
      // A step of ring attention: other people's keys, more or fewer than there are queries.
      {6, 2, 16, {0, 5, 5, 75}, {0, 130, 131, 135}, false, 0.25},
      // ... with heads that a GPU's tensor cores take.
      {4, 2, 128, {0, 5, 5, 300}, {0, 130, 131, 435}, false, 0.1, true},
      {3, 3, 64, {0, 200, 456}, {0, 333, 461}, false, 0.125, true},
      {1, 1, 1, {0, 1}, {0, 1}, true, 1.0},
  };
}

TEST_P(AttentionTest, ForwardMatchesReference) {
  for (const AttentionSizes& sizes : Cases()) {
    Problem p(run, sizes);
    p.Forward(c);
    run.ExpectOk();
    const auto expected = reference::Attention(p.q.Read(), p.k.Read(), p.v.Read(), sizes);
    EXPECT_TRUE(Near(p.o.Read(), expected.o, run.tolerance()));
    EXPECT_TRUE(Near(p.lse.Read(), expected.lse, run.wide_tolerance()));
  }
}

// Against the gradients of the f64 kernels, which the central differences below check.
void CheckBackward(const Runner& run, ops::Context c) {
  for (const AttentionSizes& sizes : Cases()) {
    Problem p(run, sizes);
    p.Forward(c);
    p.Backward(c);
    run.ExpectOk();
    Runner exact;
    Problem e(exact, sizes);
    e.q.Write(p.q.Read());
    e.k.Write(p.k.Read());
    e.v.Write(p.v.Read());
    e.d_o.Write(p.d_o.Read());
    e.Forward(exact.context());
    e.Backward(exact.context());
    exact.ExpectOk();
    // The stored output is rounded in bf16, and delta = d_o . o with it: half an ulp of bf16 in
    // each of many terms that cancel.
    const double tolerance = 2 * run.tolerance();
    EXPECT_TRUE(Near(p.dq.Read(), e.dq.Read(), tolerance));
    EXPECT_TRUE(Near(p.dk.Read(), e.dk.Read(), tolerance));
    EXPECT_TRUE(Near(p.dv.Read(), e.dv.Read(), tolerance));
  }
}

TEST_P(AttentionTest, BackwardMatchesF64) { CheckBackward(run, c); }

// The same through the library's kernels, and through this project's for tensor cores, where a GPU
// has a choice.
class GpuAttentionTest : public OpsTest {};
INSTANTIATE_TEST_SUITE_P(, GpuAttentionTest, ::testing::ValuesIn(SettingsThat([](const Setting& s) {
                           return s.mode == StreamMode::kDevice;
                         })),
                         SettingName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GpuAttentionTest);  // in a build without CUDA

// What comes first in backward passes while it lives.
struct Choose : WithVariable {
  explicit Choose(const char* kernels) : WithVariable("STRETTO_ATTENTION_BACKWARD", kernels) {}
};

TEST_P(GpuAttentionTest, LibraryBackwardMatchesF64) {
  const Choose first("cudnn");
  CheckBackward(run, c);
}

TEST_P(GpuAttentionTest, OwnBackwardMatchesF64) {
  const Choose first("own");
  CheckBackward(run, c);
}

// More tiles than a GPU has multiprocessors, which end anywhere: thread blocks take several, and
// none waits for ever, reads what belongs to the next one, or gives other bits in another run.
TEST_P(GpuAttentionTest, ManyTilesGiveTheLibrarysGradients) {
  for (const int64_t dim : {64, 128}) {
    for (const bool causal : {true, false}) {
      AttentionSizes sizes = {16, 8, dim, {0}, {0}, causal, 0.1, true};
      // Those of f32 are plain and slow.
      const bool fast = run.dtype() == DType::kBF16;
      for (int i = 0; i < (fast ? 40 : 8); ++i) {
        sizes.cu_q.push_back(sizes.cu_q.back() + 1 + (i * 131) % 700);
        sizes.cu_k.push_back(causal ? sizes.cu_q.back() : sizes.cu_k.back() + 1 + (i * 257) % 500);
      }
      Problem p(run, sizes);
      p.Forward(c);
      const Buffer* const gradients[] = {&p.dq, &p.dk, &p.dv};
      std::array<std::array<Values, 3>, 2> results;  // own, the library's
      std::array<std::vector<std::byte>, 3> bytes;
      for (int again = 0; again < (fast ? 30 : 2); ++again) {
        const Choose first("own");
        p.Backward(c);
        run.ExpectOk();
        for (size_t i = 0; i < 3; ++i) {
          if (again == 0) {
            bytes[i] = gradients[i]->bytes();
            results[0][i] = gradients[i]->Read();
          }
          EXPECT_TRUE(gradients[i]->bytes() == bytes[i]) << dim << causal << i << again;
        }
      }
      const Choose library("cudnn");
      p.Backward(c);
      run.ExpectOk();
      for (size_t i = 0; i < 3; ++i) results[1][i] = gradients[i]->Read();
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_TRUE(Near(results[0][i], results[1][i], 2 * run.tolerance())) << i;
      }
    }
  }
}

TEST(AttentionGradientTest, MatchesCentralDifferences) {
  const AttentionSizes cases[] = {
      {4, 2, 5, {0, 3, 3, 9}, {0, 3, 3, 9}, true, 0.3},
      {2, 1, 3, {0, 2, 5}, {0, 4, 5}, false, 0.6},
  };
  for (const AttentionSizes& sizes : cases) {
    Runner run({DType::kF64, 2});
    Problem p(run, sizes);
    p.Forward(run.context());
    p.Backward(run.context());
    run.ExpectOk();
    Values q = p.q.Read(), k = p.k.Read(), v = p.v.Read();
    const Values r = p.d_o.Read();
    const auto objective = [&] { return Dot(reference::Attention(q, k, v, sizes).o, r); };
    EXPECT_TRUE(Near(p.dq.Read(), NumericGradient(q, objective), 1e-8));
    EXPECT_TRUE(Near(p.dk.Read(), NumericGradient(k, objective), 1e-8));
    EXPECT_TRUE(Near(p.dv.Read(), NumericGradient(v, objective), 1e-8));
    // Negative control: another scale is another gradient.
    AttentionSizes wrong = sizes;
    wrong.scale *= 1.01;
    const auto other = [&] { return Dot(reference::Attention(q, k, v, wrong).o, r); };
    EXPECT_FALSE(Near(p.dq.Read(), NumericGradient(q, other), 1e-8));
  }
}

TEST_P(AttentionTest, NoKeysGiveZeroAndMinusInfinity) {
  Problem p(run, {2, 1, 6, {0, 3, 5}, {0, 0, 4}, false, 0.5});
  p.Forward(c);
  p.Backward(c);
  run.ExpectOk();
  const Values o = p.o.Read(), lse = p.lse.Read(), dq = p.dq.Read();
  for (int i = 0; i < 3 * 2 * 6; ++i) {
    EXPECT_EQ(o[i], 0);
    EXPECT_EQ(dq[i], 0);
  }
  for (int i = 0; i < 3 * 2; ++i) EXPECT_EQ(lse[i], -INFINITY);
  for (int i = 3 * 2; i < 5 * 2; ++i) EXPECT_TRUE(std::isfinite(lse[i]));
}

TEST_P(AttentionTest, NoQueriesClearTheGradientsOfKeys) {
  Problem p(run, {2, 1, 6, {0, 0, 5}, {0, 3, 4}, false, 0.5});
  p.Forward(c);
  p.Backward(c);
  run.ExpectOk();
  for (int i = 0; i < 3 * 6; ++i) EXPECT_EQ(p.dk.Read()[i], 0);
  for (int i = 0; i < 3 * 6; ++i) EXPECT_EQ(p.dv.Read()[i], 0);
}

// Rows that take no part, in front of, between and behind those that do.
std::vector<AttentionSizes> PartCases() {
  return {
      // As in a step of ring attention: all queries and the front of the keys, then the back of the
      // queries and all keys; sequences without queries, without keys and without either.
      {4,
       2,
       16,
       {0, 70, 70, 90, 95},
       {0, 140, 141, 170, 171},
       false,
       0.25,
       false,
       {},
       {131, 1, 0, 1}},
      {3, 1, 5, {2, 70, 70, 95, 96}, {1, 5, 140, 160, 171}, false, 0.4, false, {66, 0, 20, 1}, {}},
      {6, 2, 16, {3, 9, 75}, {2, 132, 140}, false, 0.25, false, {0, 60}, {120, 0}},
      {2, 2, 8, {1, 9, 75}, {1, 9, 75}, true, 0.25, false, {5, 66}, {5, 66}},
      // What a GPU's library takes.
      {4,
       2,
       64,
       {0, 1, 130, 130, 515},
       {0, 3, 300, 301, 640},
       false,
       0.125,
       true,
       {},
       {2, 190, 1, 0}},
      {4, 1, 128, {0, 64, 130, 515}, {0, 3, 300, 640}, false, 0.1, true, {64, 7, 300}, {}},
      {5,
       5,
       64,
       {9, 64, 130, 400},
       {0, 3, 300, 640},
       false,
       0.1,
       true,
       {30, 0, 270},
       {0, 290, 200}},
      {2, 1, 64, {4, 200, 384}, {4, 200, 384}, true, 0.125, true, {196, 100}, {196, 100}},
  };
}

// Whether the sequences of `a` name the row, of queries or of keys.
bool Named(const AttentionSizes& a, bool keys, int64_t row) {
  const std::vector<int32_t>& cu = keys ? a.cu_k : a.cu_q;
  for (size_t s = 0; s + 1 < cu.size(); ++s) {
    if (row >= cu[s] && row < cu[s] + (keys ? a.Keys(s) : a.Queries(s))) return true;
  }
  return false;
}

constexpr double kUntouched = 7;

// The named rows are `expected`, the others what they were.
void ExpectRows(const Buffer& actual, const Values& expected, const AttentionSizes& a, bool keys,
                double tolerance) {
  const Values got = actual.Read();
  const int64_t width = static_cast<int64_t>(got.size()) / (keys ? a.cu_k : a.cu_q).back();
  Values named, wanted;
  for (int64_t i = 0; i < static_cast<int64_t>(got.size()); ++i) {
    if (!Named(a, keys, i / width)) {
      EXPECT_EQ(got[i], kUntouched) << "row " << i / width << " takes no part and was written";
    } else if (std::isinf(expected[i])) {
      EXPECT_EQ(got[i], expected[i]);
    } else {
      named.push_back(got[i]);
      wanted.push_back(expected[i]);
    }
  }
  EXPECT_TRUE(Near(named, wanted, tolerance));
}

void Fill(const Buffer& b) {
  const_cast<Buffer&>(b).Write(Values(static_cast<size_t>(b.view().elements()), kUntouched));
}

TEST_P(AttentionTest, RowsThatTakeNoPartAreNeitherReadNorWritten) {
  for (const AttentionSizes& sizes : PartCases()) {
    Problem p(run, sizes);
    Runner exact;
    Problem e(exact, sizes);
    e.q.Write(p.q.Read());
    e.k.Write(p.k.Read());
    e.v.Write(p.v.Read());
    e.d_o.Write(p.d_o.Read());
    // What is read of other rows is found: it is not a number. (A library's kernels read whole
    // tiles and multiply what nobody sees by zero.)
    const double poison = run.on_cpu() || run.dtype() != DType::kBF16 ? NAN : 1e4;
    for (Problem* x : {&p, &e}) {
      for (Buffer* b : {&x->q, &x->k, &x->v, &x->d_o}) {
        const bool keys = b == &x->k || b == &x->v;
        Values v = b->Read();
        const int64_t width = static_cast<int64_t>(v.size()) / (keys ? x->tk : x->tq);
        for (size_t i = 0; i < v.size(); ++i) {
          if (!Named(sizes, keys, static_cast<int64_t>(i) / width)) v[i] = poison;
        }
        b->Write(v);
      }
      for (Buffer* b : {&x->o, &x->lse, &x->dq, &x->dk, &x->dv}) Fill(*b);
    }
    p.Forward(c);
    p.Backward(c);
    run.ExpectOk();
    e.Forward(exact.context());
    e.Backward(exact.context());
    exact.ExpectOk();
    const auto expected = reference::Attention(e.q.Read(), e.k.Read(), e.v.Read(), sizes);
    ExpectRows(p.o, expected.o, sizes, false, run.tolerance());
    ExpectRows(p.lse, expected.lse, sizes, false, run.wide_tolerance());
    const double tolerance = 2 * run.tolerance();
    ExpectRows(p.dq, e.dq.Read(), sizes, false, tolerance);
    ExpectRows(p.dk, e.dk.Read(), sizes, true, tolerance);
    ExpectRows(p.dv, e.dv.Read(), sizes, true, tolerance);
  }
}

TEST_P(AttentionTest, TwoSetsOfKeysMergedAreAllKeys) {
  // Keys [0, 40), [40, 41), [41, 141) of three sequences, each cut after its first `front`.
  const AttentionSizes all = {4, 2, 16, {0, 30, 32, 95}, {0, 40, 41, 141}, false, 0.25};
  AttentionSizes front = all, back = all;
  front.len_k = {13, 0, 90};
  back.len_k = {27, 1, 10};
  back.cu_k = {13, 40, 131, 141};
  for (const bool wide : {false, true}) {
    Problem whole(run, all), first(run, front), second(run, back);
    const Buffer o = wide ? run.Wide({95, 4, 16}, 3) : run.Make({95, 4, 16}, 3);
    whole.Forward(c);
    first.Forward(c);
    second.Forward(c);
    ops::Copy(c, o, first.o);
    ops::AttentionMerge(c, o, first.lse, second.o, second.lse, second.cu_q, {});
    run.ExpectOk();
    EXPECT_TRUE(Near(o.Read(), whole.o.Read(), 2 * run.tolerance()));
    EXPECT_TRUE(Near(first.lse.Read(), whole.lse.Read(), run.wide_tolerance()));

    // Gradients with what both sets gave together are those through each of them.
    whole.Backward(c);
    const Buffer dq = run.Make({95, 4, 16}, Values(95 * 4 * 16, 0.0), 3);
    Values dk(whole.dk.Read().size(), 0.0), dv = dk;
    for (Problem* part : {&first, &second}) {
      Fill(part->dk);
      Fill(part->dv);
      ops::AttentionBackward(c, part->dq, part->dk, part->dv, part->delta, whole.d_o, whole.o,
                             whole.lse, whole.q, whole.k, whole.v, part->shape());
      ops::AddRows(c, dq, part->dq, part->cu_q, {});
      run.ExpectOk();
      const Values part_dk = part->dk.Read(), part_dv = part->dv.Read();
      for (size_t i = 0; i < dk.size(); ++i) {
        if (!Named(part->a, true, static_cast<int64_t>(i) / (2 * 16))) continue;
        dk[i] += part_dk[i];
        dv[i] += part_dv[i];
      }
    }
    EXPECT_TRUE(Near(dq.Read(), whole.dq.Read(), 3 * run.tolerance()));
    EXPECT_TRUE(Near(dk, whole.dk.Read(), 2 * run.tolerance()));
    EXPECT_TRUE(Near(dv, whole.dv.Read(), 2 * run.tolerance()));
  }
}

TEST_P(AttentionTest, MergeOfNothingKeepsTheBitsAndOtherRows) {
  Problem p(run, {2, 1, 6, {0, 3, 5}, {0, 2, 4}, false, 0.5});
  p.Forward(c);
  Problem none(run, {2, 1, 6, {0, 3, 5}, {0, 0, 0}, false, 0.5});
  none.Forward(c);
  run.ExpectOk();
  const auto o = p.o.bytes(), lse = p.lse.bytes();
  ops::AttentionMerge(c, p.o, p.lse, none.o, none.lse, p.cu_q, {});
  run.ExpectOk();
  EXPECT_EQ(p.o.bytes(), o);
  EXPECT_EQ(p.lse.bytes(), lse);
  // The other way round everything is the part's.
  ops::AttentionMerge(c, none.o, none.lse, p.o, p.lse, p.cu_q, {});
  run.ExpectOk();
  EXPECT_EQ(none.o.Read(), p.o.Read());
  EXPECT_EQ(none.lse.Read(), p.lse.Read());
  // Of named rows only.
  Problem other(run, {2, 1, 6, {0, 3, 5}, {0, 2, 4}, false, 0.9});
  other.Forward(c);
  const Buffer len = Indices({1, 0});
  const Values before = p.o.Read(), before_lse = p.lse.Read();
  ops::AttentionMerge(c, p.o, p.lse, other.o, other.lse, p.cu_q, len);
  run.ExpectOk();
  const Values after = p.o.Read(), after_lse = p.lse.Read();
  // Row 0 of the first sequence.
  EXPECT_NE(Values(after.begin(), after.begin() + 12), Values(before.begin(), before.begin() + 12));
  EXPECT_EQ(Values(after.begin() + 12, after.end()), Values(before.begin() + 12, before.end()));
  for (size_t i = 0; i < after_lse.size(); ++i) EXPECT_EQ(after_lse[i] != before_lse[i], i < 2);
}

TEST_P(AttentionTest, ExtremeLogitsStayFinite) {
  Problem p(run, {2, 2, 16, {0, 150}, {0, 150}, true, 10.0}, 20.0);  // scores around 1e4
  p.Forward(c);
  p.Backward(c);
  run.ExpectOk();
  const auto expected = reference::Attention(p.q.Read(), p.k.Read(), p.v.Read(), p.a);
  double largest = 0;
  for (double x : expected.lse) largest = std::max(largest, std::fabs(x));
  EXPECT_GT(largest, 1e4);
  EXPECT_TRUE(Near(p.lse.Read(), expected.lse, run.wide_tolerance()));
  for (const Buffer* b : {&p.o, &p.dq, &p.dk, &p.dv}) {
    for (double x : b->Read()) EXPECT_TRUE(std::isfinite(x));
  }
}

TEST_P(AttentionTest, SameBitsOnEveryRunAndWithOneThread) {
  const AttentionSizes sizes = {4, 2, 16, {0, 3, 170, 171}, {0, 3, 170, 171}, true, 0.25};
  Problem first(run, sizes), again(run, sizes);
  Runner one(run.serial());
  Problem serial(one, sizes);
  first.Forward(c);
  first.Backward(c);
  again.Forward(c);
  again.Backward(c);
  serial.Forward(one.context());
  serial.Backward(one.context());
  run.ExpectOk();
  one.ExpectOk();
  for (const Problem* other : {&again, &serial}) {
    EXPECT_EQ(first.o.bytes(), other->o.bytes());
    EXPECT_EQ(first.lse.bytes(), other->lse.bytes());
    EXPECT_EQ(first.dq.bytes(), other->dq.bytes());
    EXPECT_EQ(first.dk.bytes(), other->dk.bytes());
    EXPECT_EQ(first.dv.bytes(), other->dv.bytes());
  }
}

TEST_P(AttentionTest, BadSequencesFailTheStream) {
  const auto message = [&](AttentionSizes sizes, std::vector<int32_t> cu_k) {
    Runner fresh(GetParam());
    Problem p(fresh, sizes);
    p.cu_k.Write(Values(cu_k.begin(), cu_k.end()));
    p.Forward(fresh.context());
    return std::string(fresh.Wait().message());
  };
  const AttentionSizes causal = {1, 1, 4, {0, 3, 8}, {0, 3, 8}, true, 0.5};
  AttentionSizes full = causal;
  full.causal = false;
  EXPECT_NE(message(causal, {0, 4, 8}).find("sequence 0 has 3 and 4"), std::string::npos);
  EXPECT_NE(message(full, {0, 9, 8}).find("sequence 1"), std::string::npos);
  EXPECT_NE(message(full, {0, 3, 9}).find("end at query 8 and key 9"), std::string::npos);
  EXPECT_EQ(message(full, {0, 2, 8}), "");
}

}  // namespace
}  // namespace stretto::test
