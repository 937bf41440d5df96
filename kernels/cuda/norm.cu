#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

// Rows of a [rows, n] or [tokens, heads, head_dim] operand, head by head.
struct HeadRows {
  int64_t heads;
  int64_t dim;
  int64_t rows;

  explicit HeadRows(const Tensor& t)
      : heads(t.rank == 3 ? t.dims[1] : 1),
        dim(t.rank == 3 ? t.dims[2] : t.row_elements()),
        rows(t.rows() * heads) {}
  bool empty() const { return rows == 0 || dim == 0; }
};

// Where a row lies: head `head` of token `token`.
struct Place {
  int64_t token;
  int64_t head;

  __device__ Place(const HeadRows& at, int64_t row) : token(row), head(0) {
    if (at.heads > 1) {
      // Unsigned: the quotient of two numbers below 2^32 is then found without the long division.
      token = static_cast<uint64_t>(row) / static_cast<uint64_t>(at.heads);
      head = row - token * at.heads;
    }
  }
  template <class T>
  __device__ T* Row(const Rows<T>& operand, const HeadRows& at) const {
    return operand.At(token, head * at.dim);
  }
  // The statistic of the row in [tokens] or [tokens, heads].
  __device__ float* Statistic(const Rows<float>& operand) const { return operand.At(token, head); }
};

// A row is worked on by kLanes neighbouring threads of a warp, or by a whole block (kLanes 0), and
// read as packs of kWidth elements; pack i belongs to lane i % lanes. A lane keeps its first kPacks
// packs in registers as they are stored, so that every element is read once. The longest rows have
// more packs than that; those are read again where they are needed.
template <int kLanes>
struct Lanes {
  __device__ static int Count() { return kLanes > 0 ? kLanes : static_cast<int>(blockDim.x); }
  __device__ static int Own() { return static_cast<int>(threadIdx.x) % Count(); }
  __device__ static int64_t Row() {
    return int64_t{blockIdx.x} * (blockDim.x / Count()) + threadIdx.x / Count();
  }

  // The sum over the lanes of a row, in an order that depends on nothing but the shape. All threads
  // of the block call it.
  __device__ static float Sum(float x) {
    if constexpr (kLanes > 0) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, offset);
      }
    } else {
      __shared__ float warps[32];
      x = WarpSum(x);
      __syncthreads();  // the last sum has been read by all
      if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
      __syncthreads();
      x = 0;
      for (unsigned w = 0; w < blockDim.x / 32; ++w) x += warps[w];
    }
    return x;
  }
};

// Calls f(j, i) for the packs i that a lane holds as its j-th.
template <int kPacks, class F>
__device__ void Held(int own, int lanes, int packs, const F& f) {
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int i = own + j * lanes;
    if (i < packs) f(j, i);
  }
}

// Calls f(i) for the packs that it does not hold; only whole blocks have rows that long.
template <int kPacks, int kLanes, class F>
__device__ void Rest(int own, int lanes, int packs, const F& f) {
  if constexpr (kLanes == 0) {
#pragma unroll 1
    for (int i = own + kPacks * lanes; i < packs; i += lanes) f(i);
  }
}

constexpr int kWarpThreads = 128;   // of a block whose rows are shared by the lanes of a warp
constexpr int kBlockThreads = 512;  // at most, of a block that shares one row

// Blocks of a multiprocessor that the registers have to do for: as many as spill nothing.
template <int kPacks, int kLanes, bool kBackward>
constexpr int kMinBlocks = kLanes == 0   ? 1
                           : kPacks == 1 ? 10
                           : kPacks == 4 ? (kBackward ? 5 : 7)
                                         : 4;
template <int kLanes>
constexpr int kMaxThreads = kLanes > 0 ? kWarpThreads : kBlockThreads;

// kWidth elements of a row as they are stored.
template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Elements {
  T value[kWidth];

  __device__ float operator[](int k) const { return Widen(value[k]); }
  __device__ static Elements Of(const float (&from)[kWidth]) {
    Elements result;
    for (int k = 0; k < kWidth; ++k) result.value[k] = Narrow<T>(from[k]);
    return result;
  }
  __device__ void Forget() {}
};

// bf16 stays in pairs: as single elements each would fill a register.
template <>
struct alignas(16) Elements<__nv_bfloat16, 8> {
  uint32_t pairs[4];

