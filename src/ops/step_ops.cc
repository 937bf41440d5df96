// Loss, optimizer and elementwise operations.
#include "src/ops/check.h"

namespace stretto::ops {

void LossFold(Context c, Tensor state, Tensor logits, Tensor targets, int64_t first, bool start) {
  Check check(c, "LossFold", {{"state", state}, {"logits", logits}, {"targets", targets}});
  check.Supported(logits.dtype)
      .That(IsMatrix(logits), "logits must be [tokens, columns]")
      .That(Is(state, AccumulateType(logits.dtype), {logits.dims[0], 3}),
            "state must be [tokens, 3] of the statistics' type")
      .That(Is(targets, DType::kI32, {logits.dims[0]}), "targets must be i32[tokens]");
  if (check.ok()) c.kernels->loss->Fold(*c.stream, state, logits, targets, first, start);
}

void LossMerge(Context c, Tensor state, Tensor parts) {
  Check check(c, "LossMerge", {{"state", state}, {"parts", parts}});
  const int64_t tokens = state.rows();
  check.That(state.dtype == DType::kF32 || state.dtype == DType::kF64, "state must be f32 or f64")
      .That(Is(state, state.dtype, {tokens, 3}), "state must be [tokens, 3]")
      .That(Is(parts, state.dtype, {parts.rows(), 3}) &&
                (tokens == 0 ? parts.rows() == 0 : parts.rows() % tokens == 0),
            "parts must be [ranks * tokens, 3] of state's type");
  if (check.ok()) c.kernels->loss->Merge(*c.stream, state, parts);
}

void LossFinish(Context c, Tensor losses, Tensor total, Tensor state, Tensor weights, bool acc,
                Tensor targets) {
  Check check(c, "LossFinish",
              {{"losses", losses},
               {"total", total},
               {"state", state},
               {"weights", weights},
               {"targets", targets}});
  check.That(state.dtype == DType::kF32 || state.dtype == DType::kF64, "state must be f32 or f64")
      .That(Is(state, state.dtype, {state.rows(), 3}), "state must be [tokens, 3]")
      .That(Is(losses, state.dtype, {state.rows()}), "losses must be [tokens] of state's type")
      .That(total.present() && Is(total, DType::kF64, {2}), "total must be f64[2]")
      .That(IsOrAbsent(weights, DType::kF32, {state.rows()}),
            "weights must be f32[tokens] or absent")
      .That(IsOrAbsent(targets, DType::kI32, {state.rows()}),
            "targets must be i32[tokens] or absent");
  if (check.ok()) c.kernels->loss->Finish(*c.stream, losses, total, state, weights, acc, targets);
}

void LossBackward(Context c, Tensor logits, Tensor state, Tensor targets, Tensor weights,
                  int64_t first) {
  Check check(c, "LossBackward",
              {{"logits", logits}, {"state", state}, {"targets", targets}, {"weights", weights}});
  check.Supported(logits.dtype)
      .That(IsMatrix(logits), "logits must be [tokens, columns]")
      .That(Is(state, AccumulateType(logits.dtype), {logits.dims[0], 3}),
            "state must be [tokens, 3] of the statistics' type")
      .That(Is(targets, DType::kI32, {logits.dims[0]}), "targets must be i32[tokens]")
      .That(IsOrAbsent(weights, DType::kF32, {logits.dims[0]}),
            "weights must be f32[tokens] or absent");
  if (check.ok()) c.kernels->loss->Backward(*c.stream, logits, state, targets, weights, first);
}

void LossFused(Context c, Tensor logits, Tensor losses, Tensor total, Tensor targets,
               Tensor weights, bool acc) {
  Check check(c, "LossFused",
              {{"logits", logits},
               {"losses", losses},
               {"total", total},
               {"targets", targets},
               {"weights", weights}});
  check.Supported(logits.dtype)
      .That(IsMatrix(logits), "logits must be [tokens, vocabulary]")
      .That(Is(losses, AccumulateType(logits.dtype), {logits.dims[0]}),
            "losses must be [tokens] of the statistics' type")
      .That(total.present() && Is(total, DType::kF64, {2}), "total must be f64[2]")
      .That(Is(targets, DType::kI32, {logits.dims[0]}), "targets must be i32[tokens]")
      .That(IsOrAbsent(weights, DType::kF32, {logits.dims[0]}),
            "weights must be f32[tokens] or absent");
  if (check.ok()) c.kernels->loss->Fused(*c.stream, logits, losses, total, targets, weights, acc);
}

namespace {

bool ArePairs(const Context& c, const char* op, std::span<const Tensor> y,
              std::span<const Tensor> x) {
  Check lengths(c, op, {});
  lengths.That(y.size() == x.size(), "there must be as many y as x");
  bool ok = lengths.ok();
  for (size_t i = 0; ok && i < y.size(); ++i) {
    Check check(c, op, {{"y", y[i]}, {"x", x[i]}});
    check.Supported(y[i].dtype)
        .That(x[i].dtype == y[0].dtype && Like(y[i], x[i], y[0].dtype) &&
                  (x[i].present() || x[i].elements() == 0),
              "each y must be shaped like its x, and all be of one type")
        .That(y[i].contiguous() && x[i].contiguous(), "y and x must be contiguous");
    ok = check.ok();
  }
  return ok;
}

}  // namespace

void AddSumSquares(Context c, Tensor total, const OptimizerTable& table) {
  Check check(c, "AddSumSquares", {{"total", total}});
  check.That(total.present() && Is(total, DType::kF64, {1}), "total must be f64[1]")
      .That(table.device().kind == c.kernels->device, "the table must be on the kernels' device");
  if (check.ok()) c.kernels->optimizer->AddSumSquares(*c.stream, total, table.shards());
}

void PrepareStep(Context c, Tensor scalars, double max_norm, double max_loss) {
  Check check(c, "PrepareStep", {{"scalars", scalars}});
  check.That(scalars.present() && Is(scalars, DType::kF64, {StepScalars::kCount}),
             "scalars must be f64[StepScalars::kCount]");
  if (check.ok()) c.kernels->optimizer->PrepareStep(*c.stream, scalars, max_norm, max_loss);
}

namespace {

void AdamWOf(Context c, const OptimizerTable& table, const OptimizerShards& shards,
             const AdamWArgs& a) {
  Check check(c, "AdamW", {{"scalars", a.scalars}});
  check.Supported(table.shards().param)
      .That(table.device().kind == c.kernels->device, "the table must be on the kernels' device")
      .That(a.scalars.present() && Is(a.scalars, DType::kF64, {StepScalars::kCount}),
            "scalars must be f64[StepScalars::kCount]")
      .That(a.step >= 1, "step must count from 1");
  if (check.ok()) c.kernels->optimizer->AdamW(*c.stream, shards, a);
}

}  // namespace

void AdamW(Context c, const OptimizerTable& table, const AdamWArgs& a) {
  AdamWOf(c, table, table.shards(), a);
}

void AdamW(Context c, const OptimizerTable& table, const AdamWArgs& a, int64_t first,
           int64_t count) {
  AdamWOf(c, table, table.Part(first, count), a);
}

void Zero(Context c, Tensor x) {
  Check check(c, "Zero", {{"x", x}});
  check.That(x.present() || x.elements() == 0, "x must be present");
  if (check.ok()) c.kernels->elementwise->Zero(*c.stream, x);
}

void Copy(Context c, Tensor y, Tensor x) {
  Check check(c, "Copy", {{"y", y}, {"x", x}});
  check.That(Like(y, x, y.dtype) && (x.present() || x.elements() == 0), "y must be shaped like x");
  if (y.dtype != x.dtype) check.Supported(y.dtype).Supported(x.dtype);
  if (check.ok()) c.kernels->elementwise->Copy(*c.stream, y, x);
}

void Add(Context c, Tensor y, Tensor x) {
  Check check(c, "Add", {{"y", y}, {"x", x}});
  check.Supported(y.dtype).Supported(x.dtype).That(
      Like(y, x, y.dtype) && (x.present() || x.elements() == 0), "y must be shaped like x");
  if (check.ok()) c.kernels->elementwise->Add(*c.stream, y, x);
}

void CopyMany(Context c, std::span<const Tensor> y, std::span<const Tensor> x) {
  if (ArePairs(c, "CopyMany", y, x)) c.kernels->elementwise->CopyMany(*c.stream, y, x);
}

void AddMany(Context c, std::span<const Tensor> y, std::span<const Tensor> x) {
  if (ArePairs(c, "AddMany", y, x)) c.kernels->elementwise->AddMany(*c.stream, y, x);
}

void AddRows(Context c, Tensor y, Tensor x, Tensor cu, Tensor len) {
  Check check(c, "AddRows", {{"y", y}, {"x", x}, {"cu", cu}, {"len", len}});
  check.Supported(y.dtype)
      .Supported(x.dtype)
      .That(Like(y, x, y.dtype) && (x.present() || x.elements() == 0), "y must be shaped like x")
      .That(AreRows(cu, len), "cu must be i32[sequences + 1], len i32[sequences] or absent");
  if (check.ok()) c.kernels->elementwise->AddRows(*c.stream, y, x, cu, len);
}

}  // namespace stretto::ops
