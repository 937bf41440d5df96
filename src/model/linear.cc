#include "src/model/layers.h"

namespace stretto::internal {

absl::Status LinearLayer::Declare(Builder& b) {
  if (b.Width(x_) != in_) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input has ", b.Width(x_), " features per token, not ", in_));
  }
  b.Reads(x_, kInForward | kInBackwardWeight);
  *y_out_ = y_ = b.Output("y", out_, {});
  weight_ = b.Parameter({.name = "weight",
                         .shape = {out_, in_},
                         .init = Init::kNormal,
                         .std = options_.init_std,
                         .weight_decay = true});
  if (options_.bias) {
    bias_ = b.Parameter(
        {.name = "bias", .shape = {out_}, .init = Init::kZeros, .std = 0, .weight_decay = false});
  }
  return absl::OkStatus();
}

void LinearLayer::Forward(Run& run, Frame& frame) const {
  ops::Linear(run.ops(), frame.Value(y_), frame.Value(x_), run.Parameter(weight_),
              bias_.valid() ? run.Parameter(bias_) : Tensor());
}

void LinearLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor dx = frame.Grad(x_);
  if (!dx.present()) return;
  ops::LinearBackwardInput(run.ops(), dx, frame.Grad(y_), run.Parameter(weight_),
                           frame.AccumulateGrad(x_));
}

void LinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  const Run::Target dw = run.Gradient(weight_);
  const Tensor db = bias_.valid() ? run.Gradient(bias_).tensor : Tensor();
  ops::LinearBackwardWeight(run.ops(), dw.tensor, db, frame.Grad(y_), frame.Value(x_),
                            dw.accumulate);
}

}  // namespace stretto::internal
