#include <algorithm>

#include "src/model/layers.h"

namespace stretto::internal {

absl::Status LossHeadLayer::Declare(Builder& b) {
  constexpr unsigned kBackward = kInBackwardInput | kInBackwardWeight;
  if (weight_.valid()) {
    b.UsesParameter(weight_);
  } else {
    weight_ = b.Parameter({.name = "weight",
                           .shape = {vocabulary_, b.Width(x_)},
                           .init = Init::kNormal,
                           .std = init_std_,
                           .weight_decay = true});
  }
  if (weight_out_ != nullptr) *weight_out_ = weight_;
  b.Reads(x_, kInForward | kBackward);
  // With one chunk the logits stay until backward turns them into their gradient. With several they
  // are computed again chunk by chunk, and both backward halves happen in BackwardInput.
  logits_ = one_chunk() ? b.Saved("logits", vocabulary_, b.dtype(), kBackward)
                        : b.Scratch("logits", chunk_, b.dtype(), kInForward | kInBackwardInput);
  state_ = b.Saved("softmax", 3, b.accumulate_type(), kInBackwardInput);
  losses_ = b.Saved("losses", 1, b.accumulate_type(), 0);
  return absl::OkStatus();
}

Tensor LossHeadLayer::Logits(Frame& frame, int64_t first) const {
  const Tensor all = frame.Value(logits_);
  return Tensor::Of(all.data, all.dtype, {all.rows(), std::min(chunk_, vocabulary_ - first)},
                    all.device);
}

void LossHeadLayer::Forward(Run& run, Frame& frame) const {
  const Tensor x = frame.Value(x_), w = run.Parameter(weight_), state = frame.Value(state_);
  for (int64_t first = 0; first < vocabulary_; first += chunk_) {
    const Tensor logits = Logits(frame, first);
    ops::Linear(run.ops(), logits, x, w.Rows(first, logits.dims[1]), {});
    ops::LossFold(run.ops(), state, logits, frame.tokens.targets, first, first == 0);
  }
  const Run::Target total = run.LossTotal();
  ops::LossFinish(run.ops(), frame.Value(losses_).Flat(), total.tensor, state, frame.tokens.weights,
                  total.accumulate, frame.tokens.targets);
}

void LossHeadLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor x = frame.Value(x_), w = run.Parameter(weight_), state = frame.Value(state_);
  const Tensor dx = frame.Grad(x_);
  const Run::Target dw = one_chunk() ? Run::Target() : run.Gradient(weight_);
  for (int64_t first = 0; first < vocabulary_; first += chunk_) {
    const Tensor logits = Logits(frame, first);
    const Tensor rows = w.Rows(first, logits.dims[1]);
    if (!one_chunk()) ops::Linear(run.ops(), logits, x, rows, {});
    ops::LossBackward(run.ops(), logits, state, frame.tokens.targets, frame.tokens.weights, first);
    if (dx.present()) {
      ops::LinearBackwardInput(run.ops(), dx, logits, rows, first > 0 || frame.AccumulateGrad(x_));
    }
    if (!one_chunk()) {
      ops::LinearBackwardWeight(run.ops(), dw.tensor.Rows(first, logits.dims[1]), {}, logits, x,
                                dw.accumulate);
    }
  }
}

void LossHeadLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!one_chunk()) return;
  const Run::Target dw = run.Gradient(weight_);
  ops::LinearBackwardWeight(run.ops(), dw.tensor, {}, Logits(frame, 0), frame.Value(x_),
                            dw.accumulate);
}

}  // namespace stretto::internal