  __device__ float operator[](int k) const {
    return __uint_as_float(k % 2 == 0 ? pairs[k / 2] << 16 : pairs[k / 2] & 0xffff0000u);
  }
  __device__ static Elements Of(const float (&from)[8]) {
    Elements result;
    for (int k = 0; k < 4; ++k) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * k], from[2 * k + 1]);
      memcpy(&result.pairs[k], &pair, sizeof(pair));
    }
    return result;
  }
  // Hides that the pairs have not changed. The compiler would otherwise keep what it has widened
  // for the next use: twice the registers, to save a shift.
  __device__ void Forget() {
    for (uint32_t& pair : pairs) asm("" : "+r"(pair));
  }
};

template <int kPacks, class V>
__device__ void Forget(V (&packs)[kPacks]) {
  for (V& pack : packs) pack.Forget();
}

template <class T>
struct ForwardArgs {
  HeadRows at;
  Rows<T> y, h, x, residual;
  Rows<float> mean, rstd;
  float eps;
};

template <class T, int kWidth, int kPacks, int kLanes>
__global__ void __launch_bounds__(kMaxThreads<kLanes>, kMinBlocks<kPacks, kLanes, false>)
    ForwardKernel(ForwardArgs<T> a, const T* __restrict__ weight, const T* __restrict__ bias) {
  using V = Elements<T, kWidth>;
  using L = Lanes<kLanes>;
  const int own = L::Own(), lanes = L::Count();
  const int64_t row = L::Row();
  const bool active = row < a.at.rows;  // the others take part in the sums only
  const Place place(a.at, active ? row : 0);
  const int packs = active ? static_cast<int>(a.at.dim / kWidth) : 0;
  const float n = static_cast<float>(a.at.dim);
  const bool sums_up = a.residual.data != nullptr, center = a.mean.data != nullptr;

  V held[kPacks];
  const V* input = reinterpret_cast<const V*>(place.Row(a.x, a.at));
  Held<kPacks>(own, lanes, packs, [&](int j, int i) { held[j] = Read(input + i); });
  if (sums_up) {
    // The norm reads the sum as it is stored, rounded: backward will see nothing else.
    const auto add = [](const V& one, const V& other) {
      float sum[kWidth];
      for (int k = 0; k < kWidth; ++k) sum[k] = one[k] + other[k];
      return V::Of(sum);
    };
    V other[kPacks];
    const V* residual = reinterpret_cast<const V*>(place.Row(a.residual, a.at));
    V* h = reinterpret_cast<V*>(place.Row(a.h, a.at));
    Held<kPacks>(own, lanes, packs, [&](int j, int i) { other[j] = Read(residual + i); });
    Held<kPacks>(own, lanes, packs, [&](int j, int i) {
      held[j] = add(held[j], other[j]);
      h[i] = held[j];
    });
    Rest<kPacks, kLanes>(own, lanes, packs,
                         [&](int i) { h[i] = add(Read(input + i), Read(residual + i)); });
    input = h;
  }
  const auto each = [&](const auto& f) {
    Held<kPacks>(own, lanes, packs, [&](int j, int i) { f(i, held[j]); });
    Rest<kPacks, kLanes>(own, lanes, packs, [&](int i) { f(i, Read(input + i)); });
  };

  float mean = 0;
  if (center) {
    each([&](int, const V& v) {
      for (int k = 0; k < kWidth; ++k) mean += v[k];
    });
    mean = L::Sum(mean) / n;
    Forget(held);
  }
  float squares = 0;
  each([&](int, const V& v) {
    for (int k = 0; k < kWidth; ++k) {
      const float d = v[k] - mean;
      squares += d * d;
    }
  });
  const float r = 1.0f / sqrtf(L::Sum(squares) / n + a.eps);
  Forget(held);
  if (active && own == 0) {
    if (center) *place.Statistic(a.mean) = mean;
    *place.Statistic(a.rstd) = r;
  }

  V* y = reinterpret_cast<V*>(place.Row(a.y, a.at));
  each([&](int i, const V& v) {
    const V w = Read(reinterpret_cast<const V*>(weight) + i);
    V b = {};
    if (bias != nullptr) b = Read(reinterpret_cast<const V*>(bias) + i);
    float result[kWidth];
    for (int k = 0; k < kWidth; ++k) result[k] = (v[k] - mean) * r * w[k] + b[k];
    y[i] = V::Of(result);
  });
}

template <class T>
struct BackwardArgs {
  HeadRows at;
  Rows<T> dx, dy, h;
  Rows<float> mean, rstd;
  bool acc;
};

