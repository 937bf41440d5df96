#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/families.h"
#include "kernels/cuda/norm_sums.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = static_cast<int>(RotaryKernels::kPartials);  // where sums are kept

// The heads of a token in units of at most `span`, each of queries or of keys alone. A group of
// lanes works on one unit at a time: it reads the token's row of the tables once for all its heads.
struct Units {
  int heads;        // of a token
  int queries;      // the first heads
  int span;         // heads of a unit
  int query_units;  // the first units
  int count;

  Units(int64_t all, int64_t first, int64_t most)
      : heads(static_cast<int>(all)),
        queries(static_cast<int>(first)),
        span(static_cast<int>(most)),
        query_units((queries + span - 1) / span),
        count(query_units + (heads - queries + span - 1) / span) {}

  __device__ bool IsKey(int unit) const { return unit >= query_units; }
  __device__ int Begin(int unit) const {
    return IsKey(unit) ? queries + (unit - query_units) * span : unit * span;
  }
  __device__ int End(int unit) const {
    return min(Begin(unit) + span, IsKey(unit) ? heads : queries);
  }
};

template <class T>
struct Args {
  Rows<T> y, x;      // backward: dx and dy
  Rows<T> input;     // backward through the norm: its x
  Rows<float> rstd;  // with a norm
  const T* weights[2];
  const int32_t* positions;
  Rows<float> cos, sin;
  Units units;
  int64_t tokens;
  int64_t table_rows;
  int half;  // pairs in a head
  float eps;
  float sign;  // of the sine; -1 turns back
  DeviceFault* fault;
};

// Whether the tables have a row for the position of a token; reported by one thread where not.
template <class T>
__device__ bool Known(const Args<T>& a, int64_t token, int32_t position, bool reports) {
  if (position >= 0 && position < a.table_rows) return true;
  if (reports) Report(a.fault, DeviceFault::kRotaryPosition, position, token, a.table_rows);
  return false;
}

// The sum over kLanes neighbouring lanes. All threads of the warp call it.
template <int kLanes>
__device__ float LaneSum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

// Element i of the first half of a head and element i of the second turn together (rotate-half).
__device__ void Turn(float& first, float& second, float cos, float sin) {
  const float turned = first * cos - second * sin;
  second = second * cos + first * sin;
  first = turned;
}

// What turns the pairs of one pack.
template <int kWidth>
struct Angles {
  float cos[kWidth] = {}, sin[kWidth] = {};

  template <class T>
  __device__ void Load(const Args<T>& a, int64_t row, int at, float sign) {
    LoadVec(cos, a.cos.At(row, at), kWidth);
    LoadVec(sin, a.sin.At(row, at), kWidth);
    for (float& s : sin) s *= sign;
  }
};

// Packs of both halves of a head, as they are stored.
template <class T, int kWidth>
struct Packs {
  using V = Elements<T, kWidth>;
  V first = {}, second = {};

  __device__ void Load(const T* head, int at, int half) {
    first = Read(reinterpret_cast<const V*>(head + at));
    second = Read(reinterpret_cast<const V*>(head + half + at));
  }
  __device__ static void Store(T* head, int at, int half, const float (&first)[kWidth],
                               const float (&second)[kWidth]) {
    Write(reinterpret_cast<V*>(head + at), V::Of(first));
    Write(reinterpret_cast<V*>(head + half + at), V::Of(second));
  }
};

