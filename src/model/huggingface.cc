#include "stretto/model/huggingface.h"

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using nlohmann::json;

bool EndsWith(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}
bool StartsWith(const std::string& text, const std::string& start) {
  return text.compare(0, start.size(), start) == 0;
}

// --- Names ---

// One tensor of theirs inside a parameter of ours.
struct Part {
  const char* hf_name;  // inside the layer, without ".weight" or ".bias"
  int64_t rows;
};

std::vector<HfPiece> Pieces(const std::string& prefix, const std::string& kind,
                            const std::vector<Part>& parts, bool transpose = false) {
  std::vector<HfPiece> pieces;
  int64_t row = 0;
  for (const Part& part : parts) {
    pieces.push_back({absl::StrCat(prefix, part.hf_name, ".", kind), row, part.rows, transpose});
    row += part.rows;
  }
  return pieces;
}

// Parameters of one block; `name` is without "blocks.{i}." and ".weight" or ".bias".
std::vector<HfPiece> BlockPieces(const ModelConfig& c, int64_t block, const std::string& name,
                                 const std::string& kind) {
  const bool bias = kind == "bias";
  if (c.family == "gpt2") {
    const std::string prefix = absl::StrCat("transformer.h.", block, ".");
    const bool transpose = !bias;
    if (name == "attn_norm") return Pieces(prefix, kind, {{"ln_1", c.hidden}});
    if (name == "mlp_norm") return Pieces(prefix, kind, {{"ln_2", c.hidden}});
    if (name == "attn.qkv") {
      return Pieces(prefix, kind, {{"attn.c_attn", c.qkv_width()}}, transpose);
    }
    if (name == "attn.out") return Pieces(prefix, kind, {{"attn.c_proj", c.hidden}}, transpose);
    if (name == "mlp.up") return Pieces(prefix, kind, {{"mlp.c_fc", c.ffn}}, transpose);
    if (name == "mlp.down") return Pieces(prefix, kind, {{"mlp.c_proj", c.hidden}}, transpose);
    return {};
  }
  const std::string prefix = absl::StrCat("model.layers.", block, ".");
  if (name == "attn.qkv" && (!bias || c.qkv_bias())) {
    const int64_t q = c.heads * c.head_dim, k = c.kv_heads * c.head_dim;
    return Pieces(prefix, kind,
                  {{"self_attn.q_proj", q}, {"self_attn.k_proj", k}, {"self_attn.v_proj", k}});
  }
  if (bias) return {};
  if (name == "attn_norm") return Pieces(prefix, kind, {{"input_layernorm", c.hidden}});
  if (name == "mlp_norm") return Pieces(prefix, kind, {{"post_attention_layernorm", c.hidden}});
  if (name == "attn.q_norm" && c.qk_norm()) {
    return Pieces(prefix, kind, {{"self_attn.q_norm", c.head_dim}});
  }
  if (name == "attn.k_norm" && c.qk_norm()) {
    return Pieces(prefix, kind, {{"self_attn.k_norm", c.head_dim}});
  }
  if (name == "attn.out") return Pieces(prefix, kind, {{"self_attn.o_proj", c.hidden}});
  if (name == "mlp.gate_up") {
    return Pieces(prefix, kind, {{"mlp.gate_proj", c.ffn}, {"mlp.up_proj", c.ffn}});
  }
  if (name == "mlp.down") return Pieces(prefix, kind, {{"mlp.down_proj", c.hidden}});
  return {};
}

// --- config.json ---

// Reads members of one object; the first thing wrong stays in `status`.
class Reader {
 public:
  Reader(const json& object, std::string source) : object_(object), source_(std::move(source)) {}

