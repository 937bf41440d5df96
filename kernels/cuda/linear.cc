// Linear layers: which products, which epilogues, and what is done around them. The comments at the
// products show the column-major view that cuBLASLt has of the same memory.
#include <cstdint>

#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/gated_hopper.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/matmul.h"

namespace stretto::cuda {
namespace {

constexpr int64_t kAlignment = 256;

cudaDataType_t TypeOf(const Tensor& t) {
  return t.dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F;
}

// cuBLASLt stores and reads pre-activations under these conditions (whole groups of 8, so that it
// cannot touch what lies between rows), and computes GELU in the tanh form with the GPU's
// approximate tanh, which is good enough for bf16 only.
bool GeluEpilogueServes(const Tensor& pre) {
  return pre.dtype == DType::kBF16 && pre.dims[1] % 8 == 0 && pre.row_stride % 8 == 0 &&
         AlignmentOf(pre.data) >= 16;
}

// y^T [out x tokens] = (w as in x out)^T (x as in x tokens).
Product ForwardProduct(const Tensor& y, const Tensor& x, const Tensor& w) {
  Product p;
  p.a = Matrix(w);
  p.b = Matrix(x);
  p.d = Matrix(y);
  p.trans_a = true;
  p.m = y.dims[1];
  p.n = y.dims[0];
  p.k = x.dims[1];
  p.type = p.output_type = TypeOf(y);
  return p;
}

// dx^T [in x tokens] (acc)= (w as in x out) (dy as out x tokens).
Product BackwardInputProduct(const Tensor& dx, const Tensor& dy, const Tensor& w, bool acc) {
  Product p;
  p.a = Matrix(w);
  p.b = Matrix(dy);
  p.d = Matrix(dx);
  p.m = dx.dims[1];
  p.n = dx.dims[0];
  p.k = dy.dims[1];
  p.type = p.output_type = TypeOf(dx);
  p.acc = acc;
  return p;
}

// dw^T [in x out] (acc)= (x as in x tokens) (dy as out x tokens)^T.
Product BackwardWeightProduct(const Tensor& dw, const Tensor& dy, const Tensor& x, bool acc) {
  Product p;
  p.a = Matrix(x);
  p.b = Matrix(dy);
  p.d = Matrix(dw);
  p.trans_b = true;
  p.m = dw.dims[1];
  p.n = dw.dims[0];
  p.k = dy.dims[0];
  p.type = TypeOf(dy);
  p.output_type = TypeOf(dw);
  p.acc = acc;
  return p;
}

class CudaLinear final : public LinearKernels {
 public:
  void Forward(Stream& s, Tensor y, Tensor x, Tensor w, Tensor bias) const override {
    if (y.elements() == 0) return;
    if (x.dims[1] == 0) {
      Elementwise()->Zero(s, y);
      if (bias.present()) AddToRows(s, y, bias);
      return;
    }
    Matmul matmul(s, "Linear");
    if (!matmul.ok()) return;
    const Product plain = ForwardProduct(y, x, w);
    if (!bias.present()) return matmul.Run(plain);
    Product biased = plain;
    biased.epilogue = CUBLASLT_EPILOGUE_BIAS;
    biased.bias = bias.data;
    matmul.RunEpilogue(biased, [&](bool rehearsal) {
      matmul.Run(plain, rehearsal);
      AddToRows(s, y, bias);
    });
  }

  void ForwardGelu(Stream& s, Tensor y, Tensor pre, Tensor x, Tensor w,
                   Tensor bias) const override {
    if (y.elements() == 0) return;
    const auto separate = [&](bool) {
      Forward(s, pre, x, w, bias);
      Activation()->GeluForward(s, y, pre);
    };
    if (x.dims[1] == 0 || !GeluEpilogueServes(pre)) return separate(false);
    Matmul matmul(s, "LinearGelu");
    if (!matmul.ok()) return;
    Product p = ForwardProduct(y, x, w);
    p.epilogue = bias.present() ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    p.bias = bias.data;
    p.aux = Matrix(pre);
    matmul.RunEpilogue(p, separate);
  }

