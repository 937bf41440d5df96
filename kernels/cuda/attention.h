// Between attention's own kernels and its way through cuDNN.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_H_
#define STRETTO_KERNELS_CUDA_ATTENTION_H_

#include <cstdint>

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"
#include "stretto/ops/kernels.h"

namespace stretto::cuda {

// cuDNN, opened as Attention() does.
LibraryInfo DescribeCudnn();

// Reports boundaries that do not fit `q_rows` queries and `k_rows` keys as faults of the stream;
// the kernels behind it do nothing out of bounds with them.
void CheckSequences(Stream& s, const AttentionShape& shape, int64_t q_rows, int64_t k_rows);

// Where packed sequences begin, as cuDNN wants it: groups of `group` sequences, for each of them an
// array of the queries' lengths and one of the keys', and one array of offsets (elements from the
// start of an operand) for each operand. Sequences behind the last have length 0.
struct RaggedIndex {
  // q, k, v, o, statistics, dq, dk, dv.
  static constexpr int kOperands = 8;
  static constexpr int kArrays = 2 + kOperands;
  static constexpr unsigned kOfKeys = 0b11000110;  // bit i: operand i has a key's rows
  static constexpr bool IsKeys(int operand) { return (kOfKeys >> operand & 1) != 0; }

  int32_t* data = nullptr;  // groups * kArrays arrays of `pitch` numbers
  int64_t groups = 0;
  int64_t group = 0;                // sequences in one group
  int64_t strides[kOperands] = {};  // elements between the rows of each operand

  // Every array starts at a multiple of 256 bytes.
  int64_t pitch() const { return (group + 1 + 63) / 64 * 64; }
  int64_t bytes() const { return groups * kArrays * pitch() * int64_t{sizeof(int32_t)}; }
  int32_t* Lengths(int64_t g, bool keys) const {
    return data + (g * kArrays + (keys ? 1 : 0)) * pitch();
  }
  int32_t* Offsets(int64_t g, int operand) const {
    return Lengths(g, false) + (2 + operand) * pitch();
  }
};
void FillRaggedIndex(Stream& s, const RaggedIndex& index, const AttentionShape& shape);

// What comes out for queries of sequences without keys (o = 0, lse = -inf, dq = 0) and for keys of
// sequences without queries (dk = dv = 0). Absent tensors: not asked for.
void ClearLonely(Stream& s, Tensor q, Tensor k, Tensor o, Tensor lse, Tensor dq, Tensor dk,
                 Tensor dv, const AttentionShape& shape);

// to[b, h, t] = lse[b * length + t, first + h]: f32, dense, for `batch` sequences of `length`
// tokens and `heads` heads.
void HeadMajorLse(Stream& s, float* to, Tensor lse, int64_t batch, int64_t length, int64_t first,
                  int64_t heads);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_H_
