// The backward pass with a mask, for heads of 64 numbers. Tiles of the other side have 128 rows,
// which a product of a warpgroup takes at once.
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention_hopper.cuh"

namespace stretto::cuda::hopper {
namespace {

constexpr int kDim = kTileWidth;
constexpr int kTileBytes = kTile * kRowBytes;  // 16 KiB
constexpr int kHalf = kTile / 2;               // the rows of one warpgroup
constexpr int kHalfBytes = kTileBytes / 2;
constexpr int kStatBytes = kTile * sizeof(float);  // of one statistic
constexpr int kStages = 3;                         // tiles of the other side that are on their way
constexpr int kOwn = 2;                            // own tiles

// Shared memory of both kernels: a pair of own tiles and a pair of the other side's.
struct Memory {
  struct Pair {
    uint8_t first[kTileBytes];   // queries, or keys
    uint8_t second[kTileBytes];  // gradients of outputs, or values
  };
  Pair own[kOwn];
  Pair other[kStages];
  float log_sum[kStages][kTile];  // of queries; the first kOwn places where they are the own tiles
  float delta[kStages][kTile];
  Barrier own_full[kOwn], own_empty[kOwn];
  Barrier other_full[kStages], other_empty[kStages];

  __device__ void InitBarriers() {
    for (int i = 0; i < kOwn; ++i) {
      Init(&own_full[i], 1);
      Init(&own_empty[i], kConsumerWarps);
    }
    for (int i = 0; i < kStages; ++i) {
      Init(&other_full[i], 1);
      Init(&other_empty[i], kConsumerWarps);
    }
    FenceInit();
  }
};
__device__ void LoadQueries(Memory::Pair* to, float* log_sum, float* delta, Barrier* full,
                            const Shape& shape, const Maps& maps, const Tile& tile, int index,
                            int head) {
  ArriveExpecting(full, 2 * kTileBytes + 2 * kStatBytes);
  const int row = tile.q_row + index * kTile;
  const int64_t at = head * shape.padded + tile.padded + index * kTile;
  LoadBox(to->first, maps.q, full, head * kDim, row);
  LoadBytes(log_sum, shape.log_sum + at, kStatBytes, full);
  LoadBox(to->second, maps.d_o, full, head * kDim, row);
  LoadBytes(delta, shape.delta + at, kStatBytes, full);
}
__device__ void LoadKeys(Memory::Pair* to, Barrier* full, const Maps& maps, const Tile& tile,
                         int index, int kv_head) {
  ArriveExpecting(full, 2 * kTileBytes);
  const int row = tile.q_row + index * kTile;
  LoadBox(to->first, maps.k, full, kv_head * kDim, row);
  LoadBox(to->second, maps.v, full, kv_head * kDim, row);
}

// d [64 x 128] = a b^T over the 64 columns of both tiles.
__device__ void Product(float (&d)[64], uint32_t a, uint32_t b) {
  const uint64_t left = Descriptor(a), right = Descriptor(b);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    Multiply(d, left + k * (kStepAlong >> 4), right + k * (kStepAlong >> 4), k > 0);
  }
}
// d [64 x 64] = a b over the 64 columns of tile b.
__device__ void Product(float (&d)[32], const uint32_t (&a)[kDim / 16][4], uint32_t b) {
  const uint64_t right = Descriptor(b);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    Multiply<false>(d, a[k], right + k * (kStepAlong >> 4), k > 0);
  }
}
// d [64 x 64] += a b over the 16 kSteps rows of tile b.
template <int kSteps>
__device__ void Accumulate(float (&d)[32], const uint32_t (&a)[kSteps][4], uint32_t b) {
  const uint64_t right = Descriptor(b);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    Multiply<true>(d, a[k], right + k * (kStepDown >> 4), true);
  }
}
// The accumulator as a left operand in bf16.
template <int kSteps>
__device__ void ToOperand(uint32_t (&a)[kSteps][4], const float (&d)[8 * kSteps]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = PackBf16(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
  }
}

// ------------------------------------------------------------------------------- queries

// Own tiles are queries, the other side's are keys. Scores are [queries, keys].
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dq) {
  Memory& memory = SharedMemory<Memory>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<kOwn> own;
  Ring<kStages> other;
  if (group == kConsumers) {
    GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work<false> work(shape, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        Wait(&memory.own_empty[own.place], own.parity ^ 1);
        LoadQueries(&memory.own[own.place], memory.log_sum[own.place], memory.delta[own.place],
                    &memory.own_full[own.place], shape, maps, tile, tile.index, work.head);
        own.Next();
        for (int i = 0; i <= tile.index; ++i) {
          Wait(&memory.other_empty[other.place], other.parity ^ 1);
          LoadKeys(&memory.other[other.place], &memory.other_full[other.place], maps, tile, i,
                   work.head / shared_by);
          other.Next();
        }
      }
    }
    return;
  }

  TakeRegisters<240>();
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;  // and row + 8, of 64
  const int column = 2 * (lane % 4);
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work<false> work(shape, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      Wait(&memory.own_full[own.place], own.parity);
      float log_sum[2], delta[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        log_sum[i] = memory.log_sum[own.place][group * 64 + row + 8 * i];
        delta[i] = memory.delta[own.place][group * 64 + row + 8 * i];
      }
      const uint32_t q = SharedAddress(memory.own[own.place].first) + group * kHalfBytes;
      const uint32_t d_o = SharedAddress(memory.own[own.place].second) + group * kHalfBytes;
      float gradient[1][32] = {};
      uint32_t operand[kTile / 16][4];
      int before = -1;  // the place whose products are on their way
      for (int i = 0; i <= tile.index; ++i) {
        Wait(&memory.other_full[other.place], other.parity);
        const uint32_t k = SharedAddress(memory.other[other.place].first);
        float p[64], ds[64];
        FenceProducts();
        Product(p, q, k);
        CommitProducts();
        Product(ds, d_o, SharedAddress(memory.other[other.place].second));
        CommitProducts();
        WaitProducts<1>();
        Pin(p);
        Pin(gradient[0]);
        if (before >= 0) ArriveWarp(&memory.other_empty[before]);
#pragma unroll
        for (int j = 0; j < 64; ++j) p[j] = Exp2(fmaf(p[j], to_log2, -log_sum[j % 4 / 2]));
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
        Pin(gradient[0]);
        FenceProducts();
        Accumulate(gradient[0], operand, k);
        CommitProducts();
        before = other.place;
        other.Next();
      }
      WaitProducts<0>();
      Pin(gradient[0]);
      ArriveWarp(&memory.other_empty[before]);
      ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      const int first = tile.index * kTile + group * 64;
      StoreRows(dq, gradient, shape.scale, tile.q_row + first, tile.q_length - first, work.head);
    }
  }
}

