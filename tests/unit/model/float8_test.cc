// Linear layers in FP8: against products of the rounded operands, as parts of a model, and what
// they keep from step to step.
#include "stretto/model/float8.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "stretto/core/float8.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using testing::Get;
using testing::Harness;
using ::testing::HasSubstr;
using testing::RandomBatch;
using testing::Set;
using Values = std::vector<double>;

Values Read(const Tensor& t) {
  Values values;
  for (int64_t i = 0; i < t.elements(); ++i) values.push_back(Get(t, i));
  return values;
}

double Largest(const Values& x) {
  double largest = 0;
  for (double v : x) largest = std::max(largest, std::fabs(v));
  return largest;
}

// ||a - b|| / ||b||.
double Distance(const Values& a, const Values& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-300));
}

// The largest power of two that brings `amax` up to the format's largest number at most.
double ScaleFor(double amax, DType format) {
  return std::exp2(std::floor(std::log2(Float8Max(format) / amax)));
}

// What a tensor is after it was quantised.
Values Rounded(Values x, double scale, DType format) {
  for (double& v : x) {
    const float scaled = static_cast<float>(v * scale);
    v = (format == DType::kE4M3 ? static_cast<float>(E4M3(scaled))
                                : static_cast<float>(E5M2(scaled))) /
        scale;
  }
  return x;
}

// Ends a graph: keeps what it reads and sends `dy` back.
class Probe : public Layer {
 public:
  explicit Probe(SlotId y) : y_(y) {}
  const char* kind() const override { return "probe"; }
  absl::Status Declare(Builder& b) override {
    b.Reads(y_, kInForward);
    return absl::OkStatus();
  }
  void Forward(Run&, Frame& frame) const override { y = Read(frame.Value(y_)); }
  void BackwardInput(Run&, Frame& frame) const override {
    for (size_t i = 0; i < dy.size(); ++i) Set(frame.Grad(y_), static_cast<int64_t>(i), dy[i]);
  }
  void BackwardWeight(Run&, Frame&) const override {}
  mutable Values y;
  Values dy;

 private:
  SlotId y_;
};

// One layer, its state, and a frame that can be run again and again.
class OneLayer {
 public:
  static constexpr int64_t kTokens = 21, kIn = 48, kOut = 32;

  explicit OneLayer(DType gradients) : gradients_(gradients) {
    Builder b(DType::kBF16, Float8Strategies(gradients));
    x_ = b.Input("x", kIn);
    const SlotId y = b.Linear("fc", Role::kReplicated, x_, kIn, kOut, {.bias = true});
    auto probe = std::make_unique<Probe>(y);
    probe_ = probe.get();
    EXPECT_TRUE(b.Add("probe", std::move(probe)).ok());
    graph_ = b.Finish().value();
    state = Float8State::Create(graph_, Device::Cpu(), budget_).value();
    harness.emplace(graph_, 5);
    harness->run().SetFloat8(state.get());
    const Rng rng(9, "bias");
    for (int64_t i = 0; i < kOut; ++i) {
      Set(harness->parameters[1], i, rng.Normal(static_cast<uint64_t>(i)));
    }
    actions_ = TrainingActions(graph_, Recompute::kNone);
    layout_ = PlanFrame(graph_, actions_, kTokens + 3).value();
    memory_.assign(static_cast<size_t>(layout_.bytes()) / 8 + 8, std::nan(""));
  }

  // A micro-batch of values of about the given sizes.
  void RunBatch(uint64_t seed, double x_size, double dy_size) {
    const PackedBatch batch = RandomBatch({kTokens}, 7, 1);
    Frame frame(&graph_, &actions_, &layout_, reinterpret_cast<std::byte*>(memory_.data()));
    frame.tokens = ViewsOf(batch);
    frame.Begin(actions_.actions.front());
    const Rng rng(seed, "values");
    for (int64_t i = 0; i < kTokens * kIn; ++i) {
      Set(frame.Value(x_), i, x_size * rng.Normal(static_cast<uint64_t>(i)));
    }
    x = Read(frame.Value(x_));
    probe_->dy.clear();
    const Rng other(seed, "gradients");
    for (int64_t i = 0; i < kTokens * kOut; ++i) {
      const BFloat16 v(static_cast<float>(dy_size * other.Normal(static_cast<uint64_t>(i))));
      probe_->dy.push_back(static_cast<float>(v));
    }
    Execute(graph_, actions_, harness->run(), frame);
    ASSERT_TRUE(harness->stream().Synchronize().ok()) << harness->stream().status();
    dx = Read(frame.Grad(x_));
  }

