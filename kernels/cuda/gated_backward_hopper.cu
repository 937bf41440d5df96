// The gradients of gate and up from dy and the weights of the layer behind them, in one kernel, on
// the tensor cores of compute capability 9.0a.
//
// A thread block stays, and takes tiles of 128 tokens x 256 columns of d_act = dy w. Two warpgroups
// multiply, each for 64 tokens, and leave d_act, rounded, in shared memory. Of the third, one warp
// copies ahead into a ring of blocks of summed elements, and three read gate and up, make the
// gradients and store them while the next tile is multiplied. Two blocks of a cluster take tiles
// with the same columns below each other; each copies half of the weights' columns for both.
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

constexpr int kDepth = 32;                            // summed elements of a block: 64 bytes a row
constexpr int kStages = 6;                            // of the ring
constexpr int kConsumers = 2;                         // warpgroups that multiply
constexpr int kWarps = kConsumers * kWarpgroup / 32;  // that multiply
constexpr int kStorers = 3;                           // warps, behind one that copies
constexpr int kBackwardThreads = (kWarps + 1 + kStorers) * 32;
constexpr int kBackwardRows = 64 * kConsumers;         // tokens of a tile
constexpr int kBackwardColumns = 256;                  // of a tile
constexpr int kBoxes = kBackwardColumns / kTileWidth;  // of weights, side by side
constexpr int kPieceRows = 16;                         // of a warp's d_act, in pieces of 64 columns
constexpr int kPieces = kWarps * kBoxes;               // of a tile
constexpr int kLaneRows = 4;                           // of a piece, 8 columns wide

struct BackwardMaps {
  CUtensorMap dy, w;
};

// What becomes of a tile, as matrices with strides in elements.
struct BackwardGates {
  const __nv_bfloat16* gate_up;
  __nv_bfloat16* d_gate_up;
  int64_t stride, d_stride;
  int tokens, columns;
};

struct BackwardArguments {
  BackwardMaps maps;
  BackwardGates gates;
};

struct BackwardMemory {
  uint8_t dy[kStages][kBackwardRows * kDepth * 2];
  uint8_t w[kStages][kBoxes][kDepth * kRowBytes];
  uint8_t d_act[kWarps][kBoxes][kPieceRows * kRowBytes];
  Barrier full[kStages], empty[kStages];
  Barrier ready[kWarps], taken[kWarps];  // d_act of a warp

  static constexpr int kStageBytes = (kBackwardRows + kBackwardColumns) * kDepth * 2;

  __device__ void InitBarriers() {
    for (int i = 0; i < kStages; ++i) {
      Init(&full[i], 1);
      Init(&empty[i], kCluster * kConsumers);
    }
    for (int i = 0; i < kWarps; ++i) {
      Init(&ready[i], 1);
      Init(&taken[i], kBoxes);
    }
    FenceInit();
  }
};

// The first row and column of a block's tile.
struct Corner {
  int row, column;
};
__device__ inline Corner CornerOf(const GatedTiles& tiles, int tile, uint32_t rank) {
  const GatedTiles::Place place = tiles.At(tile);
  return {(place.row * kCluster + static_cast<int>(rank)) * kBackwardRows,
          place.column * kBackwardColumns};
}

// Copies operands, by one thread.
__device__ void CopyTiles(BackwardMemory& memory, const BackwardMaps& maps, const GatedTiles& tiles,
                          int first, int step, uint32_t rank) {
  constexpr int kMine = kBoxes / kCluster;
  Ring<kStages> ring;
  for (int tile = first; tile < tiles.Count(); tile += step) {
    const Corner corner = CornerOf(tiles, tile, rank);
    for (int k = 0; k < tiles.blocks; ++k) {
      Barrier* const full = &memory.full[ring.place];
      Wait(&memory.empty[ring.place], ring.parity ^ 1);
      ArriveExpecting(full, memory.kStageBytes);
      LoadBox(memory.dy[ring.place], maps.dy, full, k * kDepth, corner.row);
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int box = static_cast<int>(rank) * kMine + i;
        LoadBoxInto((1 << kCluster) - 1, memory.w[ring.place][box], maps.w, full,
                    corner.column + box * kTileWidth, k * kDepth);
      }
      ring.Next();
    }
  }
}