// ------------------------------------------------------------------------------- keys and values

// Own tiles are keys, the other side's are queries, of all heads that share the keys. Scores are
// [keys, queries].
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dk,
                 const Output dv) {
  Memory& memory = SharedMemory<Memory>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<kOwn> own;
  Ring<kStages> other;
  if (group == kConsumers) {
    GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work<true> work(shape, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        Wait(&memory.own_empty[own.place], own.parity ^ 1);
        LoadKeys(&memory.own[own.place], &memory.own_full[own.place], maps, tile, tile.index,
                 work.head);
        own.Next();
        for (int h = 0; h < shared_by; ++h) {
          for (int i = tile.index; i * kTile < tile.q_length; ++i) {
            Wait(&memory.other_empty[other.place], other.parity ^ 1);
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

  TakeRegisters<240>();
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 32 * 16 + lane / 4;  // and row + 8, of 64
  const int column = 2 * (lane % 4);
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work<true> work(shape, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      Wait(&memory.own_full[own.place], own.parity);
      // The block's keys and values stay in registers.
      uint32_t k[kDim / 16][4], v[kDim / 16][4];
      const uint32_t warp_rows = (threadIdx.x / 32) * 16 * kRowBytes;
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        LoadOperand(k[i], SharedAddress(memory.own[own.place].first) + warp_rows, i);
        LoadOperand(v[i], SharedAddress(memory.own[own.place].second) + warp_rows, i);
      }
      float d_keys[1][32] = {}, d_values[1][32] = {};
      uint32_t weights[kHalf / 16][4], changes[kHalf / 16][4];
      int before = -1;  // the place whose products are on their way
      // Half a tile of queries, from the row `from` of it on.
      const auto meet = [&](int from, auto diagonal) {
        const Memory::Pair& queries = memory.other[other.place];
        const uint32_t q = SharedAddress(queries.first) + from * kRowBytes;
        const uint32_t d_o = SharedAddress(queries.second) + from * kRowBytes;
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
        Pin(d_values[0]);
        Pin(d_keys[0]);
        if (before >= 0) ArriveWarp(&memory.other_empty[before]);
        before = -1;
#pragma unroll
        for (int j = 0; j < kHalf / 8; ++j) {
          const float2 sum = *reinterpret_cast<const float2*>(log_sum + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = p[4 * j + e];
            x = Exp2(fmaf(x, to_log2, e % 2 == 0 ? -sum.x : -sum.y));
            if (decltype(diagonal)::value && row + e / 2 * 8 > 8 * j + column + e % 2) x = 0;
          }
        }
        ToOperand(weights, p);
        Pin(d_values[0]);
        FenceProducts();
        Accumulate(d_values[0], weights, d_o);
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
        Pin(d_keys[0]);
        FenceProducts();
        Accumulate(d_keys[0], changes, q);
        CommitProducts();
      };
      for (int h = 0; h < shared_by; ++h) {
        // Of the tile on the diagonal the first half sees the first half's keys only.
        Wait(&memory.other_full[other.place], other.parity);
        if (group == 0) {
          meet(0, std::true_type{});
          meet(kHalf, std::false_type{});
        } else {
          meet(kHalf, std::true_type{});
        }
        before = other.place;
        other.Next();
        for (int i = tile.index + 1; i * kTile < tile.q_length; ++i) {
          Wait(&memory.other_full[other.place], other.parity);
          meet(0, std::false_type{});
          meet(kHalf, std::false_type{});
          before = other.place;
          other.Next();
        }
      }
      WaitProducts<0>();
      Pin(d_values[0]);
      Pin(d_keys[0]);
      ArriveWarp(&memory.other_empty[before]);
      ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      const int first = tile.index * kTile + group * 64;
      StoreRows(dk, d_keys, shape.scale, tile.q_row + first, tile.q_length - first, work.head);
      StoreRows(dv, d_values, 1.0f, tile.q_row + first, tile.q_length - first, work.head);
    }
  }
}

}  // namespace

void LaunchNarrow(Stream& s, const Backward& call) {
  Shape shape = call.shape;
  shape.items = call.q_items;
  Launch<Memory>(s, "AttentionBackward (queries)", &QueryGradients, shape.items, shape, call.maps,
                 call.dq);
  shape.items = call.k_items;
  Launch<Memory>(s, "AttentionBackward (keys)", &KeyGradients, shape.items, shape, call.maps,
                 call.dk, call.dv);
}

}  // namespace stretto::cuda::hopper
