// Attention with an online softmax over key tiles (Dao et al., FlashAttention, 2022), for any
// head_dim up to 256 and any strides. Products run in f32 outside the tensor cores: this is the
// path of f32 models and of what cuDNN does not take. No number is ever added to by two blocks:
// results are the same on every run.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_tiles.cuh"
#include "kernels/cuda/families.h"
#include "kernels/cuda/named_rows.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace attention {
namespace {

// Statistics of queries: [tokens, heads].
struct PerQuery {
  float* data;
  int64_t stride;
  __device__ float& At(int64_t row, int head) const { return data[row * stride + head]; }
};

template <int kTile, int kDim>
constexpr int64_t ForwardBytes() {
  return (2 * Tile<kTile, kDim>::kFloats + Scores<kTile>::kFloats) * int64_t{sizeof(float)};
}

template <class T, int kTile, int kDim>
__global__ __launch_bounds__(kThreads, 2) void Forward(Shape shape, Heads<T> o, PerQuery lse,
                                                       Heads<const T> q, Heads<const T> k,
                                                       Heads<const T> v) {
  constexpr int kRows = kTile / kSide;
  extern __shared__ float4 shared[];
  Tile<kTile, kDim> own{reinterpret_cast<float*>(shared)};
  Tile<kTile, kDim> other{own.data + own.kFloats};  // keys, then values
  Scores<kTile> p{other.data + other.kFloats};

  Part part;
  // The last tiles of a causal sequence have the most keys: they go first.
  if (!FindPart<kTile>(shape, /*keys=*/false, gridDim.x - 1 - blockIdx.x, part)) return;
  const int head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads);
  const int rows = min(kTile, part.q_len - part.first);
  const int keys = shape.causal ? min(part.k_len, part.first + rows) : part.k_len;

  own.Load(q, part.q + part.first, rows, head, shape.dim);
  Result<kTile, kDim> out;
  Clear(out);
  float largest[kRows], sum[kRows];
  for (int i = 0; i < kRows; ++i) {
    largest[i] = -INFINITY;
    sum[i] = 0;
  }
  for (int k0 = 0; k0 < keys; k0 += kTile) {
    const int count = min(kTile, keys - k0);
    __syncthreads();  // the tile before has been used
    other.Load(k, part.k + k0, count, kv_head, shape.dim);
    __syncthreads();
    float score[kRows][kRows];
    Multiply(score, own, other, shape.dim);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int query = part.first + threadIdx.y * kRows + i;
      const int visible = shape.causal ? min(count, query + 1 - k0) : count;
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        score[i][j] = static_cast<int>(threadIdx.x) + kSide * j < visible
                          ? score[i][j] * shape.scale
                          : -INFINITY;
        most = fmaxf(most, score[i][j]);
      }
      most = fmaxf(largest[i], RowReduce(most, [](float a, float b) { return fmaxf(a, b); }));
      // -inf while only keys with a score of -inf were seen: they add nothing.
      const float shift = most == -INFINITY ? 0.0f : most;
      const float rescale = expf(largest[i] - shift);
      float tile_sum = 0;
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        score[i][j] = expf(score[i][j] - shift);
        tile_sum += score[i][j];
      }
      sum[i] = sum[i] * rescale + RowReduce(tile_sum, [](float a, float b) { return a + b; });
      largest[i] = most;
#pragma unroll
      for (float& x : out[i]) x *= rescale;
    }
    Share<kTile>(p, score);
    __syncthreads();  // the keys have been used
    other.Load(v, part.k + k0, count, kv_head, shape.dim);
    __syncthreads();
    Accumulate<kTile, kDim>(out, p, other, count);
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float inverse = sum[i] == 0 ? 0.0f : 1.0f / sum[i];
#pragma unroll
    for (float& x : out[i]) x *= inverse;
    const int r = threadIdx.y * kRows + i;
    if (threadIdx.x == 0 && r < rows) {
      lse.At(part.q + part.first + r, head) = sum[i] == 0 ? -INFINITY : largest[i] + logf(sum[i]);
    }
  }
  Store<kTile, kDim>(o, out, part.q + part.first, rows, head, shape.dim);
}

