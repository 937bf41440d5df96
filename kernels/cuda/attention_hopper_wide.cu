// The backward pass for heads of 128 numbers, and without a mask also of 64. The other side comes
// in blocks of 64 rows: there are no registers for the scores of more.
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/attention_hopper.cuh"

namespace stretto::cuda::hopper {
namespace {

constexpr int kBlockBytes = kBlock * kRowBytes;
constexpr int kBlockSteps = kBlock / 16;  // products that sum over one

// Shared memory of a kernel: own tiles, and a ring of 64 rows each of the other side, in blocks, of
// which kDim / 64 lie side by side. What comes first is queries or keys, second gradients of
// outputs or values.
template <int kDim, int kOwnTiles, int kRingStages>
struct Memory {
  static constexpr int kParts = kDim / kBlock;
  static constexpr int kOwn = kOwnTiles;
  static constexpr int kStages = kRingStages;

  uint8_t own[kOwn][2][kConsumers][kParts][kBlockBytes];
  uint8_t other[kStages][2][1][kParts][kBlockBytes];
  float log_sum[kStages][kBlock];  // of queries, where they are the other side
  float delta[kStages][kBlock];
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
// kBlocks blocks of rows from `row` on of a head.
template <int kBlocks, int kParts>
__device__ void LoadRows(uint8_t (&to)[kBlocks][kParts][kBlockBytes], const CUtensorMap& map,
                         Barrier* full, int row, int head) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      LoadBox(to[b][p], map, full, (head * kParts + p) * kBlock, row + b * kBlock);
    }
  }
}
template <int kBlocks, int kParts>
__device__ void LoadPair(uint8_t (&to)[2][kBlocks][kParts][kBlockBytes], const CUtensorMap& first,
                         const CUtensorMap& second, Barrier* full, int row, int head) {
  LoadRows(to[0], first, full, row, head);
  LoadRows(to[1], second, full, row, head);
}

using Operand = uint32_t[kBlockSteps][4];  // a left operand of 64 x 64

template <int kParts>
__device__ void LoadOperands(Operand (&a)[kParts], const uint8_t (&from)[kParts][kBlockBytes]) {
  const uint32_t warp_rows = threadIdx.x % kWarpgroup / 32 * 16 * kRowBytes;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      LoadOperand(a[p][k], SharedAddress(from[p]) + warp_rows, k);
    }
  }
}