// Multiplies for 64 rows of each tile, and leaves d_act; `group`: which 64.
__device__ void MultiplyTiles(BackwardMemory& memory, const GatedTiles& tiles, int first, int step,
                              int group) {
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  // Who tells which block of the cluster that a place is free.
  const uint32_t told = threadIdx.x % kWarpgroup / 32;
  const bool tells = threadIdx.x % 32 == 0 && told < kCluster;
  const auto release = [&](int place) {
    if (tells) ArriveAt(&memory.empty[place], told);
  };
  const uint32_t dy = SharedAddress(memory.dy) + group * 64 * kDepth * 2;
  const uint32_t w = SharedAddress(memory.w);
  const uint32_t d_act = SharedAddress(memory.d_act[warp]);
  Ring<kStages> ring;
  uint32_t parity = 1;  // of the phase before: d_act's place was taken
  for (int tile = first; tile < tiles.Count(); tile += step, parity ^= 1) {
    float d[128];
    int before = 0;  // the place whose products are on their way
    for (int k = 0; k < tiles.blocks; ++k) {
      Wait(&memory.full[ring.place], ring.parity);
      const uint64_t left =
          NarrowDescriptor(dy + ring.place * static_cast<int>(sizeof(memory.dy[0])));
      const uint64_t right =
          Descriptor(w + ring.place * static_cast<int>(sizeof(memory.w[0])), kDepth * kRowBytes);
      FenceProducts();
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) {
        Multiply<true>(d, left + i * (kStepAlong >> 4), right + i * (kStepDown >> 4),
                       k > 0 || i > 0);
      }
      CommitProducts();
      WaitProducts<1>();
      if (k > 0) release(before);
      before = ring.place;
      ring.Next();
    }
    Wait(&memory.taken[warp], parity);
    WaitProducts<0>();
    release(before);
    Pin(d);
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
      StoreOperand(d_act + i / 8 * (kPieceRows * kRowBytes), i / 2 % 4,
                   {PackBf16(d[4 * i], d[4 * i + 1]), PackBf16(d[4 * i + 2], d[4 * i + 3]),
                    PackBf16(d[4 * i + 4], d[4 * i + 5]), PackBf16(d[4 * i + 6], d[4 * i + 7])});
    }
    ArriveWarp(&memory.ready[warp]);
  }
}

// What a lane has of a piece of gate_up: rows 4 apart, 8 columns of each.
struct GatesOfLane {
  uint4 gate[kLaneRows], up[kLaneRows];
};

// A piece that a warp stores, as each lane has it. They come one by one out of all tiles.
struct Piece {
  int tile, part;   // `part` of kPieces of the tile number `tile` of this block
  int row, column;  // the lane's first, in d_act

  __device__ bool Holds(const BackwardGates& g, int i) const {
    return row + 4 * i < g.tokens && column < g.columns;
  }
};

__device__ inline void LoadGates(GatesOfLane& to, const BackwardGates& g, const Piece& at) {
  const __nv_bfloat16* const from = g.gate_up + at.row * g.stride + at.column;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    to.gate[i] = to.up[i] = uint4{};
    if (!at.Holds(g, i)) continue;
    to.gate[i] = __ldcs(reinterpret_cast<const uint4*>(from + 4 * i * g.stride));
    to.up[i] = __ldcs(reinterpret_cast<const uint4*>(from + 4 * i * g.stride + g.columns));
  }
}

// `gate` and `up` become their gradients: two numbers.
__device__ inline void Differentiate(uint32_t d, uint32_t& gate, uint32_t& up) {
  const GateUp low = SwigluGradient<__nv_bfloat16>(LowBf16(d), {LowBf16(gate), LowBf16(up)});
  const GateUp high = SwigluGradient<__nv_bfloat16>(HighBf16(d), {HighBf16(gate), HighBf16(up)});
  gate = PackBf16(low.gate, high.gate);
  up = PackBf16(low.up, high.up);
}

// Of d_act as StoreOperand lays it out.
__device__ inline void StoreGradients(const uint8_t* d_act, GatesOfLane& x, const BackwardGates& g,
                                      const Piece& at) {
  const uint32_t first = threadIdx.x % 32 / 8, chunk = threadIdx.x % 8;
  __nv_bfloat16* const to = g.d_gate_up + at.row * g.d_stride + at.column;
#pragma unroll
  for (int i = 0; i < kLaneRows; ++i) {
    const uint32_t row = first + 4 * i;
    const uint4 d =
        *reinterpret_cast<const uint4*>(d_act + row * kRowBytes + ((chunk ^ row % 8) << 4));
    Differentiate(d.x, x.gate[i].x, x.up[i].x);
    Differentiate(d.y, x.gate[i].y, x.up[i].y);
    Differentiate(d.z, x.gate[i].z, x.up[i].z);
    Differentiate(d.w, x.gate[i].w, x.up[i].w);
    if (!at.Holds(g, i)) continue;
    __stcs(reinterpret_cast<uint4*>(to + 4 * i * g.d_stride), x.gate[i]);
    __stcs(reinterpret_cast<uint4*>(to + 4 * i * g.d_stride + g.columns), x.up[i]);
  }
}

