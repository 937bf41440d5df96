// What the kernels of attention_hopper.cu are made of: which rows of which sequence a thread block
// works on, the tiles in shared memory and the copies into them, and products of 64 rows.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_TILES_CUH_
#define STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda::hopper_attention {

using hopper::Barrier;
using hopper::CommitProducts;
using hopper::FenceProducts;
using hopper::kBlock;
using hopper::kBlockBytes;
using hopper::kBlockSteps;
using hopper::kWarpgroup;
using hopper::Pin;
using hopper::WaitProducts;

constexpr int kConsumers = 2;               // warpgroups that multiply
constexpr int kTile = kConsumers * kBlock;  // rows of a tile
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr float kLog2E = 1.44269504088896341f;

// What the kernels share. Statistics are f32 [heads][padded]: each sequence begins at a multiple of
// kTile there and is filled up to one with rows that see nothing.
struct Shape {
  const int32_t* cu;  // where sequences begin, [sequences + 1]
  int sequences;
  int length;  // of every sequence, 0: they differ
  int64_t tokens;
  int heads, kv_heads;
  int64_t padded;
  float scale;     // of scores
  float* log_sum;  // log2 of the sum of exponentials; rows that see nothing have infinity
  float* delta;    // sum of d_o o
  int items;       // of work

  __host__ __device__ int TilesOfEach() const { return (length + kTile - 1) / kTile; }
};

// Rows of heads in device memory.
struct Output {
  __nv_bfloat16* data;
  int64_t stride;
};

// One tile of one sequence.
struct Tile {
  int row = 0;     // where the sequence begins, in the operands
  int padded = 0;  // ... and in the statistics
  int length = 0;  // of the sequence
  int index = 0;   // of the tile in it
};

// Where a sequence of unknown length begins in tiles of the statistics: enough for any lengths.
__host__ __device__ inline int FirstTile(int begin, int sequence) {
  return begin / kTile + sequence;
}
// The sequence that tile `tile` of the statistics belongs to.
__device__ inline int FindSequence(const Shape& shape, int tile) {
  int low = 0, high = shape.sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (FirstTile(shape.cu[middle], middle) <= tile ? low : high) = middle;
  }
  return low;
}

// Items of work go by head and sequence first, so that blocks that run together read the same
// tiles. With sequences of one length an item is a pair of tiles, otherwise one.
struct Work {
  int head = 0, sequence = 0, place = 0;

  __device__ Work(const Shape& shape, int heads, int item) {
    if (shape.length > 0) {
      const int pairs = (shape.TilesOfEach() + 1) / 2;
      place = item % pairs;
      head = item / pairs % heads;
      sequence = item / pairs / heads;
    } else {
      const int tiles = shape.items / heads;
      head = item / tiles;
      place = tiles - 1 - item % tiles;
      sequence = FindSequence(shape, place);
    }
  }
  // The item's first or second tile; false when there is none.
  __device__ bool Get(const Shape& shape, int which, Tile* tile) const {
    if (shape.length > 0) {
      const int tiles = shape.TilesOfEach();
      tile->index = which == 0 ? tiles - 1 - place : place;
      if (which == 1 && tile->index == tiles - 1 - place) return false;
      tile->row = sequence * shape.length;
      tile->padded = sequence * tiles * kTile;
      tile->length = shape.length;
      return true;
    }
    const int begin = shape.cu[sequence];
    const int end = static_cast<int>(min(int64_t{shape.cu[sequence + 1]}, shape.tokens));
    tile->row = begin;
    tile->padded = FirstTile(begin, sequence) * kTile;
    tile->length = end - begin;
    tile->index = place - FirstTile(begin, sequence);
    return which == 0 && begin >= 0 && tile->index >= 0 && tile->index * kTile < tile->length;
  }
};

// Counts through a ring of `kSize` places.
template <int kSize>
struct Ring {
  int place = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++place == kSize) {
      place = 0;
      parity ^= 1;
    }
  }
};

// Shared memory of a kernel: own tiles, and a ring of 64 or 128 rows each of the other side, in
// blocks, of which kDim / 64 lie side by side. What comes first is queries or keys, second
// gradients of outputs or values; outputs themselves are the third.
template <int kDim, int kOwnOperands, int kOwnTiles, int kRingStages, int kBlocks = 1>
struct Memory {
  static constexpr int kParts = kDim / kBlock;
  static constexpr int kOwn = kOwnTiles;
  static constexpr int kStages = kRingStages;
  static constexpr int kStageBlocks = kBlocks;  // one above the other

  uint8_t own[kOwn][kOwnOperands][kConsumers][kParts][kBlockBytes];
  uint8_t other[kStages][2][kStageBlocks][kParts][kBlockBytes];
  float log_sum[kStages][kStageBlocks * kBlock];  // of queries, where they are the other side
  float delta[kStages][kStageBlocks * kBlock];
  Barrier own_full[kOwn], own_empty[kOwn];
  Barrier other_full[kStages], other_empty[kStages];