  // Compares the last batch's results with products of operands rounded with these scales.
  void Check(double x_scale, double w_scale, double dy_scale) const {
    const Values qx = Rounded(x, x_scale, DType::kE4M3);
    const Values qw = Rounded(Read(harness->parameters[0]), w_scale, DType::kE4M3);
    const Values qdy = Rounded(probe_->dy, dy_scale, gradients_);
    const Values bias = Read(harness->parameters[1]);
    Values y(kTokens * kOut), want_dx(kTokens * kIn, 0.0), dw(kOut * kIn, 0.0), db(kOut, 0.0);
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t o = 0; o < kOut; ++o) {
        y[t * kOut + o] = bias[o];
        db[o] += probe_->dy[t * kOut + o];
        for (int64_t i = 0; i < kIn; ++i) {
          y[t * kOut + o] += qx[t * kIn + i] * qw[o * kIn + i];
          want_dx[t * kIn + i] += qdy[t * kOut + o] * qw[o * kIn + i];
          dw[o * kIn + i] += qdy[t * kOut + o] * qx[t * kIn + i];
        }
      }
    }
    EXPECT_LT(Distance(probe_->y, y), 3e-3);  // rounded to bf16
    EXPECT_LT(Distance(dx, want_dx), 3e-3);
    EXPECT_LT(Distance(Read(harness->gradients[0]), dw), 1e-6);
    EXPECT_LT(Distance(Read(harness->gradients[1]), db), 1e-6);
    // The rounding shows: these are not the products of the operands themselves.
    Values exact(kTokens * kOut);
    for (int64_t n = 0; n < kTokens * kOut; ++n) {
      exact[n] = bias[n % kOut];
      for (int64_t i = 0; i < kIn; ++i) {
        exact[n] += x[n / kOut * kIn + i] * Get(harness->parameters[0], n % kOut * kIn + i);
      }
    }
    EXPECT_GT(Distance(probe_->y, exact), 3e-3);
  }

  ops::Context ops() const { return harness->run().ops(); }

  std::unique_ptr<Float8State> state;
  mutable std::optional<Harness> harness;
  Values x, dx;
  const Values& dy() const { return probe_->dy; }
  Values Weight() const { return Read(harness->parameters[0]); }

 private:
  DType gradients_;
  Budget budget_{-1, -1, -1};
  SlotId x_;
  Probe* probe_ = nullptr;
  Graph graph_;
  ActionList actions_;
  FrameLayout layout_;
  Values memory_;
};

class Float8Layer : public ::testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(Gradients, Float8Layer, ::testing::Values(DType::kE4M3, DType::kE5M2),
                         [](const auto& info) { return Name(info.param); });

TEST_P(Float8Layer, MultipliesTheRoundedOperands) {
  OneLayer layer(GetParam());
  layer.harness->run().BeginStep();
  layer.RunBatch(1, 3.0, 1e-3);
  const double x_max = Largest(layer.x), dy_max = Largest(layer.dy());
  const double w_max = Largest(layer.Weight());
  // The first step measures before it rounds.
  layer.Check(ScaleFor(x_max, DType::kE4M3), ScaleFor(w_max, DType::kE4M3),
              ScaleFor(dy_max, GetParam()));
  layer.state->EndStep(layer.ops());
  layer.state->SetJustInTime(false);

  // Later ones round with the history's scales, whatever comes.
  layer.harness->run().BeginStep();
  layer.RunBatch(2, 0.5, 4e-3);
  layer.Check(ScaleFor(x_max, DType::kE4M3), ScaleFor(w_max, DType::kE4M3),
              ScaleFor(dy_max, GetParam()));
  const double small_x = Largest(layer.x), large_dy = Largest(layer.dy());
  layer.state->EndStep(layer.ops());
  layer.harness->run().BeginStep();
  layer.RunBatch(3, 0.5, 1e-3);
  layer.Check(ScaleFor(std::max(x_max, small_x), DType::kE4M3), ScaleFor(w_max, DType::kE4M3),
              ScaleFor(large_dy, GetParam()));
  // After 16 steps the first is forgotten.
  for (int step = 0; step < 16; ++step) {
    layer.state->EndStep(layer.ops());
    layer.harness->run().BeginStep();
    layer.RunBatch(3, 0.5, 1e-3);
  }
  layer.Check(ScaleFor(std::max(small_x, Largest(layer.x)), DType::kE4M3),
              ScaleFor(w_max, DType::kE4M3), ScaleFor(Largest(layer.dy()), GetParam()));
}

TEST_P(Float8Layer, AccumulatesOverMicroBatches) {
  OneLayer layer(GetParam());
  layer.harness->run().BeginStep();
  layer.RunBatch(1, 1, 1e-3);
  layer.state->EndStep(layer.ops());
  layer.state->SetJustInTime(false);
  Values sum(OneLayer::kOut * OneLayer::kIn, 0.0);
  for (uint64_t seed : {4, 5}) {
    layer.harness->run().BeginStep();
    layer.RunBatch(seed, 1, 1e-3);
    const Values dw = Read(layer.harness->gradients[0]);
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += dw[i];
  }
  layer.harness->run().BeginStep();
  for (uint64_t seed : {4, 5}) layer.RunBatch(seed, 1, 1e-3);
  EXPECT_LT(Distance(Read(layer.harness->gradients[0]), sum), 1e-6);
}

