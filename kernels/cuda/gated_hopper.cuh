// What the kernels for gated linear layers on compute capability 9.0a share: clusters of thread
// blocks that stay and take tiles of a product, and when they serve.
#ifndef STRETTO_KERNELS_CUDA_GATED_HOPPER_CUH_
#define STRETTO_KERNELS_CUDA_GATED_HOPPER_CUH_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <string_view>

#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/hopper_maps.h"
#include "kernels/cuda/launch.h"

namespace stretto::cuda::hopper {

inline constexpr int kCluster = 2;  // thread blocks

inline int64_t Parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Tiles of a cluster, in the order in which they are taken: all columns of `group` rows of tiles,
// then the next rows. Those that run together should share operands that the L2 cache holds.
struct GatedTiles {
  int rows, columns, group;
  int blocks;  // of summed elements

  struct Place {
    int row, column;
  };

  // Of a block: `block_rows` of `tokens` times `block_columns` of `columns`. A group has as many
  // rows of tiles as keep the tokens' side of it, which is read for each of its columns, within a
  // quarter of the L2 cache.
  static GatedTiles Of(int64_t tokens, int block_rows, int64_t columns, int block_columns,
                       int64_t inner, int depth) {
    const int64_t bytes = int64_t{kCluster} * block_rows * inner * 2;
    const int64_t group = std::clamp<int64_t>((int64_t{14} << 20) / bytes, 4, 32);
    return {static_cast<int>(Parts(tokens, kCluster * block_rows)),
            static_cast<int>(Parts(columns, block_columns)), static_cast<int>(group),
            static_cast<int>(Parts(inner, depth))};
  }

  __host__ __device__ int Count() const { return rows * columns; }
  __device__ Place At(int tile) const {
    const int first = tile / (group * columns) * group, rest = tile % (group * columns);
    const int size = min(group, rows - first);
    return {first + rest % size, rest / size};
  }
};

__device__ inline float LowBf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float HighBf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// As many clusters as run at once, or as there are tiles; the launch's error is for the caller to
// look for. `Memory`: of a block.
template <class Memory, class Maps>
void LaunchClusters(cudaStream_t stream, void (*kernel)(Maps, GatedTiles), int threads,
                    int multiprocessors, const Maps& maps, const GatedTiles& tiles) {
  constexpr int kBytes = MemoryBytes<Memory>();
  static_assert(kBytes <= 227 * 1024);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(
      std::min(tiles.Count(), std::max(multiprocessors / kCluster, 1)) * kCluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, maps, tiles);
}

// The stride of a single row need not be one that maps take.
inline MappedMatrix Mapped(const Tensor& t) {
  const int64_t stride = t.dims[0] > 1 ? t.row_stride : Parts(t.dims[1], 8) * 8;
  return {t.data, t.dims[0], t.dims[1], stride};
}

// Whether copies take these matrices, this device has the instructions, and STRETTO_GATED or, where
// it leaves the choice, the number of tiles of a block speaks for these kernels.
inline bool TilesServe(std::initializer_list<Tensor> matrices, int64_t tiles) {
  const char* const variable = std::getenv("STRETTO_GATED");
  const std::string_view choice = variable == nullptr ? "" : variable;
  if (choice == "separate") return false;
  for (const Tensor& t : matrices) {
    if (!RowsAligned(t) || t.dims[0] > INT32_MAX / 2 || t.dims[1] > INT32_MAX / 2) return false;
  }
  if (tiles > INT32_MAX / 2 || (choice != "own" && tiles < Multiprocessors())) return false;
  return IsHopper() && EncodeTiled() != nullptr;
}

}  // namespace stretto::cuda::hopper

#endif  // STRETTO_KERNELS_CUDA_GATED_HOPPER_CUH_
