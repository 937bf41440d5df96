#include <cmath>

#include "src/model/layers.h"

namespace stretto::internal {

absl::Status LocalAttentionLayer::Declare(Builder& b) {
  const int64_t heads = options_.heads, kv_heads = options_.kv_heads, d = options_.head_dim;
  const int64_t width = (heads + 2 * kv_heads) * d;
  if (b.Width(qkv_) != width) {
    return absl::InvalidArgumentError(absl::StrCat("its input [q | k | v] has ", b.Width(qkv_),
                                                   " features per token, not ", width));
  }
  if (heads % kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(heads, " query heads cannot share ", kv_heads, " key heads evenly"));
  }
  const DType type = b.accumulate_type();
  if (options_.qk_norm && !options_.rotary) {
    return absl::InvalidArgumentError(
        "its norm of queries and keys is part of the rotation; set rotary as well as qk_norm");
  }
  b.Reads(qkv_, kInForward | kInBackwardInput);
  // Queries and keys are rotated where they lie, and their gradients written whole.
  b.ModifiesInPlace(qkv_);
  *o_out_ = o_ =
      b.Output("o", heads * d, {.value_uses = kInBackwardInput, .grad_uses = kInBackwardInput});
  lse_ = b.Saved("lse", heads, type, kInBackwardInput);
  delta_ = b.Scratch("delta", heads, type, kInBackwardInput);
  if (options_.qk_norm) {
    qk_ = b.Saved("qk", (heads + kv_heads) * d, b.dtype(), kInBackwardInput);
    rstd_ = b.Saved("rstd", heads + kv_heads, type, kInBackwardInput);
    partials_ = b.Scratch("partials", 0, type, kInBackwardInput | kInBackwardWeight,
                          RotaryKernels::kPartials * 2 * d * SizeOf(type));
    const auto norm = [&](const char* name) {
      return b.Parameter({.name = name,
                          .shape = {d},
                          .init = Init::kOnes,
                          .std = 0,
                          .weight_decay = false,
                          .partial_gradient = true});  // of the heads that are here
    };
    q_norm_ = norm("q_norm.weight");
    k_norm_ = norm("k_norm.weight");
  }
  if (options_.rotary) {
    if (d % 2 != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("rotary positions turn pairs, so head_dim must be even, not ", d));
    }
    const auto table = [&](const char* name, double (*function)(double)) {
      const auto inverse_frequency = options_.inverse_frequency;
      return b.Constant({.name = name,
                         .rows = options_.max_positions,
                         .columns = d / 2,
                         .dtype = type,
                         .value = [=](int64_t position, int64_t pair) {
                           return function(static_cast<double>(position) * inverse_frequency(pair));
                         }});
    };
    cos_ = table("rope.cos", [](double a) { return std::cos(a); });
    sin_ = table("rope.sin", [](double a) { return std::sin(a); });
  }
  return absl::OkStatus();
}

LocalAttentionLayer::Parts LocalAttentionLayer::Split(Tensor packed) const {
  const int64_t q = options_.heads * options_.head_dim, k = options_.kv_heads * options_.head_dim;
  Parts parts;
  parts.q = packed.Columns(0, q).Heads(options_.heads);
  parts.k = packed.Columns(q, k).Heads(options_.kv_heads);
  if (packed.dims[1] == q + 2 * k) parts.v = packed.Columns(q + k, k).Heads(options_.kv_heads);
  return parts;
}

Tensor LocalAttentionLayer::QueriesAndKeys(Tensor packed) const {
  const int64_t heads = options_.heads + options_.kv_heads;
  return packed.Columns(0, heads * options_.head_dim).Heads(heads);
}

RotaryArgs LocalAttentionLayer::Rotation(const Run& run, const Frame& frame) const {
  RotaryArgs args;
  args.positions = frame.tokens.positions;
  args.cos = run.Constant(cos_);
  args.sin = run.Constant(sin_);
  if (!options_.qk_norm) return args;
  args.q_weight = run.Parameter(q_norm_);
  args.k_weight = run.Parameter(k_norm_);
  args.query_heads = options_.heads;
  args.eps = options_.norm_eps;
  return args;
}

Tensor LocalAttentionLayer::Partials(const Frame& frame) const {
  Tensor t = frame.Fixed(partials_);
  t.rank = 3;
  t.dims = {RotaryKernels::kPartials, 2, options_.head_dim};
  t.row_stride = t.row_elements();
  return t;
}

AttentionShape LocalAttentionLayer::Shape(const Frame& frame) const {
  AttentionShape shape;
  shape.cu_q = shape.cu_k = frame.tokens.cu_seqlens;
  shape.max_q = shape.max_k = frame.tokens.max_length;
  shape.uniform = frame.tokens.uniform;
  shape.causal = true;
  shape.scale = 1.0 / std::sqrt(static_cast<double>(options_.head_dim));
  return shape;
}

void LocalAttentionLayer::Forward(Run& run, Frame& frame) const {
  const Tensor qkv = frame.Value(qkv_);
  const Tensor rotated = options_.qk_norm ? frame.Value(qk_) : qkv;
  if (options_.rotary) {
    ops::Rope(run.ops(), QueriesAndKeys(rotated), options_.qk_norm ? frame.Value(rstd_) : Tensor(),
              QueriesAndKeys(qkv), Rotation(run, frame));
  }
  Parts parts = Split(rotated);
  parts.v = Split(qkv).v;
  Attend(run, frame, parts);
}

void LocalAttentionLayer::Attend(Run& run, Frame& frame, const Parts& in) const {
  if (frame.tokens.ring_size > 1) {
    run.ops().stream->Fail(absl::FailedPreconditionError(absl::StrCat(
        frame.tokens.ring_size, " ranks share the documents of a micro-batch, but attention was ",
        "built for documents that one rank has; build the model with ContextStrategies")));
    return;
  }
  ops::Attention(run.ops(), frame.Value(o_).Heads(options_.heads), frame.Value(lse_), in.q, in.k,
                 in.v, Shape(frame));
}

void LocalAttentionLayer::AttendBackward(Run& run, Frame& frame, const Parts& in,
                                         const Parts& gradient) const {
  ops::AttentionBackward(run.ops(), gradient.q, gradient.k, gradient.v, frame.Value(delta_),
                         frame.Grad(o_).Heads(options_.heads),
                         frame.Value(o_).Heads(options_.heads), frame.Value(lse_), in.q, in.k, in.v,
                         Shape(frame));
}

void LocalAttentionLayer::BackwardInput(Run& run, Frame& frame) const {
  const Tensor qkv = frame.Value(qkv_), d_qkv = frame.Grad(qkv_);
  Parts rotated = Split(options_.qk_norm ? frame.Value(qk_) : qkv);
  rotated.v = Split(qkv).v;
  AttendBackward(run, frame, rotated, Split(d_qkv));
  if (!options_.rotary) return;
  // The gradients of what attention read become those of the projection where they lie.
  Tensor x, rstd, partials;
  if (options_.qk_norm) {
    x = QueriesAndKeys(qkv);
    rstd = frame.Value(rstd_);
    partials = Partials(frame);
  }
  const Tensor d = QueriesAndKeys(d_qkv);
  ops::RopeBackwardInput(run.ops(), d, d, x, rstd, partials, Rotation(run, frame));
}

void LocalAttentionLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!options_.qk_norm) return;
  const Run::Target dq = run.Gradient(q_norm_), dk = run.Gradient(k_norm_);
  ops::RopeBackwardWeight(run.ops(), dq.tensor, dk.tensor, Partials(frame), dq.accumulate);
}

}  // namespace stretto::internal