// delta = d_o . o for each token and head: one warp each.
template <class T>
__global__ void Delta(PerQuery delta, Heads<const T> d_o, Heads<const T> o, int64_t rows, int heads,
                      int dim) {
  const int64_t item = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (item >= rows * heads) return;
  const int64_t row = item / heads;
  const int head = static_cast<int>(item % heads), lane = threadIdx.x % 32;
  const T* x = d_o.Head(row, head, dim);
  const T* y = o.Head(row, head, dim);
  float sum = 0;
  for (int d = lane; d < dim; d += 32) sum = fmaf(Widen(x[d]), Widen(y[d]), sum);
  sum = WarpSum(sum);
  if (lane == 0) delta.At(row, head) = sum;
}

template <class T>
struct BackwardOperands {
  Heads<T> dq, dk, dv;
  Heads<const T> d_o, q, k, v;
  PerQuery lse, delta;
};

template <int kTile, int kDim>
constexpr int64_t BackwardBytes() {
  return (4 * Tile<kTile, kDim>::kFloats + Scores<kTile>::kFloats + 2 * kTile) *
         int64_t{sizeof(float)};
}

// Shared memory of a block of the backward pass.
template <int kTile, int kDim>
struct BackwardTiles {
  Tile<kTile, kDim> q, d_o, k, v;
  Scores<kTile> scores;
  float* lse;
  float* delta;

  __device__ explicit BackwardTiles(float* shared)
      : q{shared},
        d_o{q.data + q.kFloats},
        k{d_o.data + q.kFloats},
        v{k.data + q.kFloats},
        scores{v.data + q.kFloats},
        lse(scores.data + scores.kFloats),
        delta(lse + kTile) {}

  template <class T>
  __device__ void LoadQueries(const BackwardOperands<T>& x, int64_t row, int count, int head,
                              int dim) const {
    q.Load(x.q, row, count, head, dim);
    d_o.Load(x.d_o, row, count, head, dim);
    for (int i = threadIdx.y * kSide + threadIdx.x; i < kTile; i += kThreads) {
      lse[i] = i < count ? x.lse.At(row + i, head) : -INFINITY;
      delta[i] = i < count ? x.delta.At(row + i, head) : 0.0f;
    }
  }
  template <class T>
  __device__ void LoadKeys(const BackwardOperands<T>& x, int64_t row, int count, int head,
                           int dim) const {
    k.Load(x.k, row, count, head, dim);
    v.Load(x.v, row, count, head, dim);
  }
};

// The probability of a key for a query, from the stored log-sum-exp; a query with -inf saw nothing.
__device__ float Probability(float score, float scale, float lse, bool visible) {
  return visible && lse != -INFINITY ? expf(score * scale - lse) : 0.0f;
}

// dk and dv of one tile of keys and one key-value head, over the query heads that share it. Rows
// are keys, columns queries.
template <class T, int kTile, int kDim>
__global__ __launch_bounds__(kThreads,
                             kDim <= 64 ? 2 : 1) void BackwardKeys(Shape shape,
                                                                   BackwardOperands<T> x) {
  constexpr int kRows = kTile / kSide;
  extern __shared__ float4 shared[];
  const BackwardTiles<kTile, kDim> tiles(reinterpret_cast<float*>(shared));
  Part part;
  if (!FindPart<kTile>(shape, /*keys=*/true, blockIdx.x, part)) return;
  const int kv_head = blockIdx.y, group = shape.heads / shape.kv_heads;
  const int rows = min(kTile, part.k_len - part.first);
  tiles.LoadKeys(x, part.k + part.first, rows, kv_head, shape.dim);
  Result<kTile, kDim> dk, dv;
  Clear(dk);
  Clear(dv);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int q0 = shape.causal ? part.first : 0; q0 < part.q_len; q0 += kTile) {
      const int count = min(kTile, part.q_len - q0);
      __syncthreads();  // the tile before has been used
      tiles.LoadQueries(x, part.q + q0, count, head, shape.dim);
      __syncthreads();
      float p[kRows][kRows], ds[kRows][kRows];
      Multiply(p, tiles.k, tiles.q, shape.dim);
      Multiply(ds, tiles.v, tiles.d_o, shape.dim);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int r = threadIdx.y * kRows + i;
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int c = threadIdx.x + kSide * j;
          const bool visible = r < rows && c < count && (!shape.causal || part.first + r <= q0 + c);
          p[i][j] = Probability(p[i][j], shape.scale, tiles.lse[c], visible);
          ds[i][j] = p[i][j] == 0 ? 0.0f : p[i][j] * (ds[i][j] - tiles.delta[c]) * shape.scale;
        }
      }
      Share<kTile>(tiles.scores, p);
      Accumulate<kTile, kDim>(dv, tiles.scores, tiles.d_o, count);
      Share<kTile>(tiles.scores, ds);
      Accumulate<kTile, kDim>(dk, tiles.scores, tiles.q, count);
    }
  }
  Store<kTile, kDim>(x.dk, dk, part.k + part.first, rows, kv_head, shape.dim);
  Store<kTile, kDim>(x.dv, dv, part.k + part.first, rows, kv_head, shape.dim);
}