// With g = dy * weight and x = (h - mean) * rstd:
// dx = rstd * (g - mean(g) - x * mean(g * x)); RMSNorm lacks the mean(g) term.
template <class T, int kWidth, int kPacks, int kLanes>
__global__ void __launch_bounds__(kMaxThreads<kLanes>, kMinBlocks<kPacks, kLanes, true>)
    BackwardInputKernel(BackwardArgs<T> a, const T* __restrict__ weight) {
  using V = Elements<T, kWidth>;
  using L = Lanes<kLanes>;
  const int own = L::Own(), lanes = L::Count();
  const int64_t row = L::Row();
  const bool active = row < a.at.rows;
  const Place place(a.at, active ? row : 0);
  const int packs = active ? static_cast<int>(a.at.dim / kWidth) : 0;
  const float n = static_cast<float>(a.at.dim);
  const bool center = a.mean.data != nullptr;
  const float mean = center ? *place.Statistic(a.mean) : 0;
  const float r = *place.Statistic(a.rstd);

  const V* dy = reinterpret_cast<const V*>(place.Row(a.dy, a.at));
  const V* h = reinterpret_cast<const V*>(place.Row(a.h, a.at));
  const V* weights = reinterpret_cast<const V*>(weight);
  V* dx = reinterpret_cast<V*>(place.Row(a.dx, a.at));
  V held_dy[kPacks], held_h[kPacks];
  Held<kPacks>(own, lanes, packs, [&](int j, int i) {
    held_dy[j] = Read(dy + i);
    held_h[j] = Read(h + i);
  });

  float sum_g = 0, sum_gx = 0;
  const auto sum = [&](int i, const V& d, const V& v) {
    const V w = Read(weights + i);
    for (int k = 0; k < kWidth; ++k) {
      const float g = d[k] * w[k];
      sum_g += g;
      sum_gx += g * ((v[k] - mean) * r);
    }
  };
  Held<kPacks>(own, lanes, packs, [&](int j, int i) { sum(i, held_dy[j], held_h[j]); });
  Rest<kPacks, kLanes>(own, lanes, packs, [&](int i) { sum(i, Read(dy + i), Read(h + i)); });
  const float mean_g = center ? L::Sum(sum_g) / n : 0;
  const float mean_gx = L::Sum(sum_gx) / n;
  Forget(held_dy);
  Forget(held_h);

  const auto gradient = [&](int i, const V& d, const V& v, const V& old) {
    const V w = Read(weights + i);
    float result[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      const float g = d[k] * w[k];
      const float x = (v[k] - mean) * r;
      const float e = (g - mean_g - x * mean_gx) * r;
      result[k] = a.acc ? e + old[k] : e;
    }
    return V::Of(result);
  };
  V old[kPacks];
  if (a.acc) Held<kPacks>(own, lanes, packs, [&](int j, int i) { old[j] = Read(dx + i); });
  Held<kPacks>(own, lanes, packs,
               [&](int j, int i) { dx[i] = gradient(i, held_dy[j], held_h[j], old[j]); });
  Rest<kPacks, kLanes>(own, lanes, packs, [&](int i) {
    dx[i] = gradient(i, Read(dy + i), Read(h + i), Read(dx + i));
  });
}

// Calls launch(blocks, threads, Shape<width, packs, lanes>) with what suits rows of at.dim
// elements.
template <int kWidth_, int kPacks_, int kLanes_>
struct Shape {
  static constexpr int kWidth = kWidth_, kPacks = kPacks_, kLanes = kLanes_;
};
template <int kWidth, class F>
void WithShape(const HeadRows& at, const F& launch) {
  const int64_t packs = at.dim / kWidth;
  const auto warps = [&](auto shape) {
    const int64_t rows = kWarpThreads / decltype(shape)::kLanes;  // of a block
    launch(static_cast<unsigned>((at.rows + rows - 1) / rows), unsigned{kWarpThreads}, shape);
  };
  if (packs <= 8) return warps(Shape<kWidth, 1, 8>{});
  if (packs <= 16) return warps(Shape<kWidth, 1, 16>{});
  if (packs <= 32) return warps(Shape<kWidth, 1, 32>{});
  if (packs <= 128) return warps(Shape<kWidth, 4, 32>{});
  if constexpr (kWidth <= 4) {
    if (packs <= 256) return warps(Shape<kWidth, 8, 32>{});
  }
  constexpr int kPacks = 4;
  const int64_t threads =
      std::min<int64_t>((packs + 32 * kPacks - 1) / (32 * kPacks) * 32, kBlockThreads);
  launch(static_cast<unsigned>(at.rows), static_cast<unsigned>(threads),
         Shape<kWidth, kPacks, 0>{});
}

