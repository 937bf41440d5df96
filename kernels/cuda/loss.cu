// Softmax cross-entropy. A block reads the logits of a token once, with a running maximum and sum
// in every thread (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax"). The
// fused form keeps them in shared memory until the gradient is written.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kInFlight = 4;  // 16-byte accesses that a thread has under way
constexpr float kLowest = -std::numeric_limits<float>::infinity();
// As the value of a fault: the caller has not said what the targets are.
constexpr int64_t kNotGiven = std::numeric_limits<int64_t>::min();

// exp of x <= 0. For bf16 in two instructions: the relative error, 2.5e-7 and 7e-8 for each unit of
// |x|, is far below what the result is rounded to.
template <class T>
__device__ float Exp(float x) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kLog2E = 1.4426950408889634f;
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * kLog2E));
    return y;
  } else {
    return expf(x);
  }
}

__device__ void Unpack(uint4 raw, float (&x)[4]) {
  x[0] = __uint_as_float(raw.x);
  x[1] = __uint_as_float(raw.y);
  x[2] = __uint_as_float(raw.z);
  x[3] = __uint_as_float(raw.w);
}
__device__ void Unpack(uint4 raw, float (&x)[8]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(word[i] << 16);
    x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}
__device__ uint4 Repack(const float (&x)[4]) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                    __float_as_uint(x[3]));
}
__device__ uint4 Repack(const float (&x)[8]) {
  union {
    uint4 raw;
    __nv_bfloat162 pair[4];
  } u;
#pragma unroll
  for (int i = 0; i < 4; ++i) u.pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return u.raw;
}

// A maximum, and the sum of exponentials of what lies below it.
struct Softmax {
  float max = kLowest;
  float sum = 0;

  // What is subtracted from logits: while all of them are -inf (a masked vocabulary), 0, so that
  // their exponentials are 0. A NaN does not win a maximum, but comes through the sum.
  __device__ static float Shift(float max) { return max == kLowest ? 0.0f : max; }
  template <class T>
  __device__ void Raise(float to) {
    to = fmaxf(max, to);
    sum *= Exp<T>(max - Shift(to));
    max = to;
  }
};

// The columns of one row, as a block of threads shares them: 16 bytes at a time from the first
// multiple of 16 bytes on, and the few columns before and behind ("edges") one for each thread. So
// rows of any stride and length are read and written at full width, and nothing outside them.
template <class T>
struct Row {
  static constexpr int kSize = 16 / sizeof(T);
  T* data;
  int columns;
  int head;   // columns before the first pack
  int packs;  // of kSize columns

