// Quantisation to FP8, products of FP8 operands, and their scales.
#include "src/ops/check.h"
#include "stretto/core/float8.h"

namespace stretto::ops {
namespace {

constexpr int64_t kUnit = Float8Kernels::kAlignment;

// Whether a tensor, or every row of it, starts at a multiple of 16 bytes; absent operands do.
bool Aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % kUnit == 0; }
bool RowsAligned(const Tensor& t) {
  return Aligned(t) && (t.rows() <= 1 || t.row_stride * SizeOf(t.dtype) % kUnit == 0);
}
constexpr char kAligned[] = "rows must start at multiples of 16 bytes";
constexpr char kLacking[] = "the backend has no FP8 kernels";

bool IsOne(const Tensor& t) { return t.present() && Is(t, DType::kF32, {1}); }

}  // namespace

void Float8AbsMax(Context c, Tensor amax, Tensor x) {
  Check check(c, "Float8AbsMax", {{"amax", amax}, {"x", x}});
  check.That(c.kernels->float8 != nullptr, kLacking)
      .That(IsMatrix(x) && x.dtype == DType::kBF16, "x must be bf16[rows, columns]")
      .That(x.dims[1] % kUnit == 0, "columns must be a multiple of 16")
      .That(RowsAligned(x), kAligned)
      .That(IsOne(amax), "amax must be f32[1]");
  if (check.ok()) c.kernels->float8->AbsMax(*c.stream, amax, x);
}

void Float8Quantize(Context c, Tensor q, Tensor qt, Tensor x, Tensor scale, Tensor amax) {
  Check check(c, "Float8Quantize",
              {{"q", q}, {"qt", qt}, {"x", x}, {"scale", scale}, {"amax", amax}});
  check.That(c.kernels->float8 != nullptr, kLacking)
      .That(IsMatrix(x) && x.dtype == DType::kBF16, "x must be bf16[rows, columns]")
      .That(x.dims[1] % kUnit == 0, "columns must be a multiple of 16")
      .That(!q.present() || (IsFloat8(q.dtype) && Like(q, x, q.dtype)),
            "q must be FP8 and shaped like x, or absent")
      .That(!qt.present() || (IsFloat8(qt.dtype) &&
                              Is(qt, qt.dtype, {x.dims[1], Float8Kernels::Padded(x.dims[0])})),
            "qt must be FP8 [columns, rows padded to 16], or absent")
      .That(!q.present() || !qt.present() || q.dtype == qt.dtype, "q and qt must have one type")
      .That(RowsAligned(x) && RowsAligned(q) && RowsAligned(qt), kAligned)
      .That(IsOne(scale), "scale must be f32[1]")
      .That(!amax.present() || IsOne(amax), "amax must be f32[1] or absent");
  if (check.ok()) c.kernels->float8->Quantize(*c.stream, q, qt, x, scale, amax);
}

void Float8Product(Context c, Tensor d, Tensor a, Tensor b, Tensor inverse_a, Tensor inverse_b,
                   Tensor bias, bool acc, bool fast) {
  Check check(c, "Float8Product",
              {{"d", d},
               {"a", a},
               {"b", b},
               {"inverse_a", inverse_a},
               {"inverse_b", inverse_b},
               {"bias", bias}});
  check.That(c.kernels->float8 != nullptr, kLacking)
      .That(IsMatrix(a) && IsMatrix(b) && IsFloat8(a.dtype) && IsFloat8(b.dtype),
            "a must be FP8 [m, k] and b FP8 [n, k]")
      .That(a.dtype == DType::kE4M3 || b.dtype == DType::kE4M3, "a and b must not both be E5M2")
      .That(a.dims[1] == b.dims[1], "a and b must have the same number of columns")
      .That(a.dims[1] % kUnit == 0 && b.dims[0] % kUnit == 0,
            "columns, and rows of b, must be a multiple of 16")
      .That(RowsAligned(a) && RowsAligned(b) && RowsAligned(d), kAligned)
      .That((d.dtype == DType::kBF16 || d.dtype == DType::kF32) &&
                Is(d, d.dtype, {a.dims[0], b.dims[0]}),
            "d must be bf16 or f32 [m, n]")
      .That(!bias.present() || (d.dtype == DType::kBF16 && Is(bias, DType::kBF16, {b.dims[0]})),
            "bias must be bf16[n] with d bf16, or absent")
      .That(!bias.present() || !acc, "a product that accumulates has no bias")
      .That(IsOne(inverse_a) && IsOne(inverse_b), "inverse_a and inverse_b must be f32[1]")
      .That(Aligned(inverse_a) && Aligned(inverse_b),
            "inverse_a and inverse_b must lie at multiples of 16 bytes");
  if (check.ok()) {
    c.kernels->float8->Product(*c.stream, d, a, b, inverse_a, inverse_b, bias, acc, fast);
  }
}

void Float8UpdateScales(Context c, Tensor scale, Tensor inverse, Tensor history, Tensor amax,
                        Tensor limit) {
  Check check(c, "Float8UpdateScales",
              {{"scale", scale},
               {"inverse", inverse},
               {"history", history},
               {"amax", amax},
               {"limit", limit}});
  const int64_t count = amax.rows();
  check.That(c.kernels->float8 != nullptr, kLacking)
      .That(Is(amax, DType::kF32, {count}) && Is(scale, DType::kF32, {count}) &&
                Is(inverse, DType::kF32, {count}) && Is(limit, DType::kF32, {count}),
            "scale, inverse, amax and limit must be f32[count]")
      .That(scale.contiguous() && amax.contiguous() && limit.contiguous(),
            "only inverse may have gaps")
      .That(!history.present() ||
                (Is(history, DType::kF32, {count, history.dims[1]}) && history.dims[1] > 0),
            "history must be f32[count, steps] or absent");
  if (check.ok()) {
    c.kernels->float8->UpdateScales(*c.stream, scale, inverse, history, amax, limit);
  }
}

}  // namespace stretto::ops
