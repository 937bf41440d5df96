#include "stretto/train/flops.h"

#include <cstddef>

namespace stretto {
namespace {

// Weights of the matrix products of one block.
int64_t BlockMatrices(const ModelConfig& m) {
  const int64_t attention = m.hidden * m.qkv_width() + m.heads * m.head_dim * m.hidden;
  const int64_t mlp = (m.gated_mlp() ? 3 : 2) * m.hidden * m.ffn;
  return attention + mlp;
}

int64_t NormParameters(const ModelConfig& m) { return m.rms_norm() ? m.hidden : 2 * m.hidden; }

int64_t BlockParameters(const ModelConfig& m) {
  int64_t n = BlockMatrices(m) + 2 * NormParameters(m);
  if (m.qkv_bias()) n += m.qkv_width();
  if (m.qk_norm()) n += 2 * m.head_dim;
  if (m.linear_bias()) n += m.hidden + m.ffn + m.hidden;  // attention output, MLP in and out
  return n;
}

}  // namespace

TokenWork WorkOf(const std::vector<int32_t>& cu_seqlens) {
  TokenWork work;
  for (size_t i = 1; i < cu_seqlens.size(); ++i) {
    const int64_t length = int64_t{cu_seqlens[i]} - cu_seqlens[i - 1];
    work.tokens += length;
    work.squared_lengths += length * length;
  }
  return work;
}

int64_t ParameterCount(const ModelConfig& m) {
  int64_t n = m.layers * BlockParameters(m) + NormParameters(m) + m.vocabulary * m.hidden;
  if (!m.tie_embeddings) n += m.vocabulary * m.hidden;
  if (!m.rotary()) n += m.max_positions * m.hidden;
  return n;
}

StepFlops TrainingFlops(const ModelConfig& m, const TokenWork& work) {
  const auto tokens = static_cast<double>(work.tokens);
  const auto squares = static_cast<double>(work.squared_lengths);
  const auto head = static_cast<double>(m.vocabulary) * static_cast<double>(m.hidden);
  const auto layers = static_cast<double>(m.layers);
  const double width = static_cast<double>(m.heads) * static_cast<double>(m.head_dim);

  StepFlops flops;
  const double counted = layers * static_cast<double>(BlockParameters(m)) +
                         static_cast<double>(NormParameters(m)) + head;
  flops.palm = 6 * counted * tokens + 12 * layers * width * squares;

  const double products = layers * static_cast<double>(BlockMatrices(m)) + head;
  const double pairs = (squares + tokens) / 2;
  // Scores and weighted sum: 2 products, 2 FLOPs a multiply-add, 3 passes.
  flops.causal = 6 * products * tokens + 12 * layers * width * pairs;
  return flops;
}

double ModelFlopsUtilization(double flops, double seconds, double peak_tflops_per_rank, int ranks) {
  if (peak_tflops_per_rank <= 0 || seconds <= 0 || ranks < 1) return 0;
  return flops / (seconds * peak_tflops_per_rank * 1e12 * ranks);
}

}  // namespace stretto