  // Null when the member is absent or null.
  const json* Find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  int64_t Count(const char* key, std::optional<int64_t> otherwise = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) {
      if (!otherwise) Fail(key, "is missing; it must be a whole number");
      return otherwise.value_or(1);
    }
    if (value->is_number_unsigned() &&
        value->get<uint64_t>() <= uint64_t{std::numeric_limits<int32_t>::max()}) {
      return value->get<int64_t>();
    }
    Fail(key, "must be a whole number from 0 to 2147483647");
    return 1;
  }
  double Number(const char* key, double otherwise) {
    const json* value = Find(key);
    if (value == nullptr) return otherwise;
    if (value->is_number()) return value->get<double>();
    Fail(key, "must be a number");
    return otherwise;
  }
  bool Flag(const char* key, bool otherwise) {
    const json* value = Find(key);
    if (value == nullptr) return otherwise;
    if (value->is_boolean()) return value->get<bool>();
    Fail(key, "must be true or false");
    return otherwise;
  }
  std::string Text(const char* key, const std::string& otherwise) {
    const json* value = Find(key);
    if (value == nullptr) return otherwise;
    if (value->is_string()) return value->get<std::string>();
    Fail(key, "must be a string");
    return otherwise;
  }

  void Fail(const std::string& key, const std::string& what) {
    Set(absl::InvalidArgumentError(absl::StrCat(source_, ": \"", key, "\" ", what)));
  }
  void Refuse(const std::string& key, const std::string& what) {
    Set(absl::UnimplementedError(absl::StrCat(source_, ": \"", key, "\" ", what)));
  }
  // `key` must be `wanted`, which is also what its absence means.
  void Require(const char* key, bool wanted, const char* what) {
    if (Flag(key, wanted) != wanted) {
      Refuse(key, absl::StrCat("is ", wanted ? "false" : "true", ", but ", what,
                               " not supported; convert another model"));
    }
  }
  const std::string& source() const { return source_; }
  const absl::Status& status() const { return status_; }
  void Set(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

 private:
  const json& object_;
  std::string source_;
  absl::Status status_;
};

void ReadGpt2(Reader& r, ModelConfig* c) {
  c->hidden = r.Count("n_embd");
  c->layers = r.Count("n_layer");
  c->heads = r.Count("n_head");
  c->ffn = r.Count("n_inner", 4 * c->hidden);
  c->max_positions = r.Count("n_positions");
  c->norm_eps = r.Number("layer_norm_epsilon", 1e-5);
  const std::string activation = r.Text("activation_function", "gelu_new");
  if (activation != "gelu_new" && activation != "gelu_pytorch_tanh") {
    r.Refuse("activation_function", absl::StrCat("is ", activation,
                                                 ", but only gelu_new (GELU by "
                                                 "tanh) is supported for gpt2"));
  }
  r.Require("scale_attn_weights", true, "attention without 1 / sqrt(head_dim) is");
  r.Require("scale_attn_by_inverse_layer_idx", false, "scaling attention by layer is");
  r.Require("add_cross_attention", false, "cross-attention is");
}

void ReadRope(Reader& r, ModelConfig* c) {
  // Version 5 has everything in rope_parameters; version 4 theta beside rope_scaling.
  const bool v5 = r.Find("rope_parameters") != nullptr;
  const char* key = v5 ? "rope_parameters" : "rope_scaling";
  c->rope_theta = r.Number("rope_theta", 10000.0);
  if (r.Number("partial_rotary_factor", 1.0) != 1.0) {
    r.Refuse("partial_rotary_factor", "is not 1, but rotary positions turn whole heads here");
  }
  const json* object = r.Find(key);
  if (object == nullptr) return;
  if (!object->is_object()) {
    r.Fail(key, "must be an object");
    return;
  }
  for (const auto& [name, value] : object->items()) {
    if (value.is_object()) {
      r.Refuse(key, absl::StrCat("has rotary positions of their own for layers of type ", name,
                                 ", but all layers share theirs here"));
      return;
    }
  }
  Reader rope(*object, absl::StrCat(r.source(), ": ", key));
  c->rope_theta = rope.Number("rope_theta", c->rope_theta);
  const std::string type = rope.Text("rope_type", rope.Text("type", "default"));
  if (type == "llama3") {
    for (const char* name : {"factor", "low_freq_factor", "high_freq_factor"}) {
      if (rope.Find(name) == nullptr) rope.Fail(name, "is missing; rope type llama3 needs it");
    }
    c->rope_scaling_factor = rope.Number("factor", 1);
    c->rope_low_freq_factor = rope.Number("low_freq_factor", 1);
    c->rope_high_freq_factor = rope.Number("high_freq_factor", 4);
    c->rope_original_positions = rope.Count("original_max_position_embeddings");
  } else if (type != "default") {
    r.Refuse(key, absl::StrCat("asks for rope type ", type,
                               ", but only default and llama3 are supported"));
  }
  if (rope.Find("mrope_section") != nullptr) {
    r.Refuse(key, "has an mrope_section, but positions in several dimensions are not supported");
  }
  if (rope.Number("partial_rotary_factor", 1.0) != 1.0) {
    r.Refuse(key, "has a partial_rotary_factor, but rotary positions turn whole heads here");
  }
  r.Set(rope.status());
}

