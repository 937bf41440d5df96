// Gradients of attention from the stored log-sum-exp: scores are computed again tile by tile (Dao
// et al., FlashAttention, 2022, algorithm 4). One task is one sequence and key-value head: it owns
// the rows of dk and dv of that head and the rows of dq of the query heads that share it, and walks
// them in a fixed order, so no two threads add to the same number.
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/gemm.h"

namespace stretto::cpu {
namespace {

struct Operands {
  Tensor dq, dk, dv, delta, d_o, o, lse, q, k, v;
  bool causal;
  double scale;
};

// Where gradients of one head's rows are summed: the output itself for f32 and f64, a dense buffer
// for bf16.
template <class A>
struct Accumulator {
  A* data;
  int64_t ld;
  A* Row(int64_t i) const { return data + i * ld; }
};

template <class T>
Accumulator<Acc<T>> Begin(const Tensor& t, int64_t row, int64_t count, int64_t head,
                          Acc<T>* buffer) {
  const int64_t dim = t.dims[2];
  Accumulator<Acc<T>> acc{buffer, dim};
  if constexpr (!std::is_same_v<T, BFloat16>) {
    acc = {t.as<T>(row) + head * dim, t.row_stride};
  }
  for (int64_t i = 0; i < count; ++i) std::fill_n(acc.Row(i), dim, Acc<T>{0});
  return acc;
}

template <class T>
void End(const Accumulator<Acc<T>>& acc, const Tensor& t, int64_t row, int64_t count,
         int64_t head) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const int64_t dim = t.dims[2];
    for (int64_t i = 0; i < count; ++i) {
      T* to = t.as<T>(row + i) + head * dim;
      VecLoop<float>(dim, [&](int64_t j, auto k) { Store(to + j, Load(acc.Row(i) + j, k), k); });
    }
  }
}

// Buffers of one thread; the wide ones are used for bf16 only.
template <class A>
struct Buffers {
  A* scores;  // [queries, keys] of a tile: scores, then probabilities, then their gradient
  A* grads;   // [queries, keys]: gradient of the probabilities
  A* q;
  A* d_o;
  A* dq;
  A* k;
  A* v;
  A* dk;
  A* dv;

  Buffers(int64_t dim, int64_t max_keys, bool widen) {
    const int64_t tile = kQueryTile * kKeyTile;
    scores = Scratch<A>(kScratchA, 2 * tile);
    grads = scores + tile;
    q = d_o = dq = k = v = dk = dv = nullptr;
    if (!widen) return;
    q = Scratch<A>(kScratchB, (3 * kQueryTile + 2 * kKeyTile) * dim);
    d_o = q + kQueryTile * dim;
    dq = d_o + kQueryTile * dim;
    k = dq + kQueryTile * dim;
    v = k + kKeyTile * dim;
    dk = Scratch<A>(kScratchC, 2 * max_keys * dim);
    dv = dk + max_keys * dim;
  }
};

// delta = sum over head_dim of d_o * o, for one tile of queries.
template <class T>
void Delta(const Operands& x, int64_t row, int64_t rows, int64_t head) {
  using A = Acc<T>;
  const int64_t dim = x.q.dims[2];
  for (int64_t i = 0; i < rows; ++i) {
    const T* a = x.d_o.as<T>(row + i) + head * dim;
    const T* b = x.o.as<T>(row + i) + head * dim;
    Vec<A> sum = {};
    VecLoop<A>(dim, [&](int64_t j, auto k) { sum += Load(a + j, k) * Load(b + j, k); });
    x.delta.as<A>(row + i)[head] = Sum<A>(sum);
  }
}

// In place: scores -> probabilities and grads -> gradients of the scores.
template <class A>
void Softmax(A* scores, A* grads, int64_t visible, int64_t count, A lse, A delta) {
  if (lse == -std::numeric_limits<A>::infinity()) visible = 0;  // the query saw nothing
  VecLoop<A>(visible, [&](int64_t j, auto k) {
    const Vec<A> p = Exp(Load(scores + j, k) - lse);
    Store(grads + j, p * (Load(grads + j, k) - delta), k);
    Store(scores + j, p, k);
  });
  std::fill(scores + visible, scores + count, A{0});
  std::fill(grads + visible, grads + count, A{0});
}

