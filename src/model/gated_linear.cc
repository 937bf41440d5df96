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
  *gate_up_out_ = gate_up_ =
      b.Output("y", 2 * features_,
               {.recompute_source = true, .recomputed_if_dropped = true, .shard = shard});
  *act_out_ = act_ = b.Output(
      "act", features_, {.grad_uses = 0, .cheap = true, .swiglu_of = gate_up_, .shard = shard});
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
  const Tensor dy = frame.Grad(gate_up_);
  LinearBackwardInput(run, frame, options_, x_, dy, run.Parameter(weight_), {0, dy.rows()});
}

void GatedLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  LinearBackwardWeight(run, weight_, {}, frame.Grad(gate_up_), frame.Value(x_));
}

}  // namespace stretto::internal
