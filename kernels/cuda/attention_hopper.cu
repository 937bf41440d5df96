// The backward pass of causal self-attention on Hopper's tensor cores, for heads of 64 numbers in
// bf16. Two kernels without a sum between blocks, so that results are the same on every run: one
// for the gradients of queries, a tile of which meets all keys that it sees, one for those of keys
// and values, a tile of which meets all queries that see it. Scores are computed in both; for that
// nothing but the results is written.
//
// A block has one warpgroup that copies tiles of 128 rows into shared memory, ahead of two that
// multiply, each for 64 rows of the block's own tile. Blocks stay, and take tiles in pairs, a long
// one and a short one, so that all have as much to do.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

using hopper::Barrier;
using hopper::CommitProducts;
using hopper::FenceProducts;
using hopper::kRowBytes;
using hopper::kStepAlong;
using hopper::kStepDown;
using hopper::kWarpgroup;
using hopper::Pin;
using hopper::WaitProducts;

constexpr int kDim = hopper::kTileWidth;
constexpr int kRows = 128;                     // of a tile
constexpr int kTileBytes = kRows * kRowBytes;  // 16 KiB
constexpr int kHalf = kRows / 2;               // the rows of one warpgroup
constexpr int kHalfBytes = kTileBytes / 2;
constexpr int kStatBytes = kRows * sizeof(float);  // of one statistic
constexpr int kStages = 3;                         // tiles of the other side that are on their way
constexpr int kOwn = 2;                            // own tiles
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr float kLog2E = 1.44269504088896341f;

// What the kernels share. Statistics are f32 [heads][padded]: each sequence begins at a multiple of
// kRows there and is filled up to one with rows that see nothing.
struct Shape {
  const int32_t* cu;  // where sequences begin, [sequences + 1]
  int sequences;
  int length;  // of every sequence, 0: they differ
  int64_t tokens;
  int heads, kv_heads;
  int64_t padded;
  float scale;           // of scores
  const float* log_sum;  // log2 of the sum of exponentials
  const float* delta;    // sum of d_o o
  int items;             // of work

  __host__ __device__ int TilesOfEach() const { return (length + kRows - 1) / kRows; }
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
  return begin / kRows + sequence;
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
      tile->padded = sequence * tiles * kRows;
      tile->length = shape.length;
      return true;
    }
    const int begin = shape.cu[sequence];
    const int end = static_cast<int>(min(int64_t{shape.cu[sequence + 1]}, shape.tokens));
    tile->row = begin;
    tile->padded = FirstTile(begin, sequence) * kRows;
    tile->length = end - begin;
    tile->index = place - FirstTile(begin, sequence);
    return which == 0 && begin >= 0 && tile->index >= 0 && tile->index * kRows < tile->length;
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

// Shared memory of both kernels: a pair of own tiles and a pair of the other side's.
struct Memory {
  struct Pair {
    uint8_t first[kTileBytes];   // queries, or keys
    uint8_t second[kTileBytes];  // gradients of outputs, or values
  };
  Pair own[kOwn];
  Pair other[kStages];
  float log_sum[kStages][kRows];  // of queries; the first kOwn places where they are the own tiles
  float delta[kStages][kRows];
  Barrier own_full[kOwn], own_empty[kOwn];
  Barrier other_full[kStages], other_empty[kStages];

