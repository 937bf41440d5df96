// Token embedding. The backward pass sorts the tokens by id, so that the rows to be summed lie
// behind each other, and adds them in fixed pieces: the order of additions depends on the ids
// alone.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <cub/device/device_radix_sort.cuh>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/support.cuh"

namespace stretto::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // accesses to rows that a thread has under way

// N elements as they come from memory. In this form they wait in as few registers as they need,
// which Vec's separate values do not.
template <class T, int N>
using Raw = typename WordOf<N * sizeof(T)>::type;

template <class T, int N>
__device__ Raw<T, N> LoadRaw(const T* p) {
  return *reinterpret_cast<const Raw<T, N>*>(p);
}
template <class T, int N>
__device__ Vec<T, N> Elements(Raw<T, N> raw) {
  Vec<T, N> v;
  memcpy(&v, &raw, sizeof(v));
  return v;
}

// One warp for each token.
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    ForwardKernel(Rows<T> y, int64_t tokens, int columns, const int32_t* ids, Rows<T> table,
                  int64_t table_rows, const int32_t* positions, Rows<T> places, int64_t place_rows,
                  DeviceFault* fault) {
  const int64_t t = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  if (t >= tokens) return;
  const int lane = threadIdx.x % 32;
  const int32_t id = ids[t];
  const int32_t position = positions == nullptr ? 0 : positions[t];
  if (id < 0 || id >= table_rows) {
    if (lane == 0) Report(fault, DeviceFault::kEmbeddingId, id, t, table_rows);
    return;
  }
  if (positions != nullptr && (position < 0 || position >= place_rows)) {
    if (lane == 0) Report(fault, DeviceFault::kEmbeddingPosition, position, t, place_rows);
    return;
  }
  const T* from = table.At(id, 0);
  const T* add = positions == nullptr ? nullptr : places.At(position, 0);
  T* to = y.At(t, 0);
  for (int first = lane * N; first < columns; first += kInFlight * 32 * N) {
    Raw<T, N> row[kInFlight], more[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int column = first + u * 32 * N;
      if (column >= columns) continue;
      row[u] = LoadRaw<T, N>(from + column);
      if (add != nullptr) more[u] = LoadRaw<T, N>(add + column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int column = first + u * 32 * N;
      if (column >= columns) continue;
      if (add == nullptr) {
        *reinterpret_cast<Raw<T, N>*>(to + column) = row[u];
        continue;
      }
      Vec<T, N> x = Elements<T, N>(row[u]);
      const Vec<T, N> y = Elements<T, N>(more[u]);
#pragma unroll
      for (int i = 0; i < N; ++i) x.value[i] = Narrow<T>(Widen(x.value[i]) + Widen(y.value[i]));
      *reinterpret_cast<Vec<T, N>*>(to + column) = x;
    }
  }
}

// Tokens in the order in which they are summed: by id, tokens of one id in their own order. `count`
// of them, cut into pieces of `length`. Ids outside the table come last, as the id `rows`.
struct Order {
  const uint32_t* ids = nullptr;
  const int32_t* tokens = nullptr;
  int count = 0;
  int length = 0;
  uint32_t rows = 0;  // of the table

  __host__ __device__ int Pieces() const { return (count + length - 1) / length; }
  __device__ int End(int piece) const { return min(count, (piece + 1) * length); }
  // Whether the id at the edge in front of position `at` goes on behind it.
  __device__ bool Continues(int at) const { return at > 0 && at < count && ids[at - 1] == ids[at]; }
};

__global__ void __launch_bounds__(kThreads)
    NumberKernel(uint32_t* keys, int32_t* tokens, const int32_t* ids, int count, uint32_t rows,
                 DeviceFault* fault) {
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= count) return;
  const uint32_t id = ids[t];  // a negative one becomes a large one
  if (id >= rows) Report(fault, DeviceFault::kEmbeddingGradient, ids[t], t, rows);
  keys[t] = min(id, rows);
  tokens[t] = t;
}

