// Products of FP8 operands on cuBLASLt.
#include <cstdint>

#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/float8_quantize.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul.h"

namespace stretto::cuda {
namespace {

cudaDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kE4M3:
      return CUDA_R_8F_E4M3;
    case DType::kE5M2:
      return CUDA_R_8F_E5M2;
    case DType::kBF16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

class CudaFloat8 final : public Float8Kernels {
 public:
  void AbsMax(Stream& s, Tensor amax, Tensor x) const override {
    Float8Quantize(s, {}, {}, x, {}, amax);
  }

  void Quantize(Stream& s, Tensor q, Tensor qt, Tensor x, Tensor scale,
                Tensor amax) const override {
    Float8Quantize(s, q, qt, x, scale, amax);
  }

  // Column-major, which cuBLASLt is: d^T [n x m] = (b as in k x n)^T (a as in k x m).
  void Product(Stream& s, Tensor d, Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b,
               Tensor bias, bool acc, bool fast) const override {
    if (d.elements() == 0) return;
    if (a.dims[1] == 0) {
      if (!acc) Elementwise()->Zero(s, d);
      if (bias.present()) AddToRows(s, d, bias);
      return;
    }
    Matmul matmul(s, "Float8Product");
    if (!matmul.ok()) return;
    stretto::cuda::Product p;
    p.a = Matrix(b);
    p.b = Matrix(a);
    p.d = Matrix(d);
    p.trans_a = true;
    p.m = d.dims[1];
    p.n = d.dims[0];
    p.k = a.dims[1];
    p.type = TypeOf(b.dtype);
    p.type_b = TypeOf(a.dtype);
    p.output_type = TypeOf(d.dtype);
    p.factor_a = reinterpret_cast<const float*>(inverse_b.data);
    p.factor_b = reinterpret_cast<const float*>(inverse_a.data);
    p.fast_accumulation = fast;
    p.acc = acc;
    if (!bias.present()) return matmul.Run(p);
    stretto::cuda::Product biased = p;
    biased.epilogue = CUBLASLT_EPILOGUE_BIAS;
    biased.bias = bias.data;
    matmul.RunEpilogue(biased, [&](bool rehearsal) {
      matmul.Run(p, rehearsal);
      AddToRows(s, d, bias);
    });
  }

  void UpdateScales(Stream& s, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                    Tensor limit) const override {
    Float8UpdateScales(s, scale, inverse, history, amax, limit);
  }
};

}  // namespace

const Float8Kernels* Float8Products() {
  static const CudaFloat8 kernels;
  return &kernels;
}

}  // namespace stretto::cuda
