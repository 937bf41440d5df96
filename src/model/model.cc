#include "stretto/model/model.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

// Frequencies of rotary pairs, with Llama 3.1's scaling: long wavelengths are slowed down by the
// factor, short ones stay, the range between is blended.
std::function<double(int64_t)> RotaryFrequencies(const ModelConfig& c) {
  const double theta = c.rope_theta, d = static_cast<double>(c.head_dim);
  const double factor = c.rope_scaling_factor, low = c.rope_low_freq_factor,
               high = c.rope_high_freq_factor,
               context = static_cast<double>(c.rope_original_positions);
  return [=](int64_t pair) {
    const double frequency = std::pow(theta, -2.0 * static_cast<double>(pair) / d);
    if (factor <= 0) return frequency;
    const double turns = context * frequency / (2 * std::numbers::pi);  // over the old context
    if (turns > high) return frequency;
    if (turns < low) return frequency / factor;
    const double blend = (turns - low) / (high - low);
    return frequency * ((1 - blend) / factor + blend);
  };
}

}  // namespace

absl::StatusOr<Model> BuildModel(const ModelConfig& config, const ModelOptions& options) {
  const ModelConfig& c = config;
  Builder b(options.dtype, options.strategies, options.kernels);
  const NormOptions norm = {.rms = c.rms_norm(), .eps = c.norm_eps};
  const double residual_std = c.init_std / std::sqrt(2.0 * static_cast<double>(c.layers));
  const LinearOptions into_residual = {.bias = c.linear_bias(), .init_std = residual_std};
  const AttentionOptions attention = {.heads = c.heads,
                                      .kv_heads = c.kv_heads,
                                      .head_dim = c.head_dim,
                                      .qk_norm = c.qk_norm(),
                                      .norm_eps = c.norm_eps,
                                      .rotary = c.rotary(),
                                      .max_positions = c.max_positions,
                                      .inverse_frequency = RotaryFrequencies(c)};

  const int64_t first = options.part.first_block;
  const int64_t end = options.part.end_block < 0 ? c.layers : options.part.end_block;
  if (first < 0 || first >= end || end > c.layers) {
    return absl::InvalidArgumentError(absl::StrCat("a part of blocks ", first, " to ", end,
                                                   " was asked for of a model with ", c.layers,
                                                   " blocks; each part needs one at least"));
  }
  const int64_t heads = c.heads * c.head_dim, kv_heads = c.kv_heads * c.head_dim;
  const std::string embedding = "embed";
  ParamId table;
  SlotId x;
  if (first == 0) {
    x = b.Embedding(embedding, c.vocabulary, c.hidden, c.rotary() ? 0 : c.max_positions, c.init_std,
                    &table);
  } else {
    x = b.StageInput("stage_input", c.hidden);
  }
  SlotId branch, n;
  for (int64_t i = first; i < end; ++i) {
    const std::string block = absl::StrCat("blocks.", i, ".");
    b.BeginBlock();
    if (i == first) {
      n = b.Norm(block + "attn_norm", x, norm);
    } else {
      std::tie(x, n) = b.AddNorm(block + "attn_norm", x, branch, norm);
    }
    const SlotId qkv = b.Linear(block + "attn.qkv", Role::kColumn, n, c.hidden, c.qkv_width(),
                                {.bias = c.qkv_bias(),
                                 .init_std = c.init_std,
                                 .features = {.parts = {heads, kv_heads, kv_heads},
                                              .groups = c.kv_heads,
                                              .members = c.heads / c.kv_heads}});
    const SlotId o = b.Attention(block + "attn", qkv, attention);
    LinearOptions out = into_residual;
    out.features = {.groups = c.kv_heads, .members = c.heads / c.kv_heads};
    branch = b.Linear(block + "attn.out", Role::kRow, o, heads, c.hidden, out);
    std::tie(x, n) = b.AddNorm(block + "mlp_norm", x, branch, norm);
    SlotId inner;
    LinearOptions down = into_residual;
    if (c.gated_mlp()) {
      std::tie(inner, down.swiglu_input) =
          b.GatedLinear(block + "mlp.gate_up", block + "mlp.act", n, c.hidden, c.ffn, c.init_std);
    } else {
      down.gelu_input = b.Linear(block + "mlp.up", Role::kColumn, n, c.hidden, c.ffn,
                                 {.bias = true, .init_std = c.init_std, .gelu_output = &inner});
    }
    branch = b.Linear(block + "mlp.down", Role::kRow, inner, c.ffn, c.hidden, down);
    b.EndBlock();
  }
  Model model;
  model.config = config;
  if (c.tie_embeddings) model.tied = table;
  if (end == c.layers) {
    std::tie(x, n) = b.AddNorm("norm", x, branch, norm);
    b.KeepToEnd(n);
    model.final_hidden = n;
    model.head = b.LossHead("head", n, c.vocabulary, options.loss_chunk,
                            c.tie_embeddings ? table : ParamId(), c.init_std,
                            c.tie_embeddings && first > 0 ? embedding : std::string());
    if (c.tie_embeddings) model.tied = model.head;
  } else {
    b.StageOutput("stage_output", x, branch);
  }
  auto graph = b.Finish();
  if (!graph.ok()) return graph.status();
  model.graph = std::move(graph).value();
  return model;
}

}  // namespace stretto