// One warp for each piece and 32 N columns. Ids that lie wholly within the piece are finished. What
// belongs to an id of an earlier piece as well goes to row 2 piece of `partials`, what goes on in
// the next piece to row 2 piece + 1 (to the former when it does both).
template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    PiecesKernel(Rows<float> table, Rows<T> dy, int columns, int tiles, Order order,
                 Rows<float> partials, bool acc) {
  const int warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const int piece = warp / tiles;
  if (piece >= order.Pieces()) return;
  const int lane = threadIdx.x % 32;
  const int column = warp % tiles * 32 * N + lane * N;
  const bool inside = column < columns;
  const int begin = piece * order.length, end = order.End(piece);

  float sum[N] = {};
  uint32_t current = order.ids[begin];
  bool continued = order.Continues(begin);
  const auto finish = [&](bool continues) {
    if (!inside || current >= order.rows) return;
    if (continued || continues) {
      StoreVec<N>(partials.At(2 * piece + (continued ? 0 : 1), column), sum, N);
      return;
    }
    float* to = table.At(current, column);
    if (acc) {
      float before[N];
      LoadVec(before, to, N);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += before[i];
    }
    StoreVec<N>(to, sum, N);
  };

  for (int at = begin; at < end; at += 32) {
    // Loads beyond the end repeat the last row, and lanes beyond the columns read the first ones:
    // without conditions, all of them are under way at once.
    const int n = min(32, end - at);
    const int mine = at + min(lane, n - 1);
    const uint32_t my_id = order.ids[mine];
    const int32_t my_token = order.tokens[mine];
    for (int first = 0; first < n; first += kInFlight) {
      Raw<T, N> row[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int32_t token = __shfl_sync(0xffffffffu, my_token, first + u);
        row[u] = LoadRaw<T, N>(dy.At(token, inside ? column : 0));
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const uint32_t id = __shfl_sync(0xffffffffu, my_id, first + u);
        if (first + u >= n) break;
        if (id != current) {
          finish(false);
          current = id;
          continued = false;
#pragma unroll
          for (int i = 0; i < N; ++i) sum[i] = 0;
        }
        const Vec<T, N> x = Elements<T, N>(row[u]);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += Widen(x.value[i]);
      }
    }
  }
  finish(order.Continues(end));
}

