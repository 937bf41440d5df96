#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/families.h"
#include "kernels/cuda/random.cuh"
#include "kernels/cuda/support.cuh"
#include "stretto/ops/optimizer_table.h"

namespace stretto::cuda {
namespace {

constexpr int kThreads = 256;
// Sums are taken by at most this many blocks, whatever the device, and the blocks added in order.
constexpr int kSumBlocks = 1024;
// An update's block takes this part of a chunk: many short blocks leave little of the device idle
// at the end.
constexpr int kBlocksPerChunk = 2;
constexpr int64_t kBlockElements = OptimizerChunk::kElements / kBlocksPerChunk;

// The sum over the block, in a fixed order; thread 0 gets it.
__device__ double BlockSum(double x) {
  __shared__ double warps[kThreads / 32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  x = WarpSum(x);
  if (lane == 0) warps[warp] = x;
  __syncthreads();
  return warp == 0 ? WarpSum(lane < kThreads / 32 ? warps[lane] : 0.0) : 0.0;
}

// How many of the N elements from i on lie before `end`.
template <int N>
__device__ int Remaining(int64_t i, int64_t end) {
  return end - i >= N ? N : static_cast<int>(max(end - i, int64_t{0}));
}

// Whether N elements at p, and at multiples of N behind it, can be read together.
template <int N, class T>
__device__ bool Aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Vec<T, N>) == 0;
}

// Adds the squares of x[begin, end) as this thread sees them, N elements at a time.
template <int N>
__device__ void AddSquares(const float* x, int64_t begin, int64_t end, double (&sums)[4]) {
  constexpr int kInFlight = 4;
  for (int64_t at = begin + int64_t{threadIdx.x} * N; at < end; at += kInFlight * kThreads * N) {
    float v[kInFlight][N];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = at + u * kThreads * N;
      LoadVec(v[u], x + i, Remaining<N>(i, end));
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int j = 0; j < N; ++j) sums[u] += double{v[u][j]} * double{v[u][j]};
    }
  }
}

// out[block] = the sum of squares of the chunks block, block + gridDim.x, ...
__global__ void __launch_bounds__(kThreads) SquaresKernel(double* out, OptimizerShards shards) {
  double sums[4] = {};
  for (int64_t i = blockIdx.x; i < shards.chunk_count; i += gridDim.x) {
    const OptimizerChunk chunk = shards.chunks[i];
    const OptimizerEntry& e = shards.entries[chunk.entry];
    const auto* grad = reinterpret_cast<const float*>(e.grad);
    const int64_t begin = chunk.index * OptimizerChunk::kElements;
    const int64_t end = min(e.elements, begin + OptimizerChunk::kElements);
    if (Aligned<4>(grad)) {
      AddSquares<4>(grad, begin, end, sums);
    } else {
      AddSquares<1>(grad, begin, end, sums);
    }
  }
  const double sum = BlockSum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    SumBlocksKernel(double* total, const double* blocks, int count) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += blocks[i];
  sum = BlockSum(sum);
  if (threadIdx.x == 0) *total += sum;
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

struct AdamWStep {
  const double* scalars;
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float keep;  // of items that decay
  float step_size, inverse_root_correction, eps;
  uint64_t step;
};

// What is kept: stochastically rounded to bf16, else as it is. `random` has 16 bits for an element
// in the half of its word that `shift` brings down.
template <int N, class T>
__device__ void Keep(T* p, const float (&x)[N], const uint32_t (&random)[N], int shift, int n) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat16 rounded[N];
#pragma unroll
    for (int i = 0; i < N; ++i) rounded[i] = RoundStochastic(x[i], random[i] >> shift);
    StoreVec<N>(p, rounded, n);
  } else {
    StoreVec<N>(p, x, n);
  }
}

// The words of the N elements from `element` on: N is 4 and the element begins a block, or 1.
template <int N>
__device__ void Draw(uint32_t (&random)[N], const OptimizerEntry& e, uint64_t element,
                     uint64_t which, uint64_t step) {
  static_assert(N == 4 || N == 1);
  uint32_t words[4];
  Philox(2 * (element / 4) + which, step, e.key[0], e.key[1], words);
  if constexpr (N == 4) {
    for (int i = 0; i < N; ++i) random[i] = words[i];
  } else {
    const auto j = static_cast<int>(element % 4);
    random[0] = j == 0 ? words[0] : j == 1 ? words[1] : j == 2 ? words[2] : words[3];
  }
}

