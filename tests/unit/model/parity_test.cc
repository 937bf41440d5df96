// Logits, loss, every gradient and three AdamW steps of each family against values computed by
// PyTorch and transformers (tests/parity/model/generate.py).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "stretto/optim/optimizer.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/snapshot/safetensors.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using testing::Get;
using Values = std::vector<double>;

constexpr int kSteps = 3;
constexpr double kLearningRate = 1e-2;

// One file of tests/parity/model/data.
struct Reference {
  ModelConfig config;
  PackedBatch batch;
  Values logits, loss;
  Values bf16_error;  // of PyTorch's bf16 model: relative L2 norm of [logits, all gradients]
  std::map<std::string, Values> initial, gradients, after;  // by parameter
};

absl::StatusOr<Values> ReadValues(const SafetensorsFile& file, const SafetensorsEntry& entry) {
  STRETTO_ASSIGN_OR_RETURN(const DType dtype, FromSafetensorsType(entry.dtype));
  std::vector<std::byte> bytes(static_cast<size_t>(entry.end - entry.begin));
  STRETTO_RETURN_IF_ERROR(file.Read(entry, 0, entry.end - entry.begin, bytes.data()));
  Values values(static_cast<size_t>(entry.elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    const std::byte* at = bytes.data() + i * static_cast<size_t>(SizeOf(dtype));
    const auto load = [&](auto value) {
      std::memcpy(&value, at, sizeof value);
      values[i] = static_cast<double>(value);
    };
    if (dtype == DType::kF64) load(double{});
    if (dtype == DType::kF32) load(float{});
    if (dtype == DType::kI32) load(int32_t{});
  }
  return values;
}

absl::StatusOr<Reference> ReadReference(const std::string& name) {
  const std::string path = absl::StrCat(STRETTO_PARITY_DATA "/", name, ".safetensors");
  STRETTO_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  Reference reference;
  STRETTO_RETURN_IF_ERROR(
      ParseConfig(file.metadata().at("model"), path, {}, ConfigRef(&reference.config)));
  STRETTO_RETURN_IF_ERROR(reference.config.Resolve());
  PackedBatch& batch = reference.batch;
  for (const SafetensorsEntry& entry : file.entries()) {
    STRETTO_ASSIGN_OR_RETURN(const Values values, ReadValues(file, entry));
    const size_t dot = entry.name.find('.');
    const std::string kind = entry.name.substr(0, dot);
    const std::string rest = dot == std::string::npos ? "" : entry.name.substr(dot + 1);
    if (kind == "initial") reference.initial[rest] = values;
    if (kind == "gradient") reference.gradients[rest] = values;
    if (kind == "after") reference.after[rest] = values;
    if (kind == "logits") reference.logits = values;
    if (kind == "loss") reference.loss = values;
    if (kind == "bf16_error") reference.bf16_error = values;
    if (kind == "ids") batch.ids.assign(values.begin(), values.end());
    if (kind == "targets") batch.targets.assign(values.begin(), values.end());
    if (kind == "weights") batch.weights.assign(values.begin(), values.end());
    if (kind == "cu_seqlens") batch.cu_seqlens.assign(values.begin(), values.end());
  }
  for (int64_t d = 0; d < batch.sequences(); ++d) {
    const int32_t length = batch.cu_seqlens[d + 1] - batch.cu_seqlens[d];
    for (int32_t t = 0; t < length; ++t) batch.positions.push_back(t);
    batch.max_length = std::max<int64_t>(batch.max_length, length);
  }
  return reference;
}

Values ToValues(const Tensor& tensor) {
  Values values(static_cast<size_t>(tensor.elements()));
  for (size_t i = 0; i < values.size(); ++i) values[i] = Get(tensor, static_cast<int64_t>(i));
  return values;
}

// The largest difference, relative to the largest reference value.
double Distance(const Values& actual, const Values& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double largest = 1e-3, difference = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    difference = std::max(difference,
                          std::isfinite(actual[i]) ? std::abs(actual[i] - expected[i]) : INFINITY);
  }
  return difference / largest;
}