// Adds the parts of ids that lie in several pieces. One block for each piece and 32 N columns; it
// has work when an id begins in the piece and goes on in the next. Its warps add the parts of equal
// shares of the pieces.
constexpr int kJoinWarps = 4;
template <int N>
__global__ void __launch_bounds__(32 * kJoinWarps)
    JoinKernel(Rows<float> table, int columns, Order order, Rows<float> partials, bool acc) {
  __shared__ float sums[kJoinWarps][32 * N];
  const int piece = blockIdx.x;
  const int begin = piece * order.length, end = order.End(piece);
  if (!order.Continues(end)) return;
  const uint32_t id = order.ids[end];
  if (id >= order.rows || (order.ids[begin] == id && order.Continues(begin))) return;

  // The last piece that begins with the id: most often the next one, else by bisection.
  int last = piece + 1, behind = piece + 2;
  if (behind < order.Pieces() && order.ids[behind * order.length] == id) {
    behind = order.Pieces();
    while (behind - last > 1) {
      const int middle = (last + behind) / 2;
      if (order.ids[middle * order.length] == id) {
        last = middle;
      } else {
        behind = middle;
      }
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = blockIdx.y * 32 * N + lane * N;
  const bool inside = column < columns;
  const int share = (last - piece + kJoinWarps - 1) / kJoinWarps;
  const int from = piece + 1 + warp * share, to = min(last + 1, from + share);
  float sum[N] = {};
  if (inside) {
    if (warp == 0) LoadVec(sum, partials.At(2 * piece + 1, column), N);
    for (int first = from; first < to; first += 2 * kInFlight) {
      Vec<float, N> part[2 * kInFlight] = {};
#pragma unroll
      for (int u = 0; u < 2 * kInFlight; ++u) {
        if (first + u >= to) continue;
        part[u] = *reinterpret_cast<const Vec<float, N>*>(partials.At(2 * (first + u), column));
      }
#pragma unroll
      for (int u = 0; u < 2 * kInFlight; ++u) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += part[u].value[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[warp][i * 32 + lane] = sum[i];
  __syncthreads();
  if (warp != 0 || !inside) return;
  float* row = table.At(id, column);
#pragma unroll
  for (int w = 1; w < kJoinWarps; ++w) {
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += sums[w][i * 32 + lane];
  }
  if (acc) {
    float before[N];
    LoadVec(before, row, N);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += before[i];
  }
  StoreVec<N>(row, sum, N);
}

int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// local[t] = ids[t] - first where that is one of `rows` rows, `rows` elsewhere; one thread each.
__global__ void LocalIdsKernel(int32_t* local, const int32_t* ids, int64_t tokens, int64_t first,
                               int64_t rows, int64_t all, DeviceFault::Code code,
                               DeviceFault* fault) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  const int64_t id = ids[t], row = id - first;
  if (id < 0 || id >= all) Report(fault, code, id, t, all);
  local[t] = static_cast<int32_t>(row >= 0 && row < rows ? row : rows);
}

class CudaEmbedding final : public EmbeddingKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor ids, Tensor table, Tensor positions,
               Tensor positions_table) const override {
    if (y.rows() == 0 || y.dims[1] == 0) return;
    if (!positions_table.present()) positions = Tensor();
    ForModelType(y.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      const auto launch = [&](auto kernel) {
        kernel<<<(y.rows() + kWarps - 1) / kWarps, kThreads, 0, Native(s)>>>(
            Rows<T>(y), y.rows(), y.dims[1], Data<int32_t>(ids), Rows<T>(table), table.rows(),
            Data<int32_t>(positions), Rows<T>(positions_table), positions_table.rows(), s.fault());
        Launched(s, "Embedding");
      };
      constexpr int kSize = Pack<T>::kSize;
      if (y.dims[1] % kSize == 0 && RowsAligned(y) && RowsAligned(table) &&
          RowsAligned(positions_table)) {
        launch(ForwardKernel<T, kSize>);
      } else {
        launch(ForwardKernel<T, 1>);
      }
    });
  }

  void LocalIds(Stream& s, Tensor local, Tensor ids, int64_t first, int64_t rows, int64_t all,
                const char* what) const override {
    if (ids.rows() == 0) return;
    const bool position = std::strcmp(what, "position") == 0;
    LocalIdsKernel<<<static_cast<unsigned>((ids.rows() + kThreads - 1) / kThreads), kThreads, 0,
                     Native(s)>>>(
        Data<int32_t>(local), Data<int32_t>(ids), ids.rows(), first, rows, all,
        position ? DeviceFault::kEmbeddingPosition : DeviceFault::kEmbeddingId, s.fault());
    Launched(s, "LocalIds");
  }

  void Backward(Stream& s, Tensor dtable, Tensor dy, Tensor ids, bool acc) const override {
    const int64_t columns = dy.dims[1];
    if (!acc && dtable.elements() > 0) {
      const int64_t row_bytes = columns * SizeOf(dtable.dtype);
      const int64_t pitch = dtable.row_stride * SizeOf(dtable.dtype);
      if (dtable.contiguous()) {
        cudaMemsetAsync(dtable.data, 0, dtable.rows() * row_bytes, Native(s));
      } else {
        cudaMemset2DAsync(dtable.data, pitch, 0, row_bytes, dtable.rows(), Native(s));
      }
      Launched(s, "EmbeddingBackward");
    }
    if (dy.rows() == 0) return;
    ForModelType(dy.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int kSize = Pack<T>::kSize;
      if (columns % kSize == 0 && RowsAligned(dy) && RowsAligned(dtable)) {
        Sum<T, kSize, 4>(s, dtable, dy, ids, acc);
      } else {
        Sum<T, 1, 1>(s, dtable, dy, ids, acc);
      }
    });
  }

 private:
  // N and M: columns of a lane, in pieces and when they are joined.
  template <class T, int N, int M>
  static void Sum(Stream& s, const Tensor& dtable, const Tensor& dy, const Tensor& ids, bool acc) {
    constexpr const char* kName = "EmbeddingBackward";
    const int count = static_cast<int>(dy.rows());
    const int columns = static_cast<int>(dy.dims[1]);
    Order order;
    order.count = count;
    order.rows = static_cast<uint32_t>(std::min(dtable.rows(), int64_t{1} << 31));
    const int bits = std::max(1, static_cast<int>(std::bit_width(order.rows)));

    size_t sort_bytes = 0;
    const auto sort = [&](void* memory, const uint32_t* keys_in, uint32_t* keys,
                          const int32_t* tokens_in, int32_t* tokens) {
      const cudaError_t error = cub::DeviceRadixSort::SortPairs(
          memory, sort_bytes, keys_in, keys, tokens_in, tokens, count, 0, bits, Native(s));
      if (error != cudaSuccess) {
        s.Fail(absl::InternalError(
            absl::StrCat("CUDA kernel ", kName, " on ", Name(s.device()),
                         " could not sort its ids: ", cudaGetErrorName(error))));
      }
      return error == cudaSuccess;
    };
    if (!sort(nullptr, nullptr, nullptr, nullptr, nullptr)) return;

    // Pieces are short enough to fill the device, yet few enough for their partial sums (two rows
    // each, whole accesses) to fit beside the sort.
    constexpr int64_t kPieces = 1024;
    const int64_t list = Aligned(count * int64_t{4});
    const int64_t used = 4 * list + Aligned(static_cast<int64_t>(sort_bytes));
    const int64_t stride = (columns + 3) / 4 * 4;
    const int64_t room = std::max<int64_t>(1, (s.workspace().bytes - used) / (2 * stride * 4));
    order.length = 16;
    while (order.Pieces() > std::min(kPieces, room)) order.length *= 2;
    const int64_t pieces = order.Pieces();

    std::byte* memory = Workspace(s, used + pieces * 2 * stride * 4, kName);
    if (memory == nullptr) return;
    const auto at = [&](int64_t i) { return memory + i * list; };
    auto* keys_in = reinterpret_cast<uint32_t*>(at(0));
    auto* keys = reinterpret_cast<uint32_t*>(at(1));
    auto* tokens_in = reinterpret_cast<int32_t*>(at(2));
    auto* tokens = reinterpret_cast<int32_t*>(at(3));
    const Tensor partials = Tensor::Of(memory + used, DType::kF32, {2 * pieces, stride});
    order.ids = keys;
    order.tokens = tokens;

    NumberKernel<<<(count + kThreads - 1) / kThreads, kThreads, 0, Native(s)>>>(
        keys_in, tokens_in, Data<int32_t>(ids), count, order.rows, s.fault());
    Launched(s, kName);
    if (!sort(at(4), keys_in, keys, tokens_in, tokens) || columns == 0) return;

    const int tiles = (columns + 32 * N - 1) / (32 * N);
    PiecesKernel<T, N><<<(pieces * tiles + kWarps - 1) / kWarps, kThreads, 0, Native(s)>>>(
        Rows<float>(dtable), Rows<T>(dy), columns, tiles, order, Rows<float>(partials), acc);
    Launched(s, kName);
    const dim3 grid(pieces, (columns + 32 * M - 1) / (32 * M));
    JoinKernel<M><<<grid, 32 * kJoinWarps, 0, Native(s)>>>(Rows<float>(dtable), columns, order,
                                                           Rows<float>(partials), acc);
    Launched(s, kName);
  }
};

}  // namespace

const EmbeddingKernels* Embedding() {
  static const CudaEmbedding kernels;
  return &kernels;
}

}  // namespace stretto::cuda
