#include "src/model/layers.h"

namespace stretto::internal {
namespace {

// Statistics and parameters that both norm layers declare alike.
struct NormParts {
  SlotId mean, rstd, partials;
  ParamId weight, bias;
};
NormParts DeclareNorm(Builder& b, int64_t width, bool shard, const NormOptions& options) {
  NormParts p;
  constexpr unsigned kUses = kInBackwardInput | kInBackwardWeight;
  const Builder::SavedOptions saved = {.shard = shard};
  if (!options.rms) p.mean = b.Saved("mean", 1, b.accumulate_type(), kUses, saved);
  p.rstd = b.Saved("rstd", 1, b.accumulate_type(), kUses, saved);
  const int64_t partial_bytes =
      b.kernels() == nullptr ? 0 : b.kernels()->norm->PartialBytes(b.dtype(), width, !options.rms);
  if (partial_bytes > 0) {
    p.partials = b.Scratch("partials", 0, b.accumulate_type(), kUses, partial_bytes);
  }
  const auto vector = [&](const char* name, Init init) {
    return b.Parameter({.name = name,
                        .shape = {width},
                        .init = init,
                        .std = 0,
                        .weight_decay = false,
                        .partial_gradient = shard});
  };
  p.weight = vector("weight", Init::kOnes);
  if (!options.rms) p.bias = vector("bias", Init::kZeros);
  return p;
}

// A [tokens, 1] statistic as the kernels take it, or absent.
Tensor Statistic(const Frame& frame, SlotId slot) {
  return slot.valid() ? frame.Value(slot).Flat() : Tensor();
}
// What BackwardInput leaves for BackwardWeight; nothing where it does not run the norm's gradient.
Tensor Partials(const Frame& frame, SlotId slot, bool backward_runs) {
  return slot.valid() && backward_runs ? frame.Fixed(slot) : Tensor();
}
Tensor OptionalParameter(const Run& run, ParamId param) {
  return param.valid() ? run.Parameter(param) : Tensor();
}
Tensor OptionalGradient(Run& run, ParamId param) {
  return param.valid() ? run.Gradient(param).tensor : Tensor();
}

}  // namespace

absl::Status NormLayer::Declare(Builder& b) {
  b.Reads(x_, kInForward | kInBackwardInput | kInBackwardWeight);
  const bool shard = b.IsShard(x_);
  *n_out_ = n_ = b.Output("n", b.Width(x_), {.cheap = true, .shard = shard});
  const NormParts p = DeclareNorm(b, b.Width(x_), shard, options_);
  mean_ = p.mean;
  rstd_ = p.rstd;
  partials_ = p.partials;
  weight_ = p.weight;
  bias_ = p.bias;
  return absl::OkStatus();
}

void NormLayer::Forward(Run& run, Frame& frame) const {
  ops::Norm(run.ops(), frame.Value(n_), {}, Statistic(frame, mean_), Statistic(frame, rstd_),
            frame.Value(x_), {}, run.Parameter(weight_), OptionalParameter(run, bias_),
            options_.eps);
}

void NormLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor dx = frame.Grad(x_);
  if (!dx.present()) return;
  ops::NormBackwardInput(run.ops(), dx, frame.Grad(n_), frame.Value(x_), Statistic(frame, mean_),
                         Statistic(frame, rstd_), run.Parameter(weight_), frame.AccumulateGrad(x_),
                         Partials(frame, partials_, true));
}

void NormLayer::BackwardWeight(Run& run, Frame& frame) const {
  const Run::Target dw = run.Gradient(weight_);
  ops::NormBackwardWeight(run.ops(), dw.tensor, OptionalGradient(run, bias_), frame.Grad(n_),
                          frame.Value(x_), Statistic(frame, mean_), Statistic(frame, rstd_),
                          dw.accumulate, Partials(frame, partials_, frame.Grad(x_).present()));
}

absl::Status AddNormLayer::Declare(Builder& b) {
  const int64_t width = b.Width(x_);
  if (b.Width(branch_) != width) {
    return absl::InvalidArgumentError(absl::StrCat("its operands have ", width, " and ",
                                                   b.Width(branch_), " features per token"));
  }
  const bool shard = b.IsShard(x_);
  if (b.IsShard(branch_) != shard) {
    return absl::InvalidArgumentError(
        "one of its operands has all tokens, the other a rank's part of them");
  }
  const bool boundary = b.AtBlockStart();
  b.Reads(x_, kInForward);
  b.Reads(branch_, kInForward);
  sum_ = b.Output("sum", width,
                  {.value_uses = kInBackwardInput | kInBackwardWeight,
                   .grad_uses = kInBackwardInput,
                   .boundary = boundary,
                   .recompute_source = true,
                   .grad_changed_by_producer = true,
                   .shard = shard});
  n_ = b.Output("n", width, {.cheap = true, .shard = shard});
  *out_ = {sum_, n_};
  const NormParts p = DeclareNorm(b, width, shard, options_);
  mean_ = p.mean;
  rstd_ = p.rstd;
  partials_ = p.partials;
  weight_ = p.weight;
  bias_ = p.bias;
  b.ShareGradient(x_, sum_);
  b.ShareGradient(branch_, sum_);
  return absl::OkStatus();
}

void AddNormLayer::Forward(Run& run, Frame& frame) const {
  ops::Norm(run.ops(), frame.Value(n_), frame.Value(sum_), Statistic(frame, mean_),
            Statistic(frame, rstd_), frame.Value(x_), frame.Value(branch_), run.Parameter(weight_),
            OptionalParameter(run, bias_), options_.eps);
}

void AddNormLayer::Recompute(Run& run, Frame& frame) const {
  if (frame.Dropped(sum_)) {
    Forward(run, frame);
    return;
  }
  ops::Norm(run.ops(), frame.Value(n_), {}, Statistic(frame, mean_), Statistic(frame, rstd_),
            frame.Value(sum_), {}, run.Parameter(weight_), OptionalParameter(run, bias_),
            options_.eps);
}

void AddNormLayer::BackwardInput(Run& run, Frame& frame) const {
  bool first = true;
  const auto norm_backward = [&](Tensor dx, bool accumulate) {
    ops::NormBackwardInput(run.ops(), dx, frame.Grad(n_), frame.Value(sum_),
                           Statistic(frame, mean_), Statistic(frame, rstd_), run.Parameter(weight_),
                           accumulate, Partials(frame, partials_, first));
    first = false;
  };
  const Tensor dsum = frame.Grad(sum_);
  if (dsum.present()) norm_backward(dsum, true);
  for (SlotId input : {x_, branch_}) {
    const Tensor dx = frame.Grad(input);
    if (!dx.present() || dx.data == dsum.data) continue;
    const bool accumulate = frame.AccumulateGrad(input);
    if (!dsum.present()) {
      norm_backward(dx, accumulate);
    } else if (accumulate) {
      ops::Add(run.ops(), dx, dsum);
    } else {
      ops::Copy(run.ops(), dx, dsum);
    }
  }
}

void AddNormLayer::BackwardWeight(Run& run, Frame& frame) const {
  const bool backward_runs =
      frame.Grad(sum_).present() || frame.Grad(x_).present() || frame.Grad(branch_).present();
  const Run::Target dw = run.Gradient(weight_);
  ops::NormBackwardWeight(run.ops(), dw.tensor, OptionalGradient(run, bias_), frame.Grad(n_),
                          frame.Value(sum_), Statistic(frame, mean_), Statistic(frame, rstd_),
                          dw.accumulate, Partials(frame, partials_, backward_runs));
}

}  // namespace stretto::internal
