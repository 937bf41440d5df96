#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/cpu/families.h"
#include "kernels/cpu/random.h"
#include "kernels/cpu/support.h"
#include "stretto/ops/optimizer_table.h"

namespace stretto::cpu {
namespace {

// Squares are summed chunk by chunk and the chunks added in order, so the result does not depend on
// the number of threads.
template <class T>
double BlockSumSquares(const T* x, int64_t n) {
  double lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const double v = Widen(x[i + j]);
      lanes[j] += v * v;
    }
  }
  for (; i < n; ++i) {
    const double v = Widen(x[i]);
    lanes[i % 16] += v * v;
  }
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// The step's constants in arithmetic precision.
template <class A>
struct AdamWStep {
  A grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size,
      inverse_root_correction, eps;
};

// The random words of a tile of elements, which starts at a multiple of kTile in the whole
// parameter: element i of the tile has moments[i] and param[i] (OptimizerKernels::AdamW).
struct TileBits {
  static constexpr int kTile = 32;
  // A vector may be read that begins at any element.
  alignas(32) uint32_t moments[kTile + 8] = {};
  alignas(32) uint32_t param[kTile + 8] = {};

  static void Draw(uint32_t (&to)[kTile + 8], uint64_t first_block, uint64_t step,
                   const uint32_t (&key)[2]) {
    U32x8 words[4];
    PhiloxLanes(first_block, 2, step, {key[0], key[1]}, words);
    for (int b = 0; b < kTile / 4; ++b) {
      for (int j = 0; j < 4; ++j) to[4 * b + j] = words[j][b];
    }
  }
};
static_assert(TileBits::kTile / 4 == 8);

inline U32x8 LoadBits(const uint32_t* p) {
  U32x8 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

// What is kept: stochastically rounded to bf16, else as it is.
template <class T, class N>
void Keep(T* p, Vec<Acc<T>> x, U32x8 random, N n) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    StoreStochastic(p, x, random, n);
  } else {
    Store(p, x, n);
  }
}

// P: stored parameter; M: moments; kMaster: whether the master is what is updated, and param a
// copy of it. The random words of element i are at offset + i of `bits`.
template <class P, class M, bool kMaster, class A>
void AdamWSpan(P* param, A* master, const A* grad, M* m, M* v, int64_t n, const AdamWStep<A>& c,
               const TileBits& bits, int64_t offset) {
  constexpr bool kRandomMoments = std::is_same_v<M, BFloat16>;
  constexpr bool kRandomParam = std::is_same_v<P, BFloat16> && !kMaster;
  VecLoop<A>(n, [&](int64_t i, auto k) {
    const Vec<A> g = Load(grad + i, k) * c.grad_scale;
    const Vec<A> m1 = Load(m + i, k) * c.beta1 + g * c.one_minus_beta1;
    const Vec<A> v1 = Load(v + i, k) * c.beta2 + g * g * c.one_minus_beta2;
    const U32x8 random = kRandomMoments ? LoadBits(bits.moments + offset + i) : U32x8{};
    Keep(m + i, m1, random, k);
    Keep(v + i, v1, random >> 16, k);
    Vec<A> root = v1;
    for (int j = 0; j < kLanes<A>; ++j) root[j] = std::sqrt(root[j]);
    Vec<A> w;
    if constexpr (kMaster) {
      w = Load(master + i, k);
    } else {
      w = Load(param + i, k);
    }
    w = w * c.keep - c.step_size * m1 / (root * c.inverse_root_correction + c.eps);
    if constexpr (kMaster) {
      Store(master + i, w, k);
      Store(param + i, w, k);
    } else {
      Keep(param + i, w, kRandomParam ? LoadBits(bits.param + offset + i) : U32x8{}, k);
    }
  });
}

template <class P, class M, bool kMaster, class A>
void AdamWChunk(const OptimizerEntry& e, int64_t first, int64_t n, const AdamWStep<A>& c,
                uint64_t step) {
  constexpr bool kRandomMoments = std::is_same_v<M, BFloat16>;
  constexpr bool kRandomParam = std::is_same_v<P, BFloat16> && !kMaster;
  const auto span = [&](int64_t at, int64_t count, const TileBits& bits, int64_t offset) {
    AdamWSpan<P, M, kMaster, A>(
        reinterpret_cast<P*>(e.param) + at, kMaster ? reinterpret_cast<A*>(e.master) + at : nullptr,
        reinterpret_cast<const A*>(e.grad) + at, reinterpret_cast<M*>(e.m) + at,
        reinterpret_cast<M*>(e.v) + at, count, c, bits, offset);
  };
  TileBits bits;
  if constexpr (!kRandomMoments && !kRandomParam) {
    span(first, n, bits, 0);
    return;
  }
  const int64_t end = first + n;
  while (first < end) {
    const uint64_t element = e.first_element + static_cast<uint64_t>(first);
    const auto offset = static_cast<int64_t>(element % TileBits::kTile);
    const uint64_t block = (element - static_cast<uint64_t>(offset)) / 4 * 2;
    if constexpr (kRandomMoments) TileBits::Draw(bits.moments, block, step, e.key);
    if constexpr (kRandomParam) TileBits::Draw(bits.param, block + 1, step, e.key);
    const int64_t count = std::min(end - first, TileBits::kTile - offset);
    span(first, count, bits, offset);
    first += count;
  }
}

