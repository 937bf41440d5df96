#include "stretto/model/huggingface.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "stretto/model/model.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::OddModel;

ModelConfig Resolved(const std::string& family, bool tied) {
  ModelConfig config = OddModel(family, tied);
  EXPECT_TRUE(config.Resolve().ok());
  return config;
}

TEST(HfPieces, SplitPackedProjections) {
  const ModelConfig c = Resolved("qwen2", true);  // 6 query and 2 key heads of 6, ffn 27
  EXPECT_THAT(HfPieces(c, "blocks.1.attn.qkv.bias"),
              ElementsAre(HfPiece{"model.layers.1.self_attn.q_proj.bias", 0, 36},
                          HfPiece{"model.layers.1.self_attn.k_proj.bias", 36, 12},
                          HfPiece{"model.layers.1.self_attn.v_proj.bias", 48, 12}));
  EXPECT_THAT(HfPieces(c, "blocks.0.mlp.gate_up.weight"),
              ElementsAre(HfPiece{"model.layers.0.mlp.gate_proj.weight", 0, 27},
                          HfPiece{"model.layers.0.mlp.up_proj.weight", 27, 27}));
}

TEST(HfPieces, Gpt2MatricesAreTransposedButEmbeddingsAreNot) {
  const ModelConfig c = Resolved("gpt2", true);
  EXPECT_THAT(HfPieces(c, "blocks.0.attn.qkv.weight"),
              ElementsAre(HfPiece{"transformer.h.0.attn.c_attn.weight", 0, 60, true}));
  EXPECT_THAT(HfPieces(c, "blocks.0.attn.qkv.bias"),
              ElementsAre(HfPiece{"transformer.h.0.attn.c_attn.bias", 0, 60, false}));
  EXPECT_THAT(HfPieces(c, "embed.weight"),
              ElementsAre(HfPiece{"transformer.wte.weight", 0, 53, false}));
}

TEST(HfPieces, UnknownParametersHaveNone) {
  const ModelConfig c = Resolved("llama", true);
  for (const char* name :
       {"", "head.weight", "blocks.2.attn.out.weight", "blocks.0.attn.qkv.bias", "blocks..x.weight",
        "blocks.99999999999999999999.attn.out.weight", "blocks.0.attn.q_norm.weight",
        "blocks.0.attn.out", "blocks.-1.attn.out.weight", "embed.position.weight", "norm.bias"}) {
    EXPECT_THAT(HfPieces(c, name), IsEmpty()) << name;
  }
}

class Families : public ::testing::TestWithParam<std::tuple<std::string, bool>> {
 protected:
  const ModelConfig config_ = Resolved(std::get<0>(GetParam()), std::get<1>(GetParam()));
};

// Whatever the model declares has a place, whole, and no two share one.
TEST_P(Families, EveryParameterIsCoveredOnce) {
  const Model model = BuildModel(config_).value();
  std::set<std::string> names;
  for (const ParameterInfo& p : model.graph.parameters) {
    int64_t row = 0;
    for (const HfPiece& piece : HfPieces(config_, p.spec.name)) {
      EXPECT_EQ(piece.first_row, row) << p.spec.name;
      EXPECT_GT(piece.rows, 0);
      EXPECT_TRUE(!piece.transpose || p.spec.shape.size() == 2) << p.spec.name;
      EXPECT_TRUE(names.insert(piece.hf_name).second) << piece.hf_name;
      EXPECT_TRUE(names.insert(HfBareName(piece.hf_name)).second ||
                  HfBareName(piece.hf_name) == piece.hf_name);
      EXPECT_FALSE(HfIgnores(config_, piece.hf_name)) << piece.hf_name;
      row += piece.rows;
    }
    EXPECT_EQ(row, p.rows()) << p.spec.name;
  }
}

TEST_P(Families, ConfigComesBack) {
  HfConfig config = {.model = config_, .dtype = DType::kBF16, .bos_token = 3, .eos_tokens = {4, 9}};
  config.model.norm_eps = 3e-6;
  config.model.init_std = 0.017;
  if (config.model.family == "llama") {
    config.model.rope_theta = 5e5;
    config.model.rope_scaling_factor = 8;
    config.model.rope_low_freq_factor = 1.5;
    config.model.rope_high_freq_factor = 4.5;
    config.model.rope_original_positions = 11;
  }
  const std::string text = HfConfigJson(config).value();
  auto back = ModelConfigFromHf(text, "config.json");
  ASSERT_TRUE(back.ok()) << back.status() << text;
  EXPECT_EQ(PrintConfig(ConfigRef(&back->model)), PrintConfig(ConfigRef(&config.model)));
  EXPECT_EQ(back->dtype, DType::kBF16);
  EXPECT_EQ(back->bos_token, 3);
  EXPECT_THAT(back->eos_tokens, ElementsAre(4, 9));
}

INSTANTIATE_TEST_SUITE_P(All, Families,
                         ::testing::Combine(::testing::Values("gpt2", "llama", "qwen2", "qwen3"),
                                            ::testing::Bool()),
                         [](const auto& info) {
                           return std::get<0>(info.param) +
                                  (std::get<1>(info.param) ? "_tied" : "_untied");
                         });