// The widest packs that all operands allow: matrices, and the vectors weight and bias.
template <class T, class F, class... Tensors>
void WithWidth(const HeadRows& at, const F& launch, const Tensor& weight, const Tensor& bias,
               const Tensors&... matrices) {
  const auto address =
      reinterpret_cast<uintptr_t>(weight.data) | reinterpret_cast<uintptr_t>(bias.data);
  if (at.dim % Pack<T>::kSize == 0 && address % 16 == 0 && (RowsAligned(matrices) && ...)) {
    WithShape<Pack<T>::kSize>(at, launch);
  } else {
    WithShape<1>(at, launch);
  }
}

// Gradients of weight and bias: sums over all rows, in two steps. The rows are cut into chunks, the
// columns into tiles; a block adds up one tile of one chunk and writes the sums to scratch memory,
// and a second kernel adds the chunks. Which rows make a chunk follows from the shape alone, so
// that every device comes to the same bits.
constexpr int kSumThreads = 256;
constexpr int kFinishColumns = 32;  // of a block of the second kernel
constexpr int kFinishParts = 16;    // among which its threads divide the chunks

struct Partition {
  int lanes;           // threads side by side along a row; kSumThreads / lanes rows at a time
  int64_t tiles;       // of lanes * kWidth columns
  int64_t chunk_rows;  // rows of a chunk
  int64_t chunks;
  int kinds;  // 1: weight, 2: weight and bias

  Partition(const HeadRows& at, int width, bool bias) : kinds(bias ? 2 : 1) {
    const int64_t packs = at.dim / width;
    lanes = 1;
    while (lanes < 32 && lanes < packs) lanes *= 2;
    tiles = (packs + lanes - 1) / lanes;
    // About a thousand blocks keep any device busy; a thread has at least four rows to add.
    constexpr int64_t kBlocks = 1024;
    const int64_t wanted = std::max<int64_t>(1, kBlocks / tiles);
    const int64_t least = int64_t{4} * (kSumThreads / lanes);
    chunk_rows = std::max(least, (at.rows + wanted - 1) / wanted);
    chunks = (at.rows + chunk_rows - 1) / chunk_rows;
  }
};

// partial [chunks, kinds, dim]
template <class T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    WeightSumsKernel(float* partial, HeadRows at, Partition p, Rows<T> dy, Rows<T> h,
                     Rows<float> mean, Rows<float> rstd) {
  using V = Elements<T, kWidth>;
  __shared__ float shared[2 * kWidth * kSumThreads];
  const int lane = threadIdx.x % p.lanes, group = threadIdx.x / p.lanes;
  const int groups = kSumThreads / p.lanes;
  const int64_t chunk = blockIdx.x / p.tiles, tile = blockIdx.x % p.tiles;
  const int64_t column = (tile * p.lanes + lane) * kWidth;
  const int64_t end = min(at.rows, (chunk + 1) * p.chunk_rows);

  float sum_w[kWidth] = {}, sum_b[kWidth] = {};
  if (column < at.dim) {
#pragma unroll 4
    for (int64_t row = chunk * p.chunk_rows + group; row < end; row += groups) {
      const Place place(at, row);
      const V d = Read(reinterpret_cast<const V*>(place.Row(dy, at) + column));
      const V v = Read(reinterpret_cast<const V*>(place.Row(h, at) + column));
      const float mu = mean.data != nullptr ? *place.Statistic(mean) : 0;
      const float r = *place.Statistic(rstd);
      for (int k = 0; k < kWidth; ++k) {
        const float g = d[k];
        sum_w[k] += g * ((v[k] - mu) * r);
        sum_b[k] += g;
      }
    }
  }
  // shared [kind, k, thread]: neighbouring threads write neighbouring words.
  for (int k = 0; k < kWidth; ++k) {
    shared[k * kSumThreads + threadIdx.x] = sum_w[k];
    shared[(kWidth + k) * kSumThreads + threadIdx.x] = sum_b[k];
  }
  __syncthreads();
  const int columns = p.lanes * kWidth;
  for (int i = threadIdx.x; i < p.kinds * columns; i += kSumThreads) {
    const int kind = i / columns, j = i % columns;
    const int64_t to = tile * columns + j;
    if (to >= at.dim) continue;
    const float* from = shared + (kind * kWidth + j % kWidth) * kSumThreads + j / kWidth;
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += from[g * p.lanes];
    partial[(chunk * p.kinds + kind) * at.dim + to] = sum;
  }
}