// dq of one tile of queries and one head. Rows are queries, columns keys.
template <class T, int kTile, int kDim>
__global__ __launch_bounds__(kThreads,
                             kDim <= 64 ? 2 : 1) void BackwardQueries(Shape shape,
                                                                      BackwardOperands<T> x) {
  constexpr int kRows = kTile / kSide;
  extern __shared__ float4 shared[];
  const BackwardTiles<kTile, kDim> tiles(reinterpret_cast<float*>(shared));
  Part part;
  if (!FindPart<kTile>(shape, /*keys=*/false, gridDim.x - 1 - blockIdx.x, part)) return;
  const int head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads);
  const int rows = min(kTile, part.q_len - part.first);
  const int keys = shape.causal ? min(part.k_len, part.first + rows) : part.k_len;
  tiles.LoadQueries(x, part.q + part.first, rows, head, shape.dim);
  Result<kTile, kDim> dq;
  Clear(dq);
  for (int k0 = 0; k0 < keys; k0 += kTile) {
    const int count = min(kTile, keys - k0);
    __syncthreads();
    tiles.LoadKeys(x, part.k + k0, count, kv_head, shape.dim);
    __syncthreads();
    float p[kRows][kRows], ds[kRows][kRows];
    Multiply(p, tiles.q, tiles.k, shape.dim);
    Multiply(ds, tiles.d_o, tiles.v, shape.dim);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int r = threadIdx.y * kRows + i;
      const float delta = tiles.delta[r];
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        const int c = threadIdx.x + kSide * j;
        const bool visible = c < count && (!shape.causal || k0 + c <= part.first + r);
        const float prob = Probability(p[i][j], shape.scale, tiles.lse[r], visible);
        ds[i][j] = prob == 0 ? 0.0f : prob * (ds[i][j] - delta) * shape.scale;
      }
    }
    Share<kTile>(tiles.scores, ds);
    Accumulate<kTile, kDim>(dq, tiles.scores, tiles.k, count);
  }
  Store<kTile, kDim>(x.dq, dq, part.q + part.first, rows, head, shape.dim);
}

// One thread for one entry of all arrays of a group.
struct Boundaries {
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int32_t* len_q;  // null: up to the next sequence
  const int32_t* len_k;
};
__global__ void RaggedIndexKernel(RaggedIndex index, int64_t pitch, Boundaries at,
                                  int64_t sequences) {
  const int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (item >= index.groups * pitch) return;
  const int64_t g = item / pitch, i = item % pitch;
  const int64_t sequence = min(g * index.group + i, sequences);
  const auto length = [&](const int32_t* cu, const int32_t* len) {
    if (sequence >= sequences) return 0;
    return len != nullptr ? len[sequence] : cu[sequence + 1] - cu[sequence];
  };
  int32_t* to = index.data + g * RaggedIndex::kArrays * pitch + i;
  to[0] = length(at.cu_q, at.len_q);
  to[pitch] = length(at.cu_k, at.len_k);
  for (int o = 0; o < RaggedIndex::kOperands; ++o) {
    const int64_t begin = ((RaggedIndex::kOfKeys >> o & 1) != 0 ? at.cu_k : at.cu_q)[sequence];
    to[(2 + o) * pitch] = static_cast<int32_t>(begin * index.strides[o]);
  }
}

// One block for each sequence: what comes out for queries that have no keys, and for keys that
// nobody asks. Absent operands have no address.
template <class T>
__global__ void ClearLonelyKernel(Shape shape, Heads<T> o, PerQuery lse, Heads<T> dq, Heads<T> dk,
                                  Heads<T> dv) {
  const int i = blockIdx.x;
  const auto length = [&](const int32_t* cu, const int32_t* len) {
    return len != nullptr ? len[i] : cu[i + 1] - cu[i];
  };
  const int queries = length(shape.cu_q, shape.len_q), keys = length(shape.cu_k, shape.len_k);
  const auto clear = [&](const Heads<T>& t, int64_t row, int rows, int heads) {
    if (t.data == nullptr) return;
    const int64_t width = int64_t{heads} * shape.dim;
    for (int64_t j = threadIdx.x; j < rows * width; j += blockDim.x) {
      t.data[(row + j / width) * t.stride + j % width] = Narrow<T>(0.0f);
    }
  };
  if (keys == 0) {
    clear(o, shape.cu_q[i], queries, shape.heads);
    clear(dq, shape.cu_q[i], queries, shape.heads);
    for (int j = threadIdx.x; lse.data != nullptr && j < queries * shape.heads; j += blockDim.x) {
      lse.At(shape.cu_q[i] + j / shape.heads, j % shape.heads) = -INFINITY;
    }
  }
  if (queries == 0) {
    clear(dk, shape.cu_k[i], keys, shape.kv_heads);
    clear(dv, shape.cu_k[i], keys, shape.kv_heads);
  }
}

