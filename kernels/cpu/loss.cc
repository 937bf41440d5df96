#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Columns that are folded at once: they stay in the first-level cache between the two passes.
constexpr int64_t kColumns = 4096;

template <class T, class A>
A RowMax(const T* x, int64_t n) {
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  Vec<A> a = Splat<A>(kLowest);
  Vec<A> b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= n; i += 2 * kLanes<A>) {
    const Vec<A> u = Load(x + i, Full<A>{});
    const Vec<A> v = Load(x + i + kLanes<A>, Full<A>{});
    a = u > a ? u : a;
    b = v > b ? v : b;
  }
  A m = Max<A>(a > b ? a : b);
  for (; i < n; ++i) m = std::max<A>(m, Widen(x[i]));
  return m;
}

template <class T, class A>
void FoldRow(A* state, const T* x, int64_t n) {
  for (int64_t first = 0; first < n; first += kColumns) {
    const int64_t count = std::min(kColumns, n - first);
    const A chunk_max = RowMax<T, A>(x + first, count);
    const A m = std::max(state[0], chunk_max);
    // All logits so far are -inf (a masked vocabulary): nothing to add yet. A NaN does not win a
    // maximum, but comes through the sum below.
    const A shift = m == -std::numeric_limits<A>::infinity() ? A{0} : m;
    Vec<A> sum = {};
    VecLoop<A>(count, [&](int64_t i, auto k) {
      sum += KeepFirst<A>(Exp(Load(x + first + i, k) - shift), k);
    });
    const A kept = state[1] == 0 ? A{0} : state[1] * std::exp(state[0] - shift);
    state[0] = m;
    state[1] = kept + Sum<A>(sum);
  }
}

template <class T, class A>
void GradientRow(T* x, const A* state, A weight, int64_t n) {
  if (weight == 0) {
    std::fill_n(x, n, T{});
    return;
  }
  const A scale = weight / state[1];
  const A m = state[0];
  VecLoop<A>(n, [&](int64_t i, auto k) { Store(x + i, Exp(Load(x + i, k) - m) * scale, k); });
}

float WeightOf(const Tensor& weights, int64_t t) {
  return weights.present() ? weights.as<float>()[t] : 1.0f;
}

void FailTarget(Stream& stream, const std::string& target, int64_t row) {
  stream.Fail(absl::OutOfRangeError(
      absl::StrCat("Loss: ", target, " of row ", row,
                   " is in no chunk of the vocabulary, or its logit is -inf; check the data "
                   "against the vocabulary, or give the token weight 0")));
}

