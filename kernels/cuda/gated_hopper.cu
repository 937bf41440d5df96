// gate_up = x w^T and act = silu(gate) * up in one kernel, on the tensor cores of compute
// capability 9.0a.
//
// A thread block stays, and takes tiles of 128 tokens x (128 columns of the gate and the same 128
// of the other half): one warpgroup copies ahead into a ring of blocks of 64 summed elements, and
// two multiply, each for 64 tokens. A thread's sums of a gate and of its factor lie 64 registers
// apart. Two blocks of a cluster take tiles with the same columns below each other; each copies
// half of the weights' rows for both.
//
// The warpgroups that multiply go through the ring at a distance, so that one keeps the tensor
// cores busy while the other stores: the second starts when the ring is full.
#include <cstdint>

#include "kernels/cuda/gated_hopper.cuh"
#include "kernels/cuda/gated_hopper.h"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/hopper_maps.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/sigmoid.cuh"

namespace stretto::cuda {
namespace hopper {
namespace {

constexpr int kStages = 4;          // of the ring
constexpr int kBuffers = 2;         // of a warp, for what it stores
constexpr int kGatedConsumers = 2;  // warpgroups
constexpr int kGatedThreads = (kGatedConsumers + 1) * kWarpgroup;
constexpr int kGatedRows = 64 * kGatedConsumers;  // tokens of a tile
constexpr int kGatedColumns = 128;                // of act, of a tile
constexpr int kGatedStoreRows = 16;               // a warp's
constexpr int kGatedBoxBytes = 128 * kRowBytes;   // of operands

struct GatedMaps {
  CUtensorMap x;
  CUtensorMap w[2];  // gate, up: each ends where its half does
  CUtensorMap gate_up[2];
  CUtensorMap act;
};

struct GatedMemory {
  uint8_t x[kStages][kGatedBoxBytes];
  uint8_t w[kStages][2][kGatedBoxBytes];
  uint8_t out[kGatedConsumers * kWarpgroup / 32][kBuffers][kGatedStoreRows * kRowBytes];
  Barrier full[kStages], empty[kStages];

  static constexpr int kStageBytes = 3 * kGatedBoxBytes;

  __device__ void InitBarriers() {
    for (int i = 0; i < kStages; ++i) {
      Init(&full[i], 1);
      Init(&empty[i], kCluster * kGatedConsumers);
    }
    FenceInit();
  }
};

// A warp's 16 rows of 64 columns, on their way into gate_up or act. The copy is made by lane 0, by
// way of a place that the copy kBuffers before has left.
__device__ void StoreWarp(uint8_t* buffer, const uint32_t (&values)[16], const CUtensorMap& map,
                          int column, int row) {
  const bool first = threadIdx.x % 32 == 0;
  if (first) WaitCopiesRead<kBuffers - 1>();
  __syncwarp();
  const uint32_t to = SharedAddress(buffer);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    StoreOperand(to, k, {values[4 * k], values[4 * k + 1], values[4 * k + 2], values[4 * k + 3]});
  }
  FenceCopies();
  __syncwarp();
  if (first) {
    StoreBox(map, column, row, buffer, PassingPolicy());
    CommitCopies();
  }
}

__device__ inline float Gated(float gate, float up) {
  return up * (gate * Sigmoid<__nv_bfloat16>(gate));
}

// A warp's share of a tile: `row` and `column` say where its first element goes in act.
__device__ void StoreTile(uint8_t (&buffers)[kBuffers][kGatedStoreRows * kRowBytes],
                          const float (&d)[128], const GatedMaps& maps, int column, int row) {
  static_assert(6 % kBuffers == 0, "the next tile begins with the first buffer again");
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t gate[16], up[16], act[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      gate[i] = PackBf16(d[32 * half + 2 * i], d[32 * half + 2 * i + 1]);
      up[i] = PackBf16(d[64 + 32 * half + 2 * i], d[64 + 32 * half + 2 * i + 1]);
    }
    const int at = column + half * kTileWidth;
    const auto compute = [&] {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        act[i] = PackBf16(Gated(LowBf16(gate[i]), LowBf16(up[i])),
                          Gated(HighBf16(gate[i]), HighBf16(up[i])));
      }
    };
    StoreWarp(buffers[3 * half % kBuffers], gate, maps.gate_up[0], at, row);
    if (half == 1) compute();  // a place is free when something was done in between
    StoreWarp(buffers[(3 * half + 1) % kBuffers], up, maps.gate_up[1], at, row);
    if (half == 0) compute();
    StoreWarp(buffers[(3 * half + 2) % kBuffers], act, maps.act, at, row);
  }
}