// The L2 norm of differences over that of the reference values.
class RelativeNorm {
 public:
  void Add(double actual, double expected) { Add(actual, expected, expected); }
  // Relative to `change` instead.
  void Add(double actual, double expected, double change) {
    differences_ += (actual - expected) * (actual - expected);
    changes_ += change * change;
  }
  void Add(const Values& actual, const Values& expected) {
    for (size_t i = 0; i < expected.size(); ++i) Add(actual[i], expected[i]);
  }
  double value() const { return std::sqrt(differences_ / changes_); }

 private:
  double differences_ = 0, changes_ = 0;
};

// How far we are from the reference.
struct Distances {
  double logits = 0, loss = 0;
  double gradients = 0;  // of the worst parameter
  double after = 0;      // of the worst parameter after the last step
  // Relative L2 norms over all elements; that of the update leaves noise out.
  double logits_norm = 0, gradients_norm = 0, update_norm = 0;
  std::string worst_gradient, worst_after;
};

// A whole step as the trainer runs it, in a world of one rank.
class Stepper {
 public:
  static absl::StatusOr<Distances> Compare(const Reference& reference, DType dtype,
                                           const AdamWOptions& options) {
    Distances distances;
    STRETTO_RETURN_IF_ERROR(World::RunThreads(1, [&](World& world) {
      Stepper stepper(world, reference, dtype);
      return stepper.Run(options, &distances);
    }));
    return distances;
  }

 private:
  Stepper(World& world, const Reference& reference, DType dtype)
      : world_(world), reference_(reference), dtype_(dtype) {}

  absl::Status Run(const AdamWOptions& options, Distances* d) {
    STRETTO_ASSIGN_OR_RETURN(const Model model,
                             BuildModel(reference_.config, {.dtype = dtype_, .loss_chunk = 19}));
    STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(Device::Cpu(), {}));
    STRETTO_ASSIGN_OR_RETURN(const KernelTable* kernels, KernelsFor(Device::Cpu()));
    const ops::Context ops = {stream.get(), kernels};
    Communicator comm(world_);
    STRETTO_ASSIGN_OR_RETURN(const Group group, comm.MakeGroup("dp", {0}));
    Budget budget(-1, -1, -1);
    STRETTO_ASSIGN_OR_RETURN(const auto dp, DataParallel::Create(comm, group, model.graph, *stream,
                                                                 *kernels, 1, budget, {}));
    STRETTO_RETURN_IF_ERROR(SetInitial(model.graph, *dp));
    STRETTO_ASSIGN_OR_RETURN(const auto optimizer,
                             AdamW::Create(model.graph, *dp, ops, budget, options));
    double memory[StepScalars::kCount] = {};
    const Tensor scalars = Tensor::Of(memory, DType::kF64, {StepScalars::kCount});
    stretto::Run run(ops);
    dp->Attach(&run, scalars.Rows(StepScalars::kLossSum, 2));

