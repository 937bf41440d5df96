#include "src/model/float8_linear.h"

#include "absl/strings/str_cat.h"
#include "src/model/layers.h"

namespace stretto {

using internal::Float8LinearLayer;

Strategies Float8Strategies(DType gradients) {
  Strategies s = LocalStrategies();
  s.gated_linear = nullptr;
  s.linear = [plain = s.linear, gradients](SlotId x, Role role, int64_t in, int64_t out,
                                           const LinearOptions& options,
                                           SlotId* y) -> std::unique_ptr<Layer> {
    constexpr int64_t kUnit = Float8Kernels::kAlignment;
    if (in % kUnit != 0 || out % kUnit != 0) return plain(x, role, in, out, options, y);
    return std::make_unique<Float8LinearLayer>(x, in, out, gradients, options, y);
  };
  return s;
}

namespace internal {

absl::Status Float8LinearLayer::Declare(Builder& b) {
  if (b.dtype() != DType::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat("FP8 layers need a model in bf16, not ",
                                                   Name(b.dtype()), "; set runtime.dtype=bf16"));
  }
  if (b.kernels() != nullptr && b.kernels()->float8 == nullptr) {
    return absl::UnimplementedError(absl::StrCat("the ", b.kernels()->name,
                                                 " backend has no FP8 kernels; set "
                                                 "runtime.fp8=none"));
  }
  if (b.Width(x_) != in_) {
    return absl::InvalidArgumentError(
        absl::StrCat("its input has ", b.Width(x_), " features per token, not ", in_));
  }
  const SlotId pre = options_.gelu_input;
  if (pre.valid() && !b.IsGeluOf(x_, pre)) {
    return absl::InvalidArgumentError("its input is not gelu of the slot named in gelu_input");
  }
  // An input that stays for somebody else is transposed when the weight's gradient asks for it.
  const bool keep = !b.KeptByProducer(x_);
  b.Reads(x_, kInForward | (keep ? 0u : kInBackwardWeight), /*writes_grad=*/!pre.valid());
  if (pre.valid()) b.Reads(pre, kInBackwardInput);
  const bool gelu = options_.gelu_output != nullptr;
  *y_out_ = y_ = b.Output("y", out_,
                          {.grad_uses = options_.bias ? kInBackwardInput | kInBackwardWeight
                                                      : unsigned{kInBackwardInput},
                           .recomputed_if_dropped = true});
  if (gelu) {
    *options_.gelu_output = gelu_ =
        b.Output("gelu", out_,
                 {.grad_uses = 0, .cheap = true, .recomputed_if_dropped = true, .gelu_of = y_});
  }
  DeclareLinearParameters(b, in_, out_, options_, /*shard=*/false, &weight_, &bias_);
  x_operand_ = b.Float8Operand("x", DType::kE4M3);
  w_operand_ = b.Float8Operand("weight", DType::kE4M3);
  dy_operand_ = b.Float8Operand("dy", gradients_);
  codes_ = b.Float8Weight(weight_, w_operand_);

