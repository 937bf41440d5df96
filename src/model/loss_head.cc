#include <algorithm>

#include "src/model/layers.h"

namespace stretto::internal {

absl::Status LossHeadLayer::Declare(Builder& b) {
  constexpr unsigned kBackward = kInBackwardInput | kInBackwardWeight;
  if (weight_.valid()) {
    b.UsesParameter(weight_);
  } else {
    ParameterSpec spec = {.name = "weight",
                          .shape = {vocabulary_, b.Width(x_)},
                          .init = Init::kNormal,
                          .std = init_std_,
                          .weight_decay = true};
    weight_ = tied_to_.empty() ? b.Parameter(std::move(spec))
                               : b.CopyOfParameter(tied_to_, std::move(spec));
  }
  if (weight_out_ != nullptr) *weight_out_ = weight_;
  b.PadRows(weight_, padded_);
  b.Reads(x_, kInForward | kBackward);
  // With one chunk forward leaves the gradient of the logits in their place. With several they are
  // computed again chunk by chunk, and both backward halves happen in BackwardInput.
  logits_ = one_chunk() ? b.Saved("logits", chunk_, b.dtype(), kBackward)
                        : b.Scratch("logits", chunk_, b.dtype(), kInForward | kInBackwardInput);
  state_ = b.Saved("softmax", 3, b.accumulate_type(), kInBackwardInput);
  losses_ = b.Saved("losses", 1, b.accumulate_type(), 0);
  return absl::OkStatus();
}

Tensor LossHeadLayer::Padded(const Frame& frame, int64_t first) const {
  return frame.Value(logits_).Columns(0, std::min(chunk_, padded_ - first));
}

Tensor LossHeadLayer::Logits(const Frame& frame, int64_t first) const {
  return frame.Value(logits_).Columns(0, std::min(chunk_, vocabulary_ - first));
}

// The logits of the padding are zero, as its rows of the weight are, and so is their gradient: the
// loss leaves them alone.
void LossHeadLayer::Forward(Run& run, Frame& frame) const {
  const Tensor x = frame.Value(x_), w = PaddedRows(run.Parameter(weight_), padded_);
  const Tensor state = frame.Value(state_), losses = frame.Value(losses_).Flat();
  const bool fused = one_chunk() && frame.training();
  for (int64_t first = 0; first < padded_; first += chunk_) {
    const Tensor padded = Padded(frame, first);
    ops::Linear(run.ops(), padded, x, w.Rows(first, padded.dims[1]), {});
    if (fused) break;
    ops::LossFold(run.ops(), state, Logits(frame, first), frame.tokens.targets, first, first == 0);
  }
  const Run::Target total = run.LossTotal();
  if (fused) {
    ops::LossFused(run.ops(), Logits(frame, 0), losses, total.tensor, frame.tokens.targets,
                   frame.tokens.weights, total.accumulate);
  } else {
    ops::LossFinish(run.ops(), losses, total.tensor, state, frame.tokens.weights, total.accumulate,
                    frame.tokens.targets);
  }
}

void LossHeadLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor x = frame.Value(x_), w = PaddedRows(run.Parameter(weight_), padded_);
  const Tensor dx = frame.Grad(x_), state = frame.Value(state_);
  const Run::Target dw = one_chunk() ? Run::Target() : run.Gradient(weight_);
  for (int64_t first = 0; first < padded_; first += chunk_) {
    const Tensor padded = Padded(frame, first);
    const Tensor rows = w.Rows(first, padded.dims[1]);
    if (!one_chunk()) {
      ops::Linear(run.ops(), padded, x, rows, {});
      ops::LossBackward(run.ops(), Logits(frame, first), state, frame.tokens.targets,
                        frame.tokens.weights, first);
    }
    if (dx.present()) {
      ops::LinearBackwardInput(run.ops(), dx, padded, rows, first > 0 || frame.AccumulateGrad(x_));
    }
    if (!one_chunk()) {
      ops::LinearBackwardWeight(run.ops(),
                                PaddedRows(dw.tensor, padded_).Rows(first, padded.dims[1]), {},
                                padded, x, dw.accumulate);
    }
  }
}

void LossHeadLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!one_chunk()) return;
  const Run::Target dw = run.Gradient(weight_);
  ops::LinearBackwardWeight(run.ops(), PaddedRows(dw.tensor, padded_), {}, Padded(frame, 0),
                            frame.Value(x_), dw.accumulate);
}

}  // namespace stretto::internal
