// Backends are tables: one abstract class for each kernel family, implemented by kernels/cpu and
// kernels/cuda. Nothing above ops/ knows which backend runs.
//
// All functions only enqueue on the stream; operands are views whose shapes ops/ops.h has checked.
// Row strides are honoured for every matrix operand. "acc" means: add to what the output holds
// instead of overwriting it. Arithmetic is done in f32 for f32 and bf16, in f64 for f64.
#ifndef STRETTO_OPS_KERNELS_H_
#define STRETTO_OPS_KERNELS_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stretto/core/device.h"
#include "stretto/core/dtype.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto {

// y = x w^T + bias. Weights are [out, in], as in torch.nn.Linear.
class LinearKernels {
 public:
  virtual ~LinearKernels() = default;
  virtual void Forward(Stream& s, Tensor y,  // [tokens, out]
                       Tensor x,             // [tokens, in]
                       Tensor w,             // [out, in]
                       Tensor bias           // [out] or absent
  ) const = 0;
  // pre = x w^T + bias, y = gelu(pre) (tanh form), as one operation.
  virtual void ForwardGelu(Stream& s, Tensor y, Tensor pre,  // [tokens, out] each
                           Tensor x, Tensor w, Tensor bias) const = 0;
  // gate_up = x w^T, act = silu(gate) * up with gate_up = [gate | up] side by side, as one
  // operation; act is made from gate_up as it is stored.
  virtual void ForwardSwiglu(Stream& s, Tensor act,  // [tokens, f]
                             Tensor gate_up,         // [tokens, 2 f]
                             Tensor x,               // [tokens, in]
                             Tensor w                // [2 f, in]
  ) const = 0;
  // dx (acc)= dy w
  virtual void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor w, bool acc) const = 0;
  // dpre = gelu'(pre) * (dy w): the input of this layer is gelu(pre), pre [tokens, in].
  virtual void BackwardInputGelu(Stream& s, Tensor dpre, Tensor dy, Tensor w, Tensor pre) const = 0;
  // d_gate_up = the gradient of gate_up = [gate | up], where dy w, rounded, is the gradient of
  // silu(gate) * up, the input of this layer; as one operation.
  virtual void BackwardInputSwiglu(Stream& s, Tensor d_gate_up,  // [tokens, 2 f]
                                   Tensor dy,                    // [tokens, out]
                                   Tensor w,                     // [out, f]
                                   Tensor gate_up                // [tokens, 2 f]
  ) const = 0;
  // dw (acc)= dy^T x, and db (acc)= column sums of dy when present. dw, db: f32 for f32 and bf16
  // operands, f64 for f64.
  virtual void BackwardWeight(Stream& s, Tensor dw, Tensor db, Tensor dy, Tensor x,
                              bool acc) const = 0;
  // The second half of BackwardWeight alone: db (acc)= column sums of dy.
  virtual void BackwardBias(Stream& s, Tensor db, Tensor dy, bool acc) const = 0;
};

// Products of FP8 operands (core/float8.h). An operand stands for its codes divided by its scale;
// scales are f32 [1] and live on the device, inverse ones at multiples of kAlignment bytes
// (cuBLASLt reads them so). A product takes both operands with the summed
// dimension contiguous, the one form that Hopper's tensor cores read FP8 in; so Quantize makes the
// transpose too. Widths are multiples of kAlignment, which those tensor cores want; a transpose's
// rows are padded to one with zeros.
class Float8Kernels {
 public:
  static constexpr int64_t kAlignment = 16;
  static constexpr int64_t Padded(int64_t n) {
    return (n + kAlignment - 1) / kAlignment * kAlignment;
  }

