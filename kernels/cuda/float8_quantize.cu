// bf16 to FP8, with the transpose and the largest magnitude from one read.
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "kernels/cuda/float8_quantize.h"
#include "kernels/cuda/launch.h"

namespace stretto::cuda {
namespace {

// A block works on a tile of kRows x kColumns. A thread reads 4 rows of 8 columns: 16 bytes a row,
// and codes that make 4-byte words of the transpose.
constexpr int kThreads = 256;
constexpr int kRows = 128;
constexpr int kColumns = 64;
constexpr int kRowsEach = 4;
constexpr int kColumnsEach = 8;
constexpr int kAcross = kColumns / kColumnsEach;  // threads along a row of the tile
static_assert(kThreads == kAcross * kRows / kRowsEach);
// Words of a column in shared memory; the odd number spreads columns over the banks.
constexpr int kWords = kRows / 4 + 1;

struct Operands {
  const __nv_bfloat16* x;
  int64_t rows, columns, x_stride;
  uint8_t* q;  // or null
  int64_t q_stride;
  uint8_t* qt;  // or null
  int64_t qt_stride, qt_columns;
  const float* scale;  // not read without q and qt
  unsigned* amax;      // or null
};

// Two codes, that of the first argument in the low byte.
template <__nv_fp8_interpretation_t kFormat>
__device__ uint32_t Codes(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, kFormat);
}

// Magnitudes are compared as integers, which order them as numbers and put NaN on top: the order in
// which blocks come does not matter.
__device__ void FoldMax(unsigned* amax, unsigned most) {
  __shared__ unsigned warps[kThreads / 32];
  most = __reduce_max_sync(0xffffffffu, most);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned other : warps) most = max(most, other);
    // Most blocks find a larger one there already.
    if (most > *static_cast<volatile unsigned*>(amax)) atomicMax(amax, most);
  }
}

template <__nv_fp8_interpretation_t kFormat>
__global__ void __launch_bounds__(kThreads) QuantizeKernel(Operands o, int64_t tiles_across) {
  __shared__ uint32_t tile[kColumns * kWords];
  const int64_t row0 = blockIdx.x / tiles_across * kRows;
  const int64_t column0 = blockIdx.x % tiles_across * kColumns;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t column = column0 + across * kColumnsEach;
  const bool inside = column < o.columns;  // all 8: columns is a multiple of 16
  const bool quantize = o.q != nullptr || o.qt != nullptr;
  const float scale = quantize ? *o.scale : 0.0f;

  unsigned most = 0;
  uint32_t words[kColumnsEach] = {};  // the transpose: 4 rows of one column each
#pragma unroll
  for (int i = 0; i < kRowsEach; ++i) {
    const int64_t row = row0 + down * kRowsEach + i;
    if (!inside || row >= o.rows) continue;
    const uint4 raw = *reinterpret_cast<const uint4*>(o.x + row * o.x_stride + column);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // A bf16 is the upper half of an f32.
      const uint32_t low = pairs[j] << 16, high = pairs[j] & 0xffff0000u;
      most = max(most, max(low & 0x7fffffffu, high & 0x7fffffffu));
      codes[j] = Codes<kFormat>(__uint_as_float(low) * scale, __uint_as_float(high) * scale);
      words[2 * j] |= (codes[j] & 0xffu) << (8 * i);
      words[2 * j + 1] |= (codes[j] >> 8 & 0xffu) << (8 * i);
    }
    if (o.q != nullptr) {
      *reinterpret_cast<uint2*>(o.q + row * o.q_stride + column) =
          make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    }
  }
  if (o.amax != nullptr) FoldMax(o.amax, most);
  if (o.qt == nullptr) return;

#pragma unroll
  for (int j = 0; j < kColumnsEach; ++j) {
    tile[(across * kColumnsEach + j) * kWords + down] = words[j];
  }
  __syncthreads();
  // 16 bytes, which is 16 rows, of one column for each thread; what lies behind the rows is zero.
  constexpr int kSegments = kRows / 16;