// One group of kLanes lanes for each unit of a token; lane i has the i-th pack of either half.
template <class T, int kWidth, int kLanes, int kHeads, bool kNorm>
__global__ void __launch_bounds__(kThreads) ForwardKernel(Args<T> a) {
  const int lane = threadIdx.x % kLanes, at = lane * kWidth;
  const uint64_t index = uint64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t token = index / static_cast<uint64_t>(a.units.count);
  const int unit = static_cast<int>(index - token * a.units.count);
  const int begin = a.units.Begin(unit), heads = a.units.End(unit) - begin;
  const int dim = 2 * a.half;
  // Groups without a token and lanes without a pack take part in the sums only.
  bool active = token < a.tokens && at < a.half;

  Packs<T, kWidth> x[kHeads], weight;
  Angles<kWidth> angles;
  if (active) {
    // The position takes as long to come as the heads, which do not wait for it.
    const int32_t position = a.positions[token];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h < heads) x[h].Load(a.x.At(token, (begin + h) * dim), at, a.half);
    }
    if (kNorm) weight.Load(a.weights[a.units.IsKey(unit)], at, a.half);
    active = Known(a, token, position, unit == 0 && lane == 0);
    if (active) angles.Load(a, position, at, a.sign);
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    float r = 1;
    if constexpr (kNorm) {
      float squares = 0;
      for (int k = 0; k < kWidth; ++k) {
        squares += x[h].first[k] * x[h].first[k] + x[h].second[k] * x[h].second[k];
      }
      r = 1.0f / sqrtf(LaneSum<kLanes>(squares) / static_cast<float>(dim) + a.eps);
      if (active && lane == 0 && h < heads) *a.rstd.At(token, begin + h) = r;
    }
    if (!active || h >= heads) continue;
    float first[kWidth], second[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      first[k] = x[h].first[k];
      second[k] = x[h].second[k];
      if constexpr (kNorm) {
        first[k] *= r * weight.first[k];
        second[k] *= r * weight.second[k];
      }
      Turn(first[k], second[k], angles.cos[k], angles.sin[k]);
    }
    Packs<T, kWidth>::Store(a.y.At(token, (begin + h) * dim), at, a.half, first, second);
  }
}

// Backward through rotation and norm. A group keeps to one unit of the heads, for which it goes
// through every so many tokens and adds up its part of the weight's gradient. With d = dy turned
// back and r = rstd: dx = r d weight - x r^2 mean(r d weight x), and r d x is added up.
// partial [kBlocks, 2, dim].
template <class T, int kWidth, int kLanes, int kHeads>
__global__ void __launch_bounds__(kThreads, 2)
    BackwardKernel(Args<T> a, float* __restrict__ partial) {
  constexpr int kGroups = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, at = lane * kWidth;
  const int group = static_cast<int>(blockIdx.x) * kGroups + static_cast<int>(threadIdx.x) / kLanes;
  const int unit = group % a.units.count, slot = group / a.units.count;
  const int slots = kBlocks * kGroups / a.units.count;  // groups for each unit; the rest are idle
  const int begin = a.units.Begin(unit), end = a.units.End(unit);
  const int dim = 2 * a.half;
  const bool has_pack = at < a.half;

  Packs<T, kWidth> weight;
  if (has_pack) weight.Load(a.weights[a.units.IsKey(unit)], at, a.half);
  float sum_first[kWidth] = {}, sum_second[kWidth] = {};
  const auto exists = [&](int64_t token) { return slot < slots && token < a.tokens; };
  int32_t next = exists(slot) ? a.positions[slot] : 0;
  // Trips are counted alike by all: the lanes of a warp have to meet in LaneSum.
#pragma unroll 1
  for (int64_t base = 0; base < a.tokens; base += slots) {
    const int64_t token = base + slot;
    const int32_t position = next;
    if (exists(token + slots)) next = a.positions[token + slots];
    const bool active =
        exists(token) && has_pack && Known(a, token, position, unit == 0 && lane == 0);
    Angles<kWidth> back;
    if (active) back.Load(a, position, at, -1.0f);
#pragma unroll 1
    for (int offset = 0; offset < a.units.span; offset += kHeads) {
      Packs<T, kWidth> dy[kHeads], x[kHeads];
      float rstd[kHeads] = {};
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const int head = begin + offset + h;
        if (!active || head >= end) continue;
        dy[h].Load(a.x.At(token, head * dim), at, a.half);
        x[h].Load(a.input.At(token, head * dim), at, a.half);
        rstd[h] = *a.rstd.At(token, head);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float first[kWidth], second[kWidth], sum = 0;
        for (int k = 0; k < kWidth; ++k) {
          first[k] = dy[h].first[k] * rstd[h];
          second[k] = dy[h].second[k] * rstd[h];
          Turn(first[k], second[k], back.cos[k], back.sin[k]);
          const float u = first[k] * x[h].first[k], v = second[k] * x[h].second[k];
          sum_first[k] += u;
          sum_second[k] += v;
          sum += u * weight.first[k] + v * weight.second[k];
        }
        const float mean = LaneSum<kLanes>(sum) * (rstd[h] * rstd[h] / static_cast<float>(dim));
        const int head = begin + offset + h;
        if (!active || head >= end) continue;
        for (int k = 0; k < kWidth; ++k) {
          first[k] = first[k] * weight.first[k] - x[h].first[k] * mean;
          second[k] = second[k] * weight.second[k] - x[h].second[k] * mean;
        }
        Packs<T, kWidth>::Store(a.y.At(token, head * dim), at, a.half, first, second);
      }
    }
  }

  // sums [half, k, thread]: neighbouring threads write neighbouring words, and what is read
  // together lies in different banks.
  constexpr int kStride = kThreads + kLanes;
  __shared__ float sums[2 * kWidth * kStride];
  for (int k = 0; k < kWidth; ++k) {
    sums[k * kStride + threadIdx.x] = sum_first[k];
    sums[(kWidth + k) * kStride + threadIdx.x] = sum_second[k];
  }
  __syncthreads();
  partial += int64_t{blockIdx.x} * 2 * dim;
  const int first_group = static_cast<int>(blockIdx.x) * kGroups;
  for (int i = threadIdx.x; i < 2 * kWidth * kLanes; i += kThreads) {
    const int source = i % kLanes, k = i / kLanes;  // k over both halves
    if (source * kWidth >= a.half) continue;
    float total[2] = {};
    for (int g = 0; g < kGroups; ++g) {
      const float part = sums[k * kStride + g * kLanes + source];
      if (a.units.IsKey((first_group + g) % a.units.count)) {
        total[1] += part;
      } else {
        total[0] += part;
      }
    }
    const int column = k / kWidth * a.half + source * kWidth + k % kWidth;
    partial[column] = total[0];
    partial[dim + column] = total[1];
  }
}

