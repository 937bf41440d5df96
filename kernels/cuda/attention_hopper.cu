// The backward pass of causal self-attention on Hopper's tensor cores, for heads of 64 or 128
// numbers in bf16. Two kernels without a sum between thread blocks, so that results are the same on
// every run: one for the gradients of queries, a tile of which meets all keys that it sees, one for
// those of keys and values, a tile of which meets all queries that see it. Scores are computed in
// both; for that nothing but the results is written.
//
// Each multiprocessor has one thread block: one warpgroup that copies ahead into shared memory, and
// two that multiply, each for 64 rows of a tile of 128. Tiles are taken in pairs, a long one and a
// short one, so that all have as much to do.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/attention_hopper_tiles.cuh"
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

using namespace hopper_attention;  // NOLINT: this file is its only user

// ------------------------------------------------------------------------------- queries

// What the forward pass left of each query and head, [tokens, heads].
struct Lse {
  const float* data;
  int64_t stride;
};

// log_sum and delta of the thread's two rows of a warpgroup's 64, the first of which is `first` in
// the sequence; leaves those of all rows in memory for KeyGradients. Two lanes have a row.
template <int kParts>
__device__ void RowStatistics(const Shape& shape, const Lse& lse,
                              const uint8_t (&d_o)[kParts][kBlockBytes],
                              const uint8_t (&o)[kParts][kBlockBytes], const Tile& tile, int first,
                              int head, float (&log_sum)[2], float (&delta)[2]) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x % kWarpgroup / 2;
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kParts; ++p) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int chunk = (lane % 2 * 4 + c) ^ (row % 8);  // of 16 bytes, as they lie
      const int at = row * hopper::kRowBytes + chunk * 16;
      const auto x = *reinterpret_cast<const Pack<__nv_bfloat16>*>(d_o[p] + at);
      const auto y = *reinterpret_cast<const Pack<__nv_bfloat16>*>(o[p] + at);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum = fmaf(Widen(x.value[e]), Widen(y.value[e]), sum);
    }
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  float log = INFINITY;
  if (first + row < tile.length) {
    const float x = lse.data[(tile.row + first + row) * lse.stride + head];
    if (x != -INFINITY) log = x * kLog2E;
  } else {
    sum = 0;
  }
  if (lane % 2 == 0) {
    const int64_t at = head * shape.padded + tile.padded + first + row;
    shape.log_sum[at] = log;
    shape.delta[at] = sum;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = 2 * (lane / 4 + 8 * i);
    log_sum[i] = __shfl_sync(0xffffffffu, log, from);
    delta[i] = __shfl_sync(0xffffffffu, sum, from);
  }
}

// Registers hold the scores with two blocks of keys at once, for heads of 64 numbers, or with one
// and beside it the operands of 128.
template <int kDim>
using QueryMemory =
    std::conditional_t<kDim == 64, Memory<kDim, 3, 2, 3, 2>, Memory<kDim, 3, 1, 3, 1>>;