class CpuLoss final : public LossKernels {
 public:
  void Fold(Stream& s, Tensor state, Tensor logits, Tensor targets, int64_t first,
            bool start) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(logits.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t columns = logits.dims[1];
        pool->ParallelFor(
            logits.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t t = begin; t < end; ++t) {
                A* st = state.as<A>(t);
                if (start) {
                  st[0] = st[2] = -std::numeric_limits<A>::infinity();
                  st[1] = 0;
                }
                FoldRow<T, A>(st, logits.as<T>(t), columns);
                const int64_t target = targets.as<int32_t>()[t] - first;
                if (target >= 0 && target < columns) st[2] = Widen(logits.as<T>(t)[target]);
              }
            },
            kSerialElements / std::max<int64_t>(columns, 1));
      });
    });
  }

  void Merge(Stream& s, Tensor state, Tensor parts) const override {
    s.Enqueue([=] {
      ForModelType(state.dtype, [&](auto type) {
        using A = Acc<typename decltype(type)::type>;
        constexpr A kLowest = -std::numeric_limits<A>::infinity();
        const int64_t tokens = state.rows();
        for (int64_t t = 0; t < tokens; ++t) {
          A* st = state.as<A>(t);
          A max = kLowest, sum = 0, target = kLowest;
          for (int64_t r = t; r < parts.rows(); r += tokens) {
            max = std::max(max, parts.as<A>(r)[0]);
            target = std::max(target, parts.as<A>(r)[2]);
          }
          const A shift = max == kLowest ? A{0} : max;
          for (int64_t r = t; r < parts.rows(); r += tokens) {
            const A* part = parts.as<A>(r);
            if (part[1] != 0) sum += part[1] * std::exp(part[0] - shift);
          }
          st[0] = max;
          st[1] = sum;
          st[2] = target;
        }
      });
    });
  }

  void Finish(Stream& s, Tensor losses, Tensor total, Tensor state, Tensor weights, bool acc,
              Tensor targets) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(state.dtype, [&](auto type) {
        using A = Acc<typename decltype(type)::type>;
        double sum = 0;
        double weight_sum = 0;
        for (int64_t t = 0; t < state.rows(); ++t) {
          const A w = WeightOf(weights, t);
          A& loss = losses.as<A>()[t];
          loss = 0;
          if (w == 0) continue;
          const A* st = state.as<A>(t);
          if (st[2] == -std::numeric_limits<A>::infinity()) {
            const std::string id = targets.present()
                                       ? absl::StrCat("target ", targets.as<int32_t>()[t])
                                       : "the target";
            FailTarget(*stream, id, t);
          }
          loss = w * (st[0] - st[2] + std::log(st[1]));
          sum += loss;
          weight_sum += w;
        }
        double* out = total.as<double>();
        out[0] = (acc ? out[0] : 0) + sum;
        out[1] = (acc ? out[1] : 0) + weight_sum;
      });
    });
  }

  void Fused(Stream& s, Tensor logits, Tensor losses, Tensor total, Tensor targets, Tensor weights,
             bool acc) const override {
    Stream* stream = &s;
    s.Enqueue([=] {
      ForModelType(logits.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t columns = logits.dims[1];
        stream->pool().ParallelFor(
            logits.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t t = begin; t < end; ++t) {
                const A w = WeightOf(weights, t);
                T* row = logits.as<T>(t);
                A& loss = losses.as<A>()[t];
                loss = 0;
                A state[2] = {-std::numeric_limits<A>::infinity(), 0};
                if (w == 0) {
                  GradientRow(row, state, w, columns);
                  continue;
                }
                FoldRow<T, A>(state, row, columns);
                const int64_t target = targets.as<int32_t>()[t];
                const bool here = target >= 0 && target < columns;
                const A logit = here ? Widen(row[target]) : -std::numeric_limits<A>::infinity();
                if (logit == -std::numeric_limits<A>::infinity()) {
                  FailTarget(*stream, absl::StrCat("target ", target), t);
                }
                loss = w * (state[0] - logit + std::log(state[1]));
                const A at_target = w * (std::exp(logit - state[0]) / state[1] - 1);
                GradientRow(row, state, w, columns);
                if (here) row[target] = Narrow<T>(at_target);
              }
            },
            kSerialElements / std::max<int64_t>(columns, 1));
        double sum = 0;
        double weight_sum = 0;
        for (int64_t t = 0; t < logits.rows(); ++t) {
          sum += losses.as<A>()[t];
          weight_sum += WeightOf(weights, t);
        }
        double* out = total.as<double>();
        out[0] = (acc ? out[0] : 0) + sum;
        out[1] = (acc ? out[1] : 0) + weight_sum;
      });
    });
  }

  void Backward(Stream& s, Tensor logits, Tensor state, Tensor targets, Tensor weights,
                int64_t first) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(logits.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        using A = Acc<T>;
        const int64_t columns = logits.dims[1];
        pool->ParallelFor(
            logits.rows(), 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t t = begin; t < end; ++t) {
                const A w = WeightOf(weights, t);
                const A* st = state.as<A>(t);
                T* row = logits.as<T>(t);
                const int64_t target = targets.as<int32_t>()[t] - first;
                const bool here = w != 0 && target >= 0 && target < columns;
                // In arithmetic precision: the difference may cancel.
                const A at_target =
                    here ? w * (std::exp(Widen(row[target]) - st[0]) / st[1] - 1) : A{0};
                GradientRow<T, A>(row, st, w, columns);
                if (here) row[target] = Narrow<T>(at_target);
              }
            },
            kSerialElements / std::max<int64_t>(columns, 1));
      });
    });
  }
};

}  // namespace

const LossKernels* Loss() {
  static const CpuLoss kernels;
  return &kernels;
}

}  // namespace stretto::cpu