// Adds the chunks: part q of a block takes chunks q, q + kFinishParts, ... in order, then the parts
// are added in order. blockIdx.y: weight, bias.
__global__ void __launch_bounds__(kFinishColumns* kFinishParts)
    FinishWeightKernel(float* dweight, float* dbias, const float* __restrict__ partial, int64_t dim,
                       int64_t chunks, bool acc) {
  __shared__ float parts[kFinishParts][kFinishColumns];
  const int64_t column = int64_t{blockIdx.x} * kFinishColumns + threadIdx.x;
  float sum = 0;
  if (column < dim) {
#pragma unroll 8
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kFinishParts) {
      sum += partial[(chunk * gridDim.y + blockIdx.y) * dim + column];
    }
  }
  parts[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= dim) return;
  float* to = (blockIdx.y == 0 ? dweight : dbias) + column;
  sum = 0;
  for (int part = 0; part < kFinishParts; ++part) sum += parts[part][threadIdx.x];
  *to = acc ? *to + sum : sum;
}

class CudaNorm final : public NormKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
               Tensor weight, Tensor bias, double eps) const override {
    const HeadRows at(x);
    if (at.empty()) return;
    ForModelType(x.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const ForwardArgs<T> args = {at,
                                   Rows<T>(y),
                                   Rows<T>(h),
                                   Rows<T>(x),
                                   Rows<T>(residual),
                                   Rows<float>(mean),
                                   Rows<float>(rstd),
                                   static_cast<float>(eps)};
      const auto launch = [&](unsigned blocks, unsigned threads, auto shape) {
        using S = decltype(shape);
        ForwardKernel<T, S::kWidth, S::kPacks, S::kLanes>
            <<<blocks, threads, 0, Native(s)>>>(args, Data<T>(weight), Data<T>(bias));
      };
      WithWidth<T>(at, launch, weight, bias, y, h, x, residual);
      Launched(s, "NormForward");
    });
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                     Tensor weight, bool acc) const override {
    const HeadRows at(dx);
    if (at.empty()) return;
    ForModelType(dx.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const BackwardArgs<T> args = {
          at, Rows<T>(dx), Rows<T>(dy), Rows<T>(h), Rows<float>(mean), Rows<float>(rstd), acc};
      const auto launch = [&](unsigned blocks, unsigned threads, auto shape) {
        using S = decltype(shape);
        BackwardInputKernel<T, S::kWidth, S::kPacks, S::kLanes>
            <<<blocks, threads, 0, Native(s)>>>(args, Data<T>(weight));
      };
      WithWidth<T>(at, launch, weight, Tensor{}, dx, dy, h);
      Launched(s, "NormBackwardInput");
    });
  }

  void BackwardWeight(Stream& s, Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean,
                      Tensor rstd, bool acc) const override {
    const HeadRows at(dy);
    if (at.dim == 0) return;
    ForModelType(dy.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const bool wide = at.dim % Pack<T>::kSize == 0 && RowsAligned(dy) && RowsAligned(h);
      const Partition p(at, wide ? Pack<T>::kSize : 1, dbias.present());
      auto* partial = reinterpret_cast<float*>(
          Workspace(s, p.chunks * p.kinds * at.dim * sizeof(float), "NormBackwardWeight"));
      if (at.rows > 0) {
        if (partial == nullptr) return;
        const auto blocks = static_cast<unsigned>(p.chunks * p.tiles);
        const auto launch = [&](auto kernel) {
          kernel<<<blocks, kSumThreads, 0, Native(s)>>>(partial, at, p, Rows<T>(dy), Rows<T>(h),
                                                        Rows<float>(mean), Rows<float>(rstd));
        };
        if (wide) {
          launch(WeightSumsKernel<T, Pack<T>::kSize>);
        } else {
          launch(WeightSumsKernel<T, 1>);
        }
        Launched(s, "NormBackwardWeight");
      }
      const dim3 blocks(static_cast<unsigned>((at.dim + kFinishColumns - 1) / kFinishColumns),
                        p.kinds);
      FinishWeightKernel<<<blocks, dim3(kFinishColumns, kFinishParts), 0, Native(s)>>>(
          Data<float>(dweight), Data<float>(dbias), partial, at.dim, p.chunks, acc);
      Launched(s, "NormBackwardWeight");
    });
  }
};

}  // namespace

const NormKernels* Norm() {
  static const CudaNorm kernels;
  return &kernels;
}

}  // namespace stretto::cuda