// --- Heads that packs do not fit: one warp for each head, element by element. ---

template <class T>
struct OddHead {
  int64_t token;
  int head;
  int64_t row;  // of the tables; -1: nothing to do

  __device__ OddHead(const Args<T>& a, uint64_t index) {
    token = index / static_cast<uint64_t>(a.units.heads);
    head = static_cast<int>(index - token * a.units.heads);
    row = -1;
    if (token >= a.tokens) return;
    const int32_t position = a.positions[token];
    if (Known(a, token, position, head == 0 && threadIdx.x % 32 == 0)) row = position;
  }
  __device__ const T* Weight(const Args<T>& a) const { return a.weights[head >= a.units.queries]; }
};

template <class T, bool kNorm>
__global__ void __launch_bounds__(kThreads) OddForwardKernel(Args<T> a) {
  const OddHead<T> at(a, uint64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32);
  if (at.row < 0) return;
  const int lane = threadIdx.x % 32, dim = 2 * a.half;
  const T* x = a.x.At(at.token, at.head * dim);
  T* y = a.y.At(at.token, at.head * dim);
  float r = 1;
  if constexpr (kNorm) {
    float squares = 0;
    for (int i = lane; i < dim; i += 32) squares += Widen(x[i]) * Widen(x[i]);
    r = 1.0f / sqrtf(LaneSum<32>(squares) / static_cast<float>(dim) + a.eps);
    if (lane == 0) *a.rstd.At(at.token, at.head) = r;
  }
  for (int i = lane; i < a.half; i += 32) {
    float first = Widen(x[i]), second = Widen(x[a.half + i]);
    if constexpr (kNorm) {
      first *= r * Widen(at.Weight(a)[i]);
      second *= r * Widen(at.Weight(a)[a.half + i]);
    }
    Turn(first, second, *a.cos.At(at.row, i), *a.sin.At(at.row, i) * a.sign);
    y[i] = Narrow<T>(first);
    y[a.half + i] = Narrow<T>(second);
  }
}

// rstd * dy, turned back: pair i of a head.
template <class T>
struct OddGradient {
  float first, second;