TEST(Float8LayerControl, AWrongScaleIsNoticed) {
  OneLayer layer(DType::kE4M3);
  layer.harness->run().BeginStep();
  layer.RunBatch(1, 1, 1e-3);
  const Values right = Read(layer.harness->gradients[0]);
  layer.state->EndStep(layer.ops());
  layer.state->SetJustInTime(false);
  const auto run = [&] {
    layer.harness->run().BeginStep();
    layer.RunBatch(1, 1, 1e-3);
    return Distance(Read(layer.harness->gradients[0]), right);
  };
  EXPECT_EQ(run(), 0);
  // The gradients' scale, by 2^17: what is small vanishes.
  layer.state->scales().as<float>()[2] *= 0x1p-17f;
  ASSERT_TRUE(layer.state->Restored().ok());
  EXPECT_GT(run(), 0.3);
  // And a scale that its inverse does not belong to.
  layer.state->scales().as<float>()[2] *= 0x1p17f;
  ASSERT_TRUE(layer.state->Restored().ok());
  layer.state->scales().as<float>()[0] *= 2;
  EXPECT_GT(run(), 0.5);
}

// --- Whole models ---

ModelConfig Sizes(const std::string& family, int64_t ffn = 48) {
  ModelConfig c;
  c.family = family;
  c.vocabulary = 53;
  c.layers = 2;
  c.hidden = 32;
  c.heads = 2;
  c.kv_heads = family == "gpt2" ? 2 : 1;
  c.head_dim = 16;
  c.ffn = ffn;
  c.max_positions = 32;
  c.init_std = 0.15;
  EXPECT_TRUE(c.Resolve().ok());
  return c;
}

Model Build(const ModelConfig& config, std::optional<DType> gradients) {
  ModelOptions options = {.dtype = DType::kBF16};
  if (gradients) options.strategies = Float8Strategies(*gradients);
  return BuildModel(config, options).value();
}

struct Outcome {
  double loss = 0;
  std::vector<Values> gradients;
};

// Two steps of two micro-batches, the second with the scales of the first.
Outcome TwoSteps(const Model& model, Recompute recompute = Recompute::kNone, bool defer = false) {
  Budget budget(-1, -1, -1);
  const auto state = Float8State::Create(model.graph, Device::Cpu(), budget).value();
  Harness h(model.graph, 21);
  h.run().SetFloat8(state.get());
  const ActionList actions = TrainingActions(model.graph, recompute, defer);
  Outcome out;
  for (int step = 0; step < 2; ++step) {
    h.run().BeginStep();
    for (uint64_t seed : {3, 4}) {
      const absl::Status status =
          h.RunBatch(actions, RandomBatch({7, 14, 2}, model.config.vocabulary, seed));
      EXPECT_TRUE(status.ok()) << status;
    }
    state->EndStep(h.run().ops());
    state->SetJustInTime(false);
  }
  out.loss = h.loss_total[0] / h.loss_total[1];
  for (const Tensor& g : h.gradients) out.gradients.push_back(Read(g));
  return out;
}

class Float8Model : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, Float8Model, ::testing::Values("gpt2", "llama", "qwen3"),
                         [](const auto& info) { return info.param; });

TEST_P(Float8Model, GradientsAreThoseOfBf16ButForTheRounding) {
  const ModelConfig config = Sizes(GetParam());
  const Outcome bf16 = TwoSteps(Build(config, std::nullopt));
  for (DType gradients : {DType::kE4M3, DType::kE5M2}) {
    const Model model = Build(config, gradients);
    EXPECT_EQ(model.graph.float8_weights.size(), 8u);  // four a block
    const Outcome fp8 = TwoSteps(model);
    EXPECT_NEAR(fp8.loss, bf16.loss, 0.02 * bf16.loss);
    EXPECT_NE(fp8.loss, bf16.loss);
    for (size_t p = 0; p < bf16.gradients.size(); ++p) {
      const std::string& name = model.graph.parameters[p].spec.name;
      if (Largest(bf16.gradients[p]) < 1e-3) continue;  // of the keys' biases: noise
      EXPECT_LT(Distance(fp8.gradients[p], bf16.gradients[p]), 0.25) << name;
    }
  }
}

