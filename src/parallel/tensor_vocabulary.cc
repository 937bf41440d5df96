// Embedding and loss over a vocabulary that the ranks of a tensor axis share.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "src/model/layers.h"
#include "src/parallel/tensor_layers.h"

namespace stretto::internal {
namespace {

absl::Status FewerThanRanks(const char* what, int64_t count, const TokenCut& axis) {
  return absl::InvalidArgumentError(absl::StrCat("its ", count, " ", what, " are fewer than the ",
                                                 axis.ranks, " ranks of the tensor axis"));
}

}  // namespace

absl::Status VocabularyEmbeddingLayer::Declare(Builder& b) {
  *y_out_ = y_ = b.Output("y", width_, {.grad_uses = kInBackwardWeight, .shard = true});
  whole_y_ = b.Scratch("whole_y", width_, b.dtype(), kInForward);
  whole_dy_ = b.Scratch("whole_dy", width_, b.dtype(), kInBackwardWeight);
  for (Table& table : tables_) {
    if (table.all == 0) continue;
    const bool ids = &table == &tables_[0];
    table.rows = CutEvenly(table.all, b.tokens().ranks, b.tokens().index);
    if (table.rows.count == 0) {
      return FewerThanRanks(ids ? "entries" : "positions", table.all, b.tokens());
    }
    table.param = b.Parameter({.name = ids ? "weight" : "position.weight",
                               .shape = {table.rows.count, width_},
                               .init = Init::kNormal,
                               .std = init_std_,
                               .weight_decay = true,
                               .part = {.whole = {table.all, width_}, .rows = {table.rows}}});
    b.PadRows(table.param, table.rows.count + 1);
    table.ids = b.Saved(ids ? "ids" : "positions", 1, DType::kI32, kInBackwardWeight);
  }
  if (table_out_ != nullptr) *table_out_ = tables_[0].param;
  sum_label_ = b.layer_name() + " sum";
  gather_label_ = b.layer_name() + " gradient";
  b.Exchanges(ActionKind::kForward, width_, b.dtype(), sum_label_, {.sum = true});
  b.Exchanges(ActionKind::kStartWeight, width_, b.dtype(), gather_label_);
  return absl::OkStatus();
}

void VocabularyEmbeddingLayer::Forward(Run& run, Frame& frame) const {
  const auto ids_of = [&](const Table& table, Tensor ids, const char* what) {
    const Tensor local = frame.Value(table.ids).Flat();
    ops::LocalIds(run.ops(), local, ids, table.rows.first, table.rows.count, table.all, what);
    return local;
  };
  const Table &words = tables_[0], &places = tables_[1];
  const Tensor ids = ids_of(words, frame.tokens.ids, "id");
  const Tensor table = Rows(words, run.Parameter(words.param));
  const Tensor whole = frame.Value(whole_y_);
  if (places.all > 0) {
    const Tensor positions = ids_of(places, frame.tokens.positions, "position");
    ops::Embedding(run.ops(), whole, ids, table, positions,
                   Rows(places, run.Parameter(places.param)));
  } else {
    ops::Embedding(run.ops(), whole, ids, table, {}, {});
  }
  SumAsWritten(run, frame, whole_y_, frame.Padded(y_), sum_label_, [](Range) {});
  WaitForPieces(run, frame, whole_y_);
}

void VocabularyEmbeddingLayer::Exchange(ActionKind, Run& run, Frame& frame) const {
  StartGather(run, frame, whole_dy_, frame.PaddedGrad(y_), gather_label_);
}

void VocabularyEmbeddingLayer::BackwardWeight(Run& run, Frame& frame) const {
  WaitForPieces(run, frame, whole_dy_);
  for (const Table& table : tables_) {
    if (table.all == 0) continue;
    // What belongs to other ranks' rows ends behind this rank's own, where nobody looks.
    const Run::Target d = run.Gradient(table.param);
    ops::EmbeddingBackward(run.ops(), Rows(table, d.tensor), frame.Value(whole_dy_),
                           frame.Value(table.ids).Flat(), d.accumulate);
  }
}

absl::Status VocabularyLossHeadLayer::Declare(Builder& b) {
  constexpr unsigned kBackward = kInBackwardInput | kInBackwardWeight;
  const TokenCut& axis = b.tokens();
  const int64_t width = b.Width(x_);
  if (!b.IsShard(x_)) {
    return absl::InvalidArgumentError(
        "its input must be the ranks' parts of the tokens, as a norm leaves them");
  }
  rows_ = CutEvenly(vocabulary_, axis.ranks, axis.index);
  if (rows_.count == 0) return FewerThanRanks("entries", vocabulary_, axis);
  padded_ = PaddedEntries(rows_.count);
  chunk_ = ChunkEntries(rows_.count, chunk_);
  if (weight_.valid()) {
    b.UsesParameter(weight_);
  } else {
    ParameterSpec spec = {.name = "weight",
                          .shape = {rows_.count, width},
                          .init = Init::kNormal,
                          .std = init_std_,
                          .weight_decay = true,
                          .part = {.whole = {vocabulary_, width}, .rows = {rows_}}};
    weight_ = tied_to_.empty() ? b.Parameter(std::move(spec))
                               : b.CopyOfParameter(tied_to_, std::move(spec));
  }
  if (weight_out_ != nullptr) *weight_out_ = weight_;
  b.PadRows(weight_, padded_);
  const bool one = one_chunk();
  b.Reads(x_, kInForward);
  // Kept rather than gathered again: backward of the last layer follows its forward.
  whole_x_ = b.Saved("whole_x", width, b.dtype(),
                     one ? unsigned{kInBackwardWeight} : unsigned{kInBackwardInput});
  whole_dx_ = b.Scratch("whole_dx", width, b.dtype(), kInBackwardInput);
  // With one chunk forward leaves the gradient of the logits in their place. With several they are
  // computed again chunk by chunk, and both backward halves happen in BackwardInput.
  logits_ = one ? b.Saved("logits", chunk_, b.dtype(), kBackward)
                : b.Scratch("logits", chunk_, b.dtype(), kInForward | kInBackwardInput);
  const DType wide = b.accumulate_type();
  state_ = b.Saved("softmax", 3, wide, one ? 0u : unsigned{kInBackwardInput});
  part_state_ = b.Scratch("part_softmax", 3, wide, kInForward);
  states_ = b.Scratch("all_softmax", 3 * axis.ranks, wide, kInForward);
  losses_ = b.Saved("losses", 1, wide, 0, {.shard = true});
  gather_label_ = b.layer_name() + " gather";
  states_label_ = b.layer_name() + " softmax";
  sum_label_ = b.layer_name() + " gradient";
  b.Exchanges(ActionKind::kForward, width, b.dtype(), gather_label_);
  b.Exchanges(ActionKind::kForward, 3, wide, states_label_, {.every_token = true});
  b.Exchanges(ActionKind::kBackwardInput, width, b.dtype(), sum_label_, {.sum = true});
  return absl::OkStatus();
}

void VocabularyLossHeadLayer::Forward(Run& run, Frame& frame) const {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  const Tensor x = frame.Value(whole_x_), w = PaddedRows(run.Parameter(weight_), padded_);
  const TokenViews& t = frame.tokens;
  const Tensor state = frame.Value(state_), mine = frame.Value(part_state_);
  const auto logits_of = [&](int64_t first, Range rows) {
    const Tensor padded = Padded(frame, first);
    ops::Linear(run.ops(), Cut(padded, rows), Cut(x, rows), w.Rows(first, padded.dims[1]), {});
  };
  StartGather(run, frame, whole_x_, frame.Padded(x_), gather_label_);
  AsPiecesArrive(run, frame, whole_x_, [&](Range rows) { logits_of(0, rows); });
  for (int64_t first = 0; first < padded_; first += chunk_) {
    if (first > 0) logits_of(first, {0, t.tokens});
    ops::LossFold(run.ops(), mine, Logits(frame, first), t.targets, rows_.first + first,
                  first == 0);
  }
  // Three numbers a token from each rank, one rank's behind the other's.
  const Tensor wide = frame.Value(states_);
  const Tensor states =
      Tensor::Of(wide.data, wide.dtype, {t.tokens * axis->group().size(), 3}, wide.device);
  axis->Gather(*run.ops().stream, states, mine, states_label_);
  ops::LossMerge(run.ops(), state, states);
  for (int i = 0; i < PiecesOf(frame.cut(), t.tokens); ++i) {
    const TokenPiece piece = PieceOf(frame.cut(), t.tokens, i);
    const Range own = {std::min(piece.mine.first, t.tokens), piece.own};
    const Run::Target total = run.LossTotal();
    ops::LossFinish(run.ops(), frame.Value(losses_).Flat().Rows(piece.part.first, piece.own),
                    total.tensor, Cut(state, own), Cut(t.weights, own), total.accumulate,
                    Cut(t.targets, own));
  }
  if (one_chunk() && frame.training()) {
    ops::LossBackward(run.ops(), Logits(frame, 0), state, t.targets, t.weights, rows_.first);
  }
}

void VocabularyLossHeadLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor w = PaddedRows(run.Parameter(weight_), padded_);
  const bool needs_dx = frame.Grad(x_).present();
  const Tensor dx = frame.Value(whole_dx_), state = frame.Value(state_);
  const Run::Target dw = one_chunk() ? Run::Target() : run.Gradient(weight_);
  for (int64_t first = 0; first < padded_; first += chunk_) {
    const Tensor padded = Padded(frame, first);
    const Tensor rows = w.Rows(first, padded.dims[1]);
    if (!one_chunk()) {
      ops::Linear(run.ops(), padded, frame.Value(whole_x_), rows, {});
      ops::LossBackward(run.ops(), Logits(frame, first), state, frame.tokens.targets,
                        frame.tokens.weights, rows_.first + first);
    }
    const auto into_dx = [&](Range tokens) {
      ops::LinearBackwardInput(run.ops(), Cut(dx, tokens), Cut(padded, tokens), rows, first > 0);
    };
    if (needs_dx && first + chunk_ < padded_) {
      into_dx({0, dx.rows()});
    } else if (needs_dx) {
      SumAsWritten(run, frame, whole_dx_, GradientTarget(frame, x_), sum_label_, into_dx);
    }
    if (!one_chunk()) {
      ops::LinearBackwardWeight(run.ops(),
                                PaddedRows(dw.tensor, padded_).Rows(first, padded.dims[1]), {},
                                padded, frame.Value(whole_x_), dw.accumulate);
    }
  }
}

void VocabularyLossHeadLayer::Exchange(ActionKind, Run& run, Frame& frame) const {
  if (frame.Grad(x_).present()) FinishGradient(run, frame, x_, whole_dx_);
}

void VocabularyLossHeadLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!one_chunk()) return;
  const Run::Target dw = run.Gradient(weight_);
  ops::LinearBackwardWeight(run.ops(), PaddedRows(dw.tensor, padded_), {}, Padded(frame, 0),
                            frame.Value(whole_x_), dw.accumulate);
}

}  // namespace stretto::internal
