#include "src/model/layers.h"

namespace stretto::internal {

void DeclareLinearParameters(Builder& b, int64_t in, int64_t out, const LinearOptions& options,
                             bool shard, ParamId* weight, ParamId* bias) {
  *weight = b.Parameter({.name = "weight",
                         .shape = {out, in},
                         .init = Init::kNormal,
                         .std = options.init_std,
                         .weight_decay = true,
                         .partial_gradient = shard});
  if (!options.bias) return;
  *bias = b.Parameter({.name = "bias",
                       .shape = {out},
                       .init = Init::kZeros,
                       .std = 0,
                       .weight_decay = false,
                       .partial_gradient = shard});
}

namespace {

// What an activation, whose derivative belongs to the layer, made the layer's input from.
SlotId Activated(const LinearOptions& options) {
  return options.swiglu_input.valid() ? options.swiglu_input : options.gelu_input;
}

}  // namespace

absl::Status DeclareLinearInput(Builder& b, const LinearOptions& options, SlotId x) {
  const SlotId pre = Activated(options);
  if (!pre.valid()) {
    b.Reads(x, kInForward | kInBackwardWeight);
    return absl::OkStatus();
  }
  if (options.gelu_input.valid() && !b.IsGeluOf(x, options.gelu_input)) {
    return absl::InvalidArgumentError("its input is not gelu of the slot named in gelu_input");
  }
  if (options.swiglu_input.valid() && !b.IsSwigluOf(x, options.swiglu_input)) {
    return absl::InvalidArgumentError("its input is not SwiGLU of the slot named in swiglu_input");
  }
  b.Reads(x, kInForward | kInBackwardWeight, /*writes_grad=*/false);
  b.Reads(pre, kInBackwardInput);
  return absl::OkStatus();
}

void LinearBackwardInput(Run& run, Frame& frame, const LinearOptions& options, SlotId x,
                         const Tensor& dy, const Tensor& w, Range rows) {
  const SlotId pre = Activated(options);
  const Tensor dx = frame.Grad(pre.valid() ? pre : x);
  if (!dx.present()) return;
  const auto cut = [rows](const Tensor& t) { return t.Rows(rows.first, rows.count); };
  if (options.swiglu_input.valid()) {
    ops::LinearBackwardInputSwiglu(run.ops(), cut(dx), cut(dy), w, cut(frame.Value(pre)));
  } else if (pre.valid()) {
    ops::LinearBackwardInputGelu(run.ops(), cut(dx), cut(dy), w, cut(frame.Value(pre)));
  } else {
    ops::LinearBackwardInput(run.ops(), cut(dx), cut(dy), w, frame.AccumulateGrad(x));
  }
}

void LinearBackwardWeight(Run& run, ParamId weight, ParamId bias, const Tensor& dy,
                          const Tensor& x) {
  const Run::Target dw = run.Gradient(weight);
  const Tensor db = bias.valid() ? run.Gradient(bias).tensor : Tensor();
  ops::LinearBackwardWeight(run.ops(), dw.tensor, db, dy, x, dw.accumulate);
}

absl::Status LinearLayer::Declare(Builder& b) {
  if (b.Width(x_) != in_) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input has ", b.Width(x_), " features per token, not ", in_));
  }
  STRETTO_RETURN_IF_ERROR(DeclareLinearInput(b, options_, x_));
  const bool gelu = options_.gelu_output != nullptr;
  const bool shard = b.IsShard(x_);
  *y_out_ = y_ = b.Output("y", out_, {.recompute_source = gelu, .shard = shard});
  if (gelu)
    *options_.gelu_output = gelu_ =
        b.Output("gelu", out_, {.grad_uses = 0, .cheap = true, .gelu_of = y_, .shard = shard});
  DeclareLinearParameters(b, in_, out_, options_, shard, &weight_, &bias_);
  return absl::OkStatus();
}

void LinearLayer::Forward(Run& run, Frame& frame) const {
  const Tensor bias = bias_.valid() ? run.Parameter(bias_) : Tensor();
  if (gelu_.valid()) {
    ops::LinearGelu(run.ops(), frame.Value(gelu_), frame.Value(y_), frame.Value(x_),
                    run.Parameter(weight_), bias);
  } else {
    ops::Linear(run.ops(), frame.Value(y_), frame.Value(x_), run.Parameter(weight_), bias);
  }
}

void LinearLayer::Recompute(Run& run, Frame& frame) const {
  if (gelu_.valid() && !frame.Dropped(y_)) {
    ops::Gelu(run.ops(), frame.Value(gelu_), frame.Value(y_));
  } else {
    Forward(run, frame);
  }
}

void LinearLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor dy = frame.Grad(y_);
  LinearBackwardInput(run, frame, options_, x_, dy, run.Parameter(weight_), {0, dy.rows()});
}

void LinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  LinearBackwardWeight(run, weight_, bias_, frame.Grad(y_), frame.Value(x_));
}

}  // namespace stretto::internal