// Own tiles are queries, the other side's are keys. Scores are [queries, keys].
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradients(const Shape shape, const __grid_constant__ Maps maps, const Lse lse,
                   const Output dq) {
  using M = QueryMemory<kDim>;
  constexpr bool kInRegisters = kDim != 64;
  M& memory = SharedMemory<M>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  Ring<M::kOwn> own;
  Ring<M::kStages> other;
  if (group == kConsumers) {
    hopper::GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    const int shared_by = shape.heads / shape.kv_heads;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work work(shape, shape.heads, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        hopper::Wait(&memory.own_empty[own.place], own.parity ^ 1);
        hopper::ArriveExpecting(&memory.own_full[own.place], sizeof(memory.own[0]));
        LoadPair(memory.own[own.place], maps.q, maps.d_o, &memory.own_full[own.place],
                 tile.row + tile.index * kTile, work.head);
        LoadRows(memory.own[own.place][2], maps.o, &memory.own_full[own.place],
                 tile.row + tile.index * kTile, work.head);
        own.Next();
        for (int b = 0; b < (tile.index + 1) * kConsumers; b += M::kStageBlocks) {
          hopper::Wait(&memory.other_empty[other.place], other.parity ^ 1);
          hopper::ArriveExpecting(&memory.other_full[other.place], sizeof(memory.other[0]));
          LoadPair(memory.other[other.place], maps.k, maps.v, &memory.other_full[other.place],
                   tile.row + b * kBlock, work.head / shared_by);
          other.Next();
        }
      }
    }
    return;
  }

  hopper::TakeRegisters<240>();
  const Lanes lanes;
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work work(shape, shape.heads, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      const int first = tile.index * kTile + group * kBlock;  // row of the sequence
      hopper::Wait(&memory.own_full[own.place], own.parity);
      float log_sum[2], delta[2];
      RowStatistics<M::kParts>(shape, lse, memory.own[own.place][1][group],
                               memory.own[own.place][2][group], tile, first, work.head, log_sum,
                               delta);
      const auto& own_q = memory.own[own.place][0][group];
      const auto& own_d_o = memory.own[own.place][1][group];
      Operand q[kInRegisters ? M::kParts : 1], d_o[kInRegisters ? M::kParts : 1];
      if constexpr (kInRegisters) {
        LoadOperands(q, own_q);
        LoadOperands(d_o, own_d_o);
        ArriveTogether(&memory.own_empty[own.place], group);
      }

      float gradient[M::kParts][32];
      Clear(gradient);
      int before = -1;  // the place whose last products are on their way
      const int last = tile.index * kConsumers + group;  // the block of keys on the diagonal
      for (int b = 0; b <= last; b += M::kStageBlocks) {
        constexpr int kScores = 32 * M::kStageBlocks;
        hopper::Wait(&memory.other_full[other.place], other.parity);
        const auto& k = memory.other[other.place][0];
        const auto& v = memory.other[other.place][1];
        float p[kScores], ds[kScores];
        FenceProducts();
        if constexpr (kInRegisters) {
          Product(p, q, k[0]);
          CommitProducts();
          Product(ds, d_o, v[0]);
        } else {
          Product(p, own_q, k);
          CommitProducts();
          Product(ds, own_d_o, v);
        }
        CommitProducts();
        WaitProducts<1>();
        hopper::Pin(p);
        Pin(gradient);
        if (lanes.leader && before >= 0) hopper::Arrive(&memory.other_empty[before]);
#pragma unroll
        for (int j = 0; j < kScores; ++j) {
          p[j] = hopper::Exp2(fmaf(p[j], to_log2, -log_sum[j % 4 / 2]));
        }
        if (b + M::kStageBlocks > last) {
          const int behind = (b - last) * kBlock + lanes.column - lanes.row;
#pragma unroll
          for (int j = 0; j < kScores; ++j) {
            if (behind + j / 4 * 8 + j % 2 > j % 4 / 2 * 8) p[j] = 0;
          }
        }
        WaitProducts<0>();
        hopper::Pin(ds);
#pragma unroll
        for (int j = 0; j < kScores; ++j) ds[j] = p[j] * (ds[j] - delta[j % 4 / 2]);
        Operand operand[M::kStageBlocks];
#pragma unroll
        for (int i = 0; i < M::kStageBlocks; ++i) ToOperand(operand[i], ds, 32 * i);
        Pin(gradient);
        FenceProducts();
#pragma unroll
        for (int i = 0; i < M::kStageBlocks; ++i) Accumulate(gradient, operand[i], k[i]);
        CommitProducts();
        before = other.place;
        other.Next();
      }
      WaitProducts<0>();
      Pin(gradient);
      if (lanes.leader) hopper::Arrive(&memory.other_empty[before]);
      if (!kInRegisters && lanes.leader) hopper::Arrive(&memory.own_empty[own.place]);
      own.Next();
      // With single blocks the first warpgroup does not see the last.
      if (M::kStageBlocks == 1 && group + 1 < kConsumers) {
        if (lanes.leader) hopper::Arrive(&memory.other_empty[other.place]);
        other.Next();
      }
      StoreRows(dq, gradient, shape.scale, tile.row + first, tile.length - first, work.head);
    }
  }
}

// ------------------------------------------------------------------------------- keys and values

// Keys and values of 64 numbers a head stay in registers, of more in shared memory.
template <int kDim>
using KeyMemory = Memory<kDim, 2, kDim == 64 ? 1 : 2, kDim == 64 ? 8 : 2>;

