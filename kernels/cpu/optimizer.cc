#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cpu/families.h"
#include "kernels/cpu/support.h"

namespace stretto::cpu {
namespace {

// Sums are taken over blocks of this many elements and the blocks added in order, so the result
// does not depend on the number of threads.
constexpr int64_t kSumBlock = 16384;

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

// P: stored parameter; M: master (P's own type when there is none); both may be the same memory.
template <class P, class M, class A>
void AdamWSpan(P* param, M* master, const A* grad, A* m, A* v, int64_t n, const AdamWStep<A>& c) {
  VecLoop<A>(n, [&](int64_t i, auto k) {
    const Vec<A> g = Load(grad + i, k) * c.grad_scale;
    const Vec<A> m1 = Load(m + i, k) * c.beta1 + g * c.one_minus_beta1;
    const Vec<A> v1 = Load(v + i, k) * c.beta2 + g * g * c.one_minus_beta2;
    Store(m + i, m1, k);
    Store(v + i, v1, k);
    Vec<A> root = v1;
    for (int j = 0; j < kLanes<A>; ++j) root[j] = std::sqrt(root[j]);
    const Vec<A> w = Load(master + i, k) * c.keep -
                     c.step_size * m1 / (root * c.inverse_root_correction + c.eps);
    if constexpr (!std::is_same_v<P, M>) Store(param + i, w, k);
    Store(master + i, w, k);
  });
}

class CpuOptimizer final : public OptimizerKernels {
 public:
  void SumSquares(Stream& s, Tensor total, Tensor x, bool acc) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([=] {
      ForModelType(x.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        int64_t rows = x.rows();
        int64_t columns = x.row_elements();
        AsOneRow(rows, columns, x);
        const int64_t blocks_per_row = (columns + kSumBlock - 1) / kSumBlock;
        const int64_t blocks = rows * blocks_per_row;
        double* sums = Scratch<double>(kScratchA, blocks);
        pool->ParallelFor(
            blocks, 1,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t b = begin; b < end; ++b) {
                const int64_t first = b % blocks_per_row * kSumBlock;
                sums[b] = BlockSumSquares(x.as<T>(b / blocks_per_row) + first,
                                          std::min(kSumBlock, columns - first));
              }
            },
            1);
        double sum = acc ? *total.as<double>() : 0;
        for (int64_t b = 0; b < blocks; ++b) sum += sums[b];
        *total.as<double>() = sum;
      });
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

  void AdamW(Stream& s, const AdamWArgs& args) const override {
    ThreadPool* pool = &s.pool();
    s.Enqueue([pool, a = args] {
      const double* scalars = a.scalars.as<double>();
      if (scalars[StepScalars::kSkip] != 0) return;
      ForModelType(a.param.dtype, [&](auto type) {
        using P = typename decltype(type)::type;
        using A = Acc<P>;
        const double correction1 = 1 - std::pow(a.beta1, a.step);
        const double correction2 = 1 - std::pow(a.beta2, a.step);
        const AdamWStep<A> c = {static_cast<A>(scalars[StepScalars::kScale]),
                                static_cast<A>(a.beta1),
                                static_cast<A>(1 - a.beta1),
                                static_cast<A>(a.beta2),
                                static_cast<A>(1 - a.beta2),
                                static_cast<A>(1 - a.lr * a.weight_decay),
                                static_cast<A>(a.lr / correction1),
                                static_cast<A>(1 / std::sqrt(correction2)),
                                static_cast<A>(a.eps)};
        int64_t rows = a.param.rows();
        int64_t columns = a.param.row_elements();
        if (a.master.present()) AsOneRow(rows, columns, a.param, a.grad, a.m, a.v, a.master);
        if (!a.master.present()) AsOneRow(rows, columns, a.param, a.grad, a.m, a.v);
        ForSpans(*pool, rows, columns, [&](int64_t r, int64_t first, int64_t n) {
          P* param = a.param.as<P>(r) + first;
          const A* grad = a.grad.as<A>(r) + first;
          A* m = a.m.as<A>(r) + first;
          A* v = a.v.as<A>(r) + first;
          if (a.master.present()) {
            A* master = a.master.as<A>(r) + first;
            AdamWSpan<P, A, A>(param, master, grad, m, v, n, c);
            // A master beside a parameter of the same type is a plain copy.
            if constexpr (std::is_same_v<P, A>) std::copy_n(master, n, param);
          } else {
            AdamWSpan<P, P, A>(param, param, grad, m, v, n, c);
          }
        });
      });
    });
  }
};

}  // namespace

const OptimizerKernels* Optimizer() {
  static const CpuOptimizer kernels;
  return &kernels;
}

}  // namespace stretto::cpu