// One block for each row. With o in T, or in f32.
template <class O, class T>
__global__ void MergeKernel(Heads<O> o, PerQuery lse, Heads<const T> part, PerQuery part_lse,
                            NamedRows rows, int heads, int dim) {
  extern __shared__ float weights[];  // of o and of part, for each head
  const int64_t row = blockIdx.x;
  if (!rows.Has(row)) return;
  for (int head = threadIdx.x; head < heads; head += blockDim.x) {
    const float have = lse.At(row, head), more = part_lse.At(row, head);
    float keep = 1, take = 0;
    if (more != -INFINITY) {
      const float largest = fmaxf(have, more);
      const float mine = expf(have - largest), other = expf(more - largest);
      keep = mine / (mine + other);
      take = other / (mine + other);
      lse.At(row, head) = largest + logf(mine + other);
    }
    weights[2 * head] = keep;
    weights[2 * head + 1] = take;
  }
  __syncthreads();
  O* const to = o.Head(row, 0, dim);
  const T* const from = part.Head(row, 0, dim);
  if (o.packs && part.packs) {
    constexpr int kWidth = Pack<T>::kSize;
    for (int i = threadIdx.x * kWidth; i < heads * dim; i += blockDim.x * kWidth) {
      const float keep = weights[2 * (i / dim)], take = weights[2 * (i / dim) + 1];
      if (take == 0) continue;
      float x[kWidth], y[kWidth];
      LoadVec(x, to + i, kWidth);
      LoadVec(y, from + i, kWidth);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] = x[j] * keep + y[j] * take;
      StoreVec(to + i, x, kWidth);
    }
  } else {
    for (int i = threadIdx.x; i < heads * dim; i += blockDim.x) {
      const float keep = weights[2 * (i / dim)], take = weights[2 * (i / dim) + 1];
      if (take == 0) continue;
      to[i] = Narrow<O>(Widen(to[i]) * keep + Widen(from[i]) * take);
    }
  }
}

// One block for 32 tokens: rows of lse are read, and columns written, a warp at a time.
__global__ void HeadMajorLseKernel(float* to, PerQuery lse, int64_t length, int first, int heads) {
  __shared__ float tile[32][33];
  const int64_t sequence = blockIdx.y, t0 = int64_t{blockIdx.x} * 32;
  for (int h0 = 0; h0 < heads; h0 += 32) {
    for (int t = threadIdx.y; t < 32; t += blockDim.y) {
      if (t0 + t < length && h0 + threadIdx.x < heads) {
        tile[t][threadIdx.x] = lse.At(sequence * length + t0 + t, first + h0 + threadIdx.x);
      }
    }
    __syncthreads();
    for (int h = threadIdx.y; h < 32; h += blockDim.y) {
      if (h0 + h < heads && t0 + threadIdx.x < length) {
        to[(sequence * heads + h0 + h) * length + t0 + threadIdx.x] = tile[threadIdx.x][h];
      }
    }
    __syncthreads();
  }
}

Shape MakeShape(const Tensor& q, const Tensor& k, const AttentionShape& a) {
  return {Data<int32_t>(a.cu_q),
          Data<int32_t>(a.cu_k),
          Data<int32_t>(a.len_q),
          Data<int32_t>(a.len_k),
          static_cast<int>(a.cu_q.rows() - 1),
          static_cast<int>(q.dims[1]),
          static_cast<int>(k.dims[1]),
          static_cast<int>(q.dims[2]),
          q.rows(),
          k.rows(),
          a.causal,
          static_cast<float>(a.scale)};
}

PerQuery Statistics(const Tensor& t) { return {Data<float>(t), t.row_stride}; }