  virtual ~Float8Kernels() = default;
  // amax[0] = max(amax[0], largest |x|), f32 and not negative. A NaN in x makes it NaN.
  virtual void AbsMax(Stream& s, Tensor amax, Tensor x) const = 0;
  // q = x * scale, rounded and saturated; qt the same transposed. Either may be absent. `amax` as
  // in AbsMax, in the same pass, or absent.
  virtual void Quantize(Stream& s, Tensor q,  // FP8 [rows, columns]
                        Tensor qt,            // FP8 [columns, Padded(rows)]
                        Tensor x,             // bf16 [rows, columns]
                        Tensor scale, Tensor amax) const = 0;
  // d (acc)= a b^T / (scale of a * scale of b) + bias, summed in f32. `fast`: on a GPU the tensor
  // core's own, shorter sums; good enough for a forward pass. Not both E5M2.
  virtual void Product(Stream& s, Tensor d,                 // bf16 or f32 [m, n]
                       Tensor a,                            // FP8 [m, k]
                       Tensor b,                            // FP8 [n, k]
                       Tensor inverse_a, Tensor inverse_b,  // f32 [1]: 1 / scale
                       Tensor bias,  // bf16 [n], for d in bf16 and no acc; or absent
                       bool acc, bool fast) const = 0;
  // Delayed scaling of `count` operands at once: for each the oldest element of `history` makes
  // place for `amax`, amax becomes 0, scale becomes the largest power of two that brings the
  // history's maximum up to `limit` at most, and inverse 1 / scale. An amax that is not finite is
  // passed over, and where all is 0 the scale stays. `history` absent: from amax alone, which is
  // kept (just-in-time scaling).
  virtual void UpdateScales(Stream& s, Tensor scale,
                            Tensor inverse,            // f32 [count], maybe apart
                            Tensor history,            // f32 [count, steps]
                            Tensor amax, Tensor limit  // f32 [count], as scale
  ) const = 0;
};

// LayerNorm and RMSNorm over the rows of a matrix, with the residual addition in front fused in.
class NormKernels {
 public:
  virtual ~NormKernels() = default;
  // h = x + residual when `residual` is present (h absent otherwise and the norm reads x), then
  // y = (h - mean) * rstd * weight + bias   (LayerNorm: mean and bias present)
  // y = h * rstd * weight                   (RMSNorm: mean and bias absent)
  // Variance is the biased one; statistics are f32 (f64 for f64), [rows].
  virtual void Forward(Stream& s, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x,
                       Tensor residual, Tensor weight, Tensor bias, double eps) const = 0;
  // Bytes of the `partials` of any number of rows of `columns` elements; `center` for LayerNorm.
  // 0: this backend has no use for them.
  virtual int64_t PartialBytes(DType dtype, int64_t columns, bool center) const = 0;
  // dx (acc)= gradient of the norm with respect to h. While it has dy and h at hand it leaves in
  // `partials` (statistics' type [PartialBytes / size], or absent) what BackwardWeight can make the
  // weight's gradient from; what that is is the backend's affair.
  virtual void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                             Tensor weight, bool acc, Tensor partials) const = 0;
  // dweight (acc)= , dbias (acc)= (absent for RMSNorm). f32 / f64 as in LinearKernels. `partials`:
  // as BackwardInput left them for these operands, or absent.
  virtual void BackwardWeight(Stream& s, Tensor dweight, Tensor dbias, Tensor dy, Tensor h,
                              Tensor mean, Tensor rstd, bool acc, Tensor partials) const = 0;
};

class ActivationKernels {
 public:
  virtual ~ActivationKernels() = default;
  // y = gelu(x), tanh form.
  virtual void GeluForward(Stream& s, Tensor y, Tensor x) const = 0;
  virtual void GeluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const = 0;
  // y = silu(gate) * up, where x = [gate | up] side by side: x [tokens, 2 f], y [tokens, f].
  virtual void SwigluForward(Stream& s, Tensor y, Tensor x) const = 0;
  virtual void SwigluBackward(Stream& s, Tensor dx, Tensor dy, Tensor x, bool acc) const = 0;
};

// How the heads of a token are rotated, and which RMS norm comes before that.
struct RotaryArgs {
  Tensor positions;  // i32 [tokens]
  Tensor cos, sin;   // tables [positions, head_dim / 2] (f32; f64 for f64); row positions[t]
                     // rotates token t
  Tensor q_weight, k_weight;  // [head_dim] each, of the norm; both absent: no norm
  int64_t query_heads = 0;    // the first so many heads of a token, which q_weight is for
  double eps = 0;
};