// Own tiles are keys, the other side's are queries, of all heads that share the keys. Scores are
// [keys, queries].
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradients(const Shape shape, const __grid_constant__ Maps maps, const Output dk,
                 const Output dv) {
  using M = KeyMemory<kDim>;
  constexpr bool kInRegisters = kDim == 64;
  M& memory = SharedMemory<M>();
  if (threadIdx.x == 0) memory.InitBarriers();
  __syncthreads();
  const int group = threadIdx.x / kWarpgroup;
  const int shared_by = shape.heads / shape.kv_heads;
  Ring<M::kOwn> own;
  Ring<M::kStages> other;
  if (group == kConsumers) {
    hopper::GiveRegisters<24>();
    if (threadIdx.x % kWarpgroup != 0) return;
    for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
      const Work work(shape, shape.kv_heads, item);
      for (int which = 0; which < 2; ++which) {
        Tile tile;
        if (!work.Get(shape, which, &tile)) break;
        hopper::Wait(&memory.own_empty[own.place], own.parity ^ 1);
        hopper::ArriveExpecting(&memory.own_full[own.place], sizeof(memory.own[0]));
        LoadPair(memory.own[own.place], maps.k, maps.v, &memory.own_full[own.place],
                 tile.row + tile.index * kTile, work.head);
        own.Next();
        for (int h = 0; h < shared_by; ++h) {
          const int head = work.head * shared_by + h;
          for (int r = tile.index * kTile; r < tile.length; r += kBlock) {
            Barrier* const full = &memory.other_full[other.place];
            hopper::Wait(&memory.other_empty[other.place], other.parity ^ 1);
            constexpr int kStatBytes = kBlock * sizeof(float);
            hopper::ArriveExpecting(full, sizeof(memory.other[0]) + 2 * kStatBytes);
            LoadPair(memory.other[other.place], maps.q, maps.d_o, full, tile.row + r, head);
            const int64_t at = head * shape.padded + tile.padded + r;
            hopper::LoadBytes(memory.log_sum[other.place], shape.log_sum + at, kStatBytes, full);
            hopper::LoadBytes(memory.delta[other.place], shape.delta + at, kStatBytes, full);
            other.Next();
          }
        }
      }
    }
    return;
  }

  hopper::TakeRegisters<240>();
  const Lanes lanes;
  const float to_log2 = shape.scale * kLog2E;
  for (int item = blockIdx.x; item < shape.items; item += gridDim.x) {
    const Work work(shape, shape.kv_heads, item);
    for (int which = 0; which < 2; ++which) {
      Tile tile;
      if (!work.Get(shape, which, &tile)) break;
      hopper::Wait(&memory.own_full[own.place], own.parity);
      const auto& own_k = memory.own[own.place][0][group];
      const auto& own_v = memory.own[own.place][1][group];
      Operand k[kInRegisters ? M::kParts : 1], v[kInRegisters ? M::kParts : 1];
      if constexpr (kInRegisters) {
        LoadOperands(k, own_k);
        LoadOperands(v, own_v);
        ArriveTogether(&memory.own_empty[own.place], group);
      }
      float d_keys[M::kParts][32], d_values[M::kParts][32];
      Clear(d_keys);
      Clear(d_values);
      Operand weights, second;
      int before = -1;  // the place whose last products are on their way
      const int first = tile.index * kTile + group * kBlock;  // row of the sequence
      for (int h = 0; h < shared_by; ++h) {
        for (int r = tile.index * kTile; r < tile.length; r += kBlock) {
          hopper::Wait(&memory.other_full[other.place], other.parity);
          if (r < first) {      // the second warpgroup is not seen by the first block
            if (before >= 0) {  // which may have no place but that of the block before
              WaitProducts<0>();
              Pin(d_values);
              Pin(d_keys);
              if (lanes.leader) hopper::Arrive(&memory.other_empty[before]);
              before = -1;
            }
            if (lanes.leader) hopper::Arrive(&memory.other_empty[other.place]);
            other.Next();
            continue;
          }
          const auto& q = memory.other[other.place][0][0];
          const auto& d_o = memory.other[other.place][1][0];
          const float* const log_sum = memory.log_sum[other.place] + lanes.column;
          const float* const delta = memory.delta[other.place] + lanes.column;
          float p[32], ds[32];
          FenceProducts();
          if constexpr (kInRegisters) {
            Product(p, k, q);
            CommitProducts();
            Product(ds, v, d_o);
          } else {
            Product(p, own_k, q);
            CommitProducts();
            Product(ds, own_v, d_o);
          }
          CommitProducts();
          WaitProducts<1>();
          hopper::Pin(p);
          Pin(d_values);
          Pin(d_keys);
          if (lanes.leader && before >= 0) hopper::Arrive(&memory.other_empty[before]);
#pragma unroll
          for (int j = 0; j < kBlock / 8; ++j) {
            const float2 sum = *reinterpret_cast<const float2*>(log_sum + 8 * j);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[4 * j + e] =
                  hopper::Exp2(fmaf(p[4 * j + e], to_log2, e % 2 == 0 ? -sum.x : -sum.y));
            }
          }
          if (r == first) {
#pragma unroll
            for (int j = 0; j < 32; ++j) {
              if (lanes.row + j % 4 / 2 * 8 > j / 4 * 8 + lanes.column + j % 2) p[j] = 0;
            }
          }
          ToOperand(weights, p);
          Pin(d_values);
          FenceProducts();
          Accumulate(d_values, weights, d_o);
          CommitProducts();
          // Wide heads leave registers for one operand only.
          WaitProducts<kInRegisters ? 1 : 0>();
          hopper::Pin(ds);
          if constexpr (!kInRegisters) Pin(d_values);
          Operand& changes = kInRegisters ? second : weights;
#pragma unroll
          for (int j = 0; j < kBlock / 8; ++j) {
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
          before = other.place;
          other.Next();
        }
      }
      WaitProducts<0>();
      Pin(d_values);
      Pin(d_keys);
      if (lanes.leader && before >= 0) hopper::Arrive(&memory.other_empty[before]);
      if (!kInRegisters && lanes.leader) hopper::Arrive(&memory.own_empty[own.place]);
      own.Next();
      StoreRows(dk, d_keys, shape.scale, tile.row + first, tile.length - first, work.head);
      StoreRows(dv, d_values, 1.0f, tile.row + first, tile.length - first, work.head);
    }
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

// Boxes of one block. False: the driver refuses.
bool MakeMap(EncodeTiled encode, CUtensorMap* map, const Tensor& t) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(t.dims[1] * t.dims[2]),
                              static_cast<cuuint64_t>(t.dims[0])};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(t.row_stride * SizeOf(t.dtype))};
  const cuuint32_t box[] = {kBlock, kBlock}, step[] = {1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, t.data, sizes, strides, box, step,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// STRETTO_ATTENTION_BACKWARD=cudnn leaves the pass to cuDNN, to compare the two.
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

template <class M, class Kernel, class... Arguments>
void Launch(Stream& s, const char* name, Kernel kernel, int items, const Arguments&... arguments) {
  constexpr int kBytes = MemoryBytes<M>();
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const int blocks = std::min(items, Multiprocessors());
  kernel<<<blocks, kThreads, kBytes, Native(s)>>>(arguments...);
  Launched(s, name);
}

struct Operands {
  Tensor dq, dk, dv, lse;
};

template <int kDim>
void Run(Stream& s, Shape shape, const Maps& maps, const Operands& x, int per_head) {
  const auto output = [](const Tensor& t) { return Output{Data<__nv_bfloat16>(t), t.row_stride}; };
  shape.items = per_head * shape.heads;
  Launch<QueryMemory<kDim>>(s, "AttentionBackward (queries)", &QueryGradients<kDim>, shape.items,
                            shape, maps, Lse{Data<const float>(x.lse), x.lse.row_stride},
                            output(x.dq));
  shape.items = per_head * shape.kv_heads;
  Launch<KeyMemory<kDim>>(s, "AttentionBackward (keys)", &KeyGradients<kDim>, shape.items, shape,
                          maps, output(x.dk), output(x.dv));
}

}  // namespace

