#include "src/model/layers.h"

namespace stretto::internal {

absl::Status EmbeddingLayer::Declare(Builder& b) {
  *y_out_ = y_ = b.Output("y", width_, {.grad_uses = kInBackwardWeight});
  table_ = b.Parameter({.name = "weight",
                        .shape = {vocabulary_, width_},
                        .init = Init::kNormal,
                        .std = init_std_,
                        .weight_decay = true});
  if (table_out_ != nullptr) *table_out_ = table_;
  if (positions_ > 0) {
    position_table_ = b.Parameter({.name = "position.weight",
                                   .shape = {positions_, width_},
                                   .init = Init::kNormal,
                                   .std = init_std_,
                                   .weight_decay = true});
  }
  return absl::OkStatus();
}

void EmbeddingLayer::Forward(Run& run, Frame& frame) const {
  const bool learned = position_table_.valid();
  ops::Embedding(run.ops(), frame.Value(y_), frame.tokens.ids, run.Parameter(table_),
                 learned ? frame.tokens.positions : Tensor(),
                 learned ? run.Parameter(position_table_) : Tensor());
}

void EmbeddingLayer::BackwardWeight(Run& run, Frame& frame) const {
  const Tensor dy = frame.Grad(y_);
  const Run::Target table = run.Gradient(table_);
  ops::EmbeddingBackward(run.ops(), table.tensor, dy, frame.tokens.ids, table.accumulate);
  if (position_table_.valid()) {
    const Run::Target positions = run.Gradient(position_table_);
    ops::EmbeddingBackward(run.ops(), positions.tensor, dy, frame.tokens.positions,
                           positions.accumulate);
  }
}

}  // namespace stretto::internal
