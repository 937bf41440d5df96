#include <algorithm>

#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/norm_sums.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

// A block adds up one tile of columns of one chunk; then a second kernel adds the chunks.
constexpr int kSumThreads = 256;
constexpr int kFinishColumns = 32;  // of a block of the second kernel
constexpr int kFinishParts = 16;    // among which its threads divide the chunks

struct Tiles {
  int lanes = 1;      // threads side by side along a row; kSumThreads / lanes rows at a time
  int64_t count = 0;  // of lanes * width columns

  Tiles(int64_t dim, int width) {
    const int64_t packs = dim / width;
    while (lanes < 32 && lanes < packs) lanes *= 2;
    count = (packs + lanes - 1) / lanes;
  }
};

// partial [chunks, kinds, dim]
template <class T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    ChunkSumsKernel(float* partial, Extent at, Tiles tiles, int64_t chunk_rows, int kinds,
                    Rows<T> dy, Rows<T> h, Rows<float> mean, Rows<float> rstd) {
  using V = Elements<T, kWidth>;
  __shared__ float shared[2 * kWidth * kSumThreads];
  const int lane = threadIdx.x % tiles.lanes, group = threadIdx.x / tiles.lanes;
  const int groups = kSumThreads / tiles.lanes;
  const int64_t chunk = blockIdx.x / tiles.count, tile = blockIdx.x % tiles.count;
  const int64_t column = (tile * tiles.lanes + lane) * kWidth;
  const int64_t end = min(at.rows, (chunk + 1) * chunk_rows);

  float sum_w[kWidth] = {}, sum_b[kWidth] = {};
  if (column < at.dim) {
#pragma unroll 4
    for (int64_t row = chunk * chunk_rows + group; row < end; row += groups) {
      const V d = Read(reinterpret_cast<const V*>(dy.At(row, column)));
      const V v = Read(reinterpret_cast<const V*>(h.At(row, column)));
      const float mu = mean.data != nullptr ? *mean.At(row, 0) : 0;
      const float r = *rstd.At(row, 0);
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
  const int columns = tiles.lanes * kWidth;
  for (int i = threadIdx.x; i < kinds * columns; i += kSumThreads) {
    const int kind = i / columns, j = i % columns;
    const int64_t to = tile * columns + j;
    if (to >= at.dim) continue;
    const float* from = shared + (kind * kWidth + j % kWidth) * kSumThreads + j / kWidth;
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += from[g * tiles.lanes];
    partial[(chunk * kinds + kind) * at.dim + to] = sum;
  }
}

// Adds the chunks: part q of a block takes chunks q, q + kFinishParts, ... in order, then the parts
// are added in order. blockIdx.y: weight, bias.
__global__ void __launch_bounds__(kFinishColumns* kFinishParts)
    AddChunksKernel(float* dweight, float* dbias, const float* __restrict__ partial, int64_t dim,
                    int64_t chunks, int kinds, bool acc) {
  __shared__ float parts[kFinishParts][kFinishColumns];
  const int64_t column = int64_t{blockIdx.x} * kFinishColumns + threadIdx.x;
  float sum = 0;
  if (column < dim) {
#pragma unroll 8
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kFinishParts) {
      sum += partial[(chunk * kinds + blockIdx.y) * dim + column];
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

}  // namespace

NormChunks ChunksForSums(int64_t rows, int64_t dim, int width) {
  const Tiles tiles(dim, width);
  // About a thousand blocks keep any device busy; a thread has at least four rows to add.
  constexpr int64_t kBlocks = 1024;
  NormChunks chunks;
  chunks.most = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, tiles.count));
  const int64_t least = int64_t{4} * (kSumThreads / tiles.lanes);
  chunks.rows = std::max(least, (rows + chunks.most - 1) / chunks.most);
  chunks.count = (rows + chunks.rows - 1) / chunks.rows;
  return chunks;
}

int SumWidth(const Tensor& dy, const Tensor& h) {
  int width = 1;
  ForModelType(dy.dtype, [&](auto type) {
    constexpr int kSize = Pack<typename decltype(type)::type>::kSize;
    if (Extent(dy).dim % kSize == 0 && RowsAligned(dy) && RowsAligned(h)) width = kSize;
  });
  return width;
}

void NormChunkSums(Stream& s, float* partial, const NormChunks& chunks, int kinds, Tensor dy,
                   Tensor h, Tensor mean, Tensor rstd) {
  const Extent at(dy);
  if (at.empty()) return;
  ForModelType(dy.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int width = SumWidth(dy, h);
    const Tiles tiles(at.dim, width);
    const auto blocks = static_cast<unsigned>(chunks.count * tiles.count);
    const auto launch = [&](auto kernel) {
      kernel<<<blocks, kSumThreads, 0, Native(s)>>>(partial, at, tiles, chunks.rows, kinds,
                                                    Rows<T>(dy), Rows<T>(h), Rows<float>(mean),
                                                    Rows<float>(rstd));
    };
    if (width > 1) {
      launch(ChunkSumsKernel<T, Pack<T>::kSize>);
    } else {
      launch(ChunkSumsKernel<T, 1>);
    }
    Launched(s, "NormBackwardWeight");
  });
}

void AddNormChunks(Stream& s, Tensor dweight, Tensor dbias, const float* partial, int64_t chunks,
                   int kinds, bool acc) {
  const int64_t dim = dweight.elements();
  if (dim == 0) return;
  const dim3 blocks(static_cast<unsigned>((dim + kFinishColumns - 1) / kFinishColumns),
                    dbias.present() ? 2 : 1);
  AddChunksKernel<<<blocks, dim3(kFinishColumns, kFinishParts), 0, Native(s)>>>(
      Data<float>(dweight), Data<float>(dbias), partial, dim, chunks, kinds, acc);
  Launched(s, "NormBackwardWeight");
}

}  // namespace stretto::cuda