// What queries and keys pass on their way into attention: an optional RMS norm head by head
// (QK-norm), then rotary position embedding in rotate-half order (Hugging Face). Queries and keys
// of a token lie side by side and go through together: x is [tokens, heads, head_dim], queries
// first.
class RotaryKernels {
 public:
  virtual ~RotaryKernels() = default;
  // y = rope(norm(x)); without a norm y may be x. `rstd` [tokens, heads] (f32; f64 for f64; absent
  // without a norm) is kept for backward.
  virtual void Forward(Stream& s, Tensor y, Tensor rstd, Tensor x,
                       const RotaryArgs& args) const = 0;
  // Rows of `partials`: fixed, so that the sums do not depend on the device.
  static constexpr int64_t kPartials = 264;
  // dx = gradient with respect to x; dx may be dy. With a norm it also overwrites `partials`
  // [kPartials, 2, head_dim] (f32; f64 for f64), whose sums over the rows are the gradients of
  // q_weight and of k_weight. Without one, x, rstd and partials are absent.
  virtual void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor x, Tensor rstd,
                             Tensor partials, const RotaryArgs& args) const = 0;
  // dq_weight (acc)= , dk_weight (acc)= , f32 / f64 as in LinearKernels.
  virtual void BackwardWeight(Stream& s, Tensor dq_weight, Tensor dk_weight, Tensor partials,
                              bool acc) const = 0;
};

// Which tokens see which. Sequences (documents) are packed back to back; sequence i owns the query
// rows [cu_q[i], cu_q[i+1]) and the key rows [cu_k[i], cu_k[i+1]), or, where there are lengths, the
// first len_q[i] and len_k[i] of those: the rows behind them take no part, and outputs of theirs
// stay as they are. Queries of a sequence without keys get o = 0 and lse = -inf.
struct AttentionShape {
  Tensor cu_q;        // i32 [sequences + 1]
  Tensor cu_k;        // i32 [sequences + 1]; the same tensor as cu_q for ordinary self-attention
  int64_t max_q = 0;  // longest query sequence
  int64_t max_k = 0;
  bool causal = true;   // query j of a sequence sees keys 0..j of it; needs equal lengths
  double scale = 0;     // multiplies q k^T
  int64_t uniform = 0;  // > 0: every sequence has exactly this many queries and keys, and they are
                        // as many as fill the operands; 0: lengths may differ
  Tensor len_q, len_k;  // i32 [sequences], or absent: all rows
};

// Variable-length attention with grouped-query heads; never builds a T x T matrix.
class AttentionKernels {
 public:
  virtual ~AttentionKernels() = default;
  // q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], o like q,
  // lse [tokens, heads] (f32; f64 for f64): log of the sum of exponentials of the scaled scores.
  virtual void Forward(Stream& s, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                       const AttentionShape& shape) const = 0;
  // dq, dk, dv overwritten. `delta` [tokens, heads] is scratch of lse's type. With the o and lse of
  // more keys than are given here, as Merge leaves them, these are the gradients through these keys
  // alone: their share of dq, and all of what these queries give dk and dv.
  virtual void Backward(Stream& s, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o,
                        Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                        const AttentionShape& shape) const = 0;
  // Attention to two sets of keys from attention to each: o and lse become those of both, where
  // `part` and `part_lse` are those of the second. o [tokens, heads, head_dim] in lse's type or in
  // part's, part like it; both lse as in Forward. For rows [cu[i], cu[i] + len[i]) of each sequence
  // i, without `len` up to cu[i + 1]; the others stay.
  virtual void Merge(Stream& s, Tensor o, Tensor lse, Tensor part, Tensor part_lse,
                     Tensor cu,  // i32 [sequences + 1]
                     Tensor len  // i32 [sequences] or absent
  ) const = 0;
};

class EmbeddingKernels {
 public:
  virtual ~EmbeddingKernels() = default;
  // y[t] = table[ids[t]] (+ positions_table[positions[t]] when present). ids, positions i32
  // [tokens]. An id outside the table fails the stream with the id and its row.
  virtual void Forward(Stream& s, Tensor y, Tensor ids, Tensor table, Tensor positions,
                       Tensor positions_table) const = 0;
  // dtable (acc)= rows of dy summed by id, in ascending token order (deterministic). dtable
  // f32/f64.
  virtual void Backward(Stream& s, Tensor dtable, Tensor dy, Tensor ids, bool acc) const = 0;
  // For a rank that has rows [first, first + rows) of a table of `all` rows: local[t] is ids[t] -
  // first where the row is there, and `rows` where another rank has it. i32 [tokens] each. An id
  // outside [0, all) fails the stream with the id and its row. `what` names the ids in that message
  // ("id", "position") and outlives the call's work.
  virtual void LocalIds(Stream& s, Tensor local, Tensor ids, int64_t first, int64_t rows,
                        int64_t all, const char* what) const = 0;
};

