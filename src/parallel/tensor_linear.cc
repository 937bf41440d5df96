// Column and row linear layers.
#include "absl/strings/str_cat.h"
#include "src/model/layers.h"
#include "src/parallel/tensor_layers.h"

namespace stretto::internal {

GroupPlace PlaceInGroups(int64_t groups, const TokenCut& axis) {
  GroupPlace place;
  for (; place.group < groups; ++place.group) {
    const Range ranks =
        CutEvenly(axis.ranks, static_cast<int>(groups), static_cast<int>(place.group));
    if (axis.index >= ranks.first + ranks.count) continue;
    place.ranks = static_cast<int>(ranks.count);
    place.index = static_cast<int>(axis.index - ranks.first);
    break;
  }
  return place;
}

absl::StatusOr<std::vector<FeatureCut>> CutFeatures(const Features& features, int64_t all,
                                                    const TokenCut& axis) {
  const std::vector<int64_t> parts =
      features.parts.empty() ? std::vector<int64_t>{all} : features.parts;
  std::vector<FeatureCut> cuts;
  int64_t begin = 0;
  for (const int64_t part : parts) {
    const int64_t groups = features.groups > 0 ? features.groups : part;
    const int64_t members = cuts.empty() ? features.members : 1;
    if (part <= 0 || members <= 0 || part % (groups * members) != 0) {
      return absl::InvalidArgumentError(absl::StrCat("its part of ", part, " features is not ",
                                                     groups, " equal groups of ", members));
    }
    const int64_t each = part / groups;  // features of a group
    FeatureCut cut;
    if (features.members > 1 && groups < axis.ranks) {
      const GroupPlace place = PlaceInGroups(groups, axis);
      const int64_t first = begin + place.group * each;
      if (cuts.empty()) {
        const int64_t one = each / members;
        const Range mine = CutEvenly(members, place.ranks, place.index);
        cut.range = {first + mine.first * one, mine.count * one};
      } else {
        cut = {.range = {first, each},
               .copied = true,
               .owned = place.index == 0,
               .group = place.group,
               .groups = groups};
      }
    } else {
      const Range mine = CutEvenly(groups, axis.ranks, axis.index);
      cut.range = {begin + mine.first * each, mine.count * each};
    }
    if (cut.range.count == 0) {
      return absl::InvalidArgumentError(absl::StrCat("it has fewer groups of features than the ",
                                                     axis.ranks, " ranks of the tensor axis"));
    }
    begin += part;
    cuts.push_back(cut);
  }
  if (begin != all) {
    return absl::InvalidArgumentError(absl::StrCat("its ", all, " features are not the ", begin,
                                                   " of the parts that it was told of"));
  }
  return cuts;
}

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
  STRETTO_ASSIGN_OR_RETURN(const std::vector<FeatureCut> mine,
                           CutFeatures(options_.features, out_, b.tokens()));
  int64_t out = 0;
  for (const FeatureCut& cut : mine) out += cut.range.count;
  const bool gelu = options_.gelu_output != nullptr;
  b.Reads(x_, kInForward | kInBackwardWeight);
  *y_out_ = y_ = b.Output("y", out, {.recompute_source = gelu});
  if (gelu) {
    *options_.gelu_output = gelu_ =
        b.Output("gelu", out, {.grad_uses = 0, .cheap = true, .gelu_of = y_});
  }
  whole_x_ = b.Scratch("whole_x", in_, b.dtype(), kInForward);
  again_ = b.Scratch("whole_x_again", in_, b.dtype(), kInRecompute | kInBackwardWeight);
  whole_dx_ = b.Scratch("whole_dx", in_, b.dtype(), kInBackwardInput);
  for (const bool copied : {false, true}) {
    Piece piece;
    if (!pieces_.empty()) piece.columns.first = pieces_.back().columns.count;
    ParameterPart part;
    for (const FeatureCut& cut : mine) {
      if (cut.copied != copied) continue;
      part.rows.push_back(cut.range);
      part.owned = cut.owned;
      part.copy = cut.group;
      part.copies = cut.groups;
      piece.columns.count += cut.range.count;
    }
    if (part.rows.empty()) continue;
    part.whole = {out_, in_};
    piece.weight = b.Parameter({.name = "weight",
                                .shape = {piece.columns.count, in_},
                                .init = Init::kNormal,
                                .std = options_.init_std,
                                .weight_decay = true,
                                .part = part,
                                .partial_gradient = copied});
    if (options_.bias) {
      part.whole = {out_};
      piece.bias = b.Parameter({.name = "bias",
                                .shape = {piece.columns.count},
                                .init = Init::kZeros,
                                .std = 0,
                                .weight_decay = false,
                                .part = part,
                                .partial_gradient = copied});
    }
    pieces_.push_back(piece);
  }
  if (gelu && pieces_.size() > 1) {
    return absl::InvalidArgumentError("gelu behind it needs features that no two ranks share");
  }
  gather_label_ = b.layer_name() + " gather";
  sum_label_ = b.layer_name() + " gradient";
  again_label_ = b.layer_name() + " gather again";
  b.Exchanges(ActionKind::kForward, in_, b.dtype(), gather_label_,
              {.unless_kept = gelu ? y_ : SlotId(), .for_weight = true});
  b.Exchanges(ActionKind::kBackwardInput, in_, b.dtype(), sum_label_, {.sum = true});
  b.Exchanges(ActionKind::kStartWeight, in_, b.dtype(), again_label_);
  return absl::OkStatus();
}