template <class T>
void QueryTile(const Operands& x, const Sequence& seq, int64_t first, int64_t rows, int64_t head,
               int64_t kv_head, const Buffers<Acc<T>>& buffers, const Accumulator<Acc<T>>& dk,
               const Accumulator<Acc<T>>& dv) {
  using A = Acc<T>;
  const int64_t dim = x.q.dims[2];
  const int64_t row = seq.q + first;
  const A scale = static_cast<A>(x.scale);
  Delta<T>(x, row, rows, head);
  const HeadTile<A> q = WidenHead<T>(x.q, row, rows, head, buffers.q);
  const HeadTile<A> d_o = WidenHead<T>(x.d_o, row, rows, head, buffers.d_o);
  const Accumulator<A> dq = Begin<T>(x.dq, row, rows, head, buffers.dq);
  const int64_t keys = x.causal ? first + rows : seq.k_len;
  for (int64_t k0 = 0; k0 < keys; k0 += kKeyTile) {
    const int64_t count = std::min(kKeyTile, keys - k0);
    const HeadTile<A> k = WidenHead<T>(x.k, seq.k + k0, count, kv_head, buffers.k);
    const HeadTile<A> v = WidenHead<T>(x.v, seq.k + k0, count, kv_head, buffers.v);
    A* p = buffers.scores;
    A* ds = buffers.grads;
    Gemm(false, true, rows, count, dim, scale, q.data, q.ld, k.data, k.ld, A{0}, p, count);
    Gemm(false, true, rows, count, dim, A{1}, d_o.data, d_o.ld, v.data, v.ld, A{0}, ds, count);
    for (int64_t i = 0; i < rows; ++i) {
      Softmax(p + i * count, ds + i * count, VisibleKeys(x.causal, first + i, k0, count), count,
              x.lse.as<A>(row + i)[head], x.delta.as<A>(row + i)[head]);
    }
    Gemm(true, false, count, dim, rows, A{1}, p, count, d_o.data, d_o.ld, A{1}, dv.Row(k0), dv.ld);
    Gemm(true, false, count, dim, rows, scale, ds, count, q.data, q.ld, A{1}, dk.Row(k0), dk.ld);
    Gemm(false, false, rows, dim, count, scale, ds, count, k.data, k.ld, A{1}, dq.Row(0), dq.ld);
  }
  End<T>(dq, x.dq, row, rows, head);
}

template <class T>
void Task(const Operands& x, const Sequence& seq, int64_t kv_head, int64_t max_keys) {
  using A = Acc<T>;
  const int64_t group = x.q.dims[1] / x.k.dims[1];
  const Buffers<A> buffers(x.q.dims[2], max_keys, std::is_same_v<T, BFloat16>);
  const Accumulator<A> dk = Begin<T>(x.dk, seq.k, seq.k_len, kv_head, buffers.dk);
  const Accumulator<A> dv = Begin<T>(x.dv, seq.k, seq.k_len, kv_head, buffers.dv);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t first = 0; first < seq.q_len; first += kQueryTile) {
      QueryTile<T>(x, seq, first, std::min(kQueryTile, seq.q_len - first), head, kv_head, buffers,
                   dk, dv);
    }
  }
  End<T>(dk, x.dk, seq.k, seq.k_len, kv_head);
  End<T>(dv, x.dv, seq.k, seq.k_len, kv_head);
}

}  // namespace

void AttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o,
                       Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                       const AttentionShape& shape) {
  Stream* stream = &s;
  s.Enqueue([=] {
    if (!CheckSequences(*stream, "AttentionBackward", shape, q.rows(), k.rows())) return;
    int64_t max_keys = shape.max_k;
    for (int64_t i = 0; i + 1 < shape.cu_k.rows(); ++i) {
      max_keys = std::max(max_keys, Sequence(shape, i).k_len);
    }
    ForModelType(q.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ThreadPool& pool = stream->pool();
      const Operands x = {dq, dk, dv, delta, d_o, o, lse, q, k, v, shape.causal, shape.scale};
      pool.Run(pool.threads(), [&](int64_t thread) {
        Deal deal(thread, pool.threads());
        for (int64_t i = 0; i + 1 < shape.cu_q.rows(); ++i) {
          const Sequence seq(shape, i);
          for (int64_t kv_head = 0; kv_head < k.dims[1]; ++kv_head) {
            if (deal.Mine()) Task<T>(x, seq, kv_head, max_keys);
          }
        }
      });
    });
  });
}

}  // namespace stretto::cpu
