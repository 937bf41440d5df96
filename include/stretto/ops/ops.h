// Shape-checked operations. Each function checks its operands (types, shapes, device) and then
// makes one virtual call into the backend's table. A mismatch fails the stream with a sentence that
// names the operation and the operands (Stream::status, sticky) and enqueues nothing.
//
// The operand order, shapes and meanings are those of ops/kernels.h.
#ifndef STRETTO_OPS_OPS_H_
#define STRETTO_OPS_OPS_H_

#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"
#include "stretto/ops/kernels.h"
#include "stretto/ops/optimizer_table.h"

namespace stretto::ops {

// The stream and the table that work goes to; cheap to copy.
struct Context {
  Stream* stream = nullptr;
  const KernelTable* kernels = nullptr;
};

void Linear(Context c, Tensor y, Tensor x, Tensor w, Tensor bias);
// y and pre must be two tensors.
void LinearGelu(Context c, Tensor y, Tensor pre, Tensor x, Tensor w, Tensor bias);
// act and gate_up must be two tensors.
void LinearSwiglu(Context c, Tensor act, Tensor gate_up, Tensor x, Tensor w);
void LinearBackwardInput(Context c, Tensor dx, Tensor dy, Tensor w, bool acc);
// dpre must not be pre.
void LinearBackwardInputGelu(Context c, Tensor dpre, Tensor dy, Tensor w, Tensor pre);
// d_gate_up and gate_up must be two tensors.
void LinearBackwardInputSwiglu(Context c, Tensor d_gate_up, Tensor dy, Tensor w, Tensor gate_up);
void LinearBackwardWeight(Context c, Tensor dw, Tensor db, Tensor dy, Tensor x, bool acc);
void LinearBackwardBias(Context c, Tensor db, Tensor dy, bool acc);

// FP8. The rows of x, q, qt, a and b start at multiples of 16 bytes.
void Float8AbsMax(Context c, Tensor amax, Tensor x);
void Float8Quantize(Context c, Tensor q, Tensor qt, Tensor x, Tensor scale, Tensor amax);
void Float8Product(Context c, Tensor d, Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b,
                   Tensor bias, bool acc, bool fast);
void Float8UpdateScales(Context c, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                        Tensor limit);

void Norm(Context c, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
          Tensor weight, Tensor bias, double eps);
void NormBackwardInput(Context c, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                       Tensor weight, bool acc, Tensor partials = {});
void NormBackwardWeight(Context c, Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean,
                        Tensor rstd, bool acc, Tensor partials = {});

void Gelu(Context c, Tensor y, Tensor x);
void GeluBackward(Context c, Tensor dx, Tensor dy, Tensor x, bool acc);
void Swiglu(Context c, Tensor y, Tensor x);
void SwigluBackward(Context c, Tensor dx, Tensor dy, Tensor x, bool acc);

void Rope(Context c, Tensor y, Tensor rstd, Tensor x, const RotaryArgs& args);
void RopeBackwardInput(Context c, Tensor dx, Tensor dy, Tensor x, Tensor rstd, Tensor partials,
                       const RotaryArgs& args);
void RopeBackwardWeight(Context c, Tensor dq_weight, Tensor dk_weight, Tensor partials, bool acc);

void Attention(Context c, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
               const AttentionShape& shape);
void AttentionBackward(Context c, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o,
                       Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                       const AttentionShape& shape);
void AttentionMerge(Context c, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
                    Tensor len);

void Embedding(Context c, Tensor y, Tensor ids, Tensor table, Tensor positions,
               Tensor positions_table);
void EmbeddingBackward(Context c, Tensor dtable, Tensor dy, Tensor ids, bool acc);
void LocalIds(Context c, Tensor local, Tensor ids, int64_t first, int64_t rows, int64_t all,
              const char* what);

void LossFold(Context c, Tensor state, Tensor logits, Tensor targets, int64_t first, bool start);
void LossMerge(Context c, Tensor state, Tensor parts);
void LossFinish(Context c, Tensor losses, Tensor total, Tensor state, Tensor weights, bool acc,
                Tensor targets = {});
void LossBackward(Context c, Tensor logits, Tensor state, Tensor targets, Tensor weights,
                  int64_t first);
void LossFused(Context c, Tensor logits, Tensor losses, Tensor total, Tensor targets,
               Tensor weights, bool acc);

void AddSumSquares(Context c, Tensor total, const OptimizerTable& table);
void PrepareStep(Context c, Tensor scalars, double max_norm, double max_loss);
// All items of the table, or `count` of them from item `first` on.
void AdamW(Context c, const OptimizerTable& table, const AdamWArgs& args);
void AdamW(Context c, const OptimizerTable& table, const AdamWArgs& args, int64_t first,
           int64_t count);

void Zero(Context c, Tensor x);
void Copy(Context c, Tensor y, Tensor x);
void Add(Context c, Tensor y, Tensor x);
void CopyMany(Context c, std::span<const Tensor> y, std::span<const Tensor> x);
void AddMany(Context c, std::span<const Tensor> y, std::span<const Tensor> x);
void AddRows(Context c, Tensor y, Tensor x, Tensor cu, Tensor len);

}  // namespace stretto::ops

#endif  // STRETTO_OPS_OPS_H_