  __device__ OddGradient(const Args<T>& a, const OddHead<T>& at, const T* dy, int i, float r)
      : first(Widen(dy[i]) * r), second(Widen(dy[a.half + i]) * r) {
    Turn(first, second, *a.cos.At(at.row, i), -*a.sin.At(at.row, i));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) OddBackwardKernel(Args<T> a) {
  const OddHead<T> at(a, uint64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32);
  if (at.row < 0) return;
  const int lane = threadIdx.x % 32, dim = 2 * a.half;
  const T* dy = a.x.At(at.token, at.head * dim);
  const T* x = a.input.At(at.token, at.head * dim);
  const T* weight = at.Weight(a);
  T* dx = a.y.At(at.token, at.head * dim);
  const float r = *a.rstd.At(at.token, at.head);
  float sum = 0;
  for (int i = lane; i < a.half; i += 32) {
    const OddGradient<T> d(a, at, dy, i, r);
    sum += d.first * Widen(weight[i]) * Widen(x[i]) +
           d.second * Widen(weight[a.half + i]) * Widen(x[a.half + i]);
  }
  const float mean = LaneSum<32>(sum) * (r * r / static_cast<float>(dim));
  for (int i = lane; i < a.half; i += 32) {
    const OddGradient<T> d(a, at, dy, i, r);
    dx[i] = Narrow<T>(d.first * Widen(weight[i]) - Widen(x[i]) * mean);
    dx[a.half + i] = Narrow<T>(d.second * Widen(weight[a.half + i]) - Widen(x[a.half + i]) * mean);
  }
}

// partial [kBlocks, 2, dim]: block b adds up the b-th part of all heads, warp by warp; a lane has
// pairs lane, lane + 32, ... of blockIdx.y * 32 on.
template <class T>
__global__ void __launch_bounds__(kThreads) OddSumsKernel(Args<T> a, float* __restrict__ partial) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float sums[2][2][kWarps][32];  // queries or keys, half, warp, lane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, dim = 2 * a.half;
  const int pair = static_cast<int>(blockIdx.y) * 32 + lane;
  const int64_t all = a.tokens * a.units.heads;
  const int64_t begin = all * blockIdx.x / kBlocks, end = all * (blockIdx.x + 1) / kBlocks;
  float first[2] = {}, second[2] = {};
  if (pair < a.half) {
    for (int64_t index = begin + warp; index < end; index += kWarps) {
      const OddHead<T> at(a, index);
      if (at.row < 0) continue;
      const T* x = a.input.At(at.token, at.head * dim);
      const OddGradient<T> d(a, at, a.x.At(at.token, at.head * dim), pair,
                             *a.rstd.At(at.token, at.head));
      const float u = d.first * Widen(x[pair]), v = d.second * Widen(x[a.half + pair]);
      const bool key = at.head >= a.units.queries;
      first[0] += key ? 0 : u;
      second[0] += key ? 0 : v;
      first[1] += key ? u : 0;
      second[1] += key ? v : 0;
    }
  }
  for (int kind = 0; kind < 2; ++kind) {
    sums[kind][0][warp][lane] = first[kind];
    sums[kind][1][warp][lane] = second[kind];
  }
  __syncthreads();
  if (threadIdx.x >= 4 * 32 || pair >= a.half) return;
  const int kind = warp / 2, half = warp % 2;
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[kind][half][w][lane];
  partial[(int64_t{blockIdx.x} * 2 + kind) * dim + half * a.half + pair] = total;
}

// Calls f(integral constant) with the lanes that heads of `packs` packs a half are worked on by;
// false where there are too many.
template <class F>
bool WithLanes(int packs, const F& f) {
  const auto use = [&](auto lanes) {
    f(lanes);
    return true;
  };
  if (packs <= 4) return use(std::integral_constant<int, 4>{});
  if (packs <= 8) return use(std::integral_constant<int, 8>{});
  if (packs <= 16) return use(std::integral_constant<int, 16>{});
  return packs <= 32 && use(std::integral_constant<int, 32>{});
}