// Qwen's sliding windows, where they are in use.
void RefuseSlidingWindow(Reader& r, const ModelConfig& c) {
  constexpr char kWhat[] = "but attention inside a sliding window is not supported";
  if (const json* types = r.Find("layer_types"); types != nullptr) {
    if (!types->is_array()) {
      r.Fail("layer_types", "must be a list");
      return;
    }
    for (const json& type : *types) {
      if (type != "full_attention") {
        r.Refuse("layer_types",
                 absl::StrCat("has ", type.is_string() ? type.get<std::string>() : "no string",
                              ", ", kWhat));
        return;
      }
    }
  } else if (r.Flag("use_sliding_window", false) && r.Find("sliding_window") != nullptr &&
             r.Count("max_window_layers", 28) < c.layers) {
    r.Refuse("use_sliding_window", absl::StrCat("is true, ", kWhat));
  }
}

void ReadRotaryFamily(Reader& r, ModelConfig* c) {
  const bool llama = c->family == "llama", qwen3 = c->family == "qwen3";
  c->hidden = r.Count("hidden_size");
  c->layers = r.Count("num_hidden_layers");
  c->heads = r.Count("num_attention_heads");
  // What a missing field means is the default of transformers' configuration class.
  if (llama) {
    c->kv_heads = r.Count("num_key_value_heads", c->heads);
  } else {
    c->kv_heads = r.Count("num_key_value_heads");
  }
  c->head_dim = r.Count("head_dim", qwen3 ? 128 : 0);
  c->ffn = r.Count("intermediate_size");
  c->max_positions = r.Count("max_position_embeddings");
  c->norm_eps = r.Number("rms_norm_eps", 1e-6);
  const std::string activation = r.Text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    r.Refuse("hidden_act",
             absl::StrCat("is ", activation, ", but only silu is supported for ", c->family));
  }
  if (c->family != "qwen2") r.Require("attention_bias", false, "biases in attention are");
  if (llama) r.Require("mlp_bias", false, "biases in the MLP are");
  RefuseSlidingWindow(r, *c);
  ReadRope(r, c);
}

void ReadTokens(Reader& r, HfConfig* config) {
  config->bos_token = r.Find("bos_token_id") == nullptr ? -1 : r.Count("bos_token_id");
  const json* eos = r.Find("eos_token_id");
  if (eos == nullptr) return;
  for (const json& id : eos->is_array() ? *eos : json::array({*eos})) {
    if (!id.is_number_unsigned() ||
        id.get<uint64_t>() > uint64_t{std::numeric_limits<int32_t>::max()}) {
      r.Fail("eos_token_id", "must be a token id or a list of token ids");
      return;
    }
    config->eos_tokens.push_back(id.get<int64_t>());
  }
}

void ReadDType(Reader& r, HfConfig* config) {
  const std::string name = r.Text("dtype", r.Text("torch_dtype", ""));
  if (name == "float64") config->dtype = DType::kF64;
  if (name == "float32") config->dtype = DType::kF32;
  if (name == "bfloat16") config->dtype = DType::kBF16;
  if (name == "float16") config->dtype = DType::kF16;
}

const char* TorchName(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "float64";
    case DType::kBF16:
      return "bfloat16";
    case DType::kF16:
      return "float16";
    default:
      return "float32";
  }
}

// Key by key in the order given, as a person would read it.
using Ordered = nlohmann::ordered_json;

