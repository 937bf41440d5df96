#include <algorithm>
#include <cstdint>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/families.h"
#include "kernels/cuda/norm_sums.h"

namespace stretto::cuda {
namespace {

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

// The same for kernels that keep sums of all columns in registers.
constexpr int kSumBlockThreads = 384;
template <int kWidth, int kPacks, int kLanes>
constexpr int kSumBlocks = kLanes == 0            ? 1
                           : kPacks == 1          ? 8
                           : kWidth* kPacks <= 24 ? 4
                           : kWidth == 8          ? 3
                                                  : 2;
template <int kLanes>
constexpr int kMaxSumThreads = kLanes > 0 ? kWarpThreads : kSumBlockThreads;

template <int kPacks, class V>
__device__ void Forget(V (&packs)[kPacks]) {
  for (V& pack : packs) pack.Forget();
}

template <class T>
struct ForwardArgs {
  Extent at;
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
  const int64_t place = active ? row : 0;
  const int packs = active ? static_cast<int>(a.at.dim / kWidth) : 0;
  const float n = static_cast<float>(a.at.dim);
  const bool sums_up = a.residual.data != nullptr, center = a.mean.data != nullptr;

  V held[kPacks];
  const V* input = reinterpret_cast<const V*>(a.x.At(place, 0));
  Held<kPacks>(own, lanes, packs, [&](int j, int i) { held[j] = Read(input + i); });
  if (sums_up) {
    // The norm reads the sum as it is stored, rounded: backward will see nothing else.
    const auto add = [](const V& one, const V& other) {
      float sum[kWidth];
      for (int k = 0; k < kWidth; ++k) sum[k] = one[k] + other[k];
      return V::Of(sum);
    };
    V other[kPacks];
    const V* residual = reinterpret_cast<const V*>(a.residual.At(place, 0));
    V* h = reinterpret_cast<V*>(a.h.At(place, 0));
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
    if (center) *a.mean.At(place, 0) = mean;
    *a.rstd.At(place, 0) = r;
  }

  V* y = reinterpret_cast<V*>(a.y.At(place, 0));
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
  Extent at;
  Rows<T> dx, dy, h;
  Rows<float> mean, rstd;
  bool acc;
};

// What a lane adds up over its rows for the gradients of weight and bias, by the packs that it
// holds.
template <int kWidth, int kPacks>
struct Sums {
  static constexpr bool kKeeps = true;
  float weight[kPacks][kWidth] = {}, bias[kPacks][kWidth] = {};