  void ForwardSwiglu(Stream& s, Tensor act, Tensor gate_up, Tensor x, Tensor w) const override {
    if (GatedLinear(s, act, gate_up, x, w)) return;
    Forward(s, gate_up, x, w, {});
    Activation()->SwigluForward(s, act, gate_up);
  }

  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor w, bool acc) const override {
    if (dx.elements() == 0) return;
    if (dy.dims[1] == 0) {
      if (!acc) Elementwise()->Zero(s, dx);
      return;
    }
    Matmul matmul(s, "LinearBackwardInput");
    if (matmul.ok()) matmul.Run(BackwardInputProduct(dx, dy, w, acc));
  }

  void BackwardInputGelu(Stream& s, Tensor dpre, Tensor dy, Tensor w, Tensor pre) const override {
    if (dpre.elements() == 0) return;
    const auto separate = [&](bool) {
      BackwardInput(s, dpre, dy, w, false);
      Activation()->GeluBackward(s, dpre, dpre, pre, false);
    };
    if (dy.dims[1] == 0 || !GeluEpilogueServes(pre)) return separate(false);
    Matmul matmul(s, "LinearBackwardInputGelu");
    if (!matmul.ok()) return;
    Product p = BackwardInputProduct(dpre, dy, w, false);
    p.epilogue = CUBLASLT_EPILOGUE_DGELU;
    p.aux = Matrix(pre);
    matmul.RunEpilogue(p, separate);
  }

  void BackwardInputSwiglu(Stream& s, Tensor d_gate_up, Tensor dy, Tensor w,
                           Tensor gate_up) const override {
    if (GatedLinearBackward(s, d_gate_up, dy, w, gate_up)) return;
    const Tensor d_act = d_gate_up.Columns(0, w.dims[1]);
    BackwardInput(s, d_act, dy, w, false);
    Activation()->SwigluBackward(s, d_gate_up, d_act, gate_up, false);
  }

  void BackwardWeight(Stream& s, Tensor dw, Tensor db, Tensor dy, Tensor x,
                      bool acc) const override {
    Matmul matmul(s, "LinearBackwardWeight");
    if (!matmul.ok()) return;
    const bool product = dw.elements() > 0 && dy.dims[0] > 0;
    if (dw.elements() > 0 && dy.dims[0] == 0 && !acc) Elementwise()->Zero(s, dw);
    const Product plain = BackwardWeightProduct(dw, dy, x, acc);
    if (!db.present() || db.elements() == 0) {
      if (product) matmul.Run(plain);
      return;
    }
    // Behind cuBLASLt's part of the workspace: a vector like db, then the scratch of ColumnSums.
    const int64_t vector_bytes = (db.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    const int64_t own = matmul.workspace_bytes();
    std::byte* scratch =
        Workspace(s, own + vector_bytes + ColumnSumsScratch(dy), "LinearBackwardWeight");
    if (scratch == nullptr) return;
    scratch += own;
    const Tensor vector = Tensor::Of(scratch, DType::kF32, {db.elements()}, s.device());
    // A rehearsal must not add to db.
    const auto target = [&](bool rehearsal) { return rehearsal && acc ? vector : db; };
    const auto separate = [&](bool rehearsal) {
      if (product) matmul.Run(plain, rehearsal);
      ColumnSums(s, target(rehearsal), dy, acc, scratch + vector_bytes);
    };
    if (!product) return separate(false);
    // dy is operand b. The epilogue overwrites; what it is to add to db it leaves in the vector.
    Product summed = plain;
    summed.epilogue = CUBLASLT_EPILOGUE_BGRADB;
    summed.bias = acc ? vector.data : db.data;
    matmul.RunEpilogue(summed, /*prefer_epilogue=*/false, separate, [&](bool rehearsal) {
      if (acc) Elementwise()->Add(s, target(rehearsal), vector);
    });
  }

  void BackwardBias(Stream& s, Tensor db, Tensor dy, bool acc) const override {
    if (db.elements() == 0) return;
    std::byte* const scratch = Workspace(s, ColumnSumsScratch(dy), "LinearBackwardBias");
    if (scratch != nullptr) ColumnSums(s, db, dy, acc, scratch);
  }
};

}  // namespace

const LinearKernels* Linear() {
  static const CudaLinear kernels;
  return &kernels;
}

}  // namespace stretto::cuda