__global__ void __launch_bounds__(kGatedThreads, 1)
    GatedKernel(const __grid_constant__ GatedMaps maps, const GatedTiles tiles) {
  using M = GatedMemory;
  M& memory = SharedMemory<M>();
  if (threadIdx.x == 0) memory.InitBarriers();
  SyncCluster();
  const uint32_t rank = ClusterRank();
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  Ring<kStages> ring;
  if (group == kGatedConsumers) {
    GiveRegisters<40>();
    if (threadIdx.x % kWarpgroup == 0) {
      for (int tile = first; tile < tiles.Count(); tile += step) {
        const GatedTiles::Place place = tiles.At(tile);
        const int row = (place.row * kCluster + static_cast<int>(rank)) * kGatedRows;
        const int w_row = place.column * kGatedColumns;
        for (int k = 0; k < tiles.blocks; ++k) {
          Barrier* const full = &memory.full[ring.place];
          const int column = k * kTileWidth;
          Wait(&memory.empty[ring.place], ring.parity ^ 1);
          ArriveExpecting(full, M::kStageBytes);
          LoadBox(memory.x[ring.place], maps.x, full, column, row);
          LoadBoxInto((1 << kCluster) - 1, memory.w[ring.place][rank], maps.w[rank], full, column,
                      w_row);
          ring.Next();
        }
      }
    }
    SyncCluster();
    return;
  }

  TakeRegisters<232>();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  // Who tells which block of the cluster that a place is free.
  const uint32_t told = threadIdx.x % kWarpgroup / 32;
  const bool tells = threadIdx.x % 32 == 0 && told < kCluster;
  const auto release = [&](int place) {
    if (tells) ArriveAt(&memory.empty[place], told);
  };
  if (group == 1 && first < tiles.Count()) {
    Wait(&memory.full[min(kStages, tiles.blocks) - 1], 0);
  }
  const uint32_t x = SharedAddress(memory.x) + group * 64 * kRowBytes;
  const uint32_t w = SharedAddress(memory.w);
  for (int tile = first; tile < tiles.Count(); tile += step) {
    float d[128];
    int before = 0;  // the place whose products are on their way
    for (int k = 0; k < tiles.blocks; ++k) {
      Wait(&memory.full[ring.place], ring.parity);
      const uint64_t left = Descriptor(x + ring.place * kGatedBoxBytes);
      const uint64_t right = Descriptor(w + ring.place * 2 * kGatedBoxBytes);
      FenceProducts();
#pragma unroll
      for (int i = 0; i < kTileWidth / 16; ++i) {
        Multiply(d, left + i * (kStepAlong >> 4), right + i * (kStepAlong >> 4), k > 0 || i > 0);
      }
      CommitProducts();
      WaitProducts<1>();
      if (k > 0) release(before);
      before = ring.place;
      ring.Next();
    }
    const GatedTiles::Place place = tiles.At(tile);  // while products run
    int row = (place.row * kCluster + static_cast<int>(rank)) * kGatedRows + warp * kGatedStoreRows;
    int column = place.column * kGatedColumns;
    asm volatile("" : "+r"(row), "+r"(column));
    WaitProducts<0>();
    release(before);
    Pin(d);
    StoreTile(memory.out[warp], d, maps, column, row);
  }
  if (threadIdx.x % 32 == 0) WaitCopies();
  SyncCluster();
}

// The operands of one call, with their strides in elements: x [tokens, inner], w [2 columns,
// inner], gate_up [tokens, 2 columns], act [tokens, columns].
struct GatedCall {
  int64_t tokens, columns, inner;
  MappedMatrix x, w, gate_up, act;
};

// False where the driver refuses a map.
bool MakeGatedMaps(const GatedCall& call, GatedMaps* maps) {
  const auto half = [&](MappedMatrix m, int64_t rows, int64_t elements) {
    return MappedMatrix{static_cast<uint16_t*>(m.data) + elements, rows, m.columns, m.stride};
  };
  MappedMatrix gate = call.gate_up;
  gate.columns = call.columns;
  const int64_t w_half = call.columns * call.w.stride;
  return MakeMap(&maps->x, call.x, kGatedRows) &&
         MakeMap(&maps->w[0], half(call.w, call.columns, 0), kGatedColumns) &&
         MakeMap(&maps->w[1], half(call.w, call.columns, w_half), kGatedColumns) &&
         MakeMap(&maps->gate_up[0], gate, kGatedStoreRows) &&
         MakeMap(&maps->gate_up[1], half(gate, call.tokens, call.columns), kGatedStoreRows) &&
         MakeMap(&maps->act, call.act, kGatedStoreRows);
}

// False, with nothing enqueued, where the driver refuses a map; the launch's error is for the
// caller to look for.
bool LaunchGated(cudaStream_t stream, const GatedCall& call, int multiprocessors) {
  GatedMaps maps;
  if (!MakeGatedMaps(call, &maps)) return false;
  LaunchClusters<GatedMemory>(
      stream, &GatedKernel, kGatedThreads, multiprocessors, maps,
      GatedTiles::Of(call.tokens, kGatedRows, call.columns, kGatedColumns, call.inner, kTileWidth));
  return true;
}

}  // namespace
}  // namespace hopper

namespace {

bool Serves(const Tensor& act, const Tensor& gate_up, const Tensor& x, const Tensor& w) {
  return act.dtype == DType::kBF16 && act.elements() > 0 && x.dims[1] > 0 && act.dims[1] % 8 == 0 &&
         hopper::TilesServe({act, gate_up, x, w},
                            hopper::Parts(act.dims[0], hopper::kGatedRows) *
                                hopper::Parts(act.dims[1], hopper::kGatedColumns));
}

}  // namespace

bool GatedLinear(Stream& s, Tensor act, Tensor gate_up, Tensor x, Tensor w) {
  if (!Serves(act, gate_up, x, w)) return false;
  const hopper::GatedCall call = {act.dims[0],        act.dims[1],       x.dims[1],
                                  hopper::Mapped(x),  hopper::Mapped(w), hopper::Mapped(gate_up),
                                  hopper::Mapped(act)};
  if (!hopper::LaunchGated(Native(s), call, Multiprocessors())) {
    return false;
  }
  Launched(s, "LinearSwiglu");
  return true;
}

}  // namespace stretto::cuda
