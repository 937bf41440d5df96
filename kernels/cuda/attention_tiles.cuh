// Tiles of attention's own kernels: their rows in shared memory, their products in registers.
//
// A block has 16 x 16 threads and works on one tile of rows ("own": queries or keys) of one head
// against all tiles of the other side. In a tile of scores, thread (ty, tx) owns the rows
// ty * R .. ty * R + R - 1 and the columns tx, tx + 16, ...: a row belongs to 16 lanes of one warp,
// so that scores go through shared memory without a barrier of the block.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_TILES_CUH_
#define STRETTO_KERNELS_CUDA_ATTENTION_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/support.cuh"

namespace stretto::cuda::attention {

inline constexpr int kSide = 16;  // threads of a block are kSide x kSide
inline constexpr int kThreads = kSide * kSide;
inline constexpr int kMaxHeadDim = 256;

// Rows of heads in device memory.
template <class T>
struct Heads {
  T* data;
  int64_t stride;  // elements between rows
  bool packs;      // every head of every row may be read 16 bytes at a time

  __device__ T* Head(int64_t row, int head, int dim) const {
    return data + row * stride + int64_t{head} * dim;
  }
};

template <class T>
Heads<T> HeadsOf(const Tensor& t) {
  return {Data<T>(t), t.row_stride, RowsAligned(t) && t.dims[2] % Pack<T>::kSize == 0};
}

struct Shape {
  const int32_t* cu_q;
  const int32_t* cu_k;
  const int32_t* len_q;  // null: up to the next sequence
  const int32_t* len_k;
  int sequences;
  int heads, kv_heads, dim;
  int64_t q_rows, k_rows;
  bool causal;
  float scale;
};

// A block's part: rows `first`.. of sequence [q, q + q_len) x [k, k + k_len).
struct Part {
  int64_t q, k;
  int q_len, k_len, first;
};

// Finds the block's sequence and tile of kTile rows (queries, or keys) from the boundaries cu_q or
// cu_k, which only the device knows. Sequence i gets cu[i + 1] / kTile - cu[i] / kTile + 1 blocks,
// which is always enough, and so its first block is cu[i] / kTile + i. False: nothing to do.
template <int kTile>
__device__ bool FindPart(const Shape& shape, bool keys, int block, Part& part) {
  const int32_t* const own = keys ? shape.cu_k : shape.cu_q;
  int low = 0, high = shape.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (own[middle] / kTile + middle <= block ? low : high) = middle;
  }
  part.first = (block - own[low] / kTile - low) * kTile;
  part.q = shape.cu_q[low];
  part.k = shape.cu_k[low];
  part.q_len = static_cast<int>(min(int64_t{shape.cu_q[low + 1]}, shape.q_rows) - part.q);
  part.k_len = static_cast<int>(min(int64_t{shape.cu_k[low + 1]}, shape.k_rows) - part.k);
  if (shape.len_q != nullptr) part.q_len = min(part.q_len, shape.len_q[low]);
  if (shape.len_k != nullptr) part.k_len = min(part.k_len, shape.len_k[low]);
  return part.first >= 0 && part.q >= 0 && part.k >= 0 &&
         part.first < (keys ? part.k_len : part.q_len);
}

// A tile of kTile rows of kDim numbers (a head's, filled up with zeros). The padding spreads the
// rows that 16 lanes read at once over the banks.
template <int kTile, int kDim>
struct Tile {
  static constexpr int kStride = kDim + 4;
  static constexpr int kFloats = kTile * kStride;
  float* data;

  // Rows [row, row + count) of `from`.
  template <class T>
  __device__ void Load(const Heads<const T>& from, int64_t row, int count, int head,
                       int dim) const {
    const int thread = threadIdx.y * kSide + threadIdx.x;
    if (from.packs) {
      constexpr int kPack = Pack<T>::kSize;
      for (int i = thread; i < kTile * kDim / kPack; i += kThreads) {
        const int r = i / (kDim / kPack), c = i % (kDim / kPack) * kPack;
        Pack<T> pack = {};
        if (r < count && c < dim) {
          pack = *reinterpret_cast<const Pack<T>*>(from.Head(row + r, head, dim) + c);
        }
#pragma unroll
        for (int j = 0; j < kPack; j += 4) {
          *reinterpret_cast<float4*>(data + r * kStride + c + j) =
              make_float4(Widen(pack.value[j]), Widen(pack.value[j + 1]), Widen(pack.value[j + 2]),
                          Widen(pack.value[j + 3]));
        }
      }
    } else {
      for (int i = thread; i < kTile * kDim; i += kThreads) {
        const int r = i / kDim, c = i % kDim;
        data[r * kStride + c] =
            r < count && c < dim ? Widen(from.Head(row + r, head, dim)[c]) : 0.0f;
      }
    }
  }
};

