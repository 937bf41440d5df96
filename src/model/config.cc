#include "stretto/model/config.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace stretto {

void ModelConfig::Visit(ConfigVisitor& v) {
  constexpr double kMany = 1 << 30;
  v.Choice("family", &family, {"gpt2", "llama", "qwen2", "qwen3"},
           "norms, positions, MLP and biases of this family");
  v.Field("vocabulary", &vocabulary, "token ids", {.min = 1, .max = kMany});
  v.Field("layers", &layers, "transformer blocks", {.min = 1, .max = 10000});
  v.Field("hidden", &hidden, "width of the residual stream", {.min = 1, .max = 1 << 20});
  v.Field("heads", &heads, "query heads", {.min = 1, .max = 65536});
  v.Field("kv_heads", &kv_heads, "key and value heads; 0: as many as heads",
          {.min = 0, .max = 65536});
  v.Field("head_dim", &head_dim, "width of a head; 0: hidden / heads", {.min = 0, .max = 65536});
  v.Field("ffn", &ffn,
          "inner width of the MLP; 0: 4 * hidden for gpt2, else 8/3 * hidden rounded up to 64",
          {.min = 0, .max = kMany});
  v.Field("max_positions", &max_positions, "longest document piece, in tokens",
          {.min = 1, .max = kMany});
  v.Field("tie_embeddings", &tie_embeddings, "the head uses the embedding's weights");
  v.Field("norm_eps", &norm_eps, "added to the variance in norms", {.min = 0, .max = 1});
  v.Field("rope_theta", &rope_theta, "base of the rotary frequencies", {.min = 1});
  v.Field("rope_scaling_factor", &rope_scaling_factor, "Llama 3.1 frequency scaling; 0: off",
          {.min = 0});
  v.Field("rope_low_freq_factor", &rope_low_freq_factor, "of the Llama 3.1 scaling", {.min = 0});
  v.Field("rope_high_freq_factor", &rope_high_freq_factor, "of the Llama 3.1 scaling", {.min = 0});
  v.Field("rope_original_positions", &rope_original_positions,
          "context that the scaled frequencies were made for", {.min = 1, .max = kMany});
  v.Field("init_std", &init_std,
          "standard deviation of initial weights; projections back into the residual stream use "
          "init_std / sqrt(2 * layers)",
          {.min = 0, .max = 10});
}

absl::Status ModelConfig::Resolve() {
  std::vector<std::string> errors;
  if (kv_heads == 0) kv_heads = heads;
  if (head_dim == 0) {
    if (hidden % heads != 0) {
      errors.push_back(absl::StrCat("model.hidden (", hidden, ") is no multiple of model.heads (",
                                    heads, "); set model.head_dim"));
      head_dim = 1;
    } else {
      head_dim = hidden / heads;
    }
  }
  if (heads % kv_heads != 0) {
    errors.push_back(absl::StrCat("model.heads (", heads, ") is no multiple of model.kv_heads (",
                                  kv_heads,
                                  "); each key head serves a whole number of query heads"));
  }
  if (rotary() && head_dim % 2 != 0) {
    errors.push_back(absl::StrCat("model.head_dim is ", head_dim,
                                  "; rotary positions turn pairs, so it must be even"));
  }
  if (ffn == 0) {
    ffn = family == "gpt2" ? 4 * hidden : (8 * hidden / 3 + 63) / 64 * 64;
  }
  if (rope_scaling_factor > 0 && rope_high_freq_factor <= rope_low_freq_factor) {
    errors.push_back("model.rope_high_freq_factor must be above model.rope_low_freq_factor");
  }
  // Bounds that keep sizes in bytes inside 64 bits, far beyond any machine.
  const auto real = [](int64_t v) { return static_cast<double>(v); };
  const double query_width = real(heads) * real(head_dim);
  const double kv_width = real(kv_heads) * real(head_dim);
  const double elements =
      real(layers) * real(hidden) * (2 * query_width + 2 * kv_width + 3 * real(ffn)) +
      real(hidden) * (2 * real(vocabulary) + real(max_positions));
  if (elements > 0x1p50 || query_width > 0x1p24) {
    errors.push_back(absl::StrCat("the model would have about ", elements, " parameters with ",
                                  query_width,
                                  " query columns; at most 2^50 and 2^24 are supported: lower "
                                  "model.layers, hidden, heads, head_dim, ffn or vocabulary"));
  }
  if (!errors.empty()) return absl::InvalidArgumentError(absl::StrJoin(errors, "\n"));
  return absl::OkStatus();
}

}  // namespace stretto
