#include "stretto/model/float8.h"

#include <utility>

#include "stretto/core/copy.h"
#include "stretto/core/float8.h"

namespace stretto {
namespace {

constexpr int64_t kAlignment = 256;
int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Elements between the inverse scales of two operands: products want each at an address of its own
// alignment.
constexpr int64_t kInverseStride = Float8Kernels::kAlignment / int64_t{sizeof(float)};

// inverse, then scale, history, limit and two arrays of magnitudes, f32.
int64_t ScalingBytes(const Graph& graph) {
  const auto n = static_cast<int64_t>(graph.float8_operands.size());
  return Aligned(n * (kInverseStride + Float8State::kHistory + 4) * SizeOf(DType::kF32));
}

}  // namespace

std::optional<DType> Float8GradientType(const std::string& option) {
  if (option == "e4m3") return DType::kE4M3;
  if (option == "hybrid") return DType::kE5M2;
  return std::nullopt;
}

int64_t Float8State::Bytes(const Graph& graph) {
  if (graph.float8_operands.empty()) return 0;
  int64_t bytes = ScalingBytes(graph);
  for (const Float8WeightInfo& w : graph.float8_weights) {
    bytes += 2 * Aligned(graph.parameters[w.param.value].elements());
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<Float8State>> Float8State::Create(const Graph& graph, Device device,
                                                                 Budget& budget) {
  auto state = std::unique_ptr<Float8State>(new Float8State(graph));
  const int64_t bytes = Bytes(graph), n = state->operands();
  STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(device), "fp8 weights", bytes));
  STRETTO_ASSIGN_OR_RETURN(state->arena_, Arena::Create(device, "fp8 weights", bytes));
  state->scaling_bytes_ = ScalingBytes(graph);
  auto* next = reinterpret_cast<float*>(state->arena_.data());
  const auto vector = [&](Tensor* t, int64_t per_operand = 1) {
    *t = Tensor::Of(next, DType::kF32, {n * per_operand}, device);
    next += n * per_operand;
  };
  state->inverse_ = Tensor::Of(next, DType::kF32, {n}, device);
  state->inverse_.row_stride = kInverseStride;
  next += n * kInverseStride;
  vector(&state->scale_);  // with the history behind it: see Registered
  state->history_ = Tensor::Of(next, DType::kF32, {n, kHistory}, device);
  next += n * kHistory;
  vector(&state->limit_);
  vector(&state->training_amax_);
  vector(&state->other_amax_);

  std::byte* codes = state->arena_.data() + state->scaling_bytes_;
  for (const Float8WeightInfo& w : graph.float8_weights) {
    const ParameterInfo& p = graph.parameters[w.param.value];
    const DType format = graph.float8_operands[w.operand.value].format;
    Weight weight;
    weight.q = Tensor::Of(codes, format, {p.rows(), p.columns()}, device);
    codes += Aligned(p.elements());
    weight.qt = Tensor::Of(codes, format, {p.columns(), p.rows()}, device);
    codes += Aligned(p.elements());
    state->codes_.push_back(weight);
  }

  std::vector<float> limits, ones(static_cast<size_t>(n), 1.0f);
  for (const Float8OperandInfo& o : graph.float8_operands) limits.push_back(Float8Max(o.format));
  const auto send = [](Tensor t, const std::vector<float>& values) {
    return CopyFromHost(t, values.data());
  };
  if (n > 0) {
    STRETTO_RETURN_IF_ERROR(send(state->limit_, limits));
    STRETTO_RETURN_IF_ERROR(send(state->scale_, ones));
    STRETTO_RETURN_IF_ERROR(state->SetInverse(ones));
  }
  return state;
}

absl::Status Float8State::SetInverse(const std::vector<float>& scales) {
  std::vector<float> spread(scales.size() * kInverseStride, 1.0f);
  for (size_t i = 0; i < scales.size(); ++i) spread[i * kInverseStride] = 1 / scales[i];
  const Tensor all = Tensor::Of(inverse_.data, DType::kF32, {static_cast<int64_t>(spread.size())},
                                inverse_.device);
  return CopyFromHost(all, spread.data());
}

void Float8State::Quantize(ops::Context c, Float8OperandId id, Tensor q, Tensor qt, Tensor x,
                           bool training) {
  const Tensor scale = scale_.Rows(id.value, 1);
  if (!just_in_time_) {
    const Tensor amax = training ? training_amax_.Rows(id.value, 1) : Tensor();
    return ops::Float8Quantize(c, q, qt, x, scale, amax);
  }
  // The maximum over the micro-batches so far, so that the first step ends as every step does. An
  // evaluation must leave no trace in it.
  const Tensor amax = (training ? training_amax_ : other_amax_).Rows(id.value, 1);
  ops::Float8AbsMax(c, amax, x);
  ops::Float8UpdateScales(c, scale, Inverse(id), {}, amax, limit_.Rows(id.value, 1));
  ops::Float8Quantize(c, q, qt, x, scale, {});
}

void Float8State::QuantizeAgain(ops::Context c, Float8OperandId id, Tensor q, Tensor qt,
                                Tensor x) const {
  ops::Float8Quantize(c, q, qt, x, scale_.Rows(id.value, 1), {});
}

void Float8State::QuantizeWeight(ops::Context c, Float8WeightId id, Tensor weight) {
  // As in training also in an evaluation: it is the weight that the next step will measure.
  Quantize(c, graph_.float8_weights[id.value].operand, codes_[id.value].q, codes_[id.value].qt,
           weight, /*training=*/true);
}

Tensor Float8State::Magnitudes() const {
  Tensor bits = training_amax_;
  bits.dtype = DType::kI32;
  return bits;
}

void Float8State::EndStep(ops::Context c) {
  ops::Float8UpdateScales(c, scale_, inverse_, history_, training_amax_, limit_);
}

absl::Status Float8State::Register(StateRegistry* registry, bool owner) const {
  // Named as optimizer state: who loads weights alone does without.
  const auto add = [&](const char* name, Tensor t, std::vector<int64_t> shape) {
    return registry->Add({.name = name,
                          .dtype = t.dtype,
                          .global_shape = std::move(shape),
                          .first_row = 0,
                          .local = t.Rows(0, owner ? t.rows() : 0)});
  };
  STRETTO_RETURN_IF_ERROR(add("optim.fp8.scale", scale_, {operands()}));
  return add("optim.fp8.amax_history", history_, {operands(), kHistory});
}

Tensor Float8State::Registered() const {
  return Tensor::Of(scale_.data, DType::kF32, {operands() * (1 + kHistory)}, scale_.device);
}

absl::Status Float8State::Restored() {
  std::vector<float> values(static_cast<size_t>(operands()));
  if (values.empty()) return absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(CopyToHost(values.data(), scale_));
  return SetInverse(values);
}

absl::StatusOr<std::vector<std::byte>> Float8State::Remember() const {
  std::vector<std::byte> bytes(static_cast<size_t>(scaling_bytes_));
  const Tensor all = Tensor::Of(arena_.data(), DType::kU8, {scaling_bytes_}, scale_.device);
  STRETTO_RETURN_IF_ERROR(CopyToHost(bytes.data(), all));
  return bytes;
}

absl::Status Float8State::Recall(const std::vector<std::byte>& remembered) {
  const Tensor all = Tensor::Of(arena_.data(), DType::kU8, {scaling_bytes_}, scale_.device);
  return CopyFromHost(all, remembered.data());
}

}  // namespace stretto