  __device__ Row(T* data_, int columns_) : data(data_), columns(columns_) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16);
    head = min(columns, static_cast<int>((16 - misaligned) % 16 / sizeof(T)));
    packs = (columns - head) / kSize;
  }
  __device__ uint4* Pack(int i) const { return reinterpret_cast<uint4*>(data + head) + i; }
  // Reads packs that no cache needs to keep.
  __device__ auto Read() const {
    return [*this](int i) { return __ldcs(Pack(i)); };
  }

  // The column that is this thread's edge, or -1. There are fewer than 2 kSize <= 16.
  __device__ int Edge() const {
    const int i = threadIdx.x;
    const int column = i < head ? i : i + packs * kSize;
    return column < columns ? column : -1;
  }
  // Whether this thread is the one that has `column`.
  __device__ bool Owns(int column) const {
    const int in_body = column - head;
    if (in_body >= 0 && in_body < packs * kSize) return in_body / kSize % blockDim.x == threadIdx.x;
    return Edge() == column;
  }
  // Calls use(i, load(i)) for this thread's packs, kInFlight loads at a time.
  template <class Load, class Use>
  __device__ void ForPacks(const Load& load, const Use& use) const {
    const int step = blockDim.x;
    for (int first = threadIdx.x; first < packs; first += kInFlight * step) {
      uint4 raw[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * step < packs) raw[u] = load(first + u * step);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        if (first + u * step < packs) use(first + u * step, raw[u]);
      }
    }
  }

  // This thread's part of the row's maximum and sum. load(i) is what Pack(i) holds.
  template <class Load>
  __device__ Softmax Fold(const Load& load) const {
    Softmax part;
    const int edge = Edge();
    const float x_edge = edge >= 0 ? Widen(data[edge]) : kLowest;
    ForPacks(load, [&](int, uint4 raw) {
      float x[kSize];
      Unpack(raw, x);
      float m = x[0];
#pragma unroll
      for (int j = 1; j < kSize; ++j) m = fmaxf(m, x[j]);
      part.template Raise<T>(m);
      const float shift = Softmax::Shift(part.max);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = Exp<T>(x[j] - shift);
#pragma unroll
      for (int width = kSize / 2; width > 0; width /= 2) {
#pragma unroll
        for (int j = 0; j < width; ++j) x[j] += x[j + width];
      }
      part.sum += x[0];
    });
    part.template Raise<T>(x_edge);
    part.sum += Exp<T>(x_edge - Softmax::Shift(part.max));
    return part;
  }

  // Overwrites this thread's columns with weight * (softmax - onehot(target)). `x_target` is the
  // target's logit; `target` may be outside the row. load(i) is what Pack(i) holds; used(i) is
  // called when that is of no more use.
  template <class Load, class Used>
  __device__ void Gradient(const Load& load, Softmax softmax, float weight, int64_t target,
                           float x_target, const Used& used) const {
    const float scale = weight / softmax.sum;
    ForPacks(load, [&](int i, uint4 raw) {
      float x[kSize];
      Unpack(raw, x);
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = Exp<T>(x[j] - softmax.max) * scale;
      __stcs(Pack(i), Repack(x));
      used(i);
    });
    const int edge = Edge();
    if (edge >= 0) data[edge] = Narrow<T>(Exp<T>(Widen(data[edge]) - softmax.max) * scale);
    if (target >= 0 && target < columns && Owns(static_cast<int>(target))) {
      // In f32: the difference may cancel.
      data[target] = Narrow<T>(weight * (expf(x_target - softmax.max) / softmax.sum - 1));
    }
  }

  __device__ void Zero() const {
    for (int i = threadIdx.x; i < packs; i += blockDim.x) __stcs(Pack(i), uint4{});
    const int edge = Edge();
    if (edge >= 0) data[edge] = Narrow<T>(0.0f);
  }
};

// The threads' parts as one, in a fixed order; every thread gets it. Also a barrier: what threads
// have read before it may be overwritten after it. Of two calls one after the other, one has `odd`:
// warps may still be at what the call before has left.
template <class T>
__device__ Softmax Merge(Softmax part, bool odd = false) {
  __shared__ float2 both[2][kMaxWarps];
  float2* const warps = both[odd ? 1 : 0];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
  part.Raise<T>(WarpMax(part.max));
  part.sum = WarpSum(part.sum);
  if (lane == 0) warps[threadIdx.x / 32] = make_float2(part.max, part.sum);
  __syncthreads();
  const float2 other = lane < count ? warps[lane] : make_float2(kLowest, 0);
  part.max = other.x;
  part.sum = other.y;
  part.Raise<T>(WarpMax(part.max));
  part.sum = WarpSum(part.sum);
  return part;
}

__device__ float WeightOf(const float* weights, int64_t t) {
  return weights == nullptr ? 1.0f : weights[t];
}

// weight * (log-sum-exp - target logit), where the weight is not 0.
__device__ float LossOf(Softmax softmax, float x_target, float weight, int64_t t, int64_t target,
                        DeviceFault* fault) {
  if (x_target == kLowest) Report(fault, DeviceFault::kLossTarget, target, t, 0);
  return weight * (softmax.max - x_target + logf(softmax.sum));
}

template <class T>
__global__ void __launch_bounds__(512, 2)
    FoldKernel(float* state, int64_t state_stride, T* logits, int64_t stride, int columns,
               const int32_t* targets, int64_t first, bool start) {
  const int64_t t = blockIdx.x;
  const Row<T> row(logits + t * stride, columns);
  Softmax softmax = Merge<T>(row.Fold(row.Read()));
  if (threadIdx.x != 0) return;
  float* st = state + t * state_stride;
  float x_target = kLowest;
  if (!start) {
    Softmax before;
    before.max = st[0];
    before.sum = st[1];
    x_target = st[2];
    const float max = fmaxf(before.max, softmax.max);
    before.Raise<T>(max);
    softmax.Raise<T>(max);
    softmax.sum += before.sum;
  }
  const int64_t target = targets[t] - first;
  if (target >= 0 && target < columns) x_target = Widen(row.data[target]);
  st[0] = softmax.max;
  st[1] = softmax.sum;
  st[2] = x_target;
}