    STRETTO_RETURN_IF_ERROR(CompareLogits(model, run, d));
    const ActionList actions = TrainingActions(model.graph, Recompute::kBlock);
    STRETTO_ASSIGN_OR_RETURN(const FrameLayout layout,
                             PlanFrame(model.graph, actions, reference_.batch.tokens()));
    STRETTO_ASSIGN_OR_RETURN(const Arena arena,
                             Arena::Create(Device::Cpu(), "frame", layout.bytes()));
    Frame frame(&model.graph, &actions, &layout, arena.data());
    frame.tokens = ViewsOf(reference_.batch);
    for (int step = 1; step <= kSteps; ++step) {
      dp->BeginStep(run);
      ops::Zero(ops, scalars);
      Execute(model.graph, actions, run, frame, &dp->hooks(true));
      STRETTO_RETURN_IF_ERROR(dp->FinishGradients(run));
      optimizer->AddSumSquares(scalars);
      ops::PrepareStep(ops, scalars, 0, 0);
      if (step == 1) {
        STRETTO_RETURN_IF_ERROR(stream->Synchronize());
        d->loss = Distance({memory[0], memory[1]}, reference_.loss);
        CompareGradients(model.graph, *dp, d);
      }
      optimizer->Step(scalars, kLearningRate, step);
      STRETTO_RETURN_IF_ERROR(stream->Synchronize());
      STRETTO_RETURN_IF_ERROR(dp->GatherParameters());
    }
    STRETTO_RETURN_IF_ERROR(dp->WaitParameters());
    CompareAfter(model.graph, *dp, d);
    return absl::OkStatus();
  }

  absl::Status SetInitial(const Graph& graph, const DataParallel& dp) {
    if (graph.parameters.size() != reference_.initial.size()) {
      return absl::InternalError(absl::StrCat("the model has ", graph.parameters.size(),
                                              " parameters, not ", reference_.initial.size()));
    }
    for (size_t p = 0; p < graph.parameters.size(); ++p) {
      const Tensor value = dp.Parameter({static_cast<int>(p)});
      const auto it = reference_.initial.find(graph.parameters[p].spec.name);
      if (it == reference_.initial.end() ||
          static_cast<int64_t>(it->second.size()) != value.elements()) {
        return absl::InternalError("parameter " + graph.parameters[p].spec.name);
      }
      for (int64_t i = 0; i < value.elements(); ++i) {
        testing::Set(value, i, it->second[static_cast<size_t>(i)]);
      }
    }
    return absl::OkStatus();
  }

  absl::Status CompareLogits(const Model& model, stretto::Run& run, Distances* d) {
    const ActionList actions = EvaluationActions(model.graph);
    const int64_t tokens = reference_.batch.tokens();
    STRETTO_ASSIGN_OR_RETURN(const FrameLayout layout, PlanFrame(model.graph, actions, tokens));
    STRETTO_ASSIGN_OR_RETURN(const Arena arena,
                             Arena::Create(Device::Cpu(), "frame", layout.bytes()));
    Frame frame(&model.graph, &actions, &layout, arena.data());
    frame.tokens = ViewsOf(reference_.batch);
    run.BeginStep();
    Execute(model.graph, actions, run, frame);
    Values storage(reference_.logits.size());  // doubles: large enough for every type
    const Tensor logits =
        Tensor::Of(storage.data(), dtype_, {tokens, reference_.config.vocabulary});
    ops::Linear(run.ops(), logits, frame.Value(model.final_hidden), run.Parameter(model.head), {});
    STRETTO_RETURN_IF_ERROR(run.ops().stream->Synchronize());
    d->logits = Distance(ToValues(logits), reference_.logits);
    RelativeNorm norm;
    norm.Add(ToValues(logits), reference_.logits);
    d->logits_norm = norm.value();
    return absl::OkStatus();
  }

  void CompareGradients(const Graph& graph, const DataParallel& dp, Distances* d) {
    RelativeNorm norm;
    for (size_t p = 0; p < graph.parameters.size(); ++p) {
      const std::string& name = graph.parameters[p].spec.name;
      const Values actual = ToValues(dp.Gradient({static_cast<int>(p)}));
      const Values& expected = reference_.gradients.at(name);
      norm.Add(actual, expected);
      const double distance = Distance(actual, expected);
      if (distance >= d->gradients) d->worst_gradient = name;
      d->gradients = std::max(d->gradients, distance);
    }
    d->gradients_norm = norm.value();
  }

  void CompareAfter(const Graph& graph, const DataParallel& dp, Distances* d) {
    RelativeNorm norm;
    for (size_t p = 0; p < graph.parameters.size(); ++p) {
      const std::string& name = graph.parameters[p].spec.name;
      const Values actual = ToValues(dp.Parameter({static_cast<int>(p)}));
      const Values &expected = reference_.after.at(name), &initial = reference_.initial.at(name),
                   &gradients = reference_.gradients.at(name);
      const double distance = Distance(actual, expected);
      if (distance >= d->after) d->worst_after = name;
      d->after = std::max(d->after, distance);
      for (size_t i = 0; i < actual.size(); ++i) {
        // Adam divides by the root of the second moment: where the gradient is rounding noise
        // around 0 (a key bias without rotary positions shifts all scores alike) the update is
        // noise, too.
        const bool noise = gradients[i] != 0 && std::abs(gradients[i]) < 1e-9;
        if (!noise) norm.Add(actual[i], expected[i], expected[i] - initial[i]);
      }
    }
    d->update_norm = norm.value();
  }

  World& world_;
  const Reference& reference_;
  DType dtype_;
};