// P: stored parameter; M: moments; kMaster: whether the master is what is updated, and param a
// copy of it.
template <class P, class M, bool kMaster>
struct Update {
  using Weight = std::conditional_t<kMaster, float, P>;
  static constexpr bool kRandomMoments = std::is_same_v<M, __nv_bfloat16>;
  static constexpr bool kRandomParam = std::is_same_v<P, __nv_bfloat16> && !kMaster;

  // The elements [begin, end) of an entry by one block, N at a time; kWhole: kBlockElements of
  // them.
  template <int N, bool kWhole>
  static __device__ void Range(const OptimizerEntry& e, int64_t begin, int64_t end,
                               const AdamWStep& c) {
    constexpr int kInFlight = 2;
    static_assert(kBlockElements % (kInFlight * kThreads * N) == 0);
    const auto remaining = [&](int64_t i) { return kWhole ? N : Remaining<N>(i, end); };
    auto* const param = reinterpret_cast<P*>(e.param);
    auto* const weights = reinterpret_cast<Weight*>(kMaster ? e.master : e.param);
    const auto* const grad = reinterpret_cast<const float*>(e.grad);
    auto* const m = reinterpret_cast<M*>(e.m);
    auto* const v = reinterpret_cast<M*>(e.v);
    const float scale = static_cast<float>(c.scalars[StepScalars::kScale]);
    const float keep = e.decay != 0 ? c.keep : 1.0f;
    for (int64_t at = begin + int64_t{threadIdx.x} * N; at < end; at += kInFlight * kThreads * N) {
      float g[kInFlight][N], m1[kInFlight][N], v1[kInFlight][N], w[kInFlight][N];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = at + u * kThreads * N;
        const int n = remaining(i);
        LoadVec(g[u], grad + i, n);
        LoadVec(m1[u], m + i, n);
        LoadVec(v1[u], v + i, n);
        LoadVec(w[u], weights + i, n);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int64_t i = at + u * kThreads * N;
        const int n = remaining(i);
        const uint64_t element = e.first_element + static_cast<uint64_t>(i);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const float gradient = g[u][k] * scale;
          m1[u][k] = m1[u][k] * c.beta1 + gradient * c.one_minus_beta1;
          v1[u][k] = v1[u][k] * c.beta2 + gradient * gradient * c.one_minus_beta2;
          // The hardware's root and quotient, good to some 1e-7 of the step: exact ones take half
          // of this kernel's instructions.
          float root;
          asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v1[u][k]));
          const float scaled = root * c.inverse_root_correction + c.eps;
          w[u][k] = w[u][k] * keep - __fdividef(c.step_size * m1[u][k], scaled);
        }
        uint32_t random[N] = {};
        if constexpr (kRandomMoments) Draw<N>(random, e, element, 0, c.step);
        Keep<N>(m + i, m1[u], random, 0, n);
        Keep<N>(v + i, v1[u], random, 16, n);
        if constexpr (kRandomParam) Draw<N>(random, e, element, 1, c.step);
        Keep<N>(weights + i, w[u], random, 0, n);
        if constexpr (kMaster) StoreVec<N>(param + i, w[u], n);
      }
    }
  }

  // Whether every operand can be read 4 elements at a time, and the random words come by fours too.
  static __device__ bool ByFours(const OptimizerEntry& e) {
    const bool whole_blocks = !(kRandomMoments || kRandomParam) || e.first_element % 4 == 0;
    return Aligned<4>(reinterpret_cast<const float*>(e.grad)) &&
           Aligned<4>(reinterpret_cast<const M*>(e.m)) &&
           Aligned<4>(reinterpret_cast<const M*>(e.v)) &&
           Aligned<4>(reinterpret_cast<const P*>(e.param)) &&
           (!kMaster || Aligned<4>(reinterpret_cast<const float*>(e.master))) && whole_blocks;
  }
};