  __device__ void InitBarriers() {
    for (int i = 0; i < kOwn; ++i) {
      hopper::Init(&own_full[i], 1);
      hopper::Init(&own_empty[i], kConsumers);
    }
    for (int i = 0; i < kStages; ++i) {
      hopper::Init(&other_full[i], 1);
      hopper::Init(&other_empty[i], kConsumers);
    }
    hopper::FenceInit();
  }
};
constexpr int kAlignment = 1024;
template <class M>
constexpr int MemoryBytes() {
  return sizeof(M) + kAlignment;
}
template <class M>
__device__ M& SharedMemory() {
  extern __shared__ uint8_t bytes[];
  const uint32_t address = hopper::SharedAddress(bytes);
  return *reinterpret_cast<M*>(bytes + (kAlignment - address % kAlignment) % kAlignment);
}

struct Maps {
  CUtensorMap q, k, v, d_o, o;
};

// kBlocks blocks of rows from `row` on of a head.
template <int kBlocks, int kParts>
__device__ void LoadRows(uint8_t (&to)[kBlocks][kParts][kBlockBytes], const CUtensorMap& map,
                         Barrier* full, int row, int head) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      hopper::LoadBox(to[b][p], map, full, (head * kParts + p) * kBlock, row + b * kBlock);
    }
  }
}
template <int kOperands, int kBlocks, int kParts>
__device__ void LoadPair(uint8_t (&to)[kOperands][kBlocks][kParts][kBlockBytes],
                         const CUtensorMap& first, const CUtensorMap& second, Barrier* full,
                         int row, int head) {
  LoadRows(to[0], first, full, row, head);
  LoadRows(to[1], second, full, row, head);
}

using Operand = uint32_t[kBlockSteps][4];  // a left operand of 64 x 64

template <int kParts>
__device__ void LoadOperands(Operand (&a)[kParts], const uint8_t (&from)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      hopper::LoadOperand(a[p][k], hopper::SharedAddress(from[p]), k);
    }
  }
}

// d [64 x 64] = a b^T over the numbers of a head.
template <int kParts>
__device__ void Product(float (&d)[32], const Operand (&a)[kParts],
                        const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t right = hopper::Descriptor(hopper::SharedAddress(b[p]));
    if (p == 0) {
      hopper::Multiply<false, false>(d, a[p][0], right);
    } else {
      hopper::Multiply<true, false>(d, a[p][0], right);
    }
#pragma unroll
    for (int k = 1; k < kBlockSteps; ++k) {
      hopper::Multiply<true, false>(d, a[p][k], right + k * hopper::kStepAlong);
    }
  }
}
template <int kParts>
__device__ void Product(float (&d)[32], const uint8_t (&a)[kParts][kBlockBytes],
                        const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t left = hopper::Descriptor(hopper::SharedAddress(a[p]));
    const uint64_t right = hopper::Descriptor(hopper::SharedAddress(b[p]));
    if (p == 0) {
      hopper::Multiply<false>(d, left, right);
    } else {
      hopper::Multiply<true>(d, left, right);
    }
#pragma unroll
    for (int k = 1; k < kBlockSteps; ++k) {
      hopper::Multiply<true>(d, left + k * hopper::kStepAlong, right + k * hopper::kStepAlong);
    }
  }
}
// d [64 x 128] = a b^T, over 64 numbers of a head.
__device__ inline void Product(float (&d)[64], const uint8_t (&a)[1][kBlockBytes],
                               const uint8_t (&b)[2][1][kBlockBytes]) {
  const uint64_t left = hopper::Descriptor(hopper::SharedAddress(a[0]));
  const uint64_t right = hopper::Descriptor(hopper::SharedAddress(b[0][0]));
  hopper::Multiply<false>(d, left, right);
#pragma unroll
  for (int k = 1; k < kBlockSteps; ++k) {
    hopper::Multiply<true>(d, left + k * hopper::kStepAlong, right + k * hopper::kStepAlong);
  }
}
// d [64 x numbers of a head] += a b over the rows of b.
template <int kParts>
__device__ void Accumulate(float (&d)[kParts][32], const Operand& a,
                           const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t right = hopper::Descriptor(hopper::SharedAddress(b[p]));
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      hopper::Multiply<true, true>(d[p], a[k], right + k * hopper::kStepDown);
    }
  }
}
template <int kParts>
__device__ void Pin(float (&d)[kParts][32]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) hopper::Pin(d[p]);
}
template <int kParts>
__device__ void Clear(float (&d)[kParts][32]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (float& x : d[p]) x = 0;
  }
}
// 64 columns of the accumulator, from register `from` on, as a left operand in bf16.
template <int N>
__device__ void ToOperand(Operand& a, const float (&d)[N], int from = 0) {
#pragma unroll
  for (int k = 0; k < kBlockSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = from + 8 * k + 2 * i;
      a[k][i] = hopper::PackBf16(d[at], d[at + 1]);
    }
  }
}

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
        v[j] = hopper::PackBf16(d[group / 2][i] * factor, d[group / 2][i + 1] * factor);
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

// A thread's part of a warpgroup's scores [64 x 64]: its first row (the other is 8 further) and
// column.
struct Lanes {
  int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  int column = 2 * (threadIdx.x % 4);
  bool leader = threadIdx.x % kWarpgroup == 0;
};

// Arrives once for warpgroup `group` when all its threads are here.
__device__ void ArriveTogether(Barrier* barrier, int group) {
  hopper::Meet(1 + group, kWarpgroup);
  if (threadIdx.x % kWarpgroup == 0) hopper::Arrive(barrier);
}

}  // namespace stretto::cuda::hopper_attention

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_HOPPER_TILES_CUH_