constexpr AdamWOptions kOptions = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

std::string Shown(const Distances& d) {
  return absl::StrCat("largest difference: logits ", d.logits, ", loss ", d.loss, ", gradients ",
                      d.gradients, " (", d.worst_gradient, "), after three steps ", d.after, " (",
                      d.worst_after, "); relative norm: logits ", d.logits_norm, ", gradients ",
                      d.gradients_norm, ", update ", d.update_norm);
}

class Parity : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto reference = ReadReference(GetParam());
    ASSERT_TRUE(reference.ok()) << reference.status();
    reference_ = *std::move(reference);
  }
  Distances Compare(DType dtype, const AdamWOptions& options = kOptions) {
    const auto distances = Stepper::Compare(reference_, dtype, options);
    EXPECT_TRUE(distances.ok()) << distances.status();
    if (!distances.ok()) return {};
    RecordProperty(Name(dtype), Shown(*distances));
    return *distances;
  }
  Reference reference_;
};

TEST_P(Parity, DoubleEqualsPyTorch) {
  const Distances d = Compare(DType::kF64);
  EXPECT_LT(d.logits, 1e-13) << Shown(d);
  EXPECT_LT(d.loss, 1e-13) << Shown(d);
  EXPECT_LT(d.gradients, 1e-13) << Shown(d);
  EXPECT_LT(d.after, 1e-9) << Shown(d);  // noise, see CompareAfter
  EXPECT_LT(d.update_norm, 1e-12) << Shown(d);
}

TEST_P(Parity, FloatIsClose) {
  const Distances d = Compare(DType::kF32);
  EXPECT_LT(d.logits, 2e-6) << Shown(d);
  EXPECT_LT(d.loss, 1e-6) << Shown(d);
  EXPECT_LT(d.gradients, 1e-5) << Shown(d);
  EXPECT_LT(d.update_norm, 1e-5) << Shown(d);
}

// About as close as PyTorch's own bf16 model is.
TEST_P(Parity, Bfloat16IsAsCloseAsPyTorch) {
  const Distances d = Compare(DType::kBF16);
  ASSERT_EQ(reference_.bf16_error.size(), 2u);
  EXPECT_LT(d.logits_norm, 1.5 * reference_.bf16_error[0]) << Shown(d);
  EXPECT_LT(d.gradients_norm, 1.5 * reference_.bf16_error[1]) << Shown(d);
  EXPECT_LT(d.logits_norm, 2e-2) << Shown(d);
  EXPECT_LT(d.loss, 1e-2) << Shown(d);
  EXPECT_LT(d.update_norm, 0.2) << Shown(d);
}

// Controls: what a wrong implementation would do must be seen.
TEST_P(Parity, MissingDocumentBoundaryIsSeen) {
  reference_.batch.cu_seqlens = {0, static_cast<int32_t>(reference_.batch.tokens())};
  reference_.batch.max_length = reference_.batch.tokens();
  const Distances d = Compare(DType::kF64);
  EXPECT_GT(d.logits, 1e-2) << Shown(d);
  EXPECT_GT(d.gradients, 1e-2) << Shown(d);
}

TEST_P(Parity, MissingWeightDecayIsSeen) {
  AdamWOptions options = kOptions;
  options.weight_decay = 0;
  EXPECT_GT(Compare(DType::kF64, options).after, 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Models, Parity,
                         ::testing::Values("gpt2_tied", "gpt2_untied", "llama_untied",
                                           "llama_scaled_tied", "qwen2_tied", "qwen3_untied"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace stretto
