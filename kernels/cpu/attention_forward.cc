// Attention over key tiles with an online softmax (Dao et al., FlashAttention, 2022): per query a
// running maximum and sum; the output is rescaled when the maximum grows.
#include <cmath>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/gemm.h"

namespace stretto::cpu {

bool CheckSequences(Stream& stream, const char* op, const AttentionShape& shape, int64_t q_rows,
                    int64_t k_rows) {
  const auto fail = [&](const std::string& what) {
    stream.Fail(absl::InvalidArgumentError(absl::StrCat(op, ": ", what)));
    return false;
  };
  const int64_t sequences = shape.cu_q.rows() - 1;
  const int32_t* cu_q = shape.cu_q.as<int32_t>();
  const int32_t* cu_k = shape.cu_k.as<int32_t>();
  if (cu_q[0] < 0 || cu_k[0] < 0) return fail("cu_q and cu_k must not start below 0");
  for (int64_t i = 0; i < sequences; ++i) {
    if (cu_q[i + 1] < cu_q[i] || cu_k[i + 1] < cu_k[i]) {
      return fail(absl::StrCat("cu_q and cu_k must not decrease; sequence ", i, " does"));
    }
    const int64_t q_len = Length(shape.cu_q, shape.len_q, i);
    const int64_t k_len = Length(shape.cu_k, shape.len_k, i);
    if (q_len < 0 || q_len > cu_q[i + 1] - cu_q[i] || k_len < 0 || k_len > cu_k[i + 1] - cu_k[i]) {
      return fail(absl::StrCat("sequence ", i, " has ", q_len, " queries and ", k_len,
                               " keys where there is room for ", cu_q[i + 1] - cu_q[i], " and ",
                               cu_k[i + 1] - cu_k[i]));
    }
    if (shape.causal && q_len != k_len) {
      return fail(absl::StrCat("causal attention needs as many queries as keys; sequence ", i,
                               " has ", q_len, " and ", k_len));
    }
  }
  if (cu_q[sequences] > q_rows || cu_k[sequences] > k_rows) {
    return fail(absl::StrCat("the sequences end at query ", cu_q[sequences], " and key ",
                             cu_k[sequences], ", but q has ", q_rows, " rows and k has ", k_rows));
  }
  return true;
}

namespace {

// x <- exp(x - m) for the first `visible` of `count` elements, 0 for the others; returns their sum.
template <class A>
A ExpRow(A* x, int64_t visible, int64_t count, A m) {
  Vec<A> sum = {};
  VecLoop<A>(visible, [&](int64_t i, auto k) {
    const Vec<A> e = KeepFirst<A>(Exp(Load(x + i, k) - m), k);
    Store(x + i, e, k);
    sum += e;
  });
  std::fill(x + visible, x + count, A{0});
  return Sum<A>(sum);
}

template <class A>
A RowMax(const A* x, int64_t n) {
  Vec<A> m = Splat<A>(-std::numeric_limits<A>::infinity());
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) {
    const Vec<A> v = Load(x + i, Full<A>{});
    m = v > m ? v : m;
  }
  A result = Max<A>(m);
  for (; i < n; ++i) result = std::max(result, x[i]);
  return result;
}

// The running softmax of one tile of queries.
template <class A>
struct Running {
  A max[kQueryTile];
  A sum[kQueryTile];
};

// Folds a tile of scores [rows, count] into the running state: scores become probabilities relative
// to the new maximum, and the rows of `out` are rescaled to it.
template <class A>
void FoldTile(Running<A>& run, A* scores, A* out, int64_t dim, int64_t rows, int64_t count,
              bool causal, int64_t query, int64_t k0) {
  for (int64_t i = 0; i < rows; ++i) {
    A* row = scores + i * count;
    const int64_t visible = VisibleKeys(causal, query + i, k0, count);
    const A m = std::max(run.max[i], RowMax(row, visible));
    // -inf while only keys with a score of -inf were seen: they add nothing.
    const A shift = m == -std::numeric_limits<A>::infinity() ? A{0} : m;
    const A sum = ExpRow(row, visible, count, shift);
    if (run.sum[i] != 0 && m != run.max[i]) {
      const A rescale = std::exp(run.max[i] - shift);
      run.sum[i] *= rescale;
      for (int64_t j = 0; j < dim; ++j) out[i * dim + j] *= rescale;
    }
    run.sum[i] += sum;
    run.max[i] = m;
  }
}

// Query rows [first, first + rows) of one sequence and head.
template <class T>
void QueryTile(const Sequence& seq, int64_t first, int64_t rows, int64_t head, int64_t kv_head,
               Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, bool causal, double scale) {
  using A = Acc<T>;
  const int64_t dim = q.dims[2];
  A* scores = Scratch<A>(kScratchA, kQueryTile * kKeyTile);
  A* out = Scratch<A>(kScratchB, kQueryTile * dim);
  A* wide_q = Scratch<A>(kScratchC, kQueryTile * dim);
  A* wide_kv = Scratch<A>(kScratchD, kKeyTile * dim);
  Running<A> run;
  std::fill_n(run.max, rows, -std::numeric_limits<A>::infinity());
  std::fill_n(run.sum, rows, A{0});
  std::fill_n(out, rows * dim, A{0});

  const HeadTile<A> tq = WidenHead<T>(q, seq.q + first, rows, head, wide_q);
  const int64_t keys = causal ? first + rows : seq.k_len;
  for (int64_t k0 = 0; k0 < keys; k0 += kKeyTile) {
    const int64_t count = std::min(kKeyTile, keys - k0);
    const HeadTile<A> tk = WidenHead<T>(k, seq.k + k0, count, kv_head, wide_kv);
    Gemm(false, true, rows, count, dim, static_cast<A>(scale), tq.data, tq.ld, tk.data, tk.ld, A{0},
         scores, count);
    FoldTile(run, scores, out, dim, rows, count, causal, first, k0);
    const HeadTile<A> tv = WidenHead<T>(v, seq.k + k0, count, kv_head, wide_kv);
    Gemm(false, false, rows, dim, count, A{1}, scores, count, tv.data, tv.ld, A{1}, out, dim);
  }

  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = seq.q + first + i;
    T* to = o.as<T>(row) + head * dim;
    const A inverse = run.sum[i] == 0 ? A{0} : 1 / run.sum[i];
    VecLoop<A>(dim, [&](int64_t j, auto lanes) {
      Store(to + j, Load(out + i * dim + j, lanes) * inverse, lanes);
    });
    lse.as<A>(row)[head] =
        run.sum[i] == 0 ? -std::numeric_limits<A>::infinity() : run.max[i] + std::log(run.sum[i]);
  }
}

