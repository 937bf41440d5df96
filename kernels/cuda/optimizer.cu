#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

constexpr int kThreads = 256;
// Sums are taken by at most this many blocks, whatever the device, and the blocks added in order.
constexpr int kMaxBlocks = 1024;

// The sum over the block, in a fixed order; thread 0 gets it.
__device__ double BlockSum(double x) {
  __shared__ double warps[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = WarpSum(x);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  return warp == 0 ? WarpSum(lane < kThreads / 32 ? warps[lane] : 0.0) : 0.0;
}

// out[block] (acc)= the block's share of the sum of squares; the rows are walked N columns at a
// time.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    SquaresKernel(double* out, Rows<T> x, int64_t rows, int64_t columns, bool acc) {
  constexpr int kInFlight = 4;
  const int64_t per_row = (columns + N - 1) / N;
  const int64_t steps = rows * per_row;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  double sums[kInFlight] = {};
  for (int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x; first < steps;
       first += kInFlight * stride) {
    float v[kInFlight][N] = {};
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = first + u * stride;
      if (i >= steps) continue;
      const int64_t row = rows == 1 ? 0 : i / per_row;
      const int64_t column = (i - row * per_row) * N;
      LoadVec(v[u], x.At(row, column),
              columns - column < N ? static_cast<int>(columns - column) : N);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums[u] += double{v[u][j]} * double{v[u][j]};
    }
  }
  const double sum = BlockSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (threadIdx.x == 0) out[blockIdx.x] = (acc ? out[blockIdx.x] : 0) + sum;
}

__global__ void __launch_bounds__(kThreads)
    SumBlocksKernel(double* total, const double* blocks, int count, bool acc) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += blocks[i];
  sum = BlockSum(sum);
  if (threadIdx.x == 0) *total = (acc ? *total : 0) + sum;
}

__global__ void PrepareStepKernel(double* v, double max_norm, double max_loss) {
  const double tokens = v[StepScalars::kTokens];
  const double norm = sqrt(v[StepScalars::kSumSquares]) / tokens;
  const double loss = v[StepScalars::kLossSum] / tokens;
  // 1e-6 as torch.nn.utils.clip_grad_norm_ has it.
  const double clip = max_norm > 0 ? fmin(1.0, max_norm / (norm + 1e-6)) : 1.0;
  const bool skip =
      !(tokens > 0) || !isfinite(norm) || !isfinite(loss) || (max_loss > 0 && loss > max_loss);
  v[StepScalars::kGradNorm] = norm;
  v[StepScalars::kScale] = skip ? 0 : clip / tokens;
  v[StepScalars::kSkip] = skip ? 1 : 0;
}

// A Walk's body: P is the stored parameter; with kMaster the f32 master is read and both are
// written (they may be the same memory).
template <class P, bool kMaster>
struct AdamWBody {
  Rows<P> param;
  Rows<float> master, grad, m, v;
  const double* scalars;
  float beta1, one_minus_beta1, beta2, one_minus_beta2, keep, step_size, inverse_root_correction,
      eps;

  template <int N>
  __device__ void Do(int64_t row, int64_t column, int n) const {
    if (scalars[StepScalars::kSkip] != 0) return;
    const float scale = static_cast<float>(scalars[StepScalars::kScale]);
    float g[N], m1[N], v1[N], w[N];
    LoadVec(g, grad.At(row, column), n);
    LoadVec(m1, m.At(row, column), n);
    LoadVec(v1, v.At(row, column), n);
    if constexpr (kMaster) {
      LoadVec(w, master.At(row, column), n);
    } else {
      LoadVec(w, param.At(row, column), n);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gradient = g[i] * scale;
      m1[i] = m1[i] * beta1 + gradient * one_minus_beta1;
      v1[i] = v1[i] * beta2 + gradient * gradient * one_minus_beta2;
      w[i] = w[i] * keep - step_size * m1[i] / (sqrtf(v1[i]) * inverse_root_correction + eps);
    }
    StoreVec<N>(m.At(row, column), m1, n);
    StoreVec<N>(v.At(row, column), v1, n);
    if constexpr (kMaster) StoreVec<N>(master.At(row, column), w, n);
    StoreVec<N>(param.At(row, column), w, n);
  }
};

class CudaOptimizer final : public OptimizerKernels {
 public:
  void SumSquares(Stream& s, Tensor total, Tensor x, bool acc) const override {
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int kSize = Pack<T>::kSize;
      const Walk walk(x);
      // About four accesses for each thread, so that a small tensor takes one block and one launch.
      const int64_t steps = walk.rows * ((walk.columns + kSize - 1) / kSize);
      const int blocks = static_cast<int>(
          std::clamp<int64_t>((steps + 4 * kThreads - 1) / (4 * kThreads), 1, kMaxBlocks));
      double* out = Data<double>(total);
      if (blocks > 1) {
        out = reinterpret_cast<double*>(Workspace(s, blocks * sizeof(double), "SumSquares"));
        if (out == nullptr) return;
      }
      const auto kernel = walk.aligned ? SquaresKernel<T, kSize> : SquaresKernel<T, 1>;
      kernel<<<blocks, kThreads, 0, Native(s)>>>(out, Rows<T>(x), walk.rows, walk.columns,
                                                 acc && blocks == 1);
      Launched(s, "SumSquares");
      if (blocks == 1) return;
      SumBlocksKernel<<<1, kThreads, 0, Native(s)>>>(Data<double>(total), out, blocks, acc);
      Launched(s, "SumSquares");
    });
  }

  void PrepareStep(Stream& s, Tensor scalars, double max_norm, double max_loss) const override {
    PrepareStepKernel<<<1, 1, 0, Native(s)>>>(Data<double>(scalars), max_norm, max_loss);
    Launched(s, "PrepareStep");
  }

  void AdamW(Stream& s, const AdamWArgs& a) const override {
    ForModelType(a.param.dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      if (a.master.present()) {
        Step<P, true>(s, a, Walk(a.param, a.grad, a.m, a.v, a.master));
      } else {
        Step<P, false>(s, a, Walk(a.param, a.grad, a.m, a.v));
      }
    });
  }

 private:
  template <class P, bool kMaster>
  static void Step(Stream& s, const AdamWArgs& a, const Walk& walk) {
    const double correction1 = 1 - std::pow(a.beta1, a.step);
    const double correction2 = 1 - std::pow(a.beta2, a.step);
    const AdamWBody<P, kMaster> body = {
        .param = Rows<P>(a.param),
        .master = Rows<float>(a.master),
        .grad = Rows<float>(a.grad),
        .m = Rows<float>(a.m),
        .v = Rows<float>(a.v),
        .scalars = Data<double>(a.scalars),
        .beta1 = static_cast<float>(a.beta1),
        .one_minus_beta1 = static_cast<float>(1 - a.beta1),
        .beta2 = static_cast<float>(a.beta2),
        .one_minus_beta2 = static_cast<float>(1 - a.beta2),
        .keep = static_cast<float>(1 - a.lr * a.weight_decay),
        .step_size = static_cast<float>(a.lr / correction1),
        .inverse_root_correction = static_cast<float>(1 / std::sqrt(correction2)),
        .eps = static_cast<float>(a.eps)};
    ForWalk<4>(s, "AdamW", walk, body);
  }
};

}  // namespace

const OptimizerKernels* Optimizer() {
  static const CudaOptimizer kernels;
  return &kernels;
}

}  // namespace stretto::cuda