// A config.json with some members added or replaced (`more` ends with a comma where not empty).
std::string Llama(const std::string& more) {
  return "{\"model_type\": \"llama\", " + more +
         R"("hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 53,
            "intermediate_size": 27, "max_position_embeddings": 19})";
}
std::string Qwen2(const std::string& more) {
  std::string text = Llama(more + R"("num_key_value_heads": 2, )");
  return text.replace(text.find("llama"), 5, "qwen2");
}

TEST(ModelConfigFromHf, TakesBothSchemas) {
  const std::string v4 = R"("rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "factor": 8,
      "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 12},
      "torch_dtype": "bfloat16", "eos_token_id": 7, "bos_token_id": null, )";
  const std::string v5 = R"("rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3",
      "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 12}, "dtype": "bfloat16", "eos_token_id": [7], )";
  for (const std::string& text : {Llama(v4), Llama(v5)}) {
    const auto config = ModelConfigFromHf(text, "config.json");
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->model.rope_theta, 500000);
    EXPECT_EQ(config->model.rope_scaling_factor, 8);
    EXPECT_EQ(config->model.rope_original_positions, 12);
    EXPECT_EQ(config->model.kv_heads, 4);
    EXPECT_EQ(config->model.head_dim, 6);
    EXPECT_EQ(config->model.norm_eps, 1e-6);
    EXPECT_FALSE(config->model.tie_embeddings);
    EXPECT_EQ(config->dtype, DType::kBF16);
    EXPECT_EQ(config->bos_token, -1);
    EXPECT_THAT(config->eos_tokens, ElementsAre(7));
  }
}

TEST(ModelConfigFromHf, Gpt2AsOnTheHub) {
  const auto config = ModelConfigFromHf(
      R"({"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
          "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
          "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
          "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
          "resid_pdrop": 0.1, "summary_activation": null, "vocab_size": 50257})",
      "config.json");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model.ffn, 3072);
  EXPECT_EQ(config->model.head_dim, 64);
  EXPECT_TRUE(config->model.tie_embeddings);
}

TEST(ModelConfigFromHf, WindowsThatReachNoLayerAreFine) {
  EXPECT_TRUE(
      ModelConfigFromHf(Qwen2(R"("use_sliding_window": false, "sliding_window": 4096, )"), "c")
          .ok());
  EXPECT_TRUE(ModelConfigFromHf(Qwen2(R"("use_sliding_window": true, "sliding_window": 4096,
                                         "max_window_layers": 2, )"),
                                "c")
                  .ok());
}

TEST(ModelConfigFromHf, RefusesByName) {
  const struct {
    std::string text, message;
  } cases[] = {
      {"[1", "c is no JSON object"},
      {"[]", "c is no JSON object"},
      {"{}", "\"model_type\" is missing"},
      {R"({"model_type": "mixtral"})", "\"model_type\" is mixtral"},
      {R"({"model_type": "gpt2", "vocab_size": 9})", "\"n_embd\" is missing"},
      {R"({"model_type": "gpt2", "activation_function": "relu", "vocab_size": 9, "n_embd": 4,
          "n_head": 2, "n_layer": 1, "n_positions": 8})",
       "\"activation_function\" is relu"},
      {Llama(R"("attention_bias": true, )"), "\"attention_bias\" is true"},
      {Llama(R"("mlp_bias": true, )"), "\"mlp_bias\" is true"},
      {Llama(R"("hidden_act": "gelu", )"), "\"hidden_act\" is gelu"},
      {Llama(R"("quantization_config": {"bits": 4}, )"), "\"quantization_config\" is set"},
      {Llama(R"("rope_scaling": {"type": "yarn", "factor": 4}, )"), "rope type yarn"},
      {Llama(R"("rope_parameters": {"rope_type": "linear", "factor": 4}, )"), "rope type linear"},
      {Llama(R"("rope_scaling": {"rope_type": "llama3", "factor": 4}, )"),
       "\"low_freq_factor\" is missing"},
      {Llama(R"("rope_parameters": {"full_attention": {"rope_type": "default"}}, )"),
       "for layers of type full_attention"},
      {Llama(R"("partial_rotary_factor": 0.5, )"), "\"partial_rotary_factor\" is not 1"},
      {Llama(R"("eos_token_id": ["x"], )"), "\"eos_token_id\" must be a token id"},
      {Llama(R"("num_key_value_heads": 3, )"), "no multiple of model.kv_heads"},
      {Llama(R"("num_key_value_heads": -1, )"), "\"num_key_value_heads\" must be a whole number"},
      {Llama(R"("head_dim": 1.5, )"), "\"head_dim\" must be a whole number"},
      {Qwen2(R"("use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1, )"),
       "\"use_sliding_window\" is true"},
      {Qwen2(R"("layer_types": ["full_attention", "sliding_attention"], )"),
       "\"layer_types\" has sliding_attention"},
      {Qwen2(R"("rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 2]}, )"),
       "rope type mrope"},
  };
  for (const auto& c : cases) {
    EXPECT_THAT(std::string(ModelConfigFromHf(c.text, "c").status().message()),
                HasSubstr(c.message))
        << c.text;
  }
}

TEST(HfConfigJson, RefusesGpt2ThatTransformersCannotDescribe) {
  HfConfig config = {.model = Resolved("gpt2", true)};
  config.model.head_dim = 7;
  EXPECT_THAT(std::string(HfConfigJson(config).status().message()), HasSubstr("head_dim of 7"));
}

}  // namespace
}  // namespace stretto