// Softmax cross-entropy over a vocabulary cut into chunks of columns. Per token the kernels keep a
// running maximum, a running sum of exponentials and the target's logit, so logits of one chunk are
// all that ever exists.
class LossKernels {
 public:
  virtual ~LossKernels() = default;
  // Folds logits [tokens, columns] of vocabulary columns [first, first + columns) into `state`
  // [tokens, 3] (max, sum, target logit; f32, f64 for f64). `start` begins a new state; the target
  // logit is -inf until the target's column has been folded.
  virtual void Fold(Stream& s, Tensor state, Tensor logits, Tensor targets, int64_t first,
                    bool start) const = 0;
  // What several ranks have folded of their columns each, as one: state [tokens, 3] from parts
  // [ranks * tokens, 3], which are added in the order of the ranks.
  virtual void Merge(Stream& s, Tensor state, Tensor parts) const = 0;
  // losses[t] = weight[t] * (log-sum-exp - target logit) (same type as state), total[0] (acc)=
  // their sum, total[1] (acc)= the sum of weights; total is f64 [2]. weights f32 [tokens] or absent
  // (1). Tokens of weight 0 contribute nothing whatever their target; a token of another weight
  // whose target was in no chunk fails the stream with its row, and with the id when `targets` is
  // present (they serve for nothing else).
  virtual void Finish(Stream& s, Tensor losses, Tensor total, Tensor state, Tensor weights,
                      bool acc, Tensor targets) const = 0;
  // logits <- weight * (softmax - onehot(target)), in place, for the chunk starting at `first`.
  virtual void Backward(Stream& s, Tensor logits, Tensor state, Tensor targets, Tensor weights,
                        int64_t first) const = 0;
  // Fold, Finish and Backward in one pass over the logits of the whole vocabulary: losses, total
  // and weights as in Finish; logits [tokens, vocabulary] become their gradient.
  virtual void Fused(Stream& s, Tensor logits, Tensor losses, Tensor total, Tensor targets,
                     Tensor weights, bool acc) const = 0;
};

// Scalars of one optimizer step that never leave the device: f64[kCount].
struct StepScalars {
  enum : int {
    kLossSum = 0,         // sum of token losses, all ranks
    kTokens = 1,          // sum of token weights, all ranks (N_global)
    kSumSquares = 2,      // sum of squares of the summed (not yet divided) gradients, all ranks
    kStop = 3,            // ranks that were asked to stop
    kSeenTokens = 4,      // tokens that went through the model, all ranks
    kSquaredLengths = 5,  // sum of squared sequence lengths, all ranks (attention work)
    kPlan = 6,            // 32 bits of the plan's hash, all ranks
    kReduced = 7,         // the first kReduced are summed over ranks
    kGradNorm = 7,        // sqrt(kSumSquares) / kTokens
    kScale = 8,  // what gradients are multiplied by: 1 / kTokens, times the clip coefficient
    kSkip = 9,   // 1: the update is skipped (non-finite norm or loss, or a spike)
    kCount = 16,
  };
};

struct AdamWArgs {
  Tensor scalars;  // f64 [StepScalars::kCount]
  double lr = 0, beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0;  // of the items that decay
  int64_t step = 1;         // 1-based, for bias correction and random numbers
};

struct OptimizerShards;  // stretto/ops/optimizer_table.h