  __device__ void InitBarriers() {
    for (int i = 0; i < kOwn; ++i) {
      hopper::Init(&own_full[i], 1);
      hopper::Init(&own_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      hopper::Init(&other_full[i], 1);
      hopper::Init(&other_empty[i], kConsumerWarps);
    }
    hopper::FenceInit();
  }
};
constexpr int kAlignment = 1024;
constexpr int kMemoryBytes = sizeof(Memory) + kAlignment;

__device__ Memory& SharedMemory() {
  extern __shared__ uint8_t bytes[];
  const uint32_t address = hopper::SharedAddress(bytes);
  return *reinterpret_cast<Memory*>(bytes + (kAlignment - address % kAlignment) % kAlignment);
}

struct Maps {
  CUtensorMap q, k, v, d_o;
};

__device__ void LoadQueries(Memory::Pair* to, float* log_sum, float* delta, Barrier* full,
                            const Shape& shape, const Maps& maps, const Tile& tile, int index,
                            int head) {
  hopper::ArriveExpecting(full, 2 * kTileBytes + 2 * kStatBytes);
  const int row = tile.row + index * kRows;
  const int64_t at = head * shape.padded + tile.padded + index * kRows;
  hopper::LoadBox(to->first, maps.q, full, head * kDim, row);
  hopper::LoadBytes(log_sum, shape.log_sum + at, kStatBytes, full);
  hopper::LoadBox(to->second, maps.d_o, full, head * kDim, row);
  hopper::LoadBytes(delta, shape.delta + at, kStatBytes, full);
}
__device__ void LoadKeys(Memory::Pair* to, Barrier* full, const Maps& maps, const Tile& tile,
                         int index, int kv_head) {
  hopper::ArriveExpecting(full, 2 * kTileBytes);
  const int row = tile.row + index * kRows;
  hopper::LoadBox(to->first, maps.k, full, kv_head * kDim, row);
  hopper::LoadBox(to->second, maps.v, full, kv_head * kDim, row);
}

// d [64 x 128] = a b^T over the 64 columns of both tiles.
__device__ void Product(float (&d)[64], uint32_t a, uint32_t b) {
  const uint64_t left = hopper::Descriptor(a), right = hopper::Descriptor(b);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    hopper::Multiply(d, left + k * (kStepAlong >> 4), right + k * (kStepAlong >> 4), k > 0);
  }
}
// d [64 x 64] = a b over the 64 columns of tile b.
__device__ void Product(float (&d)[32], const uint32_t (&a)[kDim / 16][4], uint32_t b) {
  const uint64_t right = hopper::Descriptor(b);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    hopper::Multiply<false>(d, a[k], right + k * (kStepAlong >> 4), k > 0);
  }
}
// d [64 x 64] += a b over the 16 kSteps rows of tile b.
template <int kSteps>
__device__ void Accumulate(float (&d)[32], const uint32_t (&a)[kSteps][4], uint32_t b) {
  const uint64_t right = hopper::Descriptor(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    hopper::Multiply<true>(d, a[k], right + k * (kStepDown >> 4), true);
  }
}
// The accumulator as a left operand in bf16.
template <int kSteps>
__device__ void ToOperand(uint32_t (&a)[kSteps][4], const float (&d)[8 * kSteps]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = hopper::PackBf16(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
  }
}

// Stores a warpgroup's 64 x 64 gradients: `row` is the first of them in the operands, of which
// `rows` exist. Four lanes have a row in pairs of numbers; they exchange them for 16 bytes each.
__device__ void StoreRows(const Output& to, const float (&d)[32], float factor, int row, int rows,
                          int head) {
  const int lane = threadIdx.x % 32, quarter = lane % 4;
  const int first = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = first + 8 * half;
    __nv_bfloat16* const at = to.data + int64_t{row + r} * to.stride + head * kDim;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * (4 * group + j) + 2 * half;
        v[j] = hopper::PackBf16(d[i] * factor, d[i + 1] * factor);
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

// ------------------------------------------------------------------------------- queries

// Own tiles are queries, the other side's are keys. Scores are [queries, keys].
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dq) {
  Memory& memory = SharedMemory();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<kOwn> own;
  Ring<kStages> other;
  if (group == kConsumers) {
    hopper::GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work work(shape, shape.heads, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        hopper::Wait(&memory.own_empty[own.place], own.parity ^ 1);
        LoadQueries(&memory.own[own.place], memory.log_sum[own.place], memory.delta[own.place],
                    &memory.own_full[own.place], shape, maps, tile, tile.index, work.head);
        own.Next();
        for (int i = 0; i <= tile.index; ++i) {
          hopper::Wait(&memory.other_empty[other.place], other.parity ^ 1);
          LoadKeys(&memory.other[other.place], &memory.other_full[other.place], maps, tile, i,
                   work.head / shared_by);
          other.Next();
        }
      }
    }
    return;
  }

  hopper::TakeRegisters<240>();
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;  // and row + 8, of 64
  const int column = 2 * (lane % 4);
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work work(shape, shape.heads, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      hopper::Wait(&memory.own_full[own.place], own.parity);
      float log_sum[2], delta[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        log_sum[i] = memory.log_sum[own.place][group * 64 + row + 8 * i];
        delta[i] = memory.delta[own.place][group * 64 + row + 8 * i];
      }
      const uint32_t q = hopper::SharedAddress(memory.own[own.place].first) + group * kHalfBytes;
      const uint32_t d_o = hopper::SharedAddress(memory.own[own.place].second) + group * kHalfBytes;
      float gradient[32] = {};
      uint32_t operand[kRows / 16][4];
      int before = -1;  // the place whose products are on their way
      for (int i = 0; i <= tile.index; ++i) {
        hopper::Wait(&memory.other_full[other.place], other.parity);
        const uint32_t k = hopper::SharedAddress(memory.other[other.place].first);
        float p[64], ds[64];
        FenceProducts();
        Product(p, q, k);
        CommitProducts();
        Product(ds, d_o, hopper::SharedAddress(memory.other[other.place].second));
        CommitProducts();
        WaitProducts<1>();
        Pin(p);
        Pin(gradient);
        if (before >= 0) hopper::ArriveWarp(&memory.other_empty[before]);
#pragma unroll
        for (int j = 0; j < 64; ++j) p[j] = hopper::Exp2(fmaf(p[j], to_log2, -log_sum[j % 4 / 2]));
        if (i == tile.index) {
#pragma unroll
          for (int j = 0; j < 64; ++j) {
            if (j / 4 * 8 + column + j % 2 > group * 64 + row + j % 4 / 2 * 8) p[j] = 0;
          }
        }
        WaitProducts<0>();
        Pin(ds);
#pragma unroll
        for (int j = 0; j < 64; ++j) ds[j] = p[j] * (ds[j] - delta[j % 4 / 2]);
        ToOperand(operand, ds);
        Pin(gradient);
        FenceProducts();
        Accumulate(gradient, operand, k);
        CommitProducts();
        before = other.place;
        other.Next();
      }
      WaitProducts<0>();
      Pin(gradient);
      hopper::ArriveWarp(&memory.other_empty[before]);
      hopper::ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      const int first = tile.index * kRows + group * 64;
      StoreRows(dq, gradient, shape.scale, tile.row + first, tile.length - first, work.head);
    }
  }
}