  __device__ void Add(int j, int k, float dy, float x) {
    weight[j][k] += dy * x;
    bias[j][k] += dy;
  }
};
struct NoSums {
  static constexpr bool kKeeps = false;
  __device__ void Add(int, int, float, float) {}
};

// With g = dy * weight and x = (h - mean) * rstd:
// dx = rstd * (g - mean(g) - x * mean(g * x)); RMSNorm lacks the mean(g) term.
template <class T, int kWidth, int kPacks, int kLanes, class S>
__device__ void BackwardRow(const BackwardArgs<T>& a, const T* __restrict__ weight, int64_t row,
                            bool active, S& sums) {
  using V = Elements<T, kWidth>;
  using L = Lanes<kLanes>;
  const int own = L::Own(), lanes = L::Count();
  const int64_t place = active ? row : 0;
  const int packs = active ? static_cast<int>(a.at.dim / kWidth) : 0;
  const float n = static_cast<float>(a.at.dim);
  const bool center = a.mean.data != nullptr;
  const float mean = center ? *a.mean.At(place, 0) : 0;
  const float r = *a.rstd.At(place, 0);

  const V* dy = reinterpret_cast<const V*>(a.dy.At(place, 0));
  const V* h = reinterpret_cast<const V*>(a.h.At(place, 0));
  const V* weights = reinterpret_cast<const V*>(weight);
  V* dx = reinterpret_cast<V*>(a.dx.At(place, 0));
  V held_dy[kPacks], held_h[kPacks], old[kPacks];
  const auto read_old = [&] {
    if (a.acc) Held<kPacks>(own, lanes, packs, [&](int j, int i) { old[j] = Read(dx + i); });
  };
  Held<kPacks>(own, lanes, packs, [&](int j, int i) {
    held_dy[j] = Read(dy + i);
    held_h[j] = Read(h + i);
  });
  // Kernels with sums have few warps, which have to have more loads in flight.
  if constexpr (S::kKeeps) read_old();

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
  if constexpr (!S::kKeeps) {
    Rest<kPacks, kLanes>(own, lanes, packs, [&](int i) { sum(i, Read(dy + i), Read(h + i)); });
  }
  const float mean_g = center ? L::Sum(sum_g) / n : 0;
  const float mean_gx = L::Sum(sum_gx) / n;
  Forget(held_dy);
  Forget(held_h);

  const auto gradient = [&](int j, int i, const V& d, const V& v, const V& before) {
    const V w = Read(weights + i);
    float result[kWidth];
    for (int k = 0; k < kWidth; ++k) {
      const float g = d[k] * w[k];
      const float x = (v[k] - mean) * r;
      const float e = (g - mean_g - x * mean_gx) * r;
      result[k] = a.acc ? e + before[k] : e;
      sums.Add(j, k, d[k], x);
    }
    return V::Of(result);
  };
  if constexpr (!S::kKeeps) read_old();
  Held<kPacks>(own, lanes, packs,
               [&](int j, int i) { dx[i] = gradient(j, i, held_dy[j], held_h[j], old[j]); });
  if constexpr (!S::kKeeps) {
    Rest<kPacks, kLanes>(own, lanes, packs, [&](int i) {
      dx[i] = gradient(0, i, Read(dy + i), Read(h + i), Read(dx + i));
    });
  }
}

template <class T, int kWidth, int kPacks, int kLanes>
__global__ void __launch_bounds__(kMaxThreads<kLanes>, kMinBlocks<kPacks, kLanes, true>)
    BackwardInputKernel(BackwardArgs<T> a, const T* __restrict__ weight) {
  const int64_t row = Lanes<kLanes>::Row();
  NoSums none;
  BackwardRow<T, kWidth, kPacks, kLanes>(a, weight, row, row < a.at.rows, none);
}

// The same for one chunk of rows, whose sums go to partial [chunks, kinds, dim]. All packs of a row
// are held.
template <class T, int kWidth, int kPacks, int kLanes>
__global__ void __launch_bounds__(kMaxSumThreads<kLanes>, kSumBlocks<kWidth, kPacks, kLanes>)
    BackwardSumsKernel(BackwardArgs<T> a, const T* __restrict__ weight, float* __restrict__ partial,
                       int64_t chunk_rows) {
  using L = Lanes<kLanes>;
  const int own = L::Own(), lanes = L::Count();
  const int groups = kLanes > 0 ? blockDim.x / lanes : 1, group = threadIdx.x / lanes;
  const int64_t begin = blockIdx.x * chunk_rows, end = min(a.at.rows, begin + chunk_rows);
  Sums<kWidth, kPacks> sums;
#pragma unroll 1
  for (int64_t first = begin; first < end; first += groups) {
    const int64_t row = first + group;
    BackwardRow<T, kWidth, kPacks, kLanes>(a, weight, row, row < end, sums);
  }

  const int kinds = a.mean.data != nullptr ? 2 : 1;
  partial += blockIdx.x * kinds * a.at.dim;
  if constexpr (kLanes == 0) {
    Held<kPacks>(own, lanes, static_cast<int>(a.at.dim / kWidth), [&](int j, int i) {
      for (int k = 0; k < kWidth; ++k) partial[i * kWidth + k] = sums.weight[j][k];
      if (kinds == 1) return;
      for (int k = 0; k < kWidth; ++k) partial[a.at.dim + i * kWidth + k] = sums.bias[j][k];
    });
  } else {
    // The groups add theirs in turn. Neighbouring lanes use neighbouring words.
    __shared__ float shared[2][kPacks][kWidth][kLanes];
    for (int g = 0; g < groups; ++g) {
      if (g == group) {
#pragma unroll
        for (int j = 0; j < kPacks; ++j) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            float& w = shared[0][j][k][own];
            float& b = shared[1][j][k][own];
            w = g == 0 ? sums.weight[j][k] : w + sums.weight[j][k];
            b = g == 0 ? sums.bias[j][k] : b + sums.bias[j][k];
          }
        }
      }
      __syncthreads();
    }
    const int dim = static_cast<int>(a.at.dim);
    for (int i = threadIdx.x; i < kinds * dim; i += blockDim.x) {
      const int kind = i >= dim ? 1 : 0, column = i - kind * dim, pack = column / kWidth;
      partial[i] = shared[kind][pack / kLanes][column % kWidth][pack % kLanes];
    }
  }
}