#pragma unroll
  for (int i = 0; i < kColumns * kSegments / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int segment = index % kSegments, c = index / kSegments;
    const int64_t first = row0 + segment * 16;
    if (column0 + c >= o.columns || first >= o.qt_columns) continue;
    const uint32_t* const from = tile + c * kWords + segment * 4;
    *reinterpret_cast<uint4*>(o.qt + (column0 + c) * o.qt_stride + first) =
        make_uint4(from[0], from[1], from[2], from[3]);
  }
}

// Within bounds that keep the inverse and products of two inverses from leaving f32's range.
__device__ float PowerOfTwoBelow(float x) {
  const float bounded = fminf(fmaxf(x, 0x1p-60f), 0x1p60f);
  return __uint_as_float(__float_as_uint(bounded) & 0x7f800000u);
}

struct Scales {
  float *scale, *inverse, *history, *amax;
  const float* limit;
  int64_t count, steps, history_stride, inverse_stride;
};

__global__ void UpdateScalesKernel(Scales s) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= s.count) return;
  const float newest = s.amax[i];
  const bool finite = isfinite(newest);
  float largest = finite ? newest : 0.0f;
  if (s.history != nullptr) {
    float* const h = s.history + i * s.history_stride;
    float carried = newest;
    largest = 0;
    for (int64_t j = 0; j < s.steps; ++j) {
      const float old = h[j];
      if (finite) {
        h[j] = carried;
        carried = old;
      }
      largest = fmaxf(largest, h[j]);
    }
    s.amax[i] = 0;
  }
  if (largest > 0) {
    const float factor = PowerOfTwoBelow(s.limit[i] / largest);
    s.scale[i] = factor;
    s.inverse[i * s.inverse_stride] = 1 / factor;  // exact
  }
}

}  // namespace

void Float8Quantize(Stream& s, Tensor q, Tensor qt, Tensor x, Tensor scale, Tensor amax) {
  Operands o;
  o.x = reinterpret_cast<const __nv_bfloat16*>(x.data);
  o.rows = x.dims[0];
  o.columns = x.dims[1];
  o.x_stride = x.row_stride;
  o.q = reinterpret_cast<uint8_t*>(q.data);
  o.q_stride = q.row_stride;
  o.qt = reinterpret_cast<uint8_t*>(qt.data);
  o.qt_stride = qt.row_stride;
  o.qt_columns = qt.present() ? qt.dims[1] : 0;
  o.scale = reinterpret_cast<const float*>(scale.data);
  o.amax = reinterpret_cast<unsigned*>(amax.data);
  if (o.rows == 0 || o.columns == 0 || (!q.present() && !qt.present() && !amax.present())) return;
  const int64_t across = (o.columns + kColumns - 1) / kColumns;
  const auto blocks = static_cast<unsigned>((o.rows + kRows - 1) / kRows * across);
  if ((q.present() ? q.dtype : qt.dtype) == DType::kE5M2) {
    QuantizeKernel<__NV_E5M2><<<blocks, kThreads, 0, Native(s)>>>(o, across);
  } else {
    QuantizeKernel<__NV_E4M3><<<blocks, kThreads, 0, Native(s)>>>(o, across);
  }
  Launched(s, "Float8Quantize");
}

void Float8UpdateScales(Stream& s, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                        Tensor limit) {
  const int64_t count = amax.dims[0];
  if (count == 0) return;
  const auto data = [](const Tensor& t) { return reinterpret_cast<float*>(t.data); };
  const Scales scales = {.scale = data(scale),
                         .inverse = data(inverse),
                         .history = data(history),
                         .amax = data(amax),
                         .limit = data(limit),
                         .count = count,
                         .steps = history.present() ? history.dims[1] : 0,
                         .history_stride = history.row_stride,
                         .inverse_stride = inverse.row_stride};
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  UpdateScalesKernel<<<blocks, kThreads, 0, Native(s)>>>(scales);
  Launched(s, "Float8UpdateScales");
}

}  // namespace stretto::cuda
