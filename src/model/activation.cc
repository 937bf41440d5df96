#include "src/model/layers.h"

namespace stretto::internal {

absl::Status ActivationLayer::Declare(Builder& b) {
  const int64_t width = b.Width(x_);
  if (function_ == Kind::kSwiglu && width % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input [gate | up] has ", width, " features; the number must be even"));
  }
  b.Reads(x_, kInForward | kInBackwardInput);
  *y_out_ = y_ = b.Output("y", function_ == Kind::kSwiglu ? width / 2 : width,
                          {.grad_uses = kInBackwardInput, .cheap = true, .shard = b.IsShard(x_)});
  return absl::OkStatus();
}

void ActivationLayer::Forward(Run& run, Frame& frame) const {
  if (function_ == Kind::kGelu) {
    ops::Gelu(run.ops(), frame.Value(y_), frame.Value(x_));
  } else {
    ops::Swiglu(run.ops(), frame.Value(y_), frame.Value(x_));
  }
}

void ActivationLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor dx = frame.Grad(x_);
  if (!dx.present()) return;
  if (function_ == Kind::kGelu) {
    ops::GeluBackward(run.ops(), dx, frame.Grad(y_), frame.Value(x_), frame.AccumulateGrad(x_));
  } else {
    ops::SwigluBackward(run.ops(), dx, frame.Grad(y_), frame.Value(x_), frame.AccumulateGrad(x_));
  }
}

}  // namespace stretto::internal