bool HopperAttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor d_o, Tensor o,
                             Tensor lse, Tensor q, Tensor k, Tensor v, const AttentionShape& a) {
  if (q.dtype != DType::kBF16 || (q.dims[2] != 64 && q.dims[2] != 128) || !a.causal) return false;
  if (a.cu_q.data != a.cu_k.data || q.rows() != k.rows() || q.rows() == 0) return false;
  for (const Tensor& t : {dq, dk, dv, d_o, o, q, k, v}) {
    if (!RowsAligned(t)) return false;
  }
  if (q.rows() > INT32_MAX / 2) return false;
  static const EncodeTiled encode = FindEncodeTiled();
  static const bool wanted = Wanted();
  if (encode == nullptr || !wanted || !IsHopper()) return false;

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
  if (per_head * shape.heads > INT32_MAX || tiles * kTile > INT32_MAX) return false;
  shape.padded = tiles * kTile;
  const int64_t bytes = 2 * shape.heads * shape.padded * int64_t{sizeof(float)};
  if (bytes > s.workspace().bytes) return false;
  shape.log_sum = reinterpret_cast<float*>(s.workspace().data);
  shape.delta = shape.log_sum + shape.heads * shape.padded;

  Maps maps;
  if (!MakeMap(encode, &maps.q, q) || !MakeMap(encode, &maps.k, k) ||
      !MakeMap(encode, &maps.v, v) || !MakeMap(encode, &maps.d_o, d_o) ||
      !MakeMap(encode, &maps.o, o)) {
    return false;
  }
  const Operands operands = {dq, dk, dv, lse};
  const auto run = q.dims[2] == 64 ? &Run<64> : &Run<128>;
  run(s, shape, maps, operands, static_cast<int>(per_head));
  return true;
}

}  // namespace stretto::cuda