template <class P, class M, bool kMaster>
__global__ void __launch_bounds__(kThreads, 3) AdamWKernel(OptimizerShards shards, AdamWStep c) {
  if (c.scalars[StepScalars::kSkip] != 0) return;
  const OptimizerChunk chunk = shards.chunks[blockIdx.x / kBlocksPerChunk];
  const OptimizerEntry e = shards.entries[chunk.entry];
  const int64_t begin =
      chunk.index * OptimizerChunk::kElements + blockIdx.x % kBlocksPerChunk * kBlockElements;
  const int64_t end = min(e.elements, begin + kBlockElements);
  using Body = Update<P, M, kMaster>;
  if (!Body::ByFours(e)) {
    Body::template Range<1, false>(e, begin, end, c);
  } else if (end - begin == kBlockElements) {
    Body::template Range<4, true>(e, begin, end, c);
  } else {
    Body::template Range<4, false>(e, begin, end, c);
  }
}

class CudaOptimizer final : public OptimizerKernels {
 public:
  void AddSumSquares(Stream& s, Tensor total, const OptimizerShards& shards) const override {
    const auto blocks = static_cast<int>(std::min<int64_t>(shards.chunk_count, kSumBlocks));
    if (blocks == 0) return;
    auto* const sums =
        reinterpret_cast<double*>(Workspace(s, blocks * sizeof(double), "AddSumSquares"));
    if (sums == nullptr) return;
    SquaresKernel<<<blocks, kThreads, 0, Native(s)>>>(sums, shards);
    Launched(s, "AddSumSquares");
    SumBlocksKernel<<<1, kThreads, 0, Native(s)>>>(Data<double>(total), sums, blocks);
    Launched(s, "AddSumSquares");
  }

  void PrepareStep(Stream& s, Tensor scalars, double max_norm, double max_loss) const override {
    PrepareStepKernel<<<1, 1, 0, Native(s)>>>(Data<double>(scalars), max_norm, max_loss);
    Launched(s, "PrepareStep");
  }

  void AdamW(Stream& s, const OptimizerShards& shards, const AdamWArgs& a) const override {
    if (shards.chunk_count == 0) return;
    const double correction1 = 1 - std::pow(a.beta1, a.step);
    const double correction2 = 1 - std::pow(a.beta2, a.step);
    const AdamWStep c = {.scalars = Data<double>(a.scalars),
                         .beta1 = static_cast<float>(a.beta1),
                         .one_minus_beta1 = static_cast<float>(1 - a.beta1),
                         .beta2 = static_cast<float>(a.beta2),
                         .one_minus_beta2 = static_cast<float>(1 - a.beta2),
                         .keep = static_cast<float>(1 - a.lr * a.weight_decay),
                         .step_size = static_cast<float>(a.lr / correction1),
                         .inverse_root_correction = static_cast<float>(1 / std::sqrt(correction2)),
                         .eps = static_cast<float>(a.eps),
                         .step = static_cast<uint64_t>(a.step)};
    const bool bf16 = shards.moments == DType::kBF16;
    if (shards.param == DType::kF32) {
      return bf16 ? Launch<float, __nv_bfloat16, false>(s, shards, c)
                  : Launch<float, float, false>(s, shards, c);
    }
    if (shards.masters) {
      return bf16 ? Launch<__nv_bfloat16, __nv_bfloat16, true>(s, shards, c)
                  : Launch<__nv_bfloat16, float, true>(s, shards, c);
    }
    return bf16 ? Launch<__nv_bfloat16, __nv_bfloat16, false>(s, shards, c)
                : Launch<__nv_bfloat16, float, false>(s, shards, c);
  }

 private:
  template <class P, class M, bool kMaster>
  static void Launch(Stream& s, const OptimizerShards& shards, const AdamWStep& c) {
    const auto blocks = static_cast<unsigned>(shards.chunk_count * kBlocksPerChunk);
    AdamWKernel<P, M, kMaster><<<blocks, kThreads, 0, Native(s)>>>(shards, c);
    Launched(s, "AdamW");
  }
};

}  // namespace

const OptimizerKernels* Optimizer() {
  static const CudaOptimizer kernels;
  return &kernels;
}

}  // namespace stretto::cuda
