// Column and row linear layers.
#include "absl/strings/str_cat.h"
#include "src/parallel/tensor_layers.h"

namespace stretto::internal {
namespace {

absl::Status CheckCut(const Features& features, int64_t all, const std::vector<Range>& mine,
                      const TokenCut& axis) {
  int64_t sum = features.parts.empty() ? all : 0;
  for (const int64_t part : features.parts) sum += part;
  bool whole = sum == all;
  for (const int64_t part : features.parts) {
    whole = whole && (features.groups == 0 || part % features.groups == 0);
  }
  if (features.parts.empty() && features.groups > 0) whole = whole && all % features.groups == 0;
  if (!whole) {
    return absl::InvalidArgumentError(
        absl::StrCat("its ", all, " features are not the parts and groups that it was told of"));
  }
  for (const Range& range : mine) {
    if (range.count > 0) continue;
    return absl::InvalidArgumentError(absl::StrCat("it has fewer groups of features than the ",
                                                   axis.ranks, " ranks of the tensor axis"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ColumnLinearLayer::Declare(Builder& b) {
  if (b.Width(x_) != in_) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input has ", b.Width(x_), " features per token, not ", in_));
  }
  if (!b.IsShard(x_) || options_.gelu_input.valid()) {
    return absl::InvalidArgumentError(
        "a column layer gathers its input from the ranks' parts of the tokens, as a norm leaves "
        "them; put a row layer in front of it");
  }
  const std::vector<Range> mine = CutFeatures(options_.features, out_, b.tokens());
  STRETTO_RETURN_IF_ERROR(CheckCut(options_.features, out_, mine, b.tokens()));
  const int64_t out = Total(mine);
  const bool gelu = options_.gelu_output != nullptr;
  b.Reads(x_, kInForward | kInBackwardWeight);
  *y_out_ = y_ = b.Output("y", out, {.recompute_source = gelu});
  if (gelu) {
    *options_.gelu_output = gelu_ =
        b.Output("gelu", out, {.grad_uses = 0, .cheap = true, .gelu_of = y_});
  }
  whole_x_ = b.Scratch("whole_x", in_, b.dtype(), kInForward);
  again_ = b.Scratch("whole_x_again", in_, b.dtype(), kInBackwardWeight);
  whole_dx_ = b.Scratch("whole_dx", in_, b.dtype(), kInBackwardInput);
  weight_ = b.Parameter({.name = "weight",
                         .shape = {out, in_},
                         .init = Init::kNormal,
                         .std = options_.init_std,
                         .weight_decay = true,
                         .part = {.whole = {out_, in_}, .rows = mine}});
  if (options_.bias) {
    bias_ = b.Parameter({.name = "bias",
                         .shape = {out},
                         .init = Init::kZeros,
                         .std = 0,
                         .weight_decay = false,
                         .part = {.whole = {out_}, .rows = mine}});
  }
  b.Exchanges(kInForward, in_, b.dtype(), {.unless_kept = gelu ? y_ : SlotId()});
  b.Exchanges(kInBackwardInput, in_, b.dtype());
  b.Exchanges(kInBackwardWeight, in_, b.dtype());
  gather_label_ = b.layer_name() + " gather";
  sum_label_ = b.layer_name() + " gradient";
  again_label_ = b.layer_name() + " gather again";
  return absl::OkStatus();
}

void ColumnLinearLayer::Forward(Run& run, Frame& frame) const {
  Gather(run, frame, whole_x_, x_, gather_label_);
  const Tensor bias = bias_.valid() ? run.Parameter(bias_) : Tensor();
  if (gelu_.valid()) {
    ops::LinearGelu(run.ops(), frame.Value(gelu_), frame.Value(y_), frame.Value(whole_x_),
                    run.Parameter(weight_), bias);
  } else {
    ops::Linear(run.ops(), frame.Value(y_), frame.Value(whole_x_), run.Parameter(weight_), bias);
  }
}

void ColumnLinearLayer::Recompute(Run& run, Frame& frame) const {
  if (gelu_.valid() && !frame.Dropped(y_)) {
    ops::Gelu(run.ops(), frame.Value(gelu_), frame.Value(y_));
  } else {
    Forward(run, frame);
  }
}

void ColumnLinearLayer::BackwardInput(Run& run, Frame& frame) const {
  if (!frame.Grad(x_).present()) return;
  ops::LinearBackwardInput(run.ops(), frame.Value(whole_dx_), frame.Grad(y_),
                           run.Parameter(weight_), /*acc=*/false);
  SumToGradient(run, frame, x_, whole_dx_, sum_label_);
}

void ColumnLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  // Gathered again rather than kept: between the halves a rank keeps its part of the tokens.
  Gather(run, frame, again_, x_, again_label_);
  const Run::Target dw = run.Gradient(weight_);
  const Tensor db = bias_.valid() ? run.Gradient(bias_).tensor : Tensor();
  ops::LinearBackwardWeight(run.ops(), dw.tensor, db, frame.Grad(y_), frame.Value(again_),
                            dw.accumulate);
}

absl::Status RowLinearLayer::Declare(Builder& b) {
  const std::vector<Range> mine = CutFeatures(options_.features, in_, b.tokens());
  STRETTO_RETURN_IF_ERROR(CheckCut(options_.features, in_, mine, b.tokens()));
  const int64_t in = Total(mine);
  if (b.Width(x_) != in || b.IsShard(x_)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "its input has ", b.Width(x_), " features of ", b.IsShard(x_) ? "a part of the" : "all",
        " tokens, not ", in, " (this rank's part of ", in_,
        ") of all; put a column layer that is "
        "cut alike in front of it"));
  }
  if (mine.size() != 1 || options_.gelu_output != nullptr) {
    return absl::InvalidArgumentError("a row layer's input is one part, and its output goes on");
  }
  const SlotId pre = options_.gelu_input;
  if (pre.valid()) {
    if (!b.IsGeluOf(x_, pre)) {
      return absl::InvalidArgumentError("its input is not gelu of the slot named in gelu_input");
    }
    b.Reads(x_, kInForward | kInBackwardWeight, /*writes_grad=*/false);
    b.Reads(pre, kInBackwardInput);
  } else {
    b.Reads(x_, kInForward | kInBackwardWeight);
  }
  *y_out_ = y_ = b.Output("y", out_, {.grad_uses = kInBackwardInput, .shard = true});
  whole_y_ = b.Scratch("whole_y", out_, b.dtype(), kInForward);
  whole_dy_ = b.Scratch("whole_dy", out_, b.dtype(), kInBackwardInput | kInBackwardWeight);
  weight_ = b.Parameter({.name = "weight",
                         .shape = {out_, in},
                         .init = Init::kNormal,
                         .std = options_.init_std,
                         .weight_decay = true,
                         .part = {.whole = {out_, in_}, .first_column = mine[0].first}});
  if (options_.bias) {
    // Every rank has it, and its whole gradient: dy is gathered for the weight anyway.
    bias_ = b.Parameter(
        {.name = "bias", .shape = {out_}, .init = Init::kZeros, .std = 0, .weight_decay = false});
    adds_bias_ = b.tokens().index == 0;
  }
  b.Exchanges(kInForward, out_, b.dtype());
  b.Exchanges(kInBackwardInput, out_, b.dtype());
  sum_label_ = b.layer_name() + " sum";
  gather_label_ = b.layer_name() + " gradient";
  return absl::OkStatus();
}

void RowLinearLayer::Forward(Run& run, Frame& frame) const {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  ops::Linear(run.ops(), frame.Value(whole_y_), frame.Value(x_), run.Parameter(weight_),
              adds_bias_ ? run.Parameter(bias_) : Tensor());
  const Tensor whole = frame.Padded(whole_y_);
  ZeroPadding(run, whole, frame.tokens.tokens);
  axis->SumToParts(*run.ops().stream, frame.Padded(y_), whole, sum_label_);
}

void RowLinearLayer::BackwardInput(Run& run, Frame& frame) const {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  axis->Gather(*run.ops().stream, frame.Padded(whole_dy_), frame.PaddedGrad(y_), gather_label_);
  const SlotId pre = options_.gelu_input;
  const Tensor dx = frame.Grad(pre.valid() ? pre : x_);
  if (!dx.present()) return;
  if (pre.valid()) {
    ops::LinearBackwardInputGelu(run.ops(), dx, frame.Value(whole_dy_), run.Parameter(weight_),
                                 frame.Value(pre));
  } else {
    ops::LinearBackwardInput(run.ops(), dx, frame.Value(whole_dy_), run.Parameter(weight_),
                             frame.AccumulateGrad(x_));
  }
}

void RowLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  const Run::Target dw = run.Gradient(weight_);
  const Tensor db = bias_.valid() ? run.Gradient(bias_).tensor : Tensor();
  ops::LinearBackwardWeight(run.ops(), dw.tensor, db, frame.Value(whole_dy_), frame.Value(x_),
                            dw.accumulate);
}

}  // namespace stretto::internal