// Calls f with the tile and width that a head_dim needs, as integral constants. Heads wider than
// 128 have the backward pass's four tiles in shared memory with 32 rows only.
template <class F>
void ForWidth(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>{}, std::integral_constant<int, 64>{});
  if (dim <= 128) return f(std::integral_constant<int, 64>{}, std::integral_constant<int, 128>{});
  f(std::integral_constant<int, 32>{}, std::integral_constant<int, 256>{});
}

// One block for each tile of `rows` packed rows and each of `heads` heads.
template <class... Parameters, class... Arguments>
void Launch(Stream& s, const char* name, void (*kernel)(Parameters...), int64_t tile, int64_t rows,
            const Shape& shape, int heads, int64_t bytes, const Arguments&... arguments) {
  const int64_t tiles = rows / tile + shape.sequences;
  if (rows == 0 || shape.sequences == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  kernel<<<dim3(static_cast<unsigned>(tiles), heads), dim3(kSide, kSide), bytes, Native(s)>>>(
      shape, arguments...);
  Launched(s, name);
}

bool TooWide(Stream& s, const Tensor& q) {
  if (q.dims[2] <= kMaxHeadDim) return false;
  s.Fail(absl::UnimplementedError(absl::StrCat("attention on ", Name(s.device()), " has head_dim ",
                                               q.dims[2], ", but at most ", kMaxHeadDim,
                                               " is supported")));
  return true;
}

template <class O, class T>
void LaunchMerge(Stream& s, const Tensor& o, const Tensor& lse, const Tensor& part,
                 const Tensor& part_lse, const Tensor& cu, const Tensor& len) {
  if (part.elements() == 0) return;
  const auto heads = static_cast<int>(part.dims[1]);
  MergeKernel<O, T>
      <<<static_cast<unsigned>(part.rows()), 128, 2 * heads * sizeof(float), Native(s)>>>(
          HeadsOf<O>(o), Statistics(lse), HeadsOf<const T>(part), Statistics(part_lse),
          NamedRows(cu, len), heads, static_cast<int>(part.dims[2]));
  Launched(s, "AttentionMerge");
}

class CudaAttention final : public AttentionKernels {
 public:
  void Forward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
               const AttentionShape& a) const override {
    if (TooWide(s, q)) return;
    CheckSequences(s, a, q.rows(), k.rows());
    ForModelType(q.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      ForWidth(q.dims[2], [&](auto tile, auto width) {
        const Shape shape = MakeShape(q, k, a);
        Launch(s, "Attention", &attention::Forward<T, tile, width>, tile, q.rows(), shape,
               shape.heads, ForwardBytes<tile, width>(), HeadsOf<T>(o), Statistics(lse),
               HeadsOf<const T>(q), HeadsOf<const T>(k), HeadsOf<const T>(v));
      });
    });
  }

  void Backward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o, Tensor o,
                Tensor lse, Tensor q, Tensor k, Tensor v, const AttentionShape& a) const override {
    if (TooWide(s, q)) return;
    if (HopperAttentionBackward(s, dq, dk, dv, d_o, o, lse, q, k, v, a, /*library_refused=*/true)) {
      return;
    }
    ForModelType(q.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const Shape shape = MakeShape(q, k, a);
      const int64_t items = q.rows() * shape.heads;
      if (items > 0) {
        constexpr int kItems = kThreads / 32;
        Delta<T><<<static_cast<unsigned>((items + kItems - 1) / kItems), kThreads, 0, Native(s)>>>(
            Statistics(delta), HeadsOf<const T>(d_o), HeadsOf<const T>(o), q.rows(), shape.heads,
            shape.dim);
        Launched(s, "AttentionBackward (delta)");
      }
      const BackwardOperands<T> x = {
          HeadsOf<T>(dq),        HeadsOf<T>(dk),      HeadsOf<T>(dv),
          HeadsOf<const T>(d_o), HeadsOf<const T>(q), HeadsOf<const T>(k),
          HeadsOf<const T>(v),   Statistics(lse),     Statistics(delta)};
      ForWidth(q.dims[2], [&](auto tile, auto width) {
        constexpr int64_t bytes = BackwardBytes<tile, width>();
        Launch(s, "AttentionBackward (keys)", &BackwardKeys<T, tile, width>, tile, k.rows(), shape,
               shape.kv_heads, bytes, x);
        Launch(s, "AttentionBackward (queries)", &BackwardQueries<T, tile, width>, tile, q.rows(),
               shape, shape.heads, bytes, x);
      });
    });
  }

  void Merge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
             Tensor len) const override {
    ForModelType(part.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      if (o.dtype == part.dtype) {
        LaunchMerge<T, T>(s, o, lse, part, part_lse, cu, len);
      } else {
        LaunchMerge<float, T>(s, o, lse, part, part_lse, cu, len);
      }
    });
  }
};

}  // namespace
}  // namespace attention