  // Transposes have up to 15 tokens of padding.
  constexpr int64_t kPadding = Float8Kernels::kAlignment;
  x8_ = b.Scratch("x8", in_, DType::kE4M3, kInForward);
  if (keep) {
    x8t_ = b.Saved(
        "x8t", in_, DType::kE4M3, kInBackwardWeight,
        {.fixed_bytes = kPadding * in_, .cheap = b.IsCheap(x_), .recomputed_if_dropped = true});
  } else {
    late_x8t_ = b.Scratch("x8t", in_, DType::kE4M3, kInBackwardWeight, kPadding * in_);
  }
  dy8_ = b.Scratch("dy8", out_, gradients_, kInBackwardInput);
  dy8t_ =
      b.Scratch("dy8t", out_, gradients_, kInBackwardInput | kInBackwardWeight, kPadding * out_);
  return absl::OkStatus();
}

Float8State* Float8LinearLayer::State(const Run& run) const {
  if (run.float8() == nullptr) {
    run.ops().stream->Fail(absl::FailedPreconditionError(
        "a linear layer in FP8 runs without scales; give the run a Float8State (Run::SetFloat8)"));
  }
  return run.float8();
}

Tensor Float8LinearLayer::Transposed(const Frame& frame, SlotId slot) {
  const Tensor t = frame.Value(slot);
  return Tensor::Of(t.data, t.dtype, {t.dims[1], Float8Kernels::Padded(t.dims[0])}, t.device);
}

void Float8LinearLayer::Multiply(Run& run, Frame& frame) const {
  const Float8State& state = *run.float8();
  ops::Float8Product(run.ops(), frame.Value(y_), frame.Value(x8_), state.Codes(codes_).q,
                     state.Inverse(x_operand_), state.Inverse(w_operand_),
                     bias_.valid() ? run.Parameter(bias_) : Tensor(), /*acc=*/false,
                     /*fast=*/true);
}

void Float8LinearLayer::Forward(Run& run, Frame& frame) const {
  Float8State* const state = State(run);
  if (state == nullptr) return;
  if (run.TakeStaleCodes(codes_)) {
    state->QuantizeWeight(run.ops(), codes_, run.Parameter(weight_));
  }
  const bool keep = frame.training() && x8t_.valid() && !frame.Dropped(x8t_);
  state->Quantize(run.ops(), x_operand_, frame.Value(x8_),
                  keep ? Transposed(frame, x8t_) : Tensor(), frame.Value(x_), frame.training());
  Multiply(run, frame);
  if (gelu_.valid()) ops::Gelu(run.ops(), frame.Value(gelu_), frame.Value(y_));
}

void Float8LinearLayer::Recompute(Run& run, Frame& frame) const {
  Float8State* const state = State(run);
  if (state == nullptr) return;
  const bool product = frame.Dropped(y_), keep = x8t_.valid() && frame.Dropped(x8t_);
  if (product || keep) {
    state->QuantizeAgain(run.ops(), x_operand_, product ? frame.Value(x8_) : Tensor(),
                         keep ? Transposed(frame, x8t_) : Tensor(), frame.Value(x_));
  }
  if (product) Multiply(run, frame);
  if (gelu_.valid() && frame.Dropped(gelu_)) {
    ops::Gelu(run.ops(), frame.Value(gelu_), frame.Value(y_));
  }
}

void Float8LinearLayer::BackwardInput(Run& run, Frame& frame) const {
  Float8State* const state = State(run);
  if (state == nullptr) return;
  const SlotId pre = options_.gelu_input;
  const Tensor dx = frame.Grad(pre.valid() ? pre : x_);
  const Tensor dy8 = dx.present() ? frame.Value(dy8_) : Tensor();
  state->Quantize(run.ops(), dy_operand_, dy8, Transposed(frame, dy8t_), frame.Grad(y_),
                  /*training=*/true);
  if (!dx.present()) return;
  ops::Float8Product(run.ops(), dx, dy8, state->Codes(codes_).qt, state->Inverse(dy_operand_),
                     state->Inverse(w_operand_), {}, !pre.valid() && frame.AccumulateGrad(x_),
                     /*fast=*/false);
  if (pre.valid()) ops::GeluBackward(run.ops(), dx, dx, frame.Value(pre), false);
}

void Float8LinearLayer::BackwardWeight(Run& run, Frame& frame) const {
  Float8State* const state = State(run);
  if (state == nullptr) return;
  const Tensor x8t = Transposed(frame, x8t_.valid() ? x8t_ : late_x8t_);
  if (!x8t_.valid()) state->QuantizeAgain(run.ops(), x_operand_, {}, x8t, frame.Value(x_));
  const Run::Target dw = run.Gradient(weight_);
  ops::Float8Product(run.ops(), dw.tensor, Transposed(frame, dy8t_), x8t,
                     state->Inverse(dy_operand_), state->Inverse(x_operand_), {}, dw.accumulate,
                     /*fast=*/false);
  if (bias_.valid()) {
    ops::LinearBackwardBias(run.ops(), run.Gradient(bias_).tensor, frame.Grad(y_), dw.accumulate);
  }
}

}  // namespace internal
}  // namespace stretto