template <class T>
__global__ void __launch_bounds__(512, 2)
    BackwardKernel(T* logits, int64_t stride, int columns, const float* state, int64_t state_stride,
                   const int32_t* targets, const float* weights, int64_t first) {
  const int64_t t = blockIdx.x;
  const Row<T> row(logits + t * stride, columns);
  const float weight = WeightOf(weights, t);
  if (weight == 0) return row.Zero();
  const float* st = state + t * state_stride;
  Softmax softmax;
  softmax.max = st[0];
  softmax.sum = st[1];
  const int64_t target = targets[t] - first;
  // The thread that has the target's column reads it before it writes there; nobody else needs it.
  float x_target = 0;
  if (target >= 0 && target < columns && row.Owns(static_cast<int>(target))) {
    x_target = Widen(row.data[target]);
  }
  row.Gradient(row.Read(), softmax, weight, target, x_target, [](int) {});
}

// Copies of 16 bytes to shared memory, which this thread does not wait for until it says so.
__device__ void Fetch(uint4* to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ void WaitForFetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rows are in shared memory between their two passes. A block takes the rows blockIdx.x,
// blockIdx.x + gridDim.x, ... Each thread finds its own packs there, and where it has written a
// gradient it fetches the next row's, so that reads and writes go on side by side.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    FusedKernel(T* logits, int64_t stride, int64_t rows, int columns, float* losses,
                const int32_t* targets, const float* weights, DeviceFault* fault) {
  extern __shared__ uint4 kept[];
  const auto row_of = [&](int64_t t) { return Row<T>(logits + t * stride, columns); };
  const auto fetch_from = [&](const Row<T>& row, int begin) {
    for (int i = threadIdx.x; i < row.packs; i += blockDim.x) {
      if (i >= begin) Fetch(kept + i, row.Pack(i));
    }
  };
  fetch_from(row_of(blockIdx.x), 0);
  bool odd = false;
  for (int64_t t = blockIdx.x; t < rows; t += gridDim.x) {
    const Row<T> row = row_of(t);
    Row<T> next = row_of(min(t + gridDim.x, rows - 1));
    if (t + gridDim.x >= rows) next.packs = 0;
    const float weight = WeightOf(weights, t);
    const int target = targets[t];
    // Here, ahead of the barrier, where its latency is hidden.
    const float x_target = target >= 0 && target < columns ? Widen(row.data[target]) : kLowest;
    WaitForFetched();
    if (weight == 0) {
      if (threadIdx.x == 0) losses[t] = 0;
      row.Zero();
      fetch_from(next, 0);
      continue;
    }
    const auto load = [&](int i) { return kept[i]; };
    const Softmax softmax = Merge<T>(row.Fold(load), odd);
    odd = !odd;
    row.Gradient(load, softmax, weight, target, x_target, [&](int i) {
      if (i < next.packs) Fetch(kept + i, next.Pack(i));
    });
    fetch_from(next, row.packs);  // a row that begins elsewhere within 16 bytes has a pack more
    if (threadIdx.x == 0) losses[t] = LossOf(softmax, x_target, weight, t, target, fault);
  }
}

// The same for rows that shared memory does not hold, one for each block: what is behind the first
// `room` packs is read again. It was read last, and mostly still is in the second-level cache.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    FusedLongKernel(T* logits, int64_t stride, int columns, float* losses, const int32_t* targets,
                    const float* weights, int room, DeviceFault* fault) {
  extern __shared__ uint4 kept[];
  const int64_t t = blockIdx.x;
  const Row<T> row(logits + t * stride, columns);
  const float weight = WeightOf(weights, t);
  const int target = targets[t];
  if (weight == 0) {
    if (threadIdx.x == 0) losses[t] = 0;
    return row.Zero();
  }
  // Every thread finds its own packs in shared memory again.
  const Softmax part = row.Fold([&](int i) {
    const uint4 raw = __ldcs(row.Pack(i));
    if (i < room) kept[i] = raw;
    return raw;
  });
  const float x_target = target >= 0 && target < columns ? Widen(row.data[target]) : kLowest;
  const Softmax softmax = Merge<T>(part);
  row.Gradient([&](int i) { return i < room ? kept[i] : __ldcs(row.Pack(i)); }, softmax, weight,
               target, x_target, [](int) {});
  if (threadIdx.x == 0) losses[t] = LossOf(softmax, x_target, weight, t, target, fault);
}