namespace {

__global__ void CheckSequencesKernel(const int32_t* cu_q, const int32_t* cu_k, const int32_t* len_q,
                                     const int32_t* len_k, int sequences, bool causal,
                                     int64_t q_rows, int64_t k_rows, DeviceFault* fault) {
  if (threadIdx.x == 0 && (cu_q[0] < 0 || cu_k[0] < 0)) {
    Report(fault, DeviceFault::kSequenceStart, 0, 0, 0);
  }
  for (int i = threadIdx.x; i < sequences; i += blockDim.x) {
    const int64_t q_room = int64_t{cu_q[i + 1]} - cu_q[i], k_room = int64_t{cu_k[i + 1]} - cu_k[i];
    const int64_t queries = len_q != nullptr ? len_q[i] : q_room;
    const int64_t keys = len_k != nullptr ? len_k[i] : k_room;
    if (q_room < 0 || k_room < 0) {
      Report(fault, DeviceFault::kSequenceOrder, 0, i, 0);
    } else if (queries < 0 || queries > q_room || keys < 0 || keys > k_room) {
      Report(fault, DeviceFault::kSequenceRoom, queries, i, keys);
    } else if (causal && queries != keys) {
      Report(fault, DeviceFault::kSequenceLengths, queries, i, keys);
    }
  }
  // Behind the others: an end that is too far may only follow from them.
  __syncthreads();
  if (threadIdx.x == 0 && (cu_q[sequences] > q_rows || cu_k[sequences] > k_rows)) {
    Report(fault, DeviceFault::kSequenceEnd, cu_q[sequences], 0, cu_k[sequences]);
  }
}

}  // namespace

void CheckSequences(Stream& s, const AttentionShape& shape, int64_t q_rows, int64_t k_rows) {
  const int sequences = static_cast<int>(shape.cu_q.rows()) - 1;
  if (sequences < 0) return;
  CheckSequencesKernel<<<1, 256, 0, Native(s)>>>(
      Data<const int32_t>(shape.cu_q), Data<const int32_t>(shape.cu_k),
      Data<const int32_t>(shape.len_q), Data<const int32_t>(shape.len_k), sequences, shape.causal,
      q_rows, k_rows, s.fault());
  Launched(s, "CheckSequences");
}

void FillRaggedIndex(Stream& s, const RaggedIndex& index, const AttentionShape& shape) {
  const int64_t items = index.groups * index.pitch();
  const attention::Boundaries at = {
      Data<const int32_t>(shape.cu_q), Data<const int32_t>(shape.cu_k),
      Data<const int32_t>(shape.len_q), Data<const int32_t>(shape.len_k)};
  attention::RaggedIndexKernel<<<static_cast<unsigned>((items + 255) / 256), 256, 0, Native(s)>>>(
      index, index.pitch(), at, shape.cu_q.rows() - 1);
  Launched(s, "AttentionIndex");
}

void ClearLonely(Stream& s, Tensor q, Tensor k, Tensor o, Tensor lse, Tensor dq, Tensor dk,
                 Tensor dv, const AttentionShape& a) {
  const attention::Shape shape = attention::MakeShape(q, k, a);
  if (shape.sequences == 0) return;
  ForModelType(q.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto heads = [](const Tensor& t) {
      return attention::Heads<T>{Data<T>(t), t.row_stride, false};
    };
    attention::ClearLonelyKernel<T><<<static_cast<unsigned>(shape.sequences), 256, 0, Native(s)>>>(
        shape, heads(o), attention::Statistics(lse), heads(dq), heads(dk), heads(dv));
    Launched(s, "Attention (no keys)");
  });
}

void HeadMajorLse(Stream& s, float* to, Tensor lse, int64_t batch, int64_t length, int64_t first,
                  int64_t heads) {
  const dim3 grid(static_cast<unsigned>((length + 31) / 32), static_cast<unsigned>(batch));
  attention::HeadMajorLseKernel<<<grid, dim3(32, 8), 0, Native(s)>>>(
      to, attention::Statistics(lse), length, static_cast<int>(first), static_cast<int>(heads));
  Launched(s, "AttentionLse");
}

const AttentionKernels* PlainAttention() {
  static const attention::CudaAttention kernels;
  return &kernels;
}

}  // namespace stretto::cuda
