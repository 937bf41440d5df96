// A linear layer that multiplies in FP8. Users reach it through Float8Strategies.
#ifndef STRETTO_SRC_MODEL_FLOAT8_LINEAR_H_
#define STRETTO_SRC_MODEL_FLOAT8_LINEAR_H_

#include <cstdint>

#include "stretto/model/float8.h"
#include "stretto/model/layer.h"

namespace stretto::internal {

// y = x w^T + bias as LinearLayer computes it, with the same options and the same parameters. Of x
// only the transposed FP8 codes are kept for backward.
class Float8LinearLayer : public Layer {
 public:
  Float8LinearLayer(SlotId x, int64_t in, int64_t out, DType gradients,
                    const LinearOptions& options, SlotId* y)
      : x_(x), in_(in), out_(out), gradients_(gradients), options_(options), y_out_(y) {}
  const char* kind() const override { return "linear_fp8"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void Recompute(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 private:
  // Null, with the stream failed, when the run has none.
  Float8State* State(const Run& run) const;
  // The slot's memory as [width, tokens padded to 16].
  static Tensor Transposed(const Frame& frame, SlotId slot);
  void Multiply(Run& run, Frame& frame) const;  // y from x8

  SlotId x_, y_, gelu_;
  SlotId x8_, dy8_, dy8t_;
  SlotId x8t_;       // kept from forward to BackwardWeight, or
  SlotId late_x8t_;  // made from x there
  int64_t in_, out_;
  DType gradients_;
  LinearOptions options_;
  SlotId* y_out_;
  ParamId weight_, bias_;
  Float8OperandId x_operand_, w_operand_, dy_operand_;
  Float8WeightId codes_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_MODEL_FLOAT8_LINEAR_H_