__global__ void __launch_bounds__(256)
    FinishKernel(float* losses, const float* state, int64_t stride, const float* weights,
                 const int32_t* targets, int64_t rows, DeviceFault* fault) {
  const int64_t t = blockIdx.x * int64_t{256} + threadIdx.x;
  if (t >= rows) return;
  const float weight = WeightOf(weights, t);
  float loss = 0;
  if (weight != 0) {
    const float* st = state + t * stride;
    Softmax softmax;
    softmax.max = st[0];
    softmax.sum = st[1];
    loss = LossOf(softmax, st[2], weight, t, targets == nullptr ? kNotGiven : targets[t], fault);
  }
  losses[t] = loss;
}

// One block, so that the order of additions does not depend on the device.
__global__ void __launch_bounds__(kMaxThreads)
    TotalKernel(double* total, const float* losses, const float* weights, int64_t rows, bool acc) {
  __shared__ double warps[2][kMaxWarps];
  double loss = 0, weight = 0;
#pragma unroll 8
  for (int64_t t = threadIdx.x; t < rows; t += kMaxThreads) {
    loss += losses[t];
    weight += WeightOf(weights, t);
  }
  loss = WarpSum(loss);
  weight = WarpSum(weight);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0) {
    warps[0][warp] = loss;
    warps[1][warp] = weight;
  }
  __syncthreads();
  if (warp >= 2) return;
  const double sum = WarpSum(warps[warp][lane]);
  if (lane == 0) total[warp] = (acc ? total[warp] : 0) + sum;
}

// Enough threads for kInFlight packs each, at most `most`.
template <class T>
unsigned Threads(int64_t columns, int64_t most) {
  int64_t threads = 32;
  while (threads < most && threads * kInFlight * Row<T>::kSize < columns) threads *= 2;
  return static_cast<unsigned>(threads);
}

// What the fused kernels get of the device, all shared memory that a block can have.
template <class T>
struct FusedLimits {
  int64_t shared = 0;  // bytes of a block
  int processors = 1;

  static const FusedLimits& Get() {
    static const FusedLimits limits = [] {
      FusedLimits l;
      int device = 0, most = 0;
      cudaGetDevice(&device);
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      cudaDeviceGetAttribute(&l.processors, cudaDevAttrMultiProcessorCount, device);
      l.shared = (most - 1024) / 16 * 16;  // 1024: more than the kernels' own, see Merge
      const auto allow = [&](auto kernel) {
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(l.shared));
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
      };
      allow(FusedKernel<T>);
      allow(FusedLongKernel<T>);
      return l;
    }();
    return limits;
  }
};

// One thread for each token: what `ranks` parts have of its state, one part behind the other.
__global__ void MergeKernel(float* state, int64_t stride, const float* parts, int64_t part_stride,
                            int64_t tokens, int64_t ranks) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  const auto part = [&](int64_t r) { return parts + (r * tokens + t) * part_stride; };
  float max = kLowest, sum = 0, target = kLowest;
  for (int64_t r = 0; r < ranks; ++r) {
    max = fmaxf(max, part(r)[0]);
    target = fmaxf(target, part(r)[2]);
  }
  const float shift = Softmax::Shift(max);
  for (int64_t r = 0; r < ranks; ++r) {
    if (part(r)[1] != 0) sum += part(r)[1] * expf(part(r)[0] - shift);
  }
  float* const to = state + t * stride;
  to[0] = max;
  to[1] = sum;
  to[2] = target;
}

