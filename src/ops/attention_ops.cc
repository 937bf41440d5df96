#include "src/ops/check.h"

namespace stretto::ops {
namespace {

void CheckAttention(Check& check, const Tensor& q, const Tensor& k, const Tensor& v,
                    const AttentionShape& shape) {
  check.Supported(q.dtype)
      .That(q.rank == 3 && k.rank == 3, "q and k must be [tokens, heads, head_dim]")
      .That(k.dtype == q.dtype && k.dims[2] == q.dims[2] && q.dims[2] > 0,
            "k must have q's type and head_dim")
      .That(Like(v, k, k.dtype), "v must be like k")
      .That(k.dims[1] > 0 && q.dims[1] % k.dims[1] == 0, "the heads of k must divide those of q")
      .That(shape.cu_q.rank == 1 && shape.cu_q.rows() >= 1 &&
                Is(shape.cu_q, DType::kI32, {shape.cu_q.rows()}),
            "cu_q must be i32[sequences + 1]")
      .That(Is(shape.cu_k, DType::kI32, {shape.cu_q.rows()}),
            "cu_k must be i32 and as long as cu_q")
      .That(AreRows(shape.cu_q, shape.len_q) && AreRows(shape.cu_k, shape.len_k),
            "len_q and len_k must be i32[sequences]")
      .That(shape.uniform == 0 || (!shape.len_q.present() && !shape.len_k.present()),
            "sequences with lengths of their own are not uniform");
}

}  // namespace

void Attention(Context c, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
               const AttentionShape& shape) {
  Check check(c, "Attention",
              {{"o", o},
               {"lse", lse},
               {"q", q},
               {"k", k},
               {"v", v},
               {"cu_q", shape.cu_q},
               {"cu_k", shape.cu_k},
               {"len_q", shape.len_q},
               {"len_k", shape.len_k}});
  CheckAttention(check, q, k, v, shape);
  check.That(Like(o, q, q.dtype), "o must be like q")
      .That(Is(lse, AccumulateType(q.dtype), {q.dims[0], q.dims[1]}),
            "lse must be [tokens, heads] of the statistics' type");
  if (check.ok()) c.kernels->attention->Forward(*c.stream, o, lse, q, k, v, shape);
}

void AttentionBackward(Context c, Tensor dq, Tensor dk, Tensor dv, Tensor delta, Tensor d_o,
                       Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v,
                       const AttentionShape& shape) {
  Check check(c, "AttentionBackward",
              {{"dq", dq},
               {"dk", dk},
               {"dv", dv},
               {"delta", delta},
               {"d_o", d_o},
               {"o", o},
               {"lse", lse},
               {"q", q},
               {"k", k},
               {"v", v},
               {"cu_q", shape.cu_q},
               {"cu_k", shape.cu_k},
               {"len_q", shape.len_q},
               {"len_k", shape.len_k}});
  CheckAttention(check, q, k, v, shape);
  const DType wide = AccumulateType(q.dtype);
  check
      .That(Like(dq, q, q.dtype) && Like(o, q, q.dtype) && Like(d_o, q, q.dtype),
            "dq, o and d_o must be like q")
      .That(Like(dk, k, k.dtype) && Like(dv, k, k.dtype), "dk and dv must be like k")
      .That(Is(lse, wide, {q.dims[0], q.dims[1]}) && Is(delta, wide, {q.dims[0], q.dims[1]}),
            "lse and delta must be [tokens, heads] of the statistics' type");
  if (check.ok()) {
    c.kernels->attention->Backward(*c.stream, dq, dk, dv, delta, d_o, o, lse, q, k, v, shape);
  }
}

void AttentionMerge(Context c, Tensor o, Tensor lse, Tensor part, Tensor part_lse, Tensor cu,
                    Tensor len) {
  Check check(
      c, "AttentionMerge",
      {{"o", o}, {"lse", lse}, {"part", part}, {"part_lse", part_lse}, {"cu", cu}, {"len", len}});
  const DType wide = AccumulateType(part.dtype);
  check.Supported(part.dtype)
      .That(part.rank == 3, "part must be [tokens, heads, head_dim]")
      .That(Like(o, part, wide) || Like(o, part, part.dtype),
            "o must be shaped like part, in its type or in that of the statistics")
      .That(Is(lse, wide, {part.dims[0], part.dims[1]}) && Like(part_lse, lse, wide),
            "lse and part_lse must be [tokens, heads] of the statistics' type")
      .That(AreRows(cu, len), "cu must be i32[sequences + 1], len i32[sequences] or absent");
  if (check.ok()) c.kernels->attention->Merge(*c.stream, o, lse, part, part_lse, cu, len);
}

}  // namespace stretto::ops
