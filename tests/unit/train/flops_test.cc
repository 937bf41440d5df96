#include "stretto/train/flops.h"

#include <vector>

#include "gtest/gtest.h"

namespace stretto {
namespace {

ModelConfig Gpt2Small() {
  ModelConfig m;
  m.family = "gpt2";
  m.vocabulary = 50257;
  m.layers = 12;
  m.hidden = 768;
  m.heads = 12;
  m.max_positions = 1024;
  EXPECT_TRUE(m.Resolve().ok());
  return m;
}

ModelConfig Llama3_8B() {
  ModelConfig m;
  m.family = "llama";
  m.vocabulary = 128256;
  m.layers = 32;
  m.hidden = 4096;
  m.heads = 32;
  m.kv_heads = 8;
  m.ffn = 14336;
  m.tie_embeddings = false;
  EXPECT_TRUE(m.Resolve().ok());
  return m;
}

// The counts that the models' publishers state.
TEST(ParameterCount, MatchesPublishedModels) {
  EXPECT_EQ(ParameterCount(Gpt2Small()), 124439808);
  EXPECT_EQ(ParameterCount(Llama3_8B()), 8030261248);

  ModelConfig qwen2;
  qwen2.family = "qwen2";  // Qwen2-0.5B
  qwen2.vocabulary = 151936;
  qwen2.layers = 24;
  qwen2.hidden = 896;
  qwen2.heads = 14;
  qwen2.kv_heads = 2;
  qwen2.ffn = 4864;
  ASSERT_TRUE(qwen2.Resolve().ok());
  EXPECT_EQ(ParameterCount(qwen2), 494032768);

  ModelConfig qwen3;
  qwen3.family = "qwen3";  // Qwen3-0.6B: heads * head_dim is not hidden
  qwen3.vocabulary = 151936;
  qwen3.layers = 28;
  qwen3.hidden = 1024;
  qwen3.heads = 16;
  qwen3.kv_heads = 8;
  qwen3.head_dim = 128;
  qwen3.ffn = 3072;
  ASSERT_TRUE(qwen3.Resolve().ok());
  EXPECT_EQ(ParameterCount(qwen3), 596049920);
}

TEST(TokenWork, FromBoundaries) {
  EXPECT_EQ(WorkOf({}), (TokenWork{0, 0}));
  EXPECT_EQ(WorkOf({0}), (TokenWork{0, 0}));
  EXPECT_EQ(WorkOf({0, 3, 3, 10}), (TokenWork{10, 9 + 49}));
  // Lengths whose squares do not fit 32 bits.
  EXPECT_EQ(WorkOf({0, 100000}), (TokenWork{100000, 10000000000}));
  TokenWork sum = WorkOf({0, 3});
  sum += WorkOf({0, 4, 5});
  EXPECT_EQ(sum, (TokenWork{8, 9 + 16 + 1}));
}

// One layer by hand: hidden 6, 2 heads of 4 over 1 key-value head, ffn 10, vocabulary 7.
TEST(TrainingFlops, SmallModelByHand) {
  ModelConfig m;
  m.family = "llama";
  m.vocabulary = 7;
  m.layers = 1;
  m.hidden = 6;
  m.heads = 2;
  m.kv_heads = 1;
  m.head_dim = 4;
  m.ffn = 10;
  ASSERT_TRUE(m.Resolve().ok());
  const TokenWork work = WorkOf({0, 3, 5});  // pairs under the diagonal: 6 + 3
  // qkv 6 x 16, output 8 x 6, gate, up and down 3 x 6 x 10, head 6 x 7.
  const double products = 96 + 48 + 180 + 42;
  const StepFlops flops = TrainingFlops(m, work);
  EXPECT_DOUBLE_EQ(flops.causal, 3 * (2 * products * 5 + 2 * (2 * 9 * 8)));
  const double counted = products + 2 * 6 + 6;  // and three norms
  EXPECT_DOUBLE_EQ(flops.palm, 6 * counted * 5 + 12 * 1 * 8 * (9 + 4));

  // The head costs the same whether its weights are the embedding's or its own.
  m.tie_embeddings = false;
  EXPECT_DOUBLE_EQ(TrainingFlops(m, work).palm, flops.palm);
  EXPECT_DOUBLE_EQ(TrainingFlops(m, work).causal, flops.causal);
}

TEST(TrainingFlops, Gpt2SmallAsNanoGptCounts) {
  const ModelConfig m = Gpt2Small();
  const StepFlops flops = TrainingFlops(m, WorkOf({0, 1024}));
  // 6 (N - position table) + 12 L H Q T, per token.
  const double per_token = 6.0 * (124439808 - 1024 * 768) + 12.0 * 12 * 768 * 1024;
  EXPECT_DOUBLE_EQ(flops.palm, per_token * 1024);
  EXPECT_LT(flops.causal, flops.palm);
}

TEST(TrainingFlops, PackingShortDocumentsCostsLess) {
  const ModelConfig m = Gpt2Small();
  const StepFlops whole = TrainingFlops(m, WorkOf({0, 1024}));
  const StepFlops split = TrainingFlops(m, WorkOf({0, 512, 1024}));
  EXPECT_LT(split.causal, whole.causal);
  EXPECT_LT(split.palm, whole.palm);
  EXPECT_EQ(TrainingFlops(m, {}).palm, 0);
}

TEST(ModelFlopsUtilization, IsAFractionOfAllRanks) {
  EXPECT_DOUBLE_EQ(ModelFlopsUtilization(6e12, 2.0, 1.5, 4), 0.5);
  EXPECT_EQ(ModelFlopsUtilization(6e12, 2.0, 0, 4), 0);  // unknown peak
  EXPECT_EQ(ModelFlopsUtilization(6e12, 0, 1.5, 4), 0);
}

}  // namespace
}  // namespace stretto
