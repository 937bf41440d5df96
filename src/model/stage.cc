#include "src/model/layers.h"

namespace stretto::internal {

absl::Status StageInputLayer::Declare(Builder& b) {
  *y_out_ = y_ =
      b.Output("y", width_, {.grad_uses = kInBackwardInput, .boundary = true, .shard = true});
  return absl::OkStatus();
}

void StageInputLayer::Forward(Run& run, Frame& frame) const {
  ops::Copy(run.ops(), frame.Value(y_), frame.boundary.in);
}

void StageInputLayer::BackwardInput(Run& run, Frame& frame) const {
  ops::Copy(run.ops(), frame.boundary.out, frame.Grad(y_));
}

absl::Status StageOutputLayer::Declare(Builder& b) {
  if (b.Width(x_) != b.Width(branch_)) {
    return absl::InvalidArgumentError(absl::StrCat("its inputs have ", b.Width(x_), " and ",
                                                   b.Width(branch_), " features per token"));
  }
  b.Reads(x_, kInForward);
  b.Reads(branch_, kInForward);
  return absl::OkStatus();
}

void StageOutputLayer::Forward(Run& run, Frame& frame) const {
  ops::Copy(run.ops(), frame.boundary.out, frame.Value(x_));
  ops::Add(run.ops(), frame.boundary.out, frame.Value(branch_));
}

void StageOutputLayer::BackwardInput(Run& run, Frame& frame) const {
  for (SlotId input : {x_, branch_}) {
    const Tensor grad = frame.Grad(input);
    if (!grad.present()) continue;
    if (frame.AccumulateGrad(input)) {
      ops::Add(run.ops(), grad, frame.boundary.in);
    } else {
      ops::Copy(run.ops(), grad, frame.boundary.in);
    }
  }
}

}  // namespace stretto::internal