class OptimizerKernels {
 public:
  virtual ~OptimizerKernels() = default;
  // total[0] += sum of squares of all gradients, accumulated in f64 in a fixed order. total is f64
  // [1].
  virtual void AddSumSquares(Stream& s, Tensor total, const OptimizerShards& shards) const = 0;
  // Fills kGradNorm, kScale and kSkip from kLossSum, kTokens and kSumSquares. max_norm <= 0: no
  // clipping. kSkip is set when the loss or the norm is not finite, when kTokens is 0, or when
  // max_loss > 0 and the mean loss exceeds it.
  virtual void PrepareStep(Stream& s, Tensor scalars, double max_norm, double max_loss) const = 0;
  // Decoupled weight decay (Loshchilov & Hutter 2019); does nothing when kSkip is set.
  //
  // What is kept in bf16 from step to step (moments, and parameters without a master) is rounded
  // stochastically: the 16 bits that are cut off round up with a probability of their own value, so
  // that the mean is exact. To nearest, a change of less than half of the last of bf16's 8 bits
  // would be lost in every step: a second moment moves by 1 - beta2, which is 1/20 to 1/1000, and a
  // parameter by lr. (Rounding a parameter that has a master is to nearest: nothing builds on it.)
  // The random bits belong to the element: with e its index in the whole parameter and W(c) =
  // Rng(seed, "round/<name>", step).Words(c), m takes the low and v the high half of
  // W(2 * (e / 4))[e % 4], the parameter the low half of W(2 * (e / 4) + 1)[e % 4].
  virtual void AdamW(Stream& s, const OptimizerShards& shards, const AdamWArgs& args) const = 0;
};

class ElementwiseKernels {
 public:
  virtual ~ElementwiseKernels() = default;
  virtual void Zero(Stream& s, Tensor x) const = 0;
  // y = x, converting between f64, f32 and bf16.
  virtual void Copy(Stream& s, Tensor y, Tensor x) const = 0;
  // y += x, same conversions.
  virtual void Add(Stream& s, Tensor y, Tensor x) const = 0;
  // The same for pairs of contiguous tensors, all of one type, in fewer launches where that helps:
  // the bits are those of one call for each pair.
  virtual void CopyMany(Stream& s, std::span<const Tensor> y, std::span<const Tensor> x) const {
    for (size_t i = 0; i < y.size(); ++i) Copy(s, y[i], x[i]);
  }
  virtual void AddMany(Stream& s, std::span<const Tensor> y, std::span<const Tensor> x) const {
    for (size_t i = 0; i < y.size(); ++i) Add(s, y[i], x[i]);
  }
  // The same for rows [cu[i], cu[i] + len[i]) of each sequence i, without `len` up to cu[i + 1];
  // the others stay.
  virtual void AddRows(Stream& s, Tensor y, Tensor x,
                       Tensor cu,  // i32 [sequences + 1], not descending
                       Tensor len  // i32 [sequences] or absent
  ) const = 0;
};

// Everything a backend can do. Owned by the backend, lives for the whole program, stateless.
struct KernelTable {
  const char* name = "";  // "cpu", "cuda"
  DeviceKind device = DeviceKind::kCpu;
  bool (*supports)(DType) = nullptr;  // model types
  const LinearKernels* linear = nullptr;
  const Float8Kernels* float8 = nullptr;
  const NormKernels* norm = nullptr;
  const ActivationKernels* activation = nullptr;
  const RotaryKernels* rotary = nullptr;
  const AttentionKernels* attention = nullptr;
  const EmbeddingKernels* embedding = nullptr;
  const LossKernels* loss = nullptr;
  const OptimizerKernels* optimizer = nullptr;
  const ElementwiseKernels* elementwise = nullptr;

  // Choices that a backend makes by measuring, such as the algorithm of each matrix product; null
  // where there are none. While measuring is on, an operation met for the first time is timed in
  // its variants, which clobbers its outputs and makes the host wait. The choices are run state
  // (contract 10): one text, the same on all ranks and kept with the checkpoint.
  void (*set_measuring)(bool on) = nullptr;
  std::string (*export_choices)() = nullptr;
  absl::Status (*import_choices)(const std::string& text) = nullptr;

  // Opens the libraries that the backend needs and says what it found; null where there are none.
  std::vector<LibraryInfo> (*describe_libraries)() = nullptr;
};

// The table for a device; UNIMPLEMENTED names the backends that were built.
absl::StatusOr<const KernelTable*> KernelsFor(Device device);

// Type of gradients, statistics and optimizer state for a model type: f64 for f64, else f32.
constexpr DType AccumulateType(DType model) {
  return model == DType::kF64 ? DType::kF64 : DType::kF32;
}

}  // namespace stretto

#endif  // STRETTO_OPS_KERNELS_H_