// ------------------------------------------------------------------------------- keys and values

// Own tiles are keys, the other side's are queries, of all heads that share the keys. Scores are
// [keys, queries].
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dk,
                 const Output dv) {
  Memory& memory = SharedMemory();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<kOwn> own;
  Ring<kStages> other;
  if (group == kConsumers) {
    hopper::GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work work(shape, shape.kv_heads, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        hopper::Wait(&memory.own_empty[own.place], own.parity ^ 1);
        LoadKeys(&memory.own[own.place], &memory.own_full[own.place], maps, tile, tile.index,
                 work.head);
        own.Next();
        for (int h = 0; h < shared_by; ++h) {
          for (int i = tile.index; i * kRows < tile.length; ++i) {
            hopper::Wait(&memory.other_empty[other.place], other.parity ^ 1);
            LoadQueries(&memory.other[other.place], memory.log_sum[other.place],
                        memory.delta[other.place], &memory.other_full[other.place], shape, maps,
                        tile, i, work.head * shared_by + h);
            other.Next();
          }
        }
      }
    }
    return;
  }

  hopper::TakeRegisters<240>();
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;  // and row + 8, of 64
  const int column = 2 * (lane % 4);
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work work(shape, shape.kv_heads, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      hopper::Wait(&memory.own_full[own.place], own.parity);
      // The block's keys and values stay in registers.
      uint32_t k[kDim / 16][4], v[kDim / 16][4];
      const uint32_t warp_rows = (threadIdx.x / 32) * 16 * kRowBytes;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        hopper::LoadOperand(k[i], hopper::SharedAddress(memory.own[own.place].first) + warp_rows,
                            i);
        hopper::LoadOperand(v[i], hopper::SharedAddress(memory.own[own.place].second) + warp_rows,
                            i);
      }
      hopper::ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      float d_keys[32] = {}, d_values[32] = {};
      uint32_t weights[kHalf / 16][4], changes[kHalf / 16][4];
      int before = -1;  // the place whose products are on their way
      // Half a tile of queries, from the row `from` of it on.
      const auto meet = [&](int from, auto diagonal) {
        const Memory::Pair& queries = memory.other[other.place];
        const uint32_t q = hopper::SharedAddress(queries.first) + from * kRowBytes;
        const uint32_t d_o = hopper::SharedAddress(queries.second) + from * kRowBytes;
        const float* const log_sum = memory.log_sum[other.place] + from + column;
        const float* const delta = memory.delta[other.place] + from + column;
        float p[32], ds[32];
        FenceProducts();
        Product(p, k, q);
        CommitProducts();
        Product(ds, v, d_o);
        CommitProducts();
        WaitProducts<1>();
        Pin(p);
        Pin(d_values);
        Pin(d_keys);
        if (before >= 0) hopper::ArriveWarp(&memory.other_empty[before]);
        before = -1;
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) {
          const float2 sum = *reinterpret_cast<const float2*>(log_sum + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = p[4 * j + e];
            x = hopper::Exp2(fmaf(x, to_log2, e % 2 == 0 ? -sum.x : -sum.y));
            if (decltype(diagonal)::value && row + e / 2 * 8 > 8 * j + column + e % 2) x = 0;
          }
        }
        ToOperand(weights, p);
        Pin(d_values);
        FenceProducts();
        Accumulate(d_values, weights, d_o);
        CommitProducts();
        WaitProducts<1>();
        Pin(ds);
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) {
          const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            ds[4 * j + e] = p[4 * j + e] * (ds[4 * j + e] - (e % 2 == 0 ? d.x : d.y));
          }
        }
        ToOperand(changes, ds);
        Pin(d_keys);
        FenceProducts();
        Accumulate(d_keys, changes, q);
        CommitProducts();
      };
      for (int h = 0; h < shared_by; ++h) {
        // Of the tile on the diagonal the first half sees the first half's keys only.
        hopper::Wait(&memory.other_full[other.place], other.parity);
        if (group == 0) {
          meet(0, std::true_type{});
          meet(kHalf, std::false_type{});
        } else {
          meet(kHalf, std::true_type{});
        }
        before = other.place;
        other.Next();
        for (int i = tile.index + 1; i * kRows < tile.length; ++i) {
          hopper::Wait(&memory.other_full[other.place], other.parity);
          meet(0, std::false_type{});
          meet(kHalf, std::false_type{});
          before = other.place;
          other.Next();
        }
      }
      WaitProducts<0>();
      Pin(d_values);
      Pin(d_keys);
      hopper::ArriveWarp(&memory.other_empty[before]);
      const int first = tile.index * kRows + group * 64;
      StoreRows(dk, d_keys, shape.scale, tile.row + first, tile.length - first, work.head);
      StoreRows(dv, d_values, 1.0f, tile.row + first, tile.length - first, work.head);
    }
  }
}

