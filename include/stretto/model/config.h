// The shape of a model: one struct for the four dense families.
#ifndef STRETTO_MODEL_CONFIG_H_
#define STRETTO_MODEL_CONFIG_H_

#include <cstdint>
#include <string>

#include "stretto/core/config.h"
#include "stretto/core/status.h"

namespace stretto {

// What the families differ in:
//            norm       positions  MLP      biases             QK-norm
//   gpt2     LayerNorm  learned    GELU     everywhere         no
//   llama    RMSNorm    RoPE       SwiGLU   none               no
//   qwen2    RMSNorm    RoPE       SwiGLU   on q, k and v      no
//   qwen3    RMSNorm    RoPE       SwiGLU   none               yes
struct ModelConfig {
  std::string family = "gpt2";
  int64_t vocabulary = 257;
  int64_t layers = 4;
  int64_t hidden = 128;
  int64_t heads = 4;
  int64_t kv_heads = 0;  // 0: as many as heads
  int64_t head_dim = 0;  // 0: hidden / heads
  int64_t ffn = 0;       // 0: 4 * hidden for gpt2, 8/3 * hidden rounded up to 64 otherwise
  int64_t max_positions = 1024;
  bool tie_embeddings = true;
  double norm_eps = 1e-5;
  double rope_theta = 10000.0;
  // RoPE scaling of Llama 3.1 and later; rope_scaling_factor 0 turns it off.
  double rope_scaling_factor = 0;
  double rope_low_freq_factor = 1;
  double rope_high_freq_factor = 4;
  int64_t rope_original_positions = 8192;
  double init_std = 0.02;

  void Visit(ConfigVisitor& v);
  // Fills the fields that are 0 with their defaults and checks the rest; all errors at once.
  absl::Status Resolve();

  bool gated_mlp() const { return family != "gpt2"; }
  bool rms_norm() const { return family != "gpt2"; }
  bool rotary() const { return family != "gpt2"; }
  bool qk_norm() const { return family == "qwen3"; }
  bool qkv_bias() const { return family == "gpt2" || family == "qwen2"; }
  bool linear_bias() const { return family == "gpt2"; }
  // Columns of the packed query-key-value projection.
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

}  // namespace stretto

#endif  // STRETTO_MODEL_CONFIG_H_