void AddTokens(const HfConfig& config, Ordered* j) {
  (*j)["bos_token_id"] = config.bos_token < 0 ? Ordered() : Ordered(config.bos_token);
  if (config.eos_tokens.empty()) {
    (*j)["eos_token_id"] = nullptr;
  } else if (config.eos_tokens.size() == 1) {
    (*j)["eos_token_id"] = config.eos_tokens[0];
  } else {
    (*j)["eos_token_id"] = config.eos_tokens;
  }
}

void AddGpt2(const ModelConfig& c, Ordered* out) {
  Ordered& j = *out;
  j["vocab_size"] = c.vocabulary;
  j["n_positions"] = c.max_positions;
  j["n_ctx"] = c.max_positions;
  j["n_embd"] = c.hidden;
  j["n_layer"] = c.layers;
  j["n_head"] = c.heads;
  j["n_inner"] = c.ffn;
  j["activation_function"] = "gelu_new";
  j["layer_norm_epsilon"] = c.norm_eps;
  // Ours has no dropout.
  for (const char* key : {"attn_pdrop", "embd_pdrop", "resid_pdrop"}) j[key] = 0.0;
}

void AddRotaryFamily(const ModelConfig& c, Ordered* out) {
  Ordered& j = *out;
  j["vocab_size"] = c.vocabulary;
  j["max_position_embeddings"] = c.max_positions;
  j["hidden_size"] = c.hidden;
  j["intermediate_size"] = c.ffn;
  j["num_hidden_layers"] = c.layers;
  j["num_attention_heads"] = c.heads;
  j["num_key_value_heads"] = c.kv_heads;
  j["head_dim"] = c.head_dim;
  j["hidden_act"] = "silu";
  j["rms_norm_eps"] = c.norm_eps;
  j["attention_dropout"] = 0.0;
  if (c.family != "qwen2") j["attention_bias"] = false;
  if (c.family == "llama") {
    j["mlp_bias"] = false;
  } else {
    j["use_sliding_window"] = false;
    j["sliding_window"] = nullptr;
  }
  // In the words of version 4 and of version 5.
  Ordered rope = {{"rope_type", "default"}};
  if (c.rope_scaling_factor > 0) {
    rope = {{"rope_type", "llama3"},
            {"factor", c.rope_scaling_factor},
            {"low_freq_factor", c.rope_low_freq_factor},
            {"high_freq_factor", c.rope_high_freq_factor},
            {"original_max_position_embeddings", c.rope_original_positions}};
  }
  j["rope_theta"] = c.rope_theta;
  j["rope_scaling"] = c.rope_scaling_factor > 0 ? rope : Ordered();
  rope["rope_theta"] = c.rope_theta;
  j["rope_parameters"] = std::move(rope);
}

}  // namespace

std::vector<HfPiece> HfPieces(const ModelConfig& c, const std::string& parameter) {
  const bool gpt2 = c.family == "gpt2";
  const std::string bare = gpt2 ? "transformer." : "model.";
  if (parameter == "embed.weight") {
    return {{bare + (gpt2 ? "wte.weight" : "embed_tokens.weight"), 0, c.vocabulary}};
  }
  if (parameter == "embed.position.weight" && gpt2) {
    return {{"transformer.wpe.weight", 0, c.max_positions}};
  }
  if (parameter == "norm.weight") {
    return {{bare + (gpt2 ? "ln_f.weight" : "norm.weight"), 0, c.hidden}};
  }
  if (parameter == "norm.bias" && gpt2) return {{"transformer.ln_f.bias", 0, c.hidden}};
  if (parameter == "head.weight" && !c.tie_embeddings) {
    return {{"lm_head.weight", 0, c.vocabulary}};
  }
  // blocks.{i}.{name}.{kind}
  const std::string start = "blocks.";
  if (!StartsWith(parameter, start)) return {};
  const size_t dot = parameter.find('.', start.size()), last = parameter.rfind('.');
  if (dot == std::string::npos || last <= dot) return {};
  const std::string digits = parameter.substr(start.size(), dot - start.size());
  if (digits.empty() || digits.size() > 6 ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    return {};
  }
  const int64_t block = std::stoll(digits);
  const std::string kind = parameter.substr(last + 1);
  if (block >= c.layers || (kind != "weight" && kind != "bias")) return {};
  return BlockPieces(c, block, parameter.substr(dot + 1, last - dot - 1), kind);
}