TEST_P(Float8Model, RecomputationChangesNoBit) {
  const Model model = Build(Sizes(GetParam()), DType::kE5M2);
  const Outcome kept = TwoSteps(model);
  for (Recompute recompute : {Recompute::kNormsAndActivations, Recompute::kBlock}) {
    for (bool defer : {false, true}) {
      const Outcome again = TwoSteps(model, recompute, defer);
      EXPECT_EQ(again.loss, kept.loss) << Name(recompute);
      EXPECT_EQ(again.gradients, kept.gradients) << Name(recompute);
    }
  }
}

TEST_P(Float8Model, ActivationsTakeLessMemory) {
  ModelConfig config = Sizes(GetParam(), 128);
  config.layers = 6;
  const Model bf16 = Build(config, std::nullopt), fp8 = Build(config, DType::kE4M3);
  const auto bytes = [](const Model& model, Recompute recompute) {
    return PlanFrame(model.graph, TrainingActions(model.graph, recompute), 4096).value().bytes();
  };
  // A token's input of qkv and the MLP's two inputs, in one byte for two.
  const int64_t saved = 4096 * config.layers * (2 * config.hidden + config.ffn);
  EXPECT_LT(bytes(fp8, Recompute::kNone), bytes(bf16, Recompute::kNone) - 0.8 * saved);
  for (Recompute recompute : {Recompute::kNormsAndActivations, Recompute::kBlock}) {
    EXPECT_LT(bytes(fp8, recompute), 1.1 * bytes(bf16, recompute)) << Name(recompute);
    EXPECT_LT(bytes(fp8, recompute), bytes(fp8, Recompute::kNone)) << Name(recompute);
  }
}

TEST(Float8Models, OddWidthsStayInTheModelsType) {
  const auto kinds = [](const Model& model) {
    std::vector<std::string> found;
    for (size_t l = 0; l < model.graph.layers.size(); ++l) {
      const std::string kind = model.graph.layers[l]->kind();
      if (kind.rfind("linear", 0) == 0 && model.graph.layer_block[l] == 0) found.push_back(kind);
    }
    return found;
  };
  const Model mixed = Build(Sizes("gpt2", 27), DType::kE5M2);
  EXPECT_THAT(kinds(mixed), ::testing::ElementsAre("linear_fp8", "linear_fp8", "linear", "linear"));
  const Outcome bf16 = TwoSteps(Build(Sizes("gpt2", 27), std::nullopt)), fp8 = TwoSteps(mixed);
  for (size_t p = 0; p < bf16.gradients.size(); ++p) {
    if (Largest(bf16.gradients[p]) < 1e-3) continue;
    EXPECT_LT(Distance(fp8.gradients[p], bf16.gradients[p]), 0.25)
        << mixed.graph.parameters[p].spec.name;
  }
  ModelConfig odd = testing::OddModel("llama");
  ASSERT_TRUE(odd.Resolve().ok());
  EXPECT_EQ(Float8State::Bytes(Build(odd, DType::kE4M3).graph), 0);
}

TEST(Float8Models, EvaluationLeavesNoTraceInTheScales) {
  const Model model = Build(Sizes("llama"), DType::kE4M3);
  const ActionList train = TrainingActions(model.graph, Recompute::kNone);
  const ActionList evaluate = EvaluationActions(model.graph);
  const auto scales_after = [&](bool evaluating) {
    Budget budget(-1, -1, -1);
    const auto state = Float8State::Create(model.graph, Device::Cpu(), budget).value();
    Harness h(model.graph, 21);
    h.run().SetFloat8(state.get());
    Values seen;
    for (uint64_t step = 0; step < 3; ++step) {
      const auto look = [&] {
        if (!evaluating) return;
        h.run().BeginStep();
        EXPECT_TRUE(h.RunBatch(evaluate, RandomBatch({31, 25}, 53, 100 + step)).ok());
      };
      look();
      h.run().BeginStep();
      EXPECT_TRUE(h.RunBatch(train, RandomBatch({9, 4}, 53, step)).ok());
      look();
      state->EndStep(h.run().ops());
      state->SetJustInTime(false);
      for (const Tensor& t : {state->scales(), state->history()}) {
        for (double v : Read(t)) seen.push_back(v);
      }
      for (const Tensor& g : h.gradients) {
        for (double v : Read(g)) seen.push_back(v);
      }
    }
    return seen;
  };
  EXPECT_EQ(scales_after(true), scales_after(false));
}

TEST(Float8Models, RefusesOtherModelTypesAndRunsWithoutState) {
  ModelOptions options = {.dtype = DType::kF32, .strategies = Float8Strategies(DType::kE4M3)};
  const auto model = BuildModel(Sizes("llama"), options);
  EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(model.status().message()), HasSubstr("bf16"));

  const Model fine = Build(Sizes("llama"), DType::kE4M3);
  Harness h(fine.graph, 1);
  const absl::Status status = h.RunBatch(EvaluationActions(fine.graph), RandomBatch({4}, 53, 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("SetFloat8"));
}

}  // namespace
}  // namespace stretto