class CudaRotary final : public RotaryKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor rstd, Tensor x, const RotaryArgs& args) const override {
    if (x.elements() == 0) return;
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      Turned<T>(s, MakeArgs<T>(s, y, x, {}, rstd, args, 1.0f), Fits(y, x, {}, args), args);
    });
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor x, Tensor rstd, Tensor partials,
                     const RotaryArgs& args) const override {
    if (dy.dims[2] == 0) return;
    ForModelType(dy.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const Args<T> a = MakeArgs<T>(s, dx, dy, x, rstd, args, -1.0f);
      const bool fits = Fits(dx, dy, x, args);
      if (args.q_weight.present()) {
        BackwardThroughNorm(s, a, fits, Data<float>(partials));
      } else if (dy.elements() > 0) {
        Turned<T>(s, a, fits, args);
      }
    });
  }

  void BackwardWeight(Stream& s, Tensor dq_weight, Tensor dk_weight, Tensor partials,
                      bool acc) const override {
    AddNormChunks(s, dq_weight, dk_weight, Data<float>(partials), kPartials, 2, acc);
  }

 private:
  template <class T>
  static Args<T> MakeArgs(Stream& s, const Tensor& y, const Tensor& x, const Tensor& input,
                          const Tensor& rstd, const RotaryArgs& args, float sign) {
    // Without a norm all heads are alike.
    const int64_t heads = x.dims[1], queries = args.q_weight.present() ? args.query_heads : heads;
    return {.y = Rows<T>(y),
            .x = Rows<T>(x),
            .input = Rows<T>(input),
            .rstd = Rows<float>(rstd),
            .weights = {Data<T>(args.q_weight), Data<T>(args.k_weight)},
            .positions = Data<int32_t>(args.positions),
            .cos = Rows<float>(args.cos),
            .sin = Rows<float>(args.sin),
            .units = Units(heads, queries, 1),
            .tokens = x.dims[0],
            .table_rows = args.cos.rows(),
            .half = static_cast<int>(x.dims[2] / 2),
            .eps = static_cast<float>(args.eps),
            .sign = sign,
            .fault = s.fault()};
  }

  // Whether every half of a head starts at a multiple of 16 bytes.
  static bool Fits(const Tensor& y, const Tensor& x, const Tensor& input, const RotaryArgs& args) {
    const auto weights = reinterpret_cast<uintptr_t>(args.q_weight.data) |
                         reinterpret_cast<uintptr_t>(args.k_weight.data);
    return x.dims[2] / 2 * SizeOf(x.dtype) % 16 == 0 && weights % 16 == 0 && RowsAligned(y) &&
           RowsAligned(x) && RowsAligned(input) && RowsAligned(args.cos) && RowsAligned(args.sin);
  }

  static unsigned BlocksFor(int64_t groups, int lanes) {
    const int64_t of_block = kThreads / lanes;
    return static_cast<unsigned>((groups + of_block - 1) / of_block);
  }

  template <class T>
  static void Turned(Stream& s, Args<T> a, bool fits, const RotaryArgs& args) {
    constexpr int kWidth = Pack<T>::kSize, kHeads = 4;
    const bool norm = args.q_weight.present();
    const bool launched =
        fits && WithLanes(a.half / kWidth, [&](auto lanes) {
          constexpr int kLanes = decltype(lanes)::value;
          a.units = Units(a.units.heads, a.units.queries, kHeads);
          const auto kernel = norm ? ForwardKernel<T, kWidth, kLanes, kHeads, true>
                                   : ForwardKernel<T, kWidth, kLanes, kHeads, false>;
          kernel<<<BlocksFor(a.tokens * a.units.count, kLanes), kThreads, 0, Native(s)>>>(a);
        });
    if (!launched) {
      const auto kernel = norm ? OddForwardKernel<T, true> : OddForwardKernel<T, false>;
      kernel<<<BlocksFor(a.tokens * a.units.heads, 32), kThreads, 0, Native(s)>>>(a);
    }
    Launched(s, "Rope");
  }

  template <class T>
  static void BackwardThroughNorm(Stream& s, Args<T> a, bool fits, float* partials) {
    constexpr int kWidth = Pack<T>::kSize, kHeads = 2;
    const bool launched =
        fits && WithLanes(a.half / kWidth, [&](auto lanes) {
          constexpr int kLanes = decltype(lanes)::value;
          // Every unit needs a group of its own; only absurdly many heads ask for longer units.
          constexpr int kMostUnits = kBlocks * (kThreads / kLanes) - 2;
          const int trips = (a.units.heads + kHeads * kMostUnits - 1) / (kHeads * kMostUnits);
          a.units = Units(a.units.heads, a.units.queries, kHeads * std::max(trips, 1));
          BackwardKernel<T, kWidth, kLanes, kHeads>
              <<<kBlocks, kThreads, 0, Native(s)>>>(a, partials);
        });
    if (!launched) {
      // The sums first: dx may take the place of dy.
      const dim3 blocks(kBlocks, static_cast<unsigned>((a.half + 31) / 32));
      OddSumsKernel<<<blocks, kThreads, 0, Native(s)>>>(a, partials);
      const unsigned heads = BlocksFor(a.tokens * a.units.heads, 32);
      if (heads > 0) OddBackwardKernel<<<heads, kThreads, 0, Native(s)>>>(a);
    }
    Launched(s, "RopeBackwardInput");
  }
};

}  // namespace

const RotaryKernels* Rotary() {
  static const CudaRotary kernels;
  return &kernels;
}

}  // namespace stretto::cuda
