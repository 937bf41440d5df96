// What the kernels of attention's backward pass on Hopper's tensor cores share: which rows a tile
// has, which of them a thread block takes, and how gradients are stored.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_CUH_
#define STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_CUH_

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda::hopper {

inline constexpr int kBlock = 64;                               // rows of a warpgroup
inline constexpr int kConsumers = 2;                            // warpgroups that multiply
inline constexpr int kTile = kConsumers * kBlock;               // rows of a tile
inline constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // and one that copies
inline constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
inline constexpr float kLog2E = 1.44269504088896341f;

// Where the queries' or the keys' rows of each sequence lie: rows [cu[i], cu[i] + len[i]), without
// `len` up to cu[i + 1].
struct SequenceRows {
  const int32_t* cu;   // [sequences + 1]
  const int32_t* len;  // [sequences] or null
  int64_t all;         // of the operand

  __device__ int Begin(int sequence) const { return cu[sequence]; }
  __device__ int Count(int sequence) const {
    const int64_t begin = cu[sequence], end = min(int64_t{cu[sequence + 1]}, all);
    const int64_t count = len != nullptr ? min(int64_t{len[sequence]}, end - begin) : end - begin;
    return begin < 0 ? 0 : static_cast<int>(max(count, int64_t{0}));
  }
};

// What the kernels share. Statistics are f32 [heads][padded]: each sequence's queries begin at a
// multiple of kTile there and are filled up to one with rows that see nothing.
struct Shape {
  SequenceRows q, k;
  int sequences;
  int length;  // > 0: that of every sequence, in queries and keys, which fill the operands
  int heads, kv_heads;
  int64_t padded;
  float scale;           // of scores
  const float* log_sum;  // log2 of the sum of exponentials
  const float* delta;    // sum of d_o o
  int items;             // of work

  __host__ __device__ int TilesOfEach() const { return (length + kTile - 1) / kTile; }
};

// Rows of heads in device memory.
struct Output {
  __nv_bfloat16* data;
  int64_t stride;
};

// One tile of one sequence, of its queries or of its keys.
struct Tile {
  int q_row = 0, k_row = 0;        // where the sequence begins, in the operands
  int padded = 0;                  // ... and in the statistics
  int q_length = 0, k_length = 0;  // of the sequence
  int index = 0;                   // of the tile in it
};

// Where a sequence of unknown length begins, in tiles: enough for any lengths.
__host__ __device__ inline int FirstTile(int begin, int sequence) {
  return begin / kTile + sequence;
}
// The sequence that tile `tile` belongs to.
__device__ inline int FindSequence(const SequenceRows& rows, int sequences, int tile) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (FirstTile(rows.cu[middle], middle) <= tile ? low : high) = middle;
  }
  return low;
}

// Items of work, of queries or of keys, go by head and sequence first, so that blocks that run
// together read the same tiles. With sequences of one length an item is a pair of tiles, otherwise
// one, the last of each head first: they have most to do where there is a mask.
template <bool kOfKeys>
struct Work {
  int head = 0, sequence = 0, place = 0;

  __device__ Work(const Shape& shape, int item) {
    const int heads = kOfKeys ? shape.kv_heads : shape.heads;
    if (shape.length > 0) {
      const int pairs = (shape.TilesOfEach() + 1) / 2;
      place = item % pairs;
      head = item / pairs % heads;
      sequence = item / pairs / heads;
    } else {
      const int tiles = shape.items / heads;
      head = item / tiles;
      place = kOfKeys ? item % tiles : tiles - 1 - item % tiles;
      sequence = FindSequence(kOfKeys ? shape.k : shape.q, shape.sequences, place);
    }
  }
  // The item's first or second tile; false when there is none.
  __device__ bool Get(const Shape& shape, int which, Tile* tile) const {
    if (shape.length > 0) {
      const int tiles = shape.TilesOfEach();
      tile->index = which == 0 ? tiles - 1 - place : place;
      if (which == 1 && tile->index == tiles - 1 - place) return false;
      tile->q_row = tile->k_row = sequence * shape.length;
      tile->padded = sequence * tiles * kTile;
      tile->q_length = tile->k_length = shape.length;
      return true;
    }
    tile->q_row = shape.q.Begin(sequence);
    tile->k_row = shape.k.Begin(sequence);
    tile->q_length = shape.q.Count(sequence);
    tile->k_length = shape.k.Count(sequence);
    tile->padded = FirstTile(tile->q_row, sequence) * kTile;
    tile->index = place - FirstTile(kOfKeys ? tile->k_row : tile->q_row, sequence);
    return which == 0 && tile->index >= 0 &&
           tile->index * kTile < (kOfKeys ? tile->k_length : tile->q_length);
  }
};

struct Maps {
  CUtensorMap q, k, v, d_o;
};

// Stores a warpgroup's gradients of 64 rows: `row` is the first of them in the operands, of which
// `rows` exist. Four lanes have a row in pairs of numbers; they exchange them for 16 bytes each.
template <int kParts>
__device__ void StoreRows(const Output& to, const float (&d)[kParts][32], float factor, int row,
                          int rows, int head) {
  const int lane = threadIdx.x % 32, quarter = lane % 4;
  const int first = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + 8 * half;
    __nv_bfloat16* const at = to.data + int64_t{row + r} * to.stride + head * kParts * kBlock;
#pragma unroll
    for (int group = 0; group < 2 * kParts; ++group) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * (group % 2) + j) + 2 * half;
        v[j] = PackBf16(d[group / 2][i] * factor, d[group / 2][i + 1] * factor);
      }
      // The transpose of 4 x 4 words over four lanes.
      const auto exchange = [](uint32_t& low, uint32_t& high, int mask, bool upper) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, mask);
        (upper ? low : high) = got;
      };
      exchange(v[0], v[1], 1, (quarter & 1) != 0);
      exchange(v[2], v[3], 1, (quarter & 1) != 0);
      exchange(v[0], v[2], 2, (quarter & 2) != 0);
      exchange(v[1], v[3], 2, (quarter & 2) != 0);
      if (r < rows) {
        *reinterpret_cast<uint4*>(at + 32 * group + 8 * quarter) =
            make_uint4(v[0], v[1], v[2], v[3]);
      }
    }
  }
}

template <class M, class Kernel, class... Arguments>
void Launch(Stream& s, const char* name, Kernel kernel, int items, const Arguments&... arguments) {
  constexpr int kBytes = MemoryBytes<M>();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const int blocks = std::min(items, Multiprocessors());
  kernel<<<blocks, kThreads, kBytes, Native(s)>>>(arguments...);
  Launched(s, name);
}

// One call. Maps have boxes of 64 numbers and as many rows as the kernels want.
struct Backward {
  Shape shape;
  int q_items, k_items;
  Maps maps;
  Output dq, dk, dv;
};

// With a mask, heads of 64 numbers.
inline constexpr int kNarrowBoxRows = kTile;
void LaunchNarrow(Stream& s, const Backward& call);
// Everything else.
inline constexpr int kWideBoxRows = kBlock;
void LaunchWide(Stream& s, const Backward& call, int dim, bool causal);

}  // namespace stretto::cuda::hopper

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_CUH_