// ------------------------------------------------------------------------------- statistics

constexpr int kStatRows = 32;   // of a block
constexpr int kStatHeads = 16;  // at a time

// delta[h][t] = sum of d_o o, log_sum[h][t] = lse log2(e), and of rows behind a sequence what gives
// them no weight. Eight lanes have a row of a head.
__global__ void __launch_bounds__(256)
    Statistics(const Shape shape, float* log_sum, float* delta, const __nv_bfloat16* d_o,
               const __nv_bfloat16* o, int64_t stride, const float* lse, int64_t lse_stride) {
  __shared__ float sums[kStatHeads][kStatRows + 1];
  __shared__ float logs[kStatHeads][kStatRows + 1];
  const int block = blockIdx.x * kStatRows;  // in the statistics
  int begin, length, at;                     // of the sequence; the block's first row in it
  if (shape.length > 0) {
    const int each = shape.TilesOfEach() * kRows;
    begin = block / each * shape.length;
    length = shape.length;
    at = block % each;
  } else {
    const int sequence = FindSequence(shape, block / kRows);
    begin = shape.cu[sequence];
    length = static_cast<int>(min(int64_t{shape.cu[sequence + 1]}, shape.tokens)) - begin;
    at = block - FirstTile(begin, sequence) * kRows;
  }
  const int lane = threadIdx.x % 8;
  for (int h0 = blockIdx.y * kStatHeads; h0 < shape.heads; h0 += gridDim.y * kStatHeads) {
    for (int i = threadIdx.x / 8; i < kStatRows * kStatHeads; i += 32) {
      const int r = i / kStatHeads, h = i % kStatHeads;
      const bool here = begin >= 0 && at + r < length && h0 + h < shape.heads;
      float sum = 0;
      if (here) {
        const int64_t from = (begin + at + r) * stride + (h0 + h) * kDim + lane * 8;
        const auto x = *reinterpret_cast<const Pack<__nv_bfloat16>*>(d_o + from);
        const auto y = *reinterpret_cast<const Pack<__nv_bfloat16>*>(o + from);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(Widen(x.value[e]), Widen(y.value[e]), sum);
      }
      for (int offset = 4; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) {
        const float log = here ? lse[(begin + at + r) * lse_stride + h0 + h] : -INFINITY;
        sums[h][r] = sum;
        logs[h][r] = log == -INFINITY ? INFINITY : log * kLog2E;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kStatRows * kStatHeads; i += 256) {
      const int h = i / kStatRows, r = i % kStatRows;
      if (h0 + h < shape.heads) {
        const int64_t to = (h0 + h) * shape.padded + block + r;
        delta[to] = sums[h][r];
        log_sum[to] = logs[h][r];
      }
    }
    __syncthreads();
  }
}

// ------------------------------------------------------------------------------- host

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled FindEncodeTiled() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<EncodeTiled>(function);
}

