// The backward pass of attention on Hopper's tensor cores, for heads of 64 or 128 numbers in bf16.
// Two kernels without a sum between thread blocks, so that results are the same on every run: one
// for the gradients of queries, a tile of which meets all keys that it sees, one for those of keys
// and values, a tile of which meets all queries that see it. Scores are computed in both; for that
// nothing but the results is written, and scratch memory grows with the tokens, not their square.
//
// Each multiprocessor has one thread block: one warpgroup that copies ahead into shared memory, and
// two that multiply, each for 64 rows of a tile of 128. Tiles of sequences of one length are taken
// in pairs, a long one and a short one, so that all have as much to do.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "kernels/cuda/attention_hopper.cuh"
#include "kernels/cuda/attention_hopper.h"
#include "kernels/cuda/hopper_maps.h"

namespace stretto::cuda {
namespace {

using hopper::SequenceRows;
using hopper::Shape;

constexpr int kStatRows = 32;   // of a block
constexpr int kStatHeads = 16;  // at a time

// delta[h][t] = sum of d_o o, log_sum[h][t] = lse log2(e), and of rows behind a sequence what gives
// them no weight. kDim / 8 lanes have a row of a head.
template <int kDim>
__global__ void __launch_bounds__(256)
    Statistics(const Shape shape, float* log_sum, float* delta, const __nv_bfloat16* d_o,
               const __nv_bfloat16* o, int64_t stride, const float* lse, int64_t lse_stride) {
  __shared__ float sums[kStatHeads][kStatRows + 1];
  __shared__ float logs[kStatHeads][kStatRows + 1];
  const int block = blockIdx.x * kStatRows;  // in the statistics
  int begin, length, at;                     // of the sequence; the block's first row in it
  if (shape.length > 0) {
    const int each = shape.TilesOfEach() * hopper::kTile;
    begin = block / each * shape.length;
    length = shape.length;
    at = block % each;
  } else {
    const int sequence = hopper::FindSequence(shape.q, shape.sequences, block / hopper::kTile);
    begin = shape.q.Begin(sequence);
    length = shape.q.Count(sequence);
    at = block - hopper::FirstTile(begin, sequence) * hopper::kTile;
  }
  constexpr int kLanes = kDim / 8;
  const int lane = threadIdx.x % kLanes;
  for (int h0 = blockIdx.y * kStatHeads; h0 < shape.heads; h0 += gridDim.y * kStatHeads) {
    for (int i = threadIdx.x / kLanes; i < kStatRows * kStatHeads; i += 256 / kLanes) {
      const int r = i / kStatHeads, h = i % kStatHeads;
      const bool here = at + r < length && h0 + h < shape.heads;
      float sum = 0;
      if (here) {
        const int64_t from = (begin + at + r) * stride + (h0 + h) * kDim + lane * 8;
        const auto x = *reinterpret_cast<const Pack<__nv_bfloat16>*>(d_o + from);
        const auto y = *reinterpret_cast<const Pack<__nv_bfloat16>*>(o + from);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum = fmaf(Widen(x.value[e]), Widen(y.value[e]), sum);
      }
      for (int offset = kLanes / 2; offset > 0; offset /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == 0) {
        const float log = here ? lse[(begin + at + r) * lse_stride + h0 + h] : -INFINITY;
        sums[h][r] = sum;
        logs[h][r] = log == -INFINITY ? INFINITY : log * hopper::kLog2E;
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

// Boxes of `rows` rows. False: the driver refuses.
bool MakeMap(CUtensorMap* map, const Tensor& t, int rows) {
  return hopper::MakeMap(map, {t.data, t.dims[0], t.dims[1] * t.dims[2], t.row_stride}, rows);
}

// Whether the library's kernels come before these.
bool LibraryFirst() {
  const char* const choice = std::getenv("STRETTO_ATTENTION_BACKWARD");
  return choice != nullptr && std::strcmp(choice, "cudnn") == 0;
}

}  // namespace

bool HopperAttentionBackward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor d_o, Tensor o,
                             Tensor lse, Tensor q, Tensor k, Tensor v, const AttentionShape& a,
                             bool library_refused) {
  if (q.dtype != DType::kBF16 || (q.dims[2] != 64 && q.dims[2] != 128)) return false;
  const bool self = a.cu_q.data == a.cu_k.data && a.len_q.data == a.len_k.data;
  if (a.causal && !self) return false;
  if (self && q.rows() != k.rows()) return false;
  if (q.rows() == 0 || k.rows() == 0) return false;
  for (const Tensor& t : {dq, dk, dv, d_o, o, q, k, v}) {
    if (!RowsAligned(t)) return false;
  }
  if (d_o.row_stride != o.row_stride) return false;
  if (std::max(q.rows(), k.rows()) > INT32_MAX / 2) return false;
  const int dim = static_cast<int>(q.dims[2]);
  if (!library_refused && LibraryFirst()) return false;
  if (hopper::EncodeTiled() == nullptr || !hopper::IsHopper()) return false;

  Shape shape = {};
  const auto rows = [](const Tensor& cu, const Tensor& len, const Tensor& operand) {
    return SequenceRows{Data<const int32_t>(cu), len.present() ? Data<const int32_t>(len) : nullptr,
                        operand.rows()};
  };
  shape.q = rows(a.cu_q, a.len_q, q);
  shape.k = rows(a.cu_k, a.len_k, k);
  shape.sequences = static_cast<int>(a.cu_q.rows() - 1);
  if (a.causal && !a.len_q.present()) shape.length = static_cast<int>(a.uniform);
  shape.heads = static_cast<int>(q.dims[1]);
  shape.kv_heads = static_cast<int>(k.dims[1]);
  shape.scale = static_cast<float>(a.scale);
  if (shape.sequences == 0) return false;
  const auto tiles = [&](const SequenceRows& side) -> int64_t {
    if (shape.length > 0) return int64_t{shape.sequences} * shape.TilesOfEach();
    return hopper::FirstTile(static_cast<int>(side.all), shape.sequences);
  };
  const auto items = [&](const SequenceRows& side) -> int64_t {
    if (shape.length > 0) return int64_t{shape.sequences} * ((shape.TilesOfEach() + 1) / 2);
    return tiles(side);
  };
  const int64_t q_items = items(shape.q) * shape.heads, k_items = items(shape.k) * shape.kv_heads;
  if (std::max(q_items, k_items) > INT32_MAX || tiles(shape.q) * hopper::kTile > INT32_MAX)
    return false;
  shape.padded = tiles(shape.q) * hopper::kTile;
  const int64_t bytes = 2 * shape.heads * shape.padded * int64_t{sizeof(float)};
  if (bytes > s.workspace().bytes) return false;
  auto* const log_sum = reinterpret_cast<float*>(s.workspace().data);
  float* const delta = log_sum + shape.heads * shape.padded;
  shape.log_sum = log_sum;
  shape.delta = delta;

  const auto output = [](const Tensor& t) {
    return hopper::Output{Data<__nv_bfloat16>(t), t.row_stride};
  };
  hopper::Backward call = {
      shape,     static_cast<int>(q_items), static_cast<int>(k_items), {}, output(dq), output(dk),
      output(dv)};
  const bool narrow = dim == 64 && a.causal;
  const int box = narrow ? hopper::kNarrowBoxRows : hopper::kWideBoxRows;
  if (!MakeMap(&call.maps.q, q, box) || !MakeMap(&call.maps.k, k, box) ||
      !MakeMap(&call.maps.v, v, box) || !MakeMap(&call.maps.d_o, d_o, box)) {
    return false;
  }
  const dim3 grid(static_cast<unsigned>(shape.padded / kStatRows),
                  static_cast<unsigned>((shape.heads + kStatHeads - 1) / kStatHeads));
  const auto statistics = dim == 64 ? &Statistics<64> : &Statistics<128>;
  statistics<<<grid, 256, 0, Native(s)>>>(shape, log_sum, delta, Data<const __nv_bfloat16>(d_o),
                                          Data<const __nv_bfloat16>(o), o.row_stride,
                                          Data<const float>(lse), lse.row_stride);
  Launched(s, "AttentionBackward (statistics)");
  narrow ? hopper::LaunchNarrow(s, call) : hopper::LaunchWide(s, call, dim, a.causal);
  return true;
}

}  // namespace stretto::cuda
