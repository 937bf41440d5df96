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
  constexpr unsigned kBackward = kInBackwardInput | kInBackwardWeight;
  b.Reads(qkv_, kInForward | (options_.qk_norm ? kBackward : kInBackwardInput));
  // Queries and keys are rotated where they lie, and their gradients written whole.
  b.ModifiesInPlace(qkv_);
  *o_out_ = o_ =
      b.Output("o", heads * d, {.value_uses = kInBackwardInput, .grad_uses = kInBackwardInput});
  lse_ = b.Saved("lse", heads, type, kInBackwardInput);
  delta_ = b.Scratch("delta", heads, type, kInBackwardInput);
  if (options_.qk_norm) {
    qk_ = b.Saved("qk", (heads + kv_heads) * d, b.dtype(), kInBackwardInput);
    dqk_ = b.Scratch("dqk", (heads + kv_heads) * d, b.dtype(), kBackward);
    rstd_q_ = b.Saved("rstd_q", heads, type, kBackward);
    rstd_k_ = b.Saved("rstd_k", kv_heads, type, kBackward);
    const auto norm = [&](const char* name) {
      return b.Parameter(
          {.name = name, .shape = {d}, .init = Init::kOnes, .std = 0, .weight_decay = false});
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
  const Parts in = Split(frame.Value(qkv_));
  Parts rotated = in;
  if (options_.qk_norm) {
    rotated = Split(frame.Value(qk_));
    ops::Norm(run.ops(), rotated.q, {}, {}, frame.Value(rstd_q_), in.q, {}, run.Parameter(q_norm_),
              {}, options_.norm_eps);
    ops::Norm(run.ops(), rotated.k, {}, {}, frame.Value(rstd_k_), in.k, {}, run.Parameter(k_norm_),
              {}, options_.norm_eps);
  }
  if (options_.rotary) {
    const Tensor cos = run.Constant(cos_), sin = run.Constant(sin_);
    ops::Rope(run.ops(), rotated.q, rotated.q, frame.tokens.positions, cos, sin, false);
    ops::Rope(run.ops(), rotated.k, rotated.k, frame.tokens.positions, cos, sin, false);
  }
  ops::Attention(run.ops(), frame.Value(o_).Heads(options_.heads), frame.Value(lse_), rotated.q,
                 rotated.k, in.v, Shape(frame));
}

void LocalAttentionLayer::BackwardInput(Run& run, Frame& frame) const {
  const Parts in = Split(frame.Value(qkv_));
  const Parts d_in = Split(frame.Grad(qkv_));
  Parts rotated = in, d_rotated = d_in;
  if (options_.qk_norm) {
    rotated = Split(frame.Value(qk_));
    d_rotated = Split(frame.Value(dqk_));
  }
  ops::AttentionBackward(run.ops(), d_rotated.q, d_rotated.k, d_in.v, frame.Value(delta_),
                         frame.Grad(o_).Heads(options_.heads),
                         frame.Value(o_).Heads(options_.heads), frame.Value(lse_), rotated.q,
                         rotated.k, in.v, Shape(frame));
  if (options_.rotary) {
    const Tensor cos = run.Constant(cos_), sin = run.Constant(sin_);
    ops::Rope(run.ops(), d_rotated.q, d_rotated.q, frame.tokens.positions, cos, sin, true);
    ops::Rope(run.ops(), d_rotated.k, d_rotated.k, frame.tokens.positions, cos, sin, true);
  }
  if (options_.qk_norm) {
    ops::NormBackwardInput(run.ops(), d_in.q, d_rotated.q, in.q, {}, frame.Value(rstd_q_),
                           run.Parameter(q_norm_), false);
    ops::NormBackwardInput(run.ops(), d_in.k, d_rotated.k, in.k, {}, frame.Value(rstd_k_),
                           run.Parameter(k_norm_), false);
  }
}

void LocalAttentionLayer::BackwardWeight(Run& run, Frame& frame) const {
  if (!options_.qk_norm) return;
  const Parts in = Split(frame.Value(qkv_)), d_rotated = Split(frame.Value(dqk_));
  const Run::Target dq = run.Gradient(q_norm_), dk = run.Gradient(k_norm_);
  ops::NormBackwardWeight(run.ops(), dq.tensor, {}, d_rotated.q, in.q, {}, frame.Value(rstd_q_),
                          dq.accumulate);
  ops::NormBackwardWeight(run.ops(), dk.tensor, {}, d_rotated.k, in.k, {}, frame.Value(rstd_k_),
                          dk.accumulate);
}

}  // namespace stretto::internal