// d [64 x 64] = a b^T over the numbers of a head.
template <int kParts>
__device__ void Product(float (&d)[32], const Operand (&a)[kParts],
                        const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t right = Descriptor(SharedAddress(b[p]));
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      Multiply<false>(d, a[p][k], right + k * (kStepAlong >> 4), p > 0 || k > 0);
    }
  }
}
template <int kParts>
__device__ void Product(float (&d)[32], const uint8_t (&a)[kParts][kBlockBytes],
                        const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t left = Descriptor(SharedAddress(a[p])), right = Descriptor(SharedAddress(b[p]));
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      const int step = k * (kStepAlong >> 4);
      Multiply(d, left + step, right + step, p > 0 || k > 0);
    }
  }
}
// d [64 x numbers of a head] += a b over the rows of b.
template <int kParts>
__device__ void Accumulate(float (&d)[kParts][32], const Operand& a,
                           const uint8_t (&b)[kParts][kBlockBytes]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
    const uint64_t right = Descriptor(SharedAddress(b[p]));
#pragma unroll
    for (int k = 0; k < kBlockSteps; ++k) {
      Multiply<true>(d[p], a[k], right + k * (kStepDown >> 4), true);
    }
  }
}
template <int kParts>
__device__ void PinAll(float (&d)[kParts][32]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) Pin(d[p]);
}
template <int kParts>
__device__ void Clear(float (&d)[kParts][32]) {
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (float& x : d[p]) x = 0;
  }
}
// The accumulator as a left operand in bf16.
__device__ void ToOperand(Operand& a, const float (&d)[32]) {
#pragma unroll
  for (int k = 0; k < kBlockSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[k][i] = PackBf16(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
  }
}

// Blocks that have the rows of a sequence.
__device__ inline int BlocksOf(int rows) { return (rows + kBlock - 1) / kBlock; }

// Frees a block of the other side unread, once it is there: who frees it earlier may free the one
// before it in its place, for a warpgroup that still reads that.
template <class M>
__device__ void Skip(M& memory, Ring<M::kStages>* other) {
  Wait(&memory.other_full[other->place], other->parity);
  ArriveWarp(&memory.other_empty[other->place]);
  other->Next();
}

// A thread's part of a warpgroup's scores [64 x 64]: its first row (the other is 8 further) and
// column.
struct Lanes {
  int row = threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  int column = 2 * (threadIdx.x % 4);
};

// ------------------------------------------------------------------------------- queries

template <int kDim>
using QueryMemory = Memory<kDim, kDim == 64 ? 2 : 1, kDim == 64 ? 8 : 4>;

// Own tiles are queries, the other side's are keys. Scores are [queries, keys].
template <int kDim, bool kCausal>
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dq) {
  using M = QueryMemory<kDim>;
  // Whether queries are held in registers over all keys. With heads of 64 ptxas 13.0 gives those
  // registers away inside the loop.
  constexpr bool kHeld = kDim > 64;
  M& memory = SharedMemory<M>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  Ring<M::kOwn> own;
  Ring<M::kStages> other;
  if (group == kConsumers) {
    GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    const int shared_by = shape.heads / shape.kv_heads;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work<false> work(shape, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        Wait(&memory.own_empty[own.place], own.parity ^ 1);
        ArriveExpecting(&memory.own_full[own.place], sizeof(memory.own[0]));
        LoadPair(memory.own[own.place], maps.q, maps.d_o, &memory.own_full[own.place],
                 tile.q_row + tile.index * kTile, work.head);
        own.Next();
        const int blocks = kCausal ? (tile.index + 1) * kConsumers : BlocksOf(tile.k_length);
        for (int b = 0; b < blocks; ++b) {
          Wait(&memory.other_empty[other.place], other.parity ^ 1);
          ArriveExpecting(&memory.other_full[other.place], sizeof(memory.other[0]));
          LoadPair(memory.other[other.place], maps.k, maps.v, &memory.other_full[other.place],
                   tile.k_row + b * kBlock, work.head / shared_by);
          other.Next();
        }
      }
    }
    return;
  }

  TakeRegisters<240>();
  const Lanes lanes;
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work<false> work(shape, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      const int first = tile.index * kTile + group * kBlock;  // row of the sequence
      float log_sum[2], delta[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = work.head * shape.padded + tile.padded + first + lanes.row + 8 * i;
        log_sum[i] = shape.log_sum[at];
        delta[i] = shape.delta[at];
      }
      Wait(&memory.own_full[own.place], own.parity);
      const auto& q = memory.own[own.place][0][group];
      const auto& d_o = memory.own[own.place][1][group];
      Operand q_held[M::kParts], d_o_held[M::kParts];
      if constexpr (kHeld) {
        LoadOperands(q_held, q);
        LoadOperands(d_o_held, d_o);
      }

      float gradient[M::kParts][32];
      Clear(gradient);
      // Blocks of keys. The last one's are not all seen: it is on the diagonal, or the sequence
      // ends.
      const int blocks = kCausal ? tile.index * kConsumers + group + 1 : BlocksOf(tile.k_length);
      const int last_seen = tile.k_length - (blocks - 1) * kBlock - 1;
      for (int b = 0; b < blocks; ++b) {
        const auto& [keys, values] = memory.other[other.place];
        float p[32], ds[32];
        Wait(&memory.other_full[other.place], other.parity);
        FenceProducts();
        if constexpr (kHeld) {
          Product(p, q_held, keys[0]);
        } else {
          Product(p, q, keys[0]);
        }
        CommitProducts();
        if constexpr (kHeld) {
          Product(ds, d_o_held, values[0]);
        } else {
          Product(ds, d_o, values[0]);
        }
        CommitProducts();
        WaitProducts<1>();
        Pin(p);
        PinAll(gradient);
        if (b > 0) {
          ArriveWarp(&memory.other_empty[other.Before()]);
        } else if (kHeld) {  // not before products have read the registers, see LoadOperand
          ArriveWarp(&memory.own_empty[own.place]);
        }
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          p[j] = Exp2(fmaf(p[j], to_log2, -log_sum[j % 4 / 2]));
        }
        if (b + 1 == blocks && (kCausal || last_seen < kBlock - 1)) {
#pragma unroll
          for (int j = 0; j < 32; ++j) {
            const int seen = kCausal ? lanes.row + j % 4 / 2 * 8 : last_seen;
            if (j / 4 * 8 + lanes.column + j % 2 > seen) p[j] = 0;
          }
        }
        WaitProducts<0>();
        Pin(ds);
#pragma unroll
        for (int j = 0; j < 32; ++j) ds[j] = p[j] * (ds[j] - delta[j % 4 / 2]);
        Operand changes;
        ToOperand(changes, ds);
        PinAll(gradient);
        FenceProducts();
        Accumulate(gradient, changes, keys[0]);
        CommitProducts();
        other.Next();
      }
      WaitProducts<0>();
      PinAll(gradient);
      if (blocks > 0) ArriveWarp(&memory.other_empty[other.Before()]);
      // The first warpgroup does not see the last block.
      if (kCausal && group + 1 < kConsumers) {
        Skip(memory, &other);
      }
      if (!kHeld || blocks == 0) ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      StoreRows(dq, gradient, shape.scale, tile.q_row + first, tile.q_length - first, work.head);
    }
  }
}

