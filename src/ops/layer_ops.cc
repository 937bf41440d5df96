// Linear, norm, activations, rotary embedding, token embedding.
#include "src/ops/check.h"

namespace stretto::ops {

void Linear(Context c, Tensor y, Tensor x, Tensor w, Tensor bias) {
  Check check(c, "Linear", {{"y", y}, {"x", x}, {"w", w}, {"bias", bias}});
  check.Supported(x.dtype)
      .That(IsMatrix(x) && IsMatrix(w), "x must be [tokens, in] and w [out, in]")
      .That(Is(w, x.dtype, {w.dims[0], x.dims[1]}), "w must be [out, in] of x's type")
      .That(Is(y, x.dtype, {x.dims[0], w.dims[0]}), "y must be [tokens, out] of x's type")
      .That(IsOrAbsent(bias, x.dtype, {w.dims[0]}), "bias must be [out] of x's type or absent");
  if (check.ok()) c.kernels->linear->Forward(*c.stream, y, x, w, bias);
}

void LinearGelu(Context c, Tensor y, Tensor pre, Tensor x, Tensor w, Tensor bias) {
  Check check(c, "LinearGelu", {{"y", y}, {"pre", pre}, {"x", x}, {"w", w}, {"bias", bias}});
  check.Supported(x.dtype)
      .That(IsMatrix(x) && IsMatrix(w), "x must be [tokens, in] and w [out, in]")
      .That(Is(w, x.dtype, {w.dims[0], x.dims[1]}), "w must be [out, in] of x's type")
      .That(Is(y, x.dtype, {x.dims[0], w.dims[0]}), "y must be [tokens, out] of x's type")
      .That(Like(pre, y, x.dtype), "pre must be like y")
      .That(!y.present() || y.data != pre.data, "y and pre must be two tensors")
      .That(IsOrAbsent(bias, x.dtype, {w.dims[0]}), "bias must be [out] of x's type or absent");
  if (check.ok()) c.kernels->linear->ForwardGelu(*c.stream, y, pre, x, w, bias);
}

void LinearSwiglu(Context c, Tensor act, Tensor gate_up, Tensor x, Tensor w) {
  Check check(c, "LinearSwiglu", {{"act", act}, {"gate_up", gate_up}, {"x", x}, {"w", w}});
  check.Supported(x.dtype)
      .That(IsMatrix(x) && IsMatrix(w), "x must be [tokens, in] and w [2 f, in]")
      .That(Is(w, x.dtype, {w.dims[0], x.dims[1]}) && w.dims[0] % 2 == 0,
            "w must be [2 f, in] of x's type")
      .That(Is(gate_up, x.dtype, {x.dims[0], w.dims[0]}),
            "gate_up must be [tokens, 2 f] of x's type")
      .That(Is(act, x.dtype, {x.dims[0], w.dims[0] / 2}), "act must be [tokens, f] of x's type")
      .That(!act.present() || act.data != gate_up.data, "act and gate_up must be two tensors");
  if (check.ok()) c.kernels->linear->ForwardSwiglu(*c.stream, act, gate_up, x, w);
}

void LinearBackwardInput(Context c, Tensor dx, Tensor dy, Tensor w, bool acc) {
  Check check(c, "LinearBackwardInput", {{"dx", dx}, {"dy", dy}, {"w", w}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy) && IsMatrix(w), "dy must be [tokens, out] and w [out, in]")
      .That(Is(w, dy.dtype, {dy.dims[1], w.dims[1]}), "w must be [out, in] of dy's type")
      .That(Is(dx, dy.dtype, {dy.dims[0], w.dims[1]}), "dx must be [tokens, in] of dy's type");
  if (check.ok()) c.kernels->linear->BackwardInput(*c.stream, dx, dy, w, acc);
}

void LinearBackwardInputGelu(Context c, Tensor dpre, Tensor dy, Tensor w, Tensor pre) {
  Check check(c, "LinearBackwardInputGelu", {{"dpre", dpre}, {"dy", dy}, {"w", w}, {"pre", pre}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy) && IsMatrix(w), "dy must be [tokens, out] and w [out, in]")
      .That(Is(w, dy.dtype, {dy.dims[1], w.dims[1]}), "w must be [out, in] of dy's type")
      .That(Is(pre, dy.dtype, {dy.dims[0], w.dims[1]}), "pre must be [tokens, in] of dy's type")
      .That(Like(dpre, pre, dy.dtype), "dpre must be like pre")
      .That(!dpre.present() || dpre.data != pre.data, "dpre must not be pre");
  if (check.ok()) c.kernels->linear->BackwardInputGelu(*c.stream, dpre, dy, w, pre);
}

void LinearBackwardInputSwiglu(Context c, Tensor d_gate_up, Tensor dy, Tensor w, Tensor gate_up) {
  Check check(c, "LinearBackwardInputSwiglu",
              {{"d_gate_up", d_gate_up}, {"dy", dy}, {"w", w}, {"gate_up", gate_up}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy) && IsMatrix(w), "dy must be [tokens, out] and w [out, f]")
      .That(Is(w, dy.dtype, {dy.dims[1], w.dims[1]}), "w must be [out, f] of dy's type")
      .That(Is(gate_up, dy.dtype, {dy.dims[0], 2 * w.dims[1]}),
            "gate_up must be [tokens, 2 f] of dy's type")
      .That(Like(d_gate_up, gate_up, dy.dtype), "d_gate_up must be like gate_up")
      .That(!d_gate_up.present() || d_gate_up.data != gate_up.data,
            "d_gate_up and gate_up must be two tensors");
  if (check.ok()) c.kernels->linear->BackwardInputSwiglu(*c.stream, d_gate_up, dy, w, gate_up);
}

void LinearBackwardWeight(Context c, Tensor dw, Tensor db, Tensor dy, Tensor x, bool acc) {
  const DType wide = AccumulateType(dy.dtype);
  Check check(c, "LinearBackwardWeight", {{"dw", dw}, {"db", db}, {"dy", dy}, {"x", x}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy) && IsMatrix(x), "dy must be [tokens, out] and x [tokens, in]")
      .That(Is(x, dy.dtype, {dy.dims[0], x.dims[1]}), "x must be [tokens, in] of dy's type")
      .That(Is(dw, wide, {dy.dims[1], x.dims[1]}), "dw must be [out, in] of the gradient type")
      .That(IsOrAbsent(db, wide, {dy.dims[1]}), "db must be [out] of the gradient type or absent");
  if (check.ok()) c.kernels->linear->BackwardWeight(*c.stream, dw, db, dy, x, acc);
}

void LinearBackwardBias(Context c, Tensor db, Tensor dy, bool acc) {
  Check check(c, "LinearBackwardBias", {{"db", db}, {"dy", dy}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy), "dy must be [tokens, out]")
      .That(Is(db, AccumulateType(dy.dtype), {dy.dims[1]}),
            "db must be [out] of the gradient type");
  if (check.ok()) c.kernels->linear->BackwardBias(*c.stream, db, dy, acc);
}

namespace {

// One element of the statistics' type for each row of x, or for each head of each.
bool Statistic(const Tensor& t, const Tensor& x) {
  const DType wide = AccumulateType(x.dtype);
  return x.rank == 3 ? Is(t, wide, {x.dims[0], x.dims[1]}) : Is(t, wide, {x.dims[0]});
}

// What NormBackwardInput leaves for NormBackwardWeight, or nothing.
bool Partials(Context c, const Tensor& t, const Tensor& h, bool center) {
  if (!t.present()) return true;
  const DType wide = AccumulateType(h.dtype);
  return Is(t, wide, {t.dims[0]}) &&
         t.bytes() >= c.kernels->norm->PartialBytes(h.dtype, h.dims[1], center);
}
constexpr char kPartialsRule[] =
    "partials must have PartialBytes() bytes of the statistics' type or be absent";

}  // namespace

void Norm(Context c, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
          Tensor weight, Tensor bias, double eps) {
  Check check(c, "Norm",
              {{"y", y},
               {"h", h},
               {"mean", mean},
               {"rstd", rstd},
               {"x", x},
               {"residual", residual},
               {"weight", weight},
               {"bias", bias}});
  check.Supported(x.dtype)
      .That(IsMatrix(x), "x must be [rows, n]")
      .That(Like(y, x, x.dtype), "y must be like x")
      .That(!residual.present() || Like(residual, x, x.dtype), "residual must be like x or absent")
      .That(x.rows() == 0 || h.present() == residual.present(),
            "h and residual must both be present or both be absent")
      .That(!h.present() || Like(h, x, x.dtype), "h must be like x or absent")
      .That(Is(weight, x.dtype, {x.dims[1]}), "weight must be [n] of x's type")
      .That(IsOrAbsent(bias, x.dtype, {x.dims[1]}), "bias must be [n] of x's type or absent")
      .That(x.rows() == 0 || mean.present() == bias.present(),
            "mean and bias must both be present (LayerNorm) or both be absent (RMSNorm)")
      .That(!mean.present() || Statistic(mean, x), "mean must have one element for each row")
      .That(Statistic(rstd, x), "rstd must have one element of the statistics' type for each row");
  if (check.ok()) {
    c.kernels->norm->Forward(*c.stream, y, h, mean, rstd, x, residual, weight, bias, eps);
  }
}

void NormBackwardInput(Context c, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                       Tensor weight, bool acc, Tensor partials) {
  Check check(c, "NormBackwardInput",
              {{"dx", dx},
               {"dy", dy},
               {"h", h},
               {"mean", mean},
               {"rstd", rstd},
               {"weight", weight},
               {"partials", partials}});
  check.Supported(h.dtype)
      .That(IsMatrix(h), "h must be [rows, n]")
      .That(Like(dx, h, h.dtype) && Like(dy, h, h.dtype), "dx and dy must be like h")
      .That(Is(weight, h.dtype, {h.dims[1]}), "weight must be [n] of h's type")
      .That(!mean.present() || Statistic(mean, h), "mean must have one element for each row")
      .That(Statistic(rstd, h), "rstd must have one element of the statistics' type for each row")
      .That(Partials(c, partials, h, mean.present()), kPartialsRule);
  if (check.ok()) {
    c.kernels->norm->BackwardInput(*c.stream, dx, dy, h, mean, rstd, weight, acc, partials);
  }
}

void NormBackwardWeight(Context c, Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean,
                        Tensor rstd, bool acc, Tensor partials) {
  Check check(c, "NormBackwardWeight",
              {{"dweight", dweight},
               {"dbias", dbias},
               {"dy", dy},
               {"h", h},
               {"mean", mean},
               {"rstd", rstd},
               {"partials", partials}});
  const DType wide = AccumulateType(h.dtype);
  check.Supported(h.dtype)
      .That(IsMatrix(h), "h must be [rows, n]")
      .That(Like(dy, h, h.dtype), "dy must be like h")
      .That(Is(dweight, wide, {h.dims[1]}), "dweight must be [n] of the gradient type")
      .That(IsOrAbsent(dbias, wide, {h.dims[1]}),
            "dbias must be [n] of the gradient type or absent")
      .That(!mean.present() || Statistic(mean, h), "mean must have one element for each row")
      .That(Statistic(rstd, h), "rstd must have one element of the statistics' type for each row")
      .That(Partials(c, partials, h, mean.present()), kPartialsRule)
      .That(!partials.present() || h.rows() == 0 || mean.present() || !dbias.present(),
            "partials without mean (RMSNorm) have no sums for dbias");
  if (check.ok()) {
    c.kernels->norm->BackwardWeight(*c.stream, dweight, dbias, dy, h, mean, rstd, acc, partials);
  }
}

void Gelu(Context c, Tensor y, Tensor x) {
  Check check(c, "Gelu", {{"y", y}, {"x", x}});
  check.Supported(x.dtype).That(Like(y, x, x.dtype), "y must be like x");
  if (check.ok()) c.kernels->activation->GeluForward(*c.stream, y, x);
}

void GeluBackward(Context c, Tensor dx, Tensor dy, Tensor x, bool acc) {
  Check check(c, "GeluBackward", {{"dx", dx}, {"dy", dy}, {"x", x}});
  check.Supported(x.dtype).That(Like(dx, x, x.dtype) && Like(dy, x, x.dtype),
                                "dx and dy must be like x");
  if (check.ok()) c.kernels->activation->GeluBackward(*c.stream, dx, dy, x, acc);
}

void Swiglu(Context c, Tensor y, Tensor x) {
  Check check(c, "Swiglu", {{"y", y}, {"x", x}});
  check.Supported(x.dtype)
      .That(IsMatrix(y), "y must be [tokens, f]")
      .That(Is(x, y.dtype, {y.dims[0], 2 * y.dims[1]}), "x must be [tokens, 2 f] of y's type");
  if (check.ok()) c.kernels->activation->SwigluForward(*c.stream, y, x);
}

void SwigluBackward(Context c, Tensor dx, Tensor dy, Tensor x, bool acc) {
  Check check(c, "SwigluBackward", {{"dx", dx}, {"dy", dy}, {"x", x}});
  check.Supported(x.dtype)
      .That(IsMatrix(dy), "dy must be [tokens, f]")
      .That(Is(x, dy.dtype, {dy.dims[0], 2 * dy.dims[1]}), "x must be [tokens, 2 f] of dy's type")
      .That(Like(dx, x, x.dtype), "dx must be like x");
  if (check.ok()) c.kernels->activation->SwigluBackward(*c.stream, dx, dy, x, acc);
}

namespace {

// The rules that forward and backward share; `x` is what is rotated, y or dy.
void CheckRotary(Check& check, const Tensor& x, const RotaryArgs& a) {
  const DType wide = AccumulateType(x.dtype);
  check.Supported(x.dtype)
      .That(x.rank == 3 && x.dims[2] % 2 == 0, "x must be [tokens, heads, even head_dim]")
      .That(Is(a.positions, DType::kI32, {x.dims[0]}), "positions must be i32[tokens]")
      .That(a.cos.rank == 2 && Is(a.cos, wide, {a.cos.dims[0], x.dims[2] / 2}) &&
                Like(a.sin, a.cos, wide),
            "cos and sin must be [positions, head_dim / 2] of the statistics' type")
      .That(a.q_weight.present() == a.k_weight.present(),
            "q_weight and k_weight must both be present (QK-norm) or both be absent");
  if (!a.q_weight.present()) return;
  check
      .That(0 < a.query_heads && a.query_heads <= x.dims[1],
            "the number of query heads must be between 1 and x's heads")
      .That(Is(a.q_weight, x.dtype, {x.dims[2]}) && Is(a.k_weight, x.dtype, {x.dims[2]}),
            "q_weight and k_weight must be [head_dim] of x's type");
}

}  // namespace

void Rope(Context c, Tensor y, Tensor rstd, Tensor x, const RotaryArgs& args) {
  Check check(c, "Rope",
              {{"y", y},
               {"rstd", rstd},
               {"x", x},
               {"positions", args.positions},
               {"cos", args.cos},
               {"sin", args.sin},
               {"q_weight", args.q_weight},
               {"k_weight", args.k_weight}});
  CheckRotary(check, x, args);
  check.That(Like(y, x, x.dtype), "y must be like x");
  if (args.q_weight.present()) {
    check.That(Statistic(rstd, x), "rstd must be [tokens, heads] of the statistics' type")
        .That(!y.present() || y.data != x.data, "with a norm y must not be x");
  }
  if (check.ok()) c.kernels->rotary->Forward(*c.stream, y, rstd, x, args);
}

void RopeBackwardInput(Context c, Tensor dx, Tensor dy, Tensor x, Tensor rstd, Tensor partials,
                       const RotaryArgs& args) {
  Check check(c, "RopeBackwardInput",
              {{"dx", dx},
               {"dy", dy},
               {"x", x},
               {"rstd", rstd},
               {"partials", partials},
               {"positions", args.positions},
               {"cos", args.cos},
               {"sin", args.sin},
               {"q_weight", args.q_weight},
               {"k_weight", args.k_weight}});
  CheckRotary(check, dy, args);
  check.That(Like(dx, dy, dy.dtype), "dx must be like dy");
  if (args.q_weight.present()) {
    check.That(Like(x, dy, dy.dtype), "x must be like dy")
        .That(Statistic(rstd, dy), "rstd must be [tokens, heads] of the statistics' type")
        .That(Is(partials, AccumulateType(dy.dtype), {RotaryKernels::kPartials, 2, dy.dims[2]}) &&
                  partials.contiguous(),
              "partials must be contiguous [kPartials, 2, head_dim] of the statistics' type");
  }
  if (check.ok()) c.kernels->rotary->BackwardInput(*c.stream, dx, dy, x, rstd, partials, args);
}

void RopeBackwardWeight(Context c, Tensor dq_weight, Tensor dk_weight, Tensor partials, bool acc) {
  Check check(c, "RopeBackwardWeight",
              {{"dq_weight", dq_weight}, {"dk_weight", dk_weight}, {"partials", partials}});
  check
      .That(partials.dtype == DType::kF64 || partials.dtype == DType::kF32,
            "partials must be f32 or f64")
      .Supported(partials.dtype)
      .That(Is(partials, partials.dtype, {RotaryKernels::kPartials, 2, partials.dims[2]}) &&
                partials.contiguous(),
            "partials must be contiguous [kPartials, 2, head_dim]")
      .That(Is(dq_weight, partials.dtype, {partials.dims[2]}) &&
                Is(dk_weight, partials.dtype, {partials.dims[2]}),
            "dq_weight and dk_weight must be [head_dim] of partials' type");
  if (check.ok()) {
    c.kernels->rotary->BackwardWeight(*c.stream, dq_weight, dk_weight, partials, acc);
  }
}

void Embedding(Context c, Tensor y, Tensor ids, Tensor table, Tensor positions,
               Tensor positions_table) {
  Check check(c, "Embedding",
              {{"y", y},
               {"ids", ids},
               {"table", table},
               {"positions", positions},
               {"positions_table", positions_table}});
  check.Supported(y.dtype)
      .That(IsMatrix(y), "y must be [tokens, n]")
      .That(Is(ids, DType::kI32, {y.dims[0]}), "ids must be i32[tokens]")
      .That(Is(table, y.dtype, {table.dims[0], y.dims[1]}), "table must be [ids, n] of y's type")
      .That(IsOrAbsent(positions_table, y.dtype, {positions_table.dims[0], y.dims[1]}),
            "positions_table must be [positions, n] of y's type or absent")
      .That(!positions_table.present() || Is(positions, DType::kI32, {y.dims[0]}),
            "positions must be i32[tokens] when positions_table is present");
  if (check.ok()) {
    c.kernels->embedding->Forward(*c.stream, y, ids, table, positions, positions_table);
  }
}

void EmbeddingBackward(Context c, Tensor dtable, Tensor dy, Tensor ids, bool acc) {
  Check check(c, "EmbeddingBackward", {{"dtable", dtable}, {"dy", dy}, {"ids", ids}});
  check.Supported(dy.dtype)
      .That(IsMatrix(dy), "dy must be [tokens, n]")
      .That(Is(ids, DType::kI32, {dy.dims[0]}), "ids must be i32[tokens]")
      .That(Is(dtable, AccumulateType(dy.dtype), {dtable.dims[0], dy.dims[1]}),
            "dtable must be [ids, n] of the gradient type");
  if (check.ok()) c.kernels->embedding->Backward(*c.stream, dtable, dy, ids, acc);
}

void LocalIds(Context c, Tensor local, Tensor ids, int64_t first, int64_t rows, int64_t all,
              const char* what) {
  Check check(c, "LocalIds", {{"local", local}, {"ids", ids}});
  check.That(Is(ids, DType::kI32, {ids.dims[0]}), "ids must be i32[tokens]")
      .That(Is(local, DType::kI32, {ids.dims[0]}), "local must be i32[tokens]")
      .That(0 <= first && 0 <= rows && first + rows <= all, "the rows must be part of the table");
  if (check.ok()) c.kernels->embedding->LocalIds(*c.stream, local, ids, first, rows, all, what);
}

}  // namespace stretto::ops
