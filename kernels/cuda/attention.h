// Between attention's own kernels and its way through cuDNN.
#ifndef STRETTO_KERNELS_CUDA_ATTENTION_H_
#define STRETTO_KERNELS_CUDA_ATTENTION_H_

#include <cstdint>

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"
#include "stretto/ops/kernels.h"

namespace stretto::cuda {

// What Attention() runs on and why, as a sentence for people ("cuDNN 9.19.0"). Never null; the text
// lives as long as the program.
const char* AttentionBackendNote();

// cuDNN, opened as Attention() does.
LibraryInfo DescribeCudnn();

// Reports boundaries that do not fit `q_rows` queries and `k_rows` keys as faults of the stream;
// the kernels behind it do nothing out of bounds with them.
void CheckSequences(Stream& s, const AttentionShape& shape, int64_t q_rows, int64_t k_rows);

// Where packed sequences begin, as cuDNN wants it: groups of `group` sequences, for each of them
// one array of lengths and one array of offsets (elements from the start of an operand) for each
// operand. Sequences behind the last have length 0.
struct RaggedIndex {
  static constexpr int kOperands = 5;

  int32_t* data = nullptr;  // groups * (1 + kOperands) arrays of `pitch` numbers
  int64_t groups = 0;
  int64_t group = 0;                // sequences in one group
  int64_t strides[kOperands] = {};  // elements between the rows of each operand

  // Every array starts at a multiple of 256 bytes.
  int64_t pitch() const { return (group + 1 + 63) / 64 * 64; }
  int64_t bytes() const { return groups * (1 + kOperands) * pitch() * int64_t{sizeof(int32_t)}; }
  int32_t* Lengths(int64_t g) const { return data + g * (1 + kOperands) * pitch(); }
  int32_t* Offsets(int64_t g, int operand) const { return Lengths(g) + (1 + operand) * pitch(); }
};
void FillRaggedIndex(Stream& s, const RaggedIndex& index, Tensor cu);

// to[b, h, t] = lse[b * length + t, first + h]: f32, dense, for `batch` sequences of `length`
// tokens and `heads` heads.
void HeadMajorLse(Stream& s, float* to, Tensor lse, int64_t batch, int64_t length, int64_t first,
                  int64_t heads);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_ATTENTION_H_