class CudaLoss final : public LossKernels {
 public:
  void Fold(Stream& s, Tensor state, Tensor logits, Tensor targets, int64_t first,
            bool start) const override {
    if (logits.rows() == 0) return;
    ForModelType(logits.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t columns = logits.dims[1];
      FoldKernel<T><<<logits.rows(), Threads<T>(columns, 512), 0, Native(s)>>>(
          Data<float>(state), state.row_stride, Data<T>(logits), logits.row_stride, columns,
          Data<int32_t>(targets), first, start);
      Launched(s, "LossFold");
    });
  }

  void Merge(Stream& s, Tensor state, Tensor parts) const override {
    const int64_t tokens = state.rows();
    if (tokens == 0) return;
    MergeKernel<<<static_cast<unsigned>((tokens + 255) / 256), 256, 0, Native(s)>>>(
        Data<float>(state), state.row_stride, Data<float>(parts), parts.row_stride, tokens,
        parts.rows() / tokens);
    Launched(s, "LossMerge");
  }

  void Finish(Stream& s, Tensor losses, Tensor total, Tensor state, Tensor weights, bool acc,
              Tensor targets) const override {
    const int64_t rows = state.rows();
    if (rows > 0) {
      FinishKernel<<<(rows + 255) / 256, 256, 0, Native(s)>>>(
          Data<float>(losses), Data<float>(state), state.row_stride, Data<float>(weights),
          Data<int32_t>(targets), rows, s.fault());
      Launched(s, "LossFinish");
    }
    Total(s, losses, total, weights, acc);
  }

  void Backward(Stream& s, Tensor logits, Tensor state, Tensor targets, Tensor weights,
                int64_t first) const override {
    if (logits.rows() == 0 || logits.dims[1] == 0) return;
    ForModelType(logits.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const int64_t columns = logits.dims[1];
      BackwardKernel<T><<<logits.rows(), Threads<T>(columns, 512), 0, Native(s)>>>(
          Data<T>(logits), logits.row_stride, columns, Data<float>(state), state.row_stride,
          Data<int32_t>(targets), Data<float>(weights), first);
      Launched(s, "LossBackward");
    });
  }

  void Fused(Stream& s, Tensor logits, Tensor losses, Tensor total, Tensor targets, Tensor weights,
             bool acc) const override {
    ForModelType(logits.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (logits.rows() == 0) return;
      const int64_t columns = logits.dims[1];
      const int64_t row_bytes = columns / Row<T>::kSize * 16;
      const FusedLimits<T>& limits = FusedLimits<T>::Get();
      const auto rows = static_cast<unsigned>(logits.rows());
      if (row_bytes > limits.shared) {
        FusedLongKernel<T><<<rows, kMaxThreads, limits.shared, Native(s)>>>(
            Data<T>(logits), logits.row_stride, columns, Data<float>(losses),
            Data<int32_t>(targets), Data<float>(weights), static_cast<int>(limits.shared / 16),
            s.fault());
      } else {
        // Two blocks of 512 threads on a multiprocessor as long as two rows fit, else one of 1024.
        const unsigned threads =
            Threads<T>(columns, row_bytes <= limits.shared / 2 - 1024 ? 512 : kMaxThreads);
        // About as many as run at a time: a multiprocessor has registers for kMaxThreads.
        const int64_t blocks =
            std::min<int64_t>(rows, int64_t{limits.processors} * (kMaxThreads / threads));
        FusedKernel<T><<<static_cast<unsigned>(blocks), threads, row_bytes, Native(s)>>>(
            Data<T>(logits), logits.row_stride, rows, columns, Data<float>(losses),
            Data<int32_t>(targets), Data<float>(weights), s.fault());
      }
      Launched(s, "LossFused");
    });
    Total(s, losses, total, weights, acc);
  }

 private:
  static void Total(Stream& s, const Tensor& losses, const Tensor& total, const Tensor& weights,
                    bool acc) {
    TotalKernel<<<1, kMaxThreads, 0, Native(s)>>>(Data<double>(total), Data<float>(losses),
                                                  Data<float>(weights), losses.rows(), acc);
    Launched(s, "LossTotal");
  }
};

}  // namespace

const LossKernels* Loss() {
  static const CudaLoss kernels;
  return &kernels;
}

}  // namespace stretto::cuda