void ColumnLinearLayer::Forward(Run& run, Frame& frame) const { Gathered(run, frame, whole_x_); }

void ColumnLinearLayer::Gathered(Run& run, Frame& frame, SlotId whole) const {
  StartGather(run, frame, whole, frame.Padded(x_), gather_label_);
  AsPiecesArrive(run, frame, whole, [&](Range rows) {
    const Tensor x = Cut(frame.Value(whole), rows), y = Cut(frame.Value(y_), rows);
    for (const Piece& piece : pieces_) {
      const Tensor w = run.Parameter(piece.weight);
      const Tensor bias = piece.bias.valid() ? run.Parameter(piece.bias) : Tensor();
      if (gelu_.valid()) {
        ops::LinearGelu(run.ops(), Cut(frame.Value(gelu_), rows), y, x, w, bias);
      } else {
        ops::Linear(run.ops(), Columns(piece, y), x, w, bias);
      }
    }
  });
}

void ColumnLinearLayer::Recompute(Run& run, Frame& frame) const {
  if (gelu_.valid() && !frame.Dropped(y_)) {
    ops::Gelu(run.ops(), frame.Value(gelu_), frame.Value(y_));
  } else {
    Gathered(run, frame, frame.FilledAgain() ? again_ : whole_x_);
  }
}

void ColumnLinearLayer::BackwardInput(Run& run, Frame& frame) const {
  if (!frame.Grad(x_).present()) return;
  SumAsWritten(run, frame, whole_dx_, GradientTarget(frame, x_), sum_label_, [&](Range rows) {
    for (const Piece& piece : pieces_) {
      ops::LinearBackwardInput(run.ops(), Cut(frame.Value(whole_dx_), rows),
                               Columns(piece, Cut(frame.Grad(y_), rows)),
                               run.Parameter(piece.weight), /*acc=*/&piece != pieces_.data());
    }
  });
}

void ColumnLinearLayer::Exchange(ActionKind kind, Run& run, Frame& frame) const {
  if (kind == ActionKind::kFinishInput) {
    if (frame.Grad(x_).present()) FinishGradient(run, frame, x_, whole_dx_);
  } else {
    // Gathered again rather than kept from forward: meanwhile a rank keeps its part of the tokens.
    StartGather(run, frame, again_, frame.Padded(x_), again_label_);
  }
}

void ColumnLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!frame.FilledAgain()) WaitForPieces(run, frame, again_);
  for (const Piece& piece : pieces_) {
    LinearBackwardWeight(run, piece.weight, piece.bias, Columns(piece, frame.Grad(y_)),
                         frame.Value(again_));
  }
}

absl::Status RowLinearLayer::Declare(Builder& b) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<FeatureCut> mine,
                           CutFeatures(options_.features, in_, b.tokens()));
  const int64_t in = mine[0].range.count;
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
  STRETTO_RETURN_IF_ERROR(DeclareLinearInput(b, options_, x_));
  *y_out_ = y_ = b.Output("y", out_, {.grad_uses = kInBackwardInput, .shard = true});
  whole_y_ = b.Scratch("whole_y", out_, b.dtype(), kInForward);
  whole_dy_ = b.Scratch("whole_dy", out_, b.dtype(), kInBackwardInput | kInBackwardWeight);
  weight_ = b.Parameter({.name = "weight",
                         .shape = {out_, in},
                         .init = Init::kNormal,
                         .std = options_.init_std,
                         .weight_decay = true,
                         .part = {.whole = {out_, in_}, .first_column = mine[0].range.first}});
  if (options_.bias) {
    // Every rank has it, and its whole gradient: dy is gathered for the weight anyway.
    bias_ = b.Parameter(
        {.name = "bias", .shape = {out_}, .init = Init::kZeros, .std = 0, .weight_decay = false});
    adds_bias_ = b.tokens().index == 0;
  }
  sum_label_ = b.layer_name() + " sum";
  gather_label_ = b.layer_name() + " gradient";
  b.Exchanges(ActionKind::kForward, out_, b.dtype(), sum_label_, {.sum = true});
  b.Exchanges(ActionKind::kStartInput, out_, b.dtype(), gather_label_);
  return absl::OkStatus();
}

void RowLinearLayer::Forward(Run& run, Frame& frame) const {
  SumAsWritten(run, frame, whole_y_, frame.Padded(y_), sum_label_, [&](Range rows) {
    ops::Linear(run.ops(), Cut(frame.Value(whole_y_), rows), Cut(frame.Value(x_), rows),
                run.Parameter(weight_), adds_bias_ ? run.Parameter(bias_) : Tensor());
  });
  WaitForPieces(run, frame, whole_y_);
}

void RowLinearLayer::Exchange(ActionKind, Run& run, Frame& frame) const {
  StartGather(run, frame, whole_dy_, frame.PaddedGrad(y_), gather_label_);
}

void RowLinearLayer::BackwardInput(Run& run, Frame& frame) const {
  AsPiecesArrive(run, frame, whole_dy_, [&](Range rows) {
    LinearBackwardInput(run, frame, options_, x_, frame.Value(whole_dy_), run.Parameter(weight_),
                        rows);
  });
}

void RowLinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  LinearBackwardWeight(run, weight_, bias_, frame.Value(whole_dy_), frame.Value(x_));
}

}  // namespace stretto::internal