std::string HfBareName(const std::string& hf_name) {
  for (const std::string prefix : {"transformer.", "model."}) {
    if (StartsWith(hf_name, prefix)) return hf_name.substr(prefix.size());
  }
  return hf_name;
}

bool HfIgnores(const ModelConfig& config, const std::string& hf_name) {
  if (config.family == "gpt2") {
    if (EndsWith(hf_name, ".attn.bias") || EndsWith(hf_name, ".attn.masked_bias")) return true;
  } else if (EndsWith(hf_name, "rotary_emb.inv_freq")) {
    return true;
  }
  return config.tie_embeddings && hf_name == "lm_head.weight";
}

absl::StatusOr<HfConfig> ModelConfigFromHf(const std::string& text, const std::string& source) {
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(source, " is no JSON object"));
  }
  Reader r(object, source);
  HfConfig config;
  ModelConfig& c = config.model;
  c.family = r.Text("model_type", "");
  const bool gpt2 = c.family == "gpt2";
  if (!gpt2 && c.family != "llama" && c.family != "qwen2" && c.family != "qwen3") {
    return absl::UnimplementedError(absl::StrCat(source, ": \"model_type\" is ",
                                                 c.family.empty() ? "missing" : c.family,
                                                 "; gpt2, llama, qwen2 and qwen3 are supported"));
  }
  if (r.Find("quantization_config") != nullptr) {
    r.Refuse("quantization_config",
             "is set, but quantised weights are not supported; convert the original ones");
  }
  c.vocabulary = r.Count("vocab_size");
  c.tie_embeddings = r.Flag("tie_word_embeddings", gpt2);
  c.init_std = r.Number("initializer_range", 0.02);
  if (gpt2) {
    ReadGpt2(r, &c);
  } else {
    ReadRotaryFamily(r, &c);
  }
  ReadTokens(r, &config);
  ReadDType(r, &config);
  if (!r.status().ok()) return r.status();

  // Ranges are those of our own configuration.
  ModelConfig checked;
  const absl::Status ranges =
      ParseConfig(PrintConfig(ConfigRef(&c)), "the model it describes", {}, ConfigRef(&checked));
  const absl::Status resolved = ranges.ok() ? c.Resolve() : ranges;
  if (!resolved.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, " cannot be used: ", std::string(resolved.message())));
  }
  return config;
}

absl::StatusOr<std::string> HfConfigJson(const HfConfig& config) {
  const ModelConfig& c = config.model;
  const bool gpt2 = c.family == "gpt2";
  if (gpt2 && (c.heads != c.kv_heads || c.heads * c.head_dim != c.hidden)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "transformers' gpt2 has no field for ", c.kv_heads, " key heads or for a head_dim of ",
        c.head_dim, " with ", c.heads, " heads and hidden width ", c.hidden,
        "; only models with heads * head_dim = hidden can be written as gpt2"));
  }
  Ordered j;
  const char* architecture = c.family == "llama"   ? "LlamaForCausalLM"
                             : c.family == "qwen2" ? "Qwen2ForCausalLM"
                             : c.family == "qwen3" ? "Qwen3ForCausalLM"
                                                   : "GPT2LMHeadModel";
  j["architectures"] = Ordered::array({architecture});
  j["model_type"] = c.family;
  if (gpt2) {
    AddGpt2(c, &j);
  } else {
    AddRotaryFamily(c, &j);
  }
  j["initializer_range"] = c.init_std;
  j["tie_word_embeddings"] = c.tie_embeddings;
  AddTokens(config, &j);
  j["use_cache"] = true;
  j["dtype"] = j["torch_dtype"] = TorchName(config.dtype.value_or(DType::kF32));
  return j.dump(2) + "\n";
}

std::string HfGenerationConfigJson(const HfConfig& config) {
  Ordered j;
  AddTokens(config, &j);
  return j.dump(2) + "\n";
}

}  // namespace stretto