// Calls f(Type<P>, Type<M>, master: true_type or false_type) for what the table holds.
template <class F>
void ForTypes(const OptimizerShards& shards, const F& f) {
  ForModelType(shards.param, [&](auto param) {
    using P = typename decltype(param)::type;
    const auto with = [&](auto moments) {
      if constexpr (std::is_same_v<P, BFloat16>) {
        if (shards.masters) return f(param, moments, std::true_type{});
      }
      f(param, moments, std::false_type{});
    };
    if constexpr (!std::is_same_v<P, double>) {
      if (shards.moments == DType::kBF16) return with(Type<BFloat16>{});
    }
    with(Type<Acc<P>>{});
  });
}

class CpuOptimizer final : public OptimizerKernels {
 public:
  void AddSumSquares(Stream& s, Tensor total, const OptimizerShards& shards) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      double* sums = Scratch<double>(kScratchA, shards.chunk_count);
      ForModelType(AccumulateType(shards.param), [&](auto type) {
        using T = typename decltype(type)::type;
        ForChunks(*pool, shards,
                  [&](int64_t chunk, const OptimizerEntry& e, int64_t first, int64_t n) {
                    sums[chunk] = BlockSumSquares(reinterpret_cast<const T*>(e.grad) + first, n);
                  });
      });
      double sum = *total.as<double>();
      for (int64_t b = 0; b < shards.chunk_count; ++b) sum += sums[b];
      *total.as<double>() = sum;
    });
  }

  void PrepareStep(Stream& s, Tensor scalars, double max_norm, double max_loss) const override {
    s.Enqueue([=] {
      double* v = scalars.as<double>();
      const double tokens = v[StepScalars::kTokens];
      const double norm = std::sqrt(v[StepScalars::kSumSquares]) / tokens;
      const double loss = v[StepScalars::kLossSum] / tokens;
      // 1e-6 as torch.nn.utils.clip_grad_norm_ has it.
      const double clip = max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
      const bool skip = !(tokens > 0) || !std::isfinite(norm) || !std::isfinite(loss) ||
                        (max_loss > 0 && loss > max_loss);
      v[StepScalars::kGradNorm] = norm;
      v[StepScalars::kScale] = skip ? 0 : clip / tokens;
      v[StepScalars::kSkip] = skip ? 1 : 0;
    });
  }

  void AdamW(Stream& s, const OptimizerShards& shards, const AdamWArgs& args) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([pool, shards, a = args] {
      const double* scalars = a.scalars.as<double>();
      if (scalars[StepScalars::kSkip] != 0) return;
      ForTypes(shards, [&](auto param, auto moments, auto master) {
        using P = typename decltype(param)::type;
        using M = typename decltype(moments)::type;
        using A = Acc<P>;
        const double correction1 = 1 - std::pow(a.beta1, a.step);
        const double correction2 = 1 - std::pow(a.beta2, a.step);
        const AdamWStep<A> plain = {static_cast<A>(scalars[StepScalars::kScale]),
                                    static_cast<A>(a.beta1),
                                    static_cast<A>(1 - a.beta1),
                                    static_cast<A>(a.beta2),
                                    static_cast<A>(1 - a.beta2),
                                    A{1},
                                    static_cast<A>(a.lr / correction1),
                                    static_cast<A>(1 / std::sqrt(correction2)),
                                    static_cast<A>(a.eps)};
        AdamWStep<A> decaying = plain;
        decaying.keep = static_cast<A>(1 - a.lr * a.weight_decay);
        ForChunks(*pool, shards, [&](int64_t, const OptimizerEntry& e, int64_t first, int64_t n) {
          AdamWChunk<P, M, decltype(master)::value, A>(e, first, n, e.decay != 0 ? decaying : plain,
                                                       static_cast<uint64_t>(a.step));
        });
      });
    });
  }

 private:
  // Calls body(chunk, entry, first element, elements) for all chunks, cut over the pool.
  template <class Body>
  static void ForChunks(ThreadPool& pool, const OptimizerShards& shards, const Body& body) {
    constexpr int64_t kSize = OptimizerChunk::kElements;
    pool.ParallelFor(
        shards.chunk_count, 1,
        [&](int64_t begin, int64_t end, int) {
          for (int64_t i = begin; i < end; ++i) {
            const OptimizerChunk& chunk = shards.chunks[i];
            const OptimizerEntry& e = shards.entries[chunk.entry];
            const int64_t first = chunk.index * kSize;
            body(i, e, first, std::min(kSize, e.elements - first));
          }
        },
        1);
  }
};

}  // namespace

const OptimizerKernels* Optimizer() {
  static const CpuOptimizer kernels;
  return &kernels;
}

}  // namespace stretto::cpu
