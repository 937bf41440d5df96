// Matrix products on cuBLASLt, which is opened at first use.
//
// They are deterministic: a product that is cut along its inner dimension is summed up from f32
// pieces in a fixed order. f32 operands are multiplied in f32, never in TF32.
#ifndef STRETTO_KERNELS_CUDA_MATMUL_H_
#define STRETTO_KERNELS_CUDA_MATMUL_H_

#include <cublasLt.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "absl/functional/function_ref.h"
#include "kernels/cuda/tuning.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::cuda {

// A row-major [r, c] operand is to cuBLASLt, which is column-major, a c x r matrix.
struct Matrix {
  std::byte* data = nullptr;
  int64_t ld = 0;

  Matrix() = default;
  explicit Matrix(const Tensor& t)
      : data(t.data), ld(std::max({t.row_stride, t.row_elements(), int64_t{1}})) {}
};

// d [m x n] = op(a) op(b) + acc * d, column-major, then the epilogue. m, n, k > 0.
struct Product {
  Matrix a, b, d;
  bool trans_a = false, trans_b = false;
  int64_t m = 0, n = 0, k = 0;
  cudaDataType_t type = CUDA_R_32F, output_type = CUDA_R_32F;  // of a and b, of d
  bool acc = false;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void* bias = nullptr;
  Matrix aux;
  // FP8 operands only. Each is multiplied by its factor, an f32 on the device.
  std::optional<cudaDataType_t> type_b;  // where b's type is not a's
  const float* factor_a = nullptr;
  const float* factor_b = nullptr;
  bool fast_accumulation = false;  // sums in the tensor cores' own precision

  cudaDataType_t TypeOfB() const { return type_b.value_or(type); }
};

// The largest power of two, up to 256, that the address is a multiple of.
int64_t AlignmentOf(const void* pointer);

// cuBLASLt, opened as Matmul does.
LibraryInfo DescribeCublasLt();

struct CublasLt;     // the library and its handle for one device
struct Descriptors;  // a product in cuBLASLt's terms

// The products of one operation, enqueued on its stream.
class Matmul {
 public:
  // Fails the stream when cuBLASLt is missing. `op` is named in errors.
  Matmul(Stream& s, const char* op);
  bool ok() const;

  // Bytes at the beginning of the stream's workspace that belong to cuBLASLt.
  int64_t workspace_bytes() const { return workspace_bytes_; }

  // A rehearsal takes the time of the real thing but leaves an accumulating output as it is.
  void Run(const Product& p, bool rehearsal = false);

  // The same for a product with an epilogue. `finish(rehearsal)` completes it;
  // `separate(rehearsal)` is another way to do all of it, to fall back on where cuBLASLt lacks the
  // case or where tuning found it faster. Before anything is measured the epilogue is used if
  // `prefer_epilogue`.
  using Work = absl::FunctionRef<void(bool)>;
  void RunEpilogue(const Product& p, bool prefer_epilogue, Work separate, Work finish);
  void RunEpilogue(const Product& p, Work separate) {
    RunEpilogue(p, true, separate, [](bool) {});
  }

 private:
  ProductKey KeyOf(const Product& p) const;
  std::optional<ProductPlan> Known(const ProductKey& key, Descriptors& descriptors);
  std::optional<ProductPlan> Choose(const Product& p, Descriptors& descriptors);
  int Ask(const Product& p, Descriptors& descriptors, int wanted,
          cublasLtMatmulHeuristicResult_t* results);
  cublasStatus_t Enqueue(const Product& p, Descriptors& descriptors, const ProductPlan& plan,
                         bool rehearsal);
  void Fail(const Product& p, const char* why);

  Stream& stream_;
  const char* op_;
  const CublasLt& lt_;
  int64_t workspace_bytes_;
};

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_MATMUL_H_
