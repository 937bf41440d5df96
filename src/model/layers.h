// The standard layers. Users reach them through Builder.
#ifndef STRETTO_SRC_MODEL_LAYERS_H_
#define STRETTO_SRC_MODEL_LAYERS_H_

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/model/layer.h"

namespace stretto::internal {

// The parameters of a linear layer, whatever it computes in: "weight" [out, in] and, when asked
// for, "bias" [out], else `bias` may be null; `shard`: of a layer that sees a part of the tokens.
// For Declare.
void DeclareLinearParameters(Builder& b, int64_t in, int64_t out, const LinearOptions& options,
                             bool shard, ParamId* weight, ParamId* bias);
// Reads x, and what gelu or SwiGLU made x from (LinearOptions::gelu_input, swiglu_input), as
// LinearBackwardInput does. For Declare; INVALID_ARGUMENT when x is not made so.
absl::Status DeclareLinearInput(Builder& b, const LinearOptions& options, SlotId x);
// Into the gradient of x, or of what gelu or SwiGLU made x from: dy [tokens, out] w [out, in]. Of
// these rows.
void LinearBackwardInput(Run& run, Frame& frame, const LinearOptions& options, SlotId x,
                         const Tensor& dy, const Tensor& w, Range rows);
// Into the gradients of `weight` [out, in] and, where valid, `bias` [out]: of dy [tokens, out] and
// x [tokens, in].
void LinearBackwardWeight(Run& run, ParamId weight, ParamId bias, const Tensor& dy,
                          const Tensor& x);

// y = x w^T + bias, with gelu behind it or in front of it, or SwiGLU in front of it, fused in
// (LinearOptions).
class LinearLayer : public Layer {
 public:
  LinearLayer(SlotId x, int64_t in, int64_t out, const LinearOptions& options, SlotId* y)
      : x_(x), in_(in), out_(out), options_(options), y_out_(y) {}
  const char* kind() const override { return "linear"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void Recompute(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 private:
  SlotId x_, y_, gelu_;
  int64_t in_, out_;
  LinearOptions options_;
  SlotId* y_out_;
  ParamId weight_, bias_;
};

// gate_up = x w^T and act = silu(gate) * up with gate_up = [gate | up], as one operation. Gradients
// come to gate_up, from the reader of act (LinearOptions::swiglu_input). The parameter is the one
// that a linear layer of this name would have; no bias.
class GatedLinearLayer : public Layer {
 public:
  GatedLinearLayer(SlotId x, int64_t in, int64_t features, const LinearOptions& options,
                   SlotId* act, SlotId* gate_up)
      : x_(x),
        in_(in),
        features_(features),
        options_(options),
        act_out_(act),
        gate_up_out_(gate_up) {}
  const char* kind() const override { return "gated_linear"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void Recompute(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 private:
  SlotId x_, gate_up_, act_;
  int64_t in_, features_;
  LinearOptions options_;
  SlotId *act_out_, *gate_up_out_;
  ParamId weight_;
};

// n = norm(x).
class NormLayer : public Layer {
 public:
  NormLayer(SlotId x, const NormOptions& options, SlotId* n)
      : x_(x), options_(options), n_out_(n) {}
  const char* kind() const override { return "norm"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 private:
  SlotId x_, n_, mean_, rstd_, partials_;
  NormOptions options_;
  SlotId* n_out_;
  ParamId weight_, bias_;
};

// sum = x + branch, n = norm(sum).
class AddNormLayer : public Layer {
 public:
  AddNormLayer(SlotId x, SlotId branch, const NormOptions& options, std::pair<SlotId, SlotId>* out)
      : x_(x), branch_(branch), options_(options), out_(out) {}
  const char* kind() const override { return "add_norm"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void Recompute(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 private:
  SlotId x_, branch_, sum_, n_, mean_, rstd_, partials_;
  NormOptions options_;
  std::pair<SlotId, SlotId>* out_;
  ParamId weight_, bias_;
};

// y = gelu(x), or y = silu(gate) * up for x = [gate | up].
class ActivationLayer : public Layer {
 public:
  enum class Kind { kGelu, kSwiglu };
  ActivationLayer(Kind function, SlotId x, SlotId* y) : function_(function), x_(x), y_out_(y) {}
  const char* kind() const override { return function_ == Kind::kGelu ? "gelu" : "swiglu"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run&, Frame&) const override {}

 private:
  Kind function_;
  SlotId x_, y_;
  SlotId* y_out_;
};

// y = table[id], plus a learned position.
class EmbeddingLayer : public Layer {
 public:
  EmbeddingLayer(int64_t vocabulary, int64_t width, int64_t positions, double init_std, SlotId* y,
                 ParamId* table)
      : vocabulary_(vocabulary),
        width_(width),
        positions_(positions),
        init_std_(init_std),
        y_out_(y),
        table_out_(table) {}
  const char* kind() const override { return "embedding"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run&, Frame&) const override {}
  void BackwardWeight(Run& run, Frame& frame) const override;
  unsigned ReadsParameters() const override { return kInForward; }

 private:
  int64_t vocabulary_, width_, positions_;
  double init_std_;
  SlotId y_;
  SlotId* y_out_;
  ParamId* table_out_;
  ParamId table_, position_table_;
};

// Variable-length causal attention of all documents of the frame on this rank.
class LocalAttentionLayer : public Layer {
 public:
  LocalAttentionLayer(SlotId qkv, const AttentionOptions& options, SlotId* o)
      : options_(options), qkv_(qkv), o_out_(o) {}
  const char* kind() const override { return options_.qk_norm ? "attention_qk_norm" : "attention"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;

 protected:
  // Query, key and value heads inside a packed matrix: [tokens, heads, head_dim] each.
  struct Parts {
    Tensor q, k, v;
  };
  // o and lse from what attention reads, and the gradients of that.
  virtual void Attend(Run& run, Frame& frame, const Parts& in) const;
  virtual void AttendBackward(Run& run, Frame& frame, const Parts& in, const Parts& gradient) const;
  AttentionShape Shape(const Frame& frame) const;

  SlotId o_, lse_, delta_;
  AttentionOptions options_;

 private:
  Parts Split(Tensor packed) const;
  // Its queries and keys side by side: [tokens, heads + kv_heads, head_dim].
  Tensor QueriesAndKeys(Tensor packed) const;
  RotaryArgs Rotation(const Run& run, const Frame& frame) const;
  // What BackwardInput leaves of the norms' weights for BackwardWeight.
  Tensor Partials(const Frame& frame) const;

  SlotId qkv_;
  SlotId qk_, rstd_, partials_;  // QK-norm only
  SlotId* o_out_;
  ParamId q_norm_, k_norm_;
  ConstantId cos_, sin_;
};

// y is what the part of the model before this one made.
class StageInputLayer : public Layer {
 public:
  StageInputLayer(int64_t width, SlotId* y) : width_(width), y_out_(y) {}
  const char* kind() const override { return "stage_input"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run&, Frame&) const override {}

 private:
  int64_t width_;
  SlotId y_;
  SlotId* y_out_;
};

// x + branch is what this part of the model makes.
class StageOutputLayer : public Layer {
 public:
  StageOutputLayer(SlotId x, SlotId branch) : x_(x), branch_(branch) {}
  const char* kind() const override { return "stage_output"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run&, Frame&) const override {}

 private:
  SlotId x_, branch_;
};

// Products of a loss head run over whole units of the vocabulary: libraries' kernels are several
// times slower on sizes such as 50257.
inline constexpr int64_t kVocabularyUnit = 64;
inline int64_t PaddedEntries(int64_t entries) {
  return (entries + kVocabularyUnit - 1) / kVocabularyUnit * kVocabularyUnit;
}
// Entries in a chunk when `asked` are asked for; PaddedEntries for one chunk, as with asked <= 0.
inline int64_t ChunkEntries(int64_t entries, int64_t asked) {
  return asked <= 0 || asked >= entries
             ? PaddedEntries(entries)
             : std::max(kVocabularyUnit, asked / kVocabularyUnit * kVocabularyUnit);
}

// logits = x w^T and softmax cross-entropy, in vocabulary chunks.
class LossHeadLayer : public Layer {
 public:
  LossHeadLayer(SlotId x, int64_t vocabulary, int64_t chunk, ParamId tied, double init_std,
                std::string tied_to, ParamId* weight)
      : x_(x),
        vocabulary_(vocabulary),
        padded_(PaddedEntries(vocabulary)),
        chunk_(ChunkEntries(vocabulary, chunk)),
        weight_(tied),
        init_std_(init_std),
        tied_to_(std::move(tied_to)),
        weight_out_(weight) {}
  const char* kind() const override { return "loss_head"; }
  absl::Status Declare(Builder& b) override;
  void Forward(Run& run, Frame& frame) const override;
  void BackwardInput(Run& run, Frame& frame) const override;
  void BackwardWeight(Run& run, Frame& frame) const override;
  unsigned WritesGradients() const override {
    return one_chunk() ? kInBackwardWeight : kInBackwardInput;
  }

 private:
  bool one_chunk() const { return chunk_ == padded_; }
  // Logits of the chunk that starts at entry `first`: with the padding, and those that exist.
  Tensor Padded(const Frame& frame, int64_t first) const;
  Tensor Logits(const Frame& frame, int64_t first) const;

  SlotId x_, logits_, state_, losses_;
  int64_t vocabulary_, padded_, chunk_;
  ParamId weight_;
  double init_std_;
  std::string tied_to_;  // layer in another part of the model; empty: none
  ParamId* weight_out_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_MODEL_LAYERS_H_