// Boxes of kRows rows and one head. False: the driver refuses.
bool MakeMap(EncodeTiled encode, CUtensorMap* map, const Tensor& t) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(t.dims[1] * t.dims[2]),
                              static_cast<cuuint64_t>(t.dims[0])};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(t.row_stride * SizeOf(t.dtype))};
  const cuuint32_t box[] = {kDim, kRows}, step[] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, t.data, sizes, strides, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Unless the library's kernels were asked for.
bool Wanted() {
  const char* const choice = std::getenv("STRETTO_ATTENTION_BACKWARD");
  return choice == nullptr || std::strcmp(choice, "cudnn") != 0;
}

// Whether the current device runs code for 9.0a.
bool IsHopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

template <class Kernel, class... Arguments>
void Launch(Stream& s, const char* name, Kernel kernel, int items, const Arguments&... arguments) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMemoryBytes);
  const int blocks = std::min(items, Multiprocessors());
  kernel<<<blocks, kThreads, kMemoryBytes, Native(s)>>>(arguments...);
  Launched(s, name);
}

}  // namespace

bool HopperAttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor d_o, Tensor o,
                             Tensor lse, Tensor q, Tensor k, Tensor v, const AttentionShape& a) {
  if (q.dtype != DType::kBF16 || q.dims[2] != kDim || !a.causal) return false;
  if (a.len_q.present() || a.len_k.present()) return false;
  if (a.cu_q.data != a.cu_k.data || q.rows() != k.rows() || q.rows() == 0) return false;
  for (const Tensor& t : {dq, dk, dv, d_o, o, q, k, v}) {
    if (!RowsAligned(t)) return false;
  }
  if (d_o.row_stride != o.row_stride || q.rows() > INT32_MAX / 2) return false;
  static const EncodeTiled encode = FindEncodeTiled();
  if (!Wanted() || encode == nullptr || !IsHopper()) return false;

  Shape shape = {};
  shape.cu = Data<const int32_t>(a.cu_q);
  shape.sequences = static_cast<int>(a.cu_q.rows() - 1);
  shape.length = static_cast<int>(a.uniform);
  shape.tokens = q.rows();
  shape.heads = static_cast<int>(q.dims[1]);
  shape.kv_heads = static_cast<int>(k.dims[1]);
  shape.scale = static_cast<float>(a.scale);
  if (shape.sequences == 0) return false;
  const int64_t tiles = shape.length > 0 ? int64_t{shape.sequences} * shape.TilesOfEach()
                                         : FirstTile(static_cast<int>(q.rows()), shape.sequences);
  const int64_t per_head =
      shape.length > 0 ? int64_t{shape.sequences} * ((shape.TilesOfEach() + 1) / 2) : tiles;
  if (per_head * shape.heads > INT32_MAX || tiles * kRows > INT32_MAX) return false;
  shape.padded = tiles * kRows;
  const int64_t bytes = 2 * shape.heads * shape.padded * int64_t{sizeof(float)};
  if (bytes > s.workspace().bytes) return false;
  auto* const log_sum = reinterpret_cast<float*>(s.workspace().data);
  float* const delta = log_sum + shape.heads * shape.padded;
  shape.log_sum = log_sum;
  shape.delta = delta;

  Maps maps;
  if (!MakeMap(encode, &maps.q, q) || !MakeMap(encode, &maps.k, k) ||
      !MakeMap(encode, &maps.v, v) || !MakeMap(encode, &maps.d_o, d_o)) {
    return false;
  }
  const dim3 grid(static_cast<unsigned>(shape.padded / kStatRows),
                  static_cast<unsigned>((shape.heads + kStatHeads - 1) / kStatHeads));
  Statistics<<<grid, 256, 0, Native(s)>>>(shape, log_sum, delta, Data<const __nv_bfloat16>(d_o),
                                          Data<const __nv_bfloat16>(o), o.row_stride,
                                          Data<const float>(lse), lse.row_stride);
  Launched(s, "AttentionBackward (statistics)");
  const auto output = [](const Tensor& t) { return Output{Data<__nv_bfloat16>(t), t.row_stride}; };
  shape.items = static_cast<int>(per_head * shape.heads);
  Launch(s, "AttentionBackward (queries)", &QueryGradients, shape.items, shape, maps, output(dq));
  shape.items = static_cast<int>(per_head * shape.kv_heads);
  Launch(s, "AttentionBackward (keys)", &KeyGradients, shape.items, shape, maps, output(dk),
         output(dv));
  return true;
}

}  // namespace stretto::cuda