class CpuAttention final : public AttentionKernels {
 public:
  void Forward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
               const AttentionShape& shape) const override {
    AttentionForward(s, o, lse, q, k, v, shape);
  }
  void Backward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o, Tensor o,
                Tensor lse, Tensor q, Tensor k, Tensor v,
                const AttentionShape& shape) const override {
    AttentionBackward(s, dq, dk, dv, delta, d_o, o, lse, q, k, v, shape);
  }
  void Merge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
             Tensor len) const override {
    AttentionMerge(s, o, lse, part, part_lse, cu, len);
  }
};

}  // namespace

void AttentionForward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                      const AttentionShape& shape) {
  Stream* stream = &s;
  s.Enqueue([=] {
    if (!CheckSequences(*stream, "Attention", shape, q.rows(), k.rows())) return;
    ForModelType(q.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ThreadPool& pool = stream->pool();
      const int64_t heads = q.dims[1];
      const int64_t group = heads / k.dims[1];
      pool.Run(pool.threads(), [&](int64_t thread) {
        Deal deal(thread, pool.threads());
        for (int64_t i = 0; i + 1 < shape.cu_q.rows(); ++i) {
          const Sequence seq(shape, i);
          for (int64_t first = 0; first < seq.q_len; first += kQueryTile) {
            const int64_t rows = std::min(kQueryTile, seq.q_len - first);
            for (int64_t head = 0; head < heads; ++head) {
              if (!deal.Mine()) continue;
              QueryTile<T>(seq, first, rows, head, head / group, o, lse, q, k, v, shape.causal,
                           shape.scale);
            }
          }
        }
      });
    });
  });
}

const AttentionKernels* Attention() {
  static const CpuAttention kernels;
  return &kernels;
}

}  // namespace stretto::cpu
