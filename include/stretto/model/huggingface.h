// The four families as Hugging Face transformers names and configures them: which of its tensors
// hold a parameter of ours, and config.json in both directions.
#ifndef STRETTO_MODEL_HUGGINGFACE_H_
#define STRETTO_MODEL_HUGGINGFACE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "stretto/core/dtype.h"
#include "stretto/core/status.h"
#include "stretto/model/config.h"

namespace stretto {

// Rows [first_row, first_row + rows) of a parameter of ours, as one tensor of a model directory.
struct HfPiece {
  std::string hf_name;
  int64_t first_row = 0;
  int64_t rows = 0;
  bool transpose = false;  // stored as [columns, rows] (GPT-2's Conv1D)

  bool operator==(const HfPiece&) const = default;
};

// The tensors that make up `parameter` ("blocks.0.attn.qkv.weight"), by ascending row, covering all
// its rows. Names are those that AutoModelForCausalLM saves. Empty when a model of this
// configuration has no such parameter. `config` must be resolved.
std::vector<HfPiece> HfPieces(const ModelConfig& config, const std::string& parameter);

// The same tensor in files saved from the bare model without its head, or by GPT-2's authors:
// without "transformer." or "model." in front.
std::string HfBareName(const std::string& hf_name);

// True for tensors that files may hold besides the parameters and that carry nothing of their own:
// attention masks, rotary tables, the head of a model with tied embeddings.
bool HfIgnores(const ModelConfig& config, const std::string& hf_name);

// What a config.json says.
struct HfConfig {
  ModelConfig model;           // resolved
  std::optional<DType> dtype;  // of the weights
  int64_t bos_token = -1;      // -1: none
  std::vector<int64_t> eos_tokens;
};

// Reads a config.json, of transformers 4 (rope_theta, rope_scaling, torch_dtype) or 5
// (rope_parameters, dtype). INVALID_ARGUMENT names a field that is missing or of the wrong type;
// UNIMPLEMENTED names what the file asks for and we do not have: another model_type or activation,
// sliding windows, attention biases, rope types other than default and llama3, quantised weights.
// `source` names the text in messages.
absl::StatusOr<HfConfig> ModelConfigFromHf(const std::string& json, const std::string& source);

// A config.json that transformers 4 and 5 accept. INVALID_ARGUMENT for a model that it has no field
// for (a GPT-2 whose heads do not make up the hidden width).
absl::StatusOr<std::string> HfConfigJson(const HfConfig& config);
// The generation_config.json beside it.
std::string HfGenerationConfigJson(const HfConfig& config);

}  // namespace stretto

#endif  // STRETTO_MODEL_HUGGINGFACE_H_