// Calls launch(blocks, threads, Shape<width, packs, lanes>) with what suits rows of at.dim
// elements.
template <int kWidth_, int kPacks_, int kLanes_>
struct Shape {
  static constexpr int kWidth = kWidth_, kPacks = kPacks_, kLanes = kLanes_;
};
template <int kWidth, class F>
void WithShape(const Extent& at, const F& launch) {
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

// Calls launch(threads, Shape<width, packs, lanes>) with what suits BackwardSumsKernel for rows of
// `dim` elements; false where it would need too many registers.
template <int kWidth, class F>
bool WithSumShape(int64_t dim, const F& launch) {
  const int64_t packs = dim / kWidth;
  if (packs == 0 || dim % kWidth != 0) return false;
  const auto use = [&](int64_t threads, auto shape) {
    launch(static_cast<unsigned>(threads), shape);
    return true;
  };
  if (packs <= 8) return use(kWarpThreads, Shape<kWidth, 1, 8>{});
  if (packs <= 16) return use(kWarpThreads, Shape<kWidth, 1, 16>{});
  if (packs <= 32) return use(kWarpThreads, Shape<kWidth, 1, 32>{});
  if constexpr (kWidth == 8) {
    if (packs <= 96) return use(kWarpThreads, Shape<kWidth, 3, 32>{});
  }
  if (packs <= 128) return use(kWarpThreads, Shape<kWidth, 4, 32>{});
  if constexpr (kWidth == 4) {
    if (packs <= 256) return use(kWarpThreads, Shape<kWidth, 8, 32>{});
  }
  constexpr int kPacks = 4;
  const int64_t threads = (packs + 32 * kPacks - 1) / (32 * kPacks) * 32;
  return threads <= kSumBlockThreads && use(threads, Shape<kWidth, kPacks, 0>{});
}

// How BackwardInput cuts the rows for the sums that it leaves: a chunk for each block, and blocks
// for one wave on 132 multiprocessors. A fixed number, so that results do not depend on the GPU.
template <class T>
NormChunks PartialChunks(int64_t rows, int64_t dim) {
  constexpr int kWidth = Pack<T>::kSize;
  NormChunks chunks;
  const bool held = WithSumShape<kWidth>(dim, [&](unsigned threads, auto shape) {
    using S = decltype(shape);
    const int64_t resident = S::kLanes > 0 ? kSumBlocks<kWidth, S::kPacks, S::kLanes>
                                           : kSumBlockThreads / int64_t{threads};
    const int64_t at_once = S::kLanes > 0 ? threads / std::max(S::kLanes, 1) : 1;
    chunks.most = 132 * resident;
    chunks.rows = std::max(4 * at_once, (rows + chunks.most - 1) / chunks.most);
    chunks.rows = (chunks.rows + at_once - 1) / at_once * at_once;
    chunks.count = (rows + chunks.rows - 1) / chunks.rows;
  });
  return held ? chunks : ChunksForSums(rows, dim, dim % kWidth == 0 ? kWidth : 1);
}

// The widest packs that all operands allow: matrices, and the vectors weight and bias.
template <class T, class F, class... Tensors>
void WithWidth(const Extent& at, const F& launch, const Tensor& weight, const Tensor& bias,
               const Tensors&... matrices) {
  const auto address =
      reinterpret_cast<uintptr_t>(weight.data) | reinterpret_cast<uintptr_t>(bias.data);
  if (at.dim % Pack<T>::kSize == 0 && address % 16 == 0 && (RowsAligned(matrices) && ...)) {
    WithShape<Pack<T>::kSize>(at, launch);
  } else {
    WithShape<1>(at, launch);
  }
}

class CudaNorm final : public NormKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
               Tensor weight, Tensor bias, double eps) const override {
    const Extent at(x);
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

  int64_t PartialBytes(DType dtype, int64_t columns, bool center) const override {
    int64_t chunks = 0;
    ForModelType(dtype, [&](auto type) {
      chunks = PartialChunks<typename decltype(type)::type>(0, columns).most;
    });
    return chunks * (center ? 2 : 1) * columns * int64_t{sizeof(float)};
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                     Tensor weight, bool acc, Tensor partials) const override {
    const Extent at(dx);
    if (at.empty()) return;
    ForModelType(dx.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const BackwardArgs<T> args = {
          at, Rows<T>(dx), Rows<T>(dy), Rows<T>(h), Rows<float>(mean), Rows<float>(rstd), acc};
      if (partials.present()) {
        const NormChunks chunks = PartialChunks<T>(at.rows, at.dim);
        auto* sums = Data<float>(partials);
        const auto fused = [&](unsigned threads, auto shape) {
          using S = decltype(shape);
          BackwardSumsKernel<T, S::kWidth, S::kPacks, S::kLanes>
              <<<static_cast<unsigned>(chunks.count), threads, 0, Native(s)>>>(
                  args, Data<T>(weight), sums, chunks.rows);
          Launched(s, "NormBackwardInput");
        };
        const bool aligned = reinterpret_cast<uintptr_t>(weight.data) % 16 == 0 &&
                             RowsAligned(dx) && RowsAligned(dy) && RowsAligned(h);
        if (aligned && WithSumShape<Pack<T>::kSize>(at.dim, fused)) return;
        // First, since dx may take the place of dy.
        NormChunkSums(s, sums, chunks, mean.present() ? 2 : 1, dy, h, mean, rstd);
      }
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
                      Tensor rstd, bool acc, Tensor partials) const override {
    const Extent at(dy);
    if (at.dim == 0) return;
    if (partials.present()) {
      ForModelType(dy.dtype, [&](auto type) {
        const NormChunks left = PartialChunks<typename decltype(type)::type>(at.rows, at.dim);
        AddNormChunks(s, dweight, dbias, Data<float>(partials), left.count, mean.present() ? 2 : 1,
                      acc);
      });
      return;
    }
    const NormChunks chunks = ChunksForSums(at.rows, at.dim, SumWidth(dy, h));
    const int kinds = dbias.present() ? 2 : 1;
    auto* sums = reinterpret_cast<float*>(
        Workspace(s, chunks.count * kinds * at.dim * sizeof(float), "NormBackwardWeight"));
    if (sums == nullptr && chunks.count > 0) return;
    NormChunkSums(s, sums, chunks, kinds, dy, h, mean, rstd);
    AddNormChunks(s, dweight, dbias, sums, chunks.count, kinds, acc);
  }
};

}  // namespace

const NormKernels* Norm() {
  static const CudaNorm kernels;
  return &kernels;
}

}  // namespace stretto::cuda
