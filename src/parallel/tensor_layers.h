// The layers of TensorStrategies.
#ifndef STRETTO_SRC_PARALLEL_TENSOR_LAYERS_H_
#define STRETTO_SRC_PARALLEL_TENSOR_LAYERS_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "stretto/model/layer.h"
#include "stretto/parallel/tensor_parallel.h"

namespace stretto::internal {

// This rank's share of one part of a layer's features.
struct FeatureCut {
  Range range;  // of all features
  // Several ranks have it, which is group `group` of `groups`; the first of them owns it.
  bool copied = false, owned = true;
  int64_t group = 0, groups = 1;
};
// One for each part (see Features); INVALID_ARGUMENT when they do not make `all` features, or when
// this rank would have none of some.
absl::StatusOr<std::vector<FeatureCut>> CutFeatures(const Features& features, int64_t all,
                                                    const TokenCut& axis);
// Which group this rank has where there are fewer groups than ranks, and its place among the ranks
// that have it.
struct GroupPlace {
  int64_t group = 0;
  int ranks = 1, index = 0;
};
GroupPlace PlaceInGroups(int64_t groups, const TokenCut& axis);

// The axis of a run; null after having failed the stream when it has none.
TensorAxis* AxisOf(const Run& run);

// Begins to gather `part`, which has all its rows (Frame::Padded), of all ranks into `whole`.
void StartGather(Run& run, const Frame& frame, SlotId whole, const Tensor& part,
                 const std::string& label);
// work(rows) with the tokens of each piece of `whole` once they have arrived.
template <class Work>
void AsPiecesArrive(Run& run, const Frame& frame, SlotId whole, const Work& work) {
  TensorAxis* const axis = AxisOf(run);
  if (axis == nullptr) return;
  const int64_t tokens = frame.tokens.tokens;
  const int pieces = PiecesOf(frame.cut(), tokens);
  for (int i = 0; i < pieces; ++i) {
    const TokenPiece piece = PieceOf(frame.cut(), tokens, i);
    axis->Wait(*run.ops().stream, frame.Padded(whole), i, pieces);
    work(Range{piece.whole.first, piece.all});
  }
}
// What is enqueued from now on sees all of the exchange of `whole`.
void WaitForPieces(Run& run, const Frame& frame, SlotId whole);

// Begins to add up piece `i` of `whole` over the ranks, into `part` or in place.
void StartSum(Run& run, const Frame& frame, SlotId whole, const TokenPiece& piece, int i,
              const Tensor& part, const std::string& label);
// Begins to add up `whole` piece by piece: each leaves after work(rows) has written its tokens.
template <class Work>
void SumAsWritten(Run& run, const Frame& frame, SlotId whole, const Tensor& part,
                  const std::string& label, const Work& work) {
  const int64_t tokens = frame.tokens.tokens;
  for (int i = 0; i < PiecesOf(frame.cut(), tokens); ++i) {
    const TokenPiece piece = PieceOf(frame.cut(), tokens, i);
    work(Range{piece.whole.first, piece.all});
    StartSum(run, frame, whole, piece, i, part, label);
  }
}
// Where this rank's part of a sum goes that becomes, or is added to, the gradient of `slot`; and
// what ends it.
Tensor GradientTarget(const Frame& frame, SlotId slot);
void FinishGradient(Run& run, const Frame& frame, SlotId slot, SlotId whole);

inline Tensor Cut(const Tensor& t, Range rows) { return t.Rows(rows.first, rows.count); }

// y = x w^T + bias: gathers the tokens of x, and has a part of the rows of w and of y's features.
class ColumnLinearLayer : public Layer {
 public:
  ColumnLinearLayer(SlotId x, int64_t in, int64_t out, const LinearOptions& options, SlotId* y)
      : x_(x), in_(in), out_(out), options_(options), y_out_(y) {}
  const char* kind() const override { return "column_linear"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void Recompute(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;
  void Exchange(ActionKind kind, Run& run, Frame& frame) const override;

 private:
  SlotId x_, y_, gelu_;
  SlotId whole_x_, again_,
      whole_dx_;  // of all tokens: x in forward and in W, and dx before its sum
  // Gathers x into `whole`, and multiplies.
  void Gathered(Run& run, Frame& frame, SlotId whole) const;
  // What this rank has alone comes first, then what others have as well.
  struct Piece {
    Range columns;  // of y
    ParamId weight, bias;
  };
  static Tensor Columns(const Piece& piece, const Tensor& y) {
    return y.Columns(piece.columns.first, piece.columns.count);
  }

  int64_t in_, out_;
  LinearOptions options_;
  SlotId* y_out_;
  std::vector<Piece> pieces_;
  std::string gather_label_, sum_label_, again_label_;
};

// y = x w^T + bias: has a part of x's features and of the columns of w; y is summed over the ranks,
// and each keeps a part of the tokens.
class RowLinearLayer : public Layer {
 public:
  RowLinearLayer(SlotId x, int64_t in, int64_t out, const LinearOptions& options, SlotId* y)
      : x_(x), in_(in), out_(out), options_(options), y_out_(y) {}
  const char* kind() const override { return "row_linear"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;
  void Exchange(ActionKind kind, Run& run, Frame& frame) const override;

 private:
  SlotId x_, y_;
  SlotId whole_y_, whole_dy_;  // of all tokens: y before its sum, and dy in both backward halves
  int64_t in_, out_;
  LinearOptions options_;
  SlotId* y_out_;
  ParamId weight_, bias_;
  bool adds_bias_ = false;  // one rank does
  std::string sum_label_, gather_label_;
};

// y = table[id] + positions[position]: each rank has a part of the rows of both tables, and looks
// up what it has. Rows of other ranks count as zero, which is what the row behind its own holds.
class VocabularyEmbeddingLayer : public Layer {
 public:
  VocabularyEmbeddingLayer(int64_t vocabulary, int64_t width, int64_t positions, double init_std,
                           SlotId* y, ParamId* table)
      : width_(width), init_std_(init_std), y_out_(y), table_out_(table) {
    tables_[0].all = vocabulary;
    tables_[1].all = positions;
  }
  const char* kind() const override { return "vocabulary_embedding"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run&, Frame&) const override {}
  void BackwardWeight(Run& run, Frame& frame) const override;
  unsigned ReadsParameters() const override { return kInForward; }
  void Exchange(ActionKind kind, Run& run, Frame& frame) const override;

 private:
  struct Table {
    int64_t all = 0;  // rows of the whole table; 0: there is none
    Range rows;       // on this rank
    ParamId param;
    SlotId ids;  // rows of this rank's part; `rows.count` for those of others
  };
  Tensor Rows(const Table& table, Tensor t) const { return PaddedRows(t, table.rows.count + 1); }

  Table tables_[2];  // of ids and of positions
  int64_t width_;
  double init_std_;
  SlotId y_, whole_y_, whole_dy_;
  SlotId* y_out_;
  ParamId* table_out_;
  std::string sum_label_, gather_label_;
};

// logits = x w^T and softmax cross-entropy: each rank has the logits of a part of the vocabulary,
// in chunks, and they stay there. What travels is three numbers a token. Each rank counts the
// losses of its part of the tokens.
class VocabularyLossHeadLayer : public Layer {
 public:
  VocabularyLossHeadLayer(SlotId x, int64_t vocabulary, int64_t chunk, ParamId tied,
                          double init_std, std::string tied_to, ParamId* weight)
      : x_(x),
        vocabulary_(vocabulary),
        chunk_(chunk),
        weight_(tied),
        init_std_(init_std),
        tied_to_(std::move(tied_to)),
        weight_out_(weight) {}
  const char* kind() const override { return "vocabulary_loss_head"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;
  unsigned WritesGradients() const override {
    return one_chunk() ? kInBackwardWeight : kInBackwardInput;
  }
  void Exchange(ActionKind kind, Run& run, Frame& frame) const override;

 private:
  bool one_chunk() const { return chunk_ == padded_; }
  // Logits of the chunk that starts at this rank's entry `first`: with the padding, and those that
  // exist.
  Tensor Padded(const Frame& frame, int64_t first) const {
    return frame.Value(logits_).Columns(0, std::min(chunk_, padded_ - first));
  }
  Tensor Logits(const Frame& frame, int64_t first) const {
    return frame.Value(logits_).Columns(0, std::min(chunk_, rows_.count - first));
  }

  SlotId x_, whole_x_, whole_dx_;
  SlotId logits_, state_, part_state_, states_, losses_;
  int64_t vocabulary_;
  Range rows_;          // entries of the vocabulary on this rank
  int64_t padded_ = 0;  // their number in whole units
  int64_t chunk_;
  ParamId weight_;
  double init_std_;
  std::string tied_to_;  // layer in another part of the model; empty: none
  ParamId* weight_out_;
  std::string gather_label_, states_label_, sum_label_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_PARALLEL_TENSOR_LAYERS_H_
