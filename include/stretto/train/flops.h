// Floating-point operations of training, in the two conventions in use; MFU means little without
// saying which.
#ifndef STRETTO_TRAIN_FLOPS_H_
#define STRETTO_TRAIN_FLOPS_H_

#include <cstdint>
#include <vector>

#include "stretto/model/config.h"

namespace stretto {

// What attention costs depends on: lengths of the sequences that attend within themselves. Sums
// over micro-batches and ranks are exact in both fields.
struct TokenWork {
  int64_t tokens = 0;
  int64_t squared_lengths = 0;  // sum of length^2

  TokenWork& operator+=(const TokenWork& other) {
    tokens += other.tokens;
    squared_lengths += other.squared_lengths;
    return *this;
  }
  bool operator==(const TokenWork&) const = default;
};
// From boundaries as in PackedBatch::cu_seqlens: [sequences + 1], starts with 0.
TokenWork WorkOf(const std::vector<int32_t>& cu_seqlens);

struct StepFlops {
  double palm = 0;    // FLOPs, forward and backward
  double causal = 0;  // FLOPs, forward and backward
};

// Parameters of a resolved model; a tied head counts once.
int64_t ParameterCount(const ModelConfig& model);

// FLOPs of forward and backward over `work`, without recomputation. L layers, H heads, Q head
// width:
//   palm    6 N' a token, where N' leaves out embedding tables but keeps the head (tied or not),
//           plus 12 L H Q * length^2 a sequence: attention counted without its causal mask
//           (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)
//   causal  3 times the multiply-adds of each matrix product that runs, in attention only those on
//   or
//           below the diagonal: length * (length + 1) / 2 pairs a sequence
// Norms, biases and activations count in neither, except that N' includes their parameters.
StepFlops TrainingFlops(const ModelConfig& model, const TokenWork& work);

// Fraction of the peak that `flops` over all ranks in `seconds` make; 0 when the peak is unknown
// (0).
double ModelFlopsUtilization(double flops, double seconds, double peak_tflops_per_rank, int ranks);

}  // namespace stretto

#endif  // STRETTO_TRAIN_FLOPS_H_