// Scores of a block, [kTile][kTile], and what is derived from them.
template <int kTile>
struct Scores {
  static constexpr int kStride = kTile + 4;
  static constexpr int kFloats = kTile * kStride;
  float* data;
};

// out[i][j] = row ty * R + i of a times row tx + 16 j of b.
template <int kTile, int kDim, int kRows = kTile / kSide>
__device__ void Multiply(float (&out)[kRows][kRows], const Tile<kTile, kDim>& a,
                         const Tile<kTile, kDim>& b, int dim) {
  constexpr int kStride = Tile<kTile, kDim>::kStride;
  for (auto& row : out) {
    for (float& x : row) x = 0;
  }
  const float* rows = a.data + threadIdx.y * kRows * kStride;
  const float* columns = b.data + threadIdx.x * kStride;
#pragma unroll 1
  for (int d = 0; d < dim; d += 4) {
    float4 x[kRows], y[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      x[i] = *reinterpret_cast<const float4*>(rows + i * kStride + d);
      y[i] = *reinterpret_cast<const float4*>(columns + i * kSide * kStride + d);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        out[i][j] = fmaf(x[i].x, y[j].x, out[i][j]);
        out[i][j] = fmaf(x[i].y, y[j].y, out[i][j]);
        out[i][j] = fmaf(x[i].z, y[j].z, out[i][j]);
        out[i][j] = fmaf(x[i].w, y[j].w, out[i][j]);
      }
    }
  }
}

// Writes the thread's scores where the 16 lanes of a row find them.
template <int kTile, int kRows = kTile / kSide>
__device__ void Share(const Scores<kTile>& to, const float (&scores)[kRows][kRows]) {
  __syncwarp();  // the lanes have read what was there
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      to.data[(threadIdx.y * kRows + i) * Scores<kTile>::kStride + threadIdx.x + kSide * j] =
          scores[i][j];
    }
  }
  __syncwarp();
}

// Rows of a result in registers: out[i][4 c + e] is row ty * R + i, column 64 c + 4 tx + e.
template <int kTile, int kDim>
using Result = float[kTile / kSide][kDim / kSide];

// out += scores x b, over the first `count` rows of b (and zeros behind them).
template <int kTile, int kDim>
__device__ void Accumulate(Result<kTile, kDim>& out, const Scores<kTile>& scores,
                           const Tile<kTile, kDim>& b, int count) {
  constexpr int kRows = kTile / kSide;
#pragma unroll 1
  for (int n = 0; n < count; n += 4) {
    float p[kRows][4];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      *reinterpret_cast<float4*>(p[i]) = *reinterpret_cast<const float4*>(
          scores.data + (threadIdx.y * kRows + i) * Scores<kTile>::kStride + n);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* row = b.data + (n + e) * Tile<kTile, kDim>::kStride + 4 * threadIdx.x;
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c) {
        const float4 y = *reinterpret_cast<const float4*>(row + 64 * c);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          out[i][4 * c + 0] = fmaf(p[i][e], y.x, out[i][4 * c + 0]);
          out[i][4 * c + 1] = fmaf(p[i][e], y.y, out[i][4 * c + 1]);
          out[i][4 * c + 2] = fmaf(p[i][e], y.z, out[i][4 * c + 2]);
          out[i][4 * c + 3] = fmaf(p[i][e], y.w, out[i][4 * c + 3]);
        }
      }
    }
  }
}

// Writes the first `count` rows of a result to rows `row`.. of `to`.
template <int kTile, int kDim, class T>
__device__ void Store(const Heads<T>& to, const Result<kTile, kDim>& result, int64_t row, int count,
                      int head, int dim) {
  constexpr int kRows = kTile / kSide;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int r = threadIdx.y * kRows + i;
    if (r >= count) continue;
    T* out = to.Head(row + r, head, dim);
#pragma unroll
    for (int c = 0; c < kDim / kSide; ++c) {
      const int column = 64 * (c / 4) + 4 * threadIdx.x + c % 4;
      if (column < dim) out[column] = Narrow<T>(result[i][c]);
    }
  }
}

template <int kRows, int kColumns>
__device__ void Clear(float (&x)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) x[i][j] = 0;
  }
}

// Over the 16 lanes that share a row.
template <class F>
__device__ float RowReduce(float x, const F& f) {
  for (int offset = kSide / 2; offset > 0; offset /= 2) {
    x = f(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

}  // namespace stretto::cuda::attention

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_TILES_CUH_