// The pieces of warp number `storer` of those that store. What it reads of gate_up is on its way
// while the piece before is worked on.
__device__ void StoreTiles(BackwardMemory& memory, const BackwardGates& gates,
                           const GatedTiles& tiles, int first, int step, uint32_t rank,
                           int storer) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Corner corner = CornerOf(tiles, first, rank);
  Piece next = {0, storer, 0, 0};
  // Loads the next piece and steps over it; false behind the last one.
  const auto load = [&](GatesOfLane& to, Piece& at) {
    const int tile = first + next.tile * step;
    if (tile >= tiles.Count()) return false;
    at = next;
    at.row = corner.row + at.part / kBoxes * kPieceRows + lane / 8;
    at.column = corner.column + at.part % kBoxes * kTileWidth + lane % 8 * 8;
    LoadGates(to, gates, at);
    next.part += kStorers;
    if (next.part >= kPieces) {
      next.part -= kPieces;
      ++next.tile;
      corner = CornerOf(tiles, tile + step, rank);
    }
    return true;
  };
  const auto store = [&](GatesOfLane& x, const Piece& at) {
    const int warp = at.part / kBoxes;
    Wait(&memory.ready[warp], static_cast<uint32_t>(at.tile) % 2);
    StoreGradients(memory.d_act[warp][at.part % kBoxes], x, gates, at);
    ArriveWarp(&memory.taken[warp]);
  };
  GatesOfLane even, odd;
  Piece even_at, odd_at;
  bool some = load(even, even_at);
  while (some) {
    const bool more = load(odd, odd_at);
    store(even, even_at);
    if (!more) break;
    some = load(even, even_at);
    store(odd, odd_at);
  }
}

__global__ void __launch_bounds__(kBackwardThreads, 1)
    GatedBackwardKernel(const __grid_constant__ BackwardArguments arguments,
                        const GatedTiles tiles) {
  BackwardMemory& memory = SharedMemory<BackwardMemory>();
  if (threadIdx.x == 0) memory.InitBarriers();
  SyncCluster();
  const uint32_t rank = ClusterRank();
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  if (group < kConsumers) {
    MultiplyTiles(memory, tiles, first, step, group);
  } else {
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0) - kWarps;
    if (warp > 0) {
      StoreTiles(memory, arguments.gates, tiles, first, step, rank, warp - 1);
    } else if (threadIdx.x % 32 == 0) {
      CopyTiles(memory, arguments.maps, tiles, first, step, rank);
    }
  }
  SyncCluster();
}

// The operands of one call, with their strides in elements: dy [tokens, inner], w [inner, columns],
// gate_up and d_gate_up [tokens, 2 columns].
struct GatedBackwardCall {
  int64_t tokens, columns, inner;
  MappedMatrix dy, w, gate_up, d_gate_up;
};

// False, with nothing enqueued, where the driver refuses a map; the launch's error is for the
// caller to look for.
bool LaunchGatedBackward(cudaStream_t stream, const GatedBackwardCall& call, int multiprocessors) {
  BackwardArguments arguments = {};
  if (!MakeMap(&arguments.maps.dy, call.dy, kBackwardRows, kDepth) ||
      !MakeMap(&arguments.maps.w, call.w, kDepth)) {
    return false;
  }
  arguments.gates = {static_cast<const __nv_bfloat16*>(call.gate_up.data),
                     static_cast<__nv_bfloat16*>(call.d_gate_up.data),
                     call.gate_up.stride,
                     call.d_gate_up.stride,
                     static_cast<int>(call.tokens),
                     static_cast<int>(call.columns)};
  LaunchClusters<BackwardMemory>(stream, &GatedBackwardKernel, kBackwardThreads, multiprocessors,
                                 arguments,
                                 GatedTiles::Of(call.tokens, kBackwardRows, call.columns,
                                                kBackwardColumns, call.inner, kDepth));
  return true;
}

}  // namespace
}  // namespace hopper

bool GatedLinearBackward(Stream& s, Tensor d_gate_up, Tensor dy, Tensor w, Tensor gate_up) {
  const int64_t tokens = dy.dims[0], columns = w.dims[1], inner = dy.dims[1];
  if (dy.dtype != DType::kBF16 || tokens == 0 || columns == 0 || inner == 0 || columns % 8 != 0) {
    return false;
  }
  const int64_t tiles = hopper::Parts(tokens, hopper::kBackwardRows) *
                        hopper::Parts(columns, hopper::kBackwardColumns);
  if (!hopper::TilesServe({d_gate_up, dy, w, gate_up}, tiles)) return false;
  const hopper::GatedBackwardCall call = {tokens,
                                          columns,
                                          inner,
                                          hopper::Mapped(dy),
                                          hopper::Mapped(w),
                                          hopper::Mapped(gate_up),
                                          hopper::Mapped(d_gate_up)};
  if (!hopper::LaunchGatedBackward(Native(s), call, Multiprocessors())) return false;
  Launched(s, "LinearBackwardInputSwiglu");
  return true;
}

}  // namespace stretto::cuda