// ------------------------------------------------------------------------------- keys and values

template <int kDim>
using KeyMemory = Memory<kDim, 2, kDim == 64 ? 8 : 2>;

// Own tiles are keys, the other side's are queries, of all heads that share the keys. Scores are
// [keys, queries].
template <int kDim, bool kCausal>
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dk,
                 const Output dv) {
  using M = KeyMemory<kDim>;
  M& memory = SharedMemory<M>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<M::kOwn> own;
  Ring<M::kStages> other;
  if (group == kConsumers) {
    GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work<true> work(shape, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        Wait(&memory.own_empty[own.place], own.parity ^ 1);
        ArriveExpecting(&memory.own_full[own.place], sizeof(memory.own[0]));
        LoadPair(memory.own[own.place], maps.k, maps.v, &memory.own_full[own.place],
                 tile.k_row + tile.index * kTile, work.head);
        own.Next();
        for (int h = 0; h < shared_by; ++h) {
          const int head = work.head * shared_by + h;
          for (int r = kCausal ? tile.index * kTile : 0; r < tile.q_length; r += kBlock) {
            Barrier* const full = &memory.other_full[other.place];
            Wait(&memory.other_empty[other.place], other.parity ^ 1);
            constexpr int kStatBytes = kBlock * sizeof(float);
            ArriveExpecting(full, sizeof(memory.other[0]) + 2 * kStatBytes);
            LoadPair(memory.other[other.place], maps.q, maps.d_o, full, tile.q_row + r, head);
            const int64_t at = head * shape.padded + tile.padded + r;
            LoadBytes(memory.log_sum[other.place], shape.log_sum + at, kStatBytes, full);
            LoadBytes(memory.delta[other.place], shape.delta + at, kStatBytes, full);
            other.Next();
          }
        }
      }
    }
    return;
  }

  TakeRegisters<240>();
  const Lanes lanes;
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work<true> work(shape, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      Wait(&memory.own_full[own.place], own.parity);
      const auto& k = memory.own[own.place][0][group];
      const auto& v = memory.own[own.place][1][group];
      float d_keys[M::kParts][32], d_values[M::kParts][32];
      Clear(d_keys);
      Clear(d_values);
      const int first = tile.index * kTile + group * kBlock;  // row of the sequence
      // Blocks of queries, for each head; with a mask from the tile's first row on, the first of
      // which the second warpgroup does not see.
      const int loaded = BlocksOf(tile.q_length - (kCausal ? tile.index * kTile : 0));
      const int skipped = kCausal ? min(group, loaded) : 0;
      const int blocks = loaded - skipped;
      for (int h = 0; h < shared_by; ++h) {
        if (skipped > 0) {
          Skip(memory, &other);
        }
        for (int b = 0; b < blocks; ++b) {
          const auto& [queries, d_o] = memory.other[other.place];
          const float* const log_sum = memory.log_sum[other.place] + lanes.column;
          const float* const delta = memory.delta[other.place] + lanes.column;
          float p[32], ds[32];
          Wait(&memory.other_full[other.place], other.parity);
          FenceProducts();
          Product(p, k, queries[0]);
          CommitProducts();
          Product(ds, v, d_o[0]);
          CommitProducts();
          WaitProducts<1>();
          Pin(p);
          PinAll(d_values);
          PinAll(d_keys);
          if (b > 0) ArriveWarp(&memory.other_empty[other.Before()]);
#pragma unroll
          for (int j = 0; j < kBlock / 8; ++j) {
            const float2 sum = *reinterpret_cast<const float2*>(log_sum + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& x = p[4 * j + e];
              x = Exp2(fmaf(x, to_log2, e % 2 == 0 ? -sum.x : -sum.y));
            }
          }
          if (kCausal && b == 0) {  // on the diagonal
#pragma unroll
            for (int j = 0; j < 32; ++j) {
              if (lanes.row + j % 4 / 2 * 8 > j / 4 * 8 + lanes.column + j % 2) p[j] = 0;
            }
          }
          Operand left;  // weights, then their changes: there are no registers for both
          ToOperand(left, p);
          PinAll(d_values);
          FenceProducts();
          Accumulate(d_values, left, d_o[0]);
          CommitProducts();
          WaitProducts<0>();
          Pin(ds);
          PinAll(d_values);
#pragma unroll
          for (int j = 0; j < kBlock / 8; ++j) {
            const float2 d = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              ds[4 * j + e] = p[4 * j + e] * (ds[4 * j + e] - (e % 2 == 0 ? d.x : d.y));
            }
          }
          ToOperand(left, ds);
          PinAll(d_keys);
          FenceProducts();
          Accumulate(d_keys, left, queries[0]);
          CommitProducts();
          other.Next();
        }
        WaitProducts<0>();
        PinAll(d_values);
        PinAll(d_keys);
        if (blocks > 0) ArriveWarp(&memory.other_empty[other.Before()]);
      }
      ArriveWarp(&memory.own_empty[own.place]);
      own.Next();
      StoreRows(dk, d_keys, shape.scale, tile.k_row + first, tile.k_length - first, work.head);
      StoreRows(dv, d_values, 1.0f, tile.k_row + first, tile.k_length - first, work.head);
    }
  }
}

template <int kDim, bool kCausal>
void Run(Stream& s, const Backward& call) {
  Shape shape = call.shape;
  shape.items = call.q_items;
  Launch<QueryMemory<kDim>>(s, "AttentionBackward (queries)", &QueryGradients<kDim, kCausal>,
                            shape.items, shape, call.maps, call.dq);
  shape.items = call.k_items;
  Launch<KeyMemory<kDim>>(s, "AttentionBackward (keys)", &KeyGradients<kDim, kCausal>, shape.items,
                          shape, call.maps, call.dk, call.dv);
}

}  // namespace

void LaunchWide(Stream& s, const Backward& call, int dim, bool causal) {
  const auto run = dim == 64 ? &Run<64, false> : causal ? &Run<128, true> : &Run<128, false>;
  run(s, call);
}

}  // namespace stretto::cuda::hopper
