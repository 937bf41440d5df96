#include <algorithm>

#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

// A block is 32 threads across the columns by 8 down the rows.
constexpr int kAcross = 32;
constexpr int kDown = 8;
// Loads that a thread has in flight.
constexpr int kUnroll = 4;
// Blocks that the first stage aims at: one wave on 132 multiprocessors, which hold kResident each.
// A fixed number, so that results do not depend on the GPU.
constexpr int kResident = 5;
constexpr int64_t kBlocks = 132 * kResident;

// How the rows are cut into parts that are summed on their own.
struct Partition {
  int64_t column_blocks;
  int64_t part_rows;
  int64_t parts;

  Partition(int64_t rows, int64_t columns, int pack)
      : column_blocks((columns + kAcross * pack - 1) / (kAcross * pack)) {
    constexpr int64_t kStep = kDown * kUnroll;
    const int64_t wanted = std::max<int64_t>(1, kBlocks / std::max<int64_t>(1, column_blocks));
    part_rows = (rows + wanted - 1) / wanted;
    part_rows = std::max<int64_t>(1, (part_rows + kStep - 1) / kStep) * kStep;
    parts = (rows + part_rows - 1) / part_rows;
  }
};

// Elements that a thread reads at once.
template <class T>
int PackOf(const Tensor& dy) {
  const bool packs = RowsAligned(dy) && dy.row_elements() % Pack<T>::kSize == 0;
  return packs ? Pack<T>::kSize : 1;
}

template <class T, int kPack>
struct alignas(sizeof(T) * kPack) Elements {
  T value[kPack];
};

// partial[part][j] = sum over the part's rows of dy[t][j].
template <class T, int kPack>
__global__ void __launch_bounds__(kAcross* kDown, kResident)
    PartialSums(float* __restrict__ partial, const T* __restrict__ dy, int64_t stride, int64_t rows,
                int64_t columns, int64_t part_rows) {
  const int64_t first = int64_t{blockIdx.x} * kAcross * kPack;
  const int64_t column = first + threadIdx.x * kPack;
  const int64_t begin = blockIdx.y * part_rows;
  const int64_t end = min(begin + part_rows, rows);
  float sum[kPack] = {};
  if (column < columns) {
    const T* from = dy + column;
    int64_t t = begin + threadIdx.y;
    for (; t + (kUnroll - 1) * kDown < end; t += kUnroll * kDown) {
      Elements<T, kPack> loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        loaded[u] = *reinterpret_cast<const Elements<T, kPack>*>(from + (t + u * kDown) * stride);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[i] += Widen(loaded[u].value[i]);
      }
    }
    for (; t < end; t += kDown) {
      const auto loaded = *reinterpret_cast<const Elements<T, kPack>*>(from + t * stride);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[i] += Widen(loaded.value[i]);
    }
  }
  __shared__ float shared[kDown][kAcross * kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) shared[threadIdx.y][threadIdx.x * kPack + i] = sum[i];
  __syncthreads();
  for (int j = threadIdx.y * kAcross + threadIdx.x; j < kAcross * kPack; j += kAcross * kDown) {
    if (first + j >= columns) continue;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kDown; ++i) total += shared[i][j];
    partial[blockIdx.y * columns + first + j] = total;
  }
}

constexpr int kFinishDown = 32;

// db[j] (acc)= sum over parts of partial[part][j].
__global__ void __launch_bounds__(kAcross* kFinishDown)
    FinishSums(float* __restrict__ db, const float* __restrict__ partial, int64_t parts,
               int64_t columns, bool acc) {
  const int64_t column = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  double sum = 0;
  if (column < columns) {
    for (int64_t part = threadIdx.y; part < parts; part += kFinishDown) {
      sum += partial[part * columns + column];
    }
  }
  __shared__ double shared[kFinishDown][kAcross];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  double total = acc ? db[column] : 0;
#pragma unroll
  for (int i = 0; i < kFinishDown; ++i) total += shared[i][threadIdx.x];
  db[column] = static_cast<float>(total);
}

template <class T, int kPack>
void LaunchPartialSums(Stream& s, float* partial, const Tensor& dy, const Partition& cut) {
  const dim3 grid(static_cast<unsigned>(cut.column_blocks), static_cast<unsigned>(cut.parts));
  PartialSums<T, kPack><<<grid, dim3(kAcross, kDown), 0, Native(s)>>>(
      partial, Data<T>(dy), dy.row_stride, dy.rows(), dy.row_elements(), cut.part_rows);
  Launched(s, "ColumnSums");
}

// Blocks go across the columns and stride down the rows.
template <class T>
__global__ void __launch_bounds__(kAcross* kDown)
    AddRow(T* __restrict__ y, int64_t stride, const T* __restrict__ bias, int64_t rows,
           int64_t columns) {
  const int64_t column = int64_t{blockIdx.x} * kAcross + threadIdx.x;
  if (column >= columns) return;
  const float add = Widen(bias[column]);
  for (int64_t t = int64_t{blockIdx.y} * kDown + threadIdx.y; t < rows; t += gridDim.y * kDown) {
    T* to = y + t * stride + column;
    *to = Narrow<T>(Widen(*to) + add);
  }
}

}  // namespace

int64_t ColumnSumsScratch(const Tensor& dy) {
  int64_t bytes = 0;
  ForModelType(dy.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Partition cut(dy.rows(), dy.row_elements(), PackOf<T>(dy));
    bytes = cut.parts * dy.row_elements() * int64_t{sizeof(float)};
  });
  return bytes;
}

void ColumnSums(Stream& s, Tensor db, Tensor dy, bool acc, std::byte* scratch) {
  const int64_t columns = db.elements();
  if (columns == 0) return;
  float* partial = reinterpret_cast<float*>(scratch);
  int64_t parts = 0;
  ForModelType(dy.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int pack = PackOf<T>(dy);
    const Partition cut(dy.rows(), columns, pack);
    parts = cut.parts;
    if (parts == 0) return;
    if (pack == 1) {
      LaunchPartialSums<T, 1>(s, partial, dy, cut);
    } else {
      LaunchPartialSums<T, Pack<T>::kSize>(s, partial, dy, cut);
    }
  });
  const auto blocks = static_cast<unsigned>((columns + kAcross - 1) / kAcross);
  FinishSums<<<blocks, dim3(kAcross, kFinishDown), 0, Native(s)>>>(Data<float>(db), partial, parts,
                                                                   columns, acc);
  Launched(s, "ColumnSums");
}

void AddToRows(Stream& s, Tensor y, Tensor bias) {
  if (y.elements() == 0) return;
  ForModelType(y.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t columns = y.row_elements();
    const int64_t down = std::min<int64_t>((y.rows() + kDown - 1) / kDown, 1024);
    const dim3 grid(static_cast<unsigned>((columns + kAcross - 1) / kAcross),
                    static_cast<unsigned>(down));
    AddRow<T><<<grid, dim3(kAcross, kDown), 0, Native(s)>>>(Data<T>(y), y.row_stride, Data<T>(bias),
                                                            y.rows(), columns);
    Launched(s, "AddToRows");
  });
}

}  // namespace stretto::cuda
