// What host code of kernels for compute capability 9.0a shares: whether there is such a GPU, and
// the maps that the copy engine reads and writes matrices by.
#ifndef STRETTO_KERNELS_CUDA_HOPPER_MAPS_H_
#define STRETTO_KERNELS_CUDA_HOPPER_MAPS_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace stretto::cuda::hopper {

// The driver's function, null where it has none.
inline decltype(&cuTensorMapEncodeTiled) EncodeTiled() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      function = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// A row-major bf16 matrix, `stride` elements from row to row.
struct MappedMatrix {
  void* data;
  int64_t rows, columns, stride;
};

// Boxes of `box_rows` rows of 64 columns, in the 128-byte swizzle, or of 32 in the 64-byte swizzle.
// The data begins at a multiple of 16 bytes, and so does every row. False: the driver refuses.
inline bool MakeMap(CUtensorMap* map, const MappedMatrix& m, int box_rows, int box_columns = 64) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[] = {1, 1};
  return EncodeTiled()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, m.data, sizes, strides, box, step,
                       CU_TENSOR_MAP_INTERLEAVE_NONE,
                       box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Whether the current device runs code for 9.0a.
inline bool IsHopper() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0;
}

}  // namespace stretto::cuda::hopper

#endif  // STRETTO_KERNELS_CUDA_HOPPER_MAPS_H_
