// How a call of attention is cut into executions of cuDNN plans, so that few plans are built and
// the backward pass fits the workspace.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_CUT_H_
#define STRETTO_KERNELS_CUDA_ATTENTION_CUT_H_

#include <algorithm>
#include <bit>
#include <compare>
#include <cstdint>
#include <vector>

namespace stretto::cuda {

constexpr int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Everything that a plan is built for.
struct AttentionKey {
  int64_t device, backward, ragged, causal;
  int64_t batch, length;         // sequences of one execution, their (longest) length in queries
  int64_t key_length;            // ... and in keys
  int64_t heads, kv_heads, dim;  // of one execution
  int64_t q_row, k_row, v_row, o_row, lse_row;  // elements between rows
  int64_t dq_row, dk_row, dv_row;
  int64_t tokens;     // ragged: rows of queries, at most
  uint64_t scale;     // bits
  int64_t workspace;  // bytes that there are
  auto operator<=>(const AttentionKey&) const = default;

  // The smallest execution: one sequence and one key-value head.
  AttentionKey Single() const {
    AttentionKey key = *this;
    key.heads /= key.kv_heads;
    key.batch = key.kv_heads = 1;
    return key;
  }
};

// What one execution takes.
struct Cut {
  int64_t batch, kv_heads;
};

// Workspace that the deterministic backward pass needs at least: the gradients of all scores in
// bf16, their row sums, and the gradients of every query head's keys and values where heads share
// them.
constexpr int64_t BackwardBytes(const AttentionKey& key) {
  const int64_t rows = key.batch * key.heads * key.length;
  const int64_t scores =
      key.batch * key.heads * RoundUp(key.length, 64) * RoundUp(key.key_length, 128) * 2;
  const int64_t keys = key.batch * key.heads * key.key_length;
  const int64_t shared = key.heads != key.kv_heads ? 2 * keys * key.dim * 2 : 0;
  return scores + shared + rows * int64_t{sizeof(float)};
}

// Divisors of n, largest first.
inline std::vector<int64_t> Divisors(int64_t n) {
  std::vector<int64_t> divisors;
  for (int64_t parts = 1; parts <= n; ++parts) {
    if (n % parts == 0) divisors.push_back(n / parts);
  }
  return divisors;
}

// Numbers of packed sequences that plans are built for; the sequences that lack are empty.
constexpr int64_t Bucket(int64_t sequences) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(sequences)));
}

// Lengths that plans are built for: a multiple of 128, and at most a quarter more than asked for
// beyond 512.
constexpr int64_t LengthBucket(int64_t n) {
  const auto power = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n)));
  return RoundUp(n, std::max<int64_t>(128, power / 4));
}

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_CUT_H_
