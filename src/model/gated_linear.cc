#include "src/model/layers.h"

namespace stretto::internal {

absl::Status GatedLinearLayer::Declare(Builder& b) {
  if (options_.bias) return absl::InvalidArgumentError("a gated linear layer has no bias");
  if (b.Width(x_) != in_) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input has ", b.Width(x_), " features per token, not ", in_));
  }
  STRETTO_RETURN_IF_ERROR(DeclareLinearInput(b, options_, x_));
  const bool shard = b.IsShard(x_);
  gate_up_ = b.Saved("y", 2 * features_, b.dtype(), kInBackwardInput,
                     {.recomputed_if_dropped = true, .recompute_source = true, .shard = shard});
  *act_out_ = act_ =
      b.Output("act", features_, {.grad_uses = kInBackwardInput, .cheap = true, .shard = shard});
  d_gate_up_ = b.Scratch("dy", 2 * features_, b.dtype(), kInBackwardInput | kInBackwardWeight);
  DeclareLinearParameters(b, in_, 2 * features_, options_, shard, &weight_, nullptr);
  return absl::OkStatus();
}

void GatedLinearLayer::Forward(Run& run, Frame& frame) const {
  ops::LinearSwiglu(run.ops(), frame.Value(act_), frame.Value(gate_up_), frame.Value(x_),
                    run.Parameter(weight_));
}

void GatedLinearLayer::Recompute(Run& run, Frame& frame) const {
  if (frame.Dropped(gate_up_)) return Forward(run, frame);
  ops::Swiglu(run.ops(), frame.Value(act_), frame.Value(gate_up_));
}

void GatedLinearLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor dy = frame.Value(d_gate_up_);
  ops::SwigluBackward(run.ops(), dy, frame.Grad(act_), frame.Value(gate_up_), false);
  LinearBackwardInput(run, frame, options_, x_, dy, run.Parameter(weight_), {0, dy.rows()});
}

void GatedLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  LinearBackwardWeight(run, weight_, {}, frame.Value(d_gate_up_), frame.Value(x_));
}

}  // namespace stretto::internal
