// Action lists and frame plans: whatever is recomputed, deferred or shared, the bits stay.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/harness.h"

namespace stretto {
namespace {

using testing::Harness;
using testing::OddModel;
using testing::RandomBatch;

Model Build(const std::string& family, DType dtype, int64_t chunk = 0,
            const KernelTable* kernels = nullptr) {
  ModelConfig config = OddModel(family);
  config.layers = 3;
  EXPECT_TRUE(config.Resolve().ok());
  ModelOptions options = {.dtype = dtype, .loss_chunk = chunk};
  options.kernels = kernels;
  return BuildModel(config, options).value();
}

// All gradients of two micro-batches as raw bytes, and the loss.
std::vector<double> Gradients(const Model& model, const ActionList& actions,
                              StreamOptions stream = {}, const KernelTable* kernels = nullptr) {
  Harness h(model.graph, 4, stream, kernels);
  h.run().BeginStep();
  for (uint64_t seed : {1, 2}) {
    const PackedBatch batch = RandomBatch({5, 8, 3}, model.config.vocabulary, seed);
    const absl::Status status = h.RunBatch(actions, batch);
    EXPECT_TRUE(status.ok()) << status;
  }
  std::vector<double> all = {h.loss_total[0], h.loss_total[1]};
  for (const Tensor& g : h.gradients) {
    for (int64_t i = 0; i < g.elements(); ++i) all.push_back(testing::Get(g, i));
  }
  return all;
}

class ActionLists : public ::testing::TestWithParam<std::string> {};

TEST_P(ActionLists, RecomputeAndDeferredWeightsKeepTheBits) {
  for (DType dtype : {DType::kF64, DType::kF32, DType::kBF16}) {
    const Model model = Build(GetParam(), dtype);
    const std::vector<double> expected =
        Gradients(model, TrainingActions(model.graph, Recompute::kNone));
    for (double g : expected) ASSERT_TRUE(std::isfinite(g));
    for (Recompute r : {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
      for (bool defer : {false, true}) {
        EXPECT_EQ(Gradients(model, TrainingActions(model.graph, r, defer)), expected)
            << Name(r) << (defer ? " deferred " : " ") << Name(dtype);
      }
    }
  }
}

// The CPU's norms for a backend whose BackwardInput leaves the weight's gradient for
// BackwardWeight. Sums of f64 are added up alike.
class KeepingNorm final : public NormKernels {
 public:
  int64_t PartialBytes(DType, int64_t columns, bool center) const override {
    return (center ? 2 : 1) * columns * SizeOf(DType::kF64);
  }
  void Forward(Stream& s, Tensor y, Tensor h, Tensor mean, Tensor rstd, Tensor x, Tensor residual,
               Tensor weight, Tensor bias, double eps) const override {
    cpu_.Forward(s, y, h, mean, rstd, x, residual, weight, bias, eps);
  }
  void BackwardInput(Stream& s, Tensor dx, Tensor dy, Tensor h, Tensor mean, Tensor rstd,
                     Tensor weight, bool acc, Tensor partials) const override {
    if (partials.present()) {
      const int64_t n = weight.elements();
      const Tensor dbias = mean.present() ? partials.Rows(n, n) : Tensor();
      cpu_.BackwardWeight(s, partials.Rows(0, n), dbias, dy, h, mean, rstd, false, {});
    }
    cpu_.BackwardInput(s, dx, dy, h, mean, rstd, weight, acc, {});
  }
  void BackwardWeight(Stream& s, Tensor dweight, Tensor dbias, Tensor dy, Tensor h, Tensor mean,
                      Tensor rstd, bool acc, Tensor partials) const override {
    if (!partials.present()) {
      return cpu_.BackwardWeight(s, dweight, dbias, dy, h, mean, rstd, acc, {});
    }
    ++taken;
    s.Enqueue([=] {
      const int64_t n = dweight.elements();
      for (const auto& [to, first] : {std::pair(dweight, int64_t{0}), std::pair(dbias, n)}) {
        if (!to.present()) continue;
        double* out = to.as<double>();
        for (int64_t i = 0; i < n; ++i) {
          out[i] = (acc ? out[i] : 0) + partials.as<double>()[first + i];
        }
      }
    });
  }
  mutable int taken = 0;

 private:
  const NormKernels& cpu_ = *KernelsFor(Device::Cpu()).value()->norm;
};

TEST_P(ActionLists, WhatNormsKeepForTheirWeightsOutlivesOtherWork) {
  const KeepingNorm norm;
  KernelTable kernels = *KernelsFor(Device::Cpu()).value();
  kernels.norm = &norm;
  const Model plain = Build(GetParam(), DType::kF64);
  const Model model = Build(GetParam(), DType::kF64, 0, &kernels);
  const std::vector<double> expected =
      Gradients(plain, TrainingActions(plain.graph, Recompute::kNone));
  // Two norms in each of three blocks and one behind them, two micro-batches.
  constexpr int kNorms = 2 * (2 * 3 + 1);
  for (Recompute r : {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
    for (bool defer : {false, true}) {
      const ActionList list = TrainingActions(model.graph, r, defer);
      norm.taken = 0;
      EXPECT_EQ(Gradients(model, list, {}, &kernels), expected) << Name(r) << " " << defer;
      EXPECT_EQ(norm.taken, kNorms);
      // A backend that keeps nothing runs the same graph.
      EXPECT_EQ(Gradients(model, list), expected) << Name(r) << " " << defer;
    }
  }
}

TEST_P(ActionLists, FifoStreamsKeepTheBits) {
  const Model model = Build(GetParam(), DType::kF32);
  const ActionList list = TrainingActions(model.graph, Recompute::kBlock);
  const std::vector<double> expected = Gradients(model, list, {.threads = 2});
  EXPECT_EQ(Gradients(model, list, {.mode = StreamMode::kFifo, .threads = 2}), expected);
}

TEST_P(ActionLists, RecomputeSavesMemory) {
  const Model model = Build(GetParam(), DType::kF32);
  const auto bytes = [&](Recompute r, bool defer) {
    return PlanFrame(model.graph, TrainingActions(model.graph, r, defer), 128)->bytes();
  };
  EXPECT_LT(bytes(Recompute::kNormsAndActivations, false), bytes(Recompute::kNone, false));
  EXPECT_LT(bytes(Recompute::kBlock, false), bytes(Recompute::kNormsAndActivations, false));
  EXPECT_GT(bytes(Recompute::kNone, true), bytes(Recompute::kNone, false));
}

TEST_P(ActionLists, ResidualGradientIsOneBufferUnlessWeightsAreDeferred) {
  const Model model = Build(GetParam(), DType::kF32);
  const auto shared = [&](bool defer) {
    const FrameLayout layout =
        PlanFrame(model.graph, TrainingActions(model.graph, Recompute::kNone, defer), 64).value();
    int count = 0;
    for (uint8_t s : layout.grad_shared) count += s;
    return count;
  };
  // Each add_norm but the last passes its gradient to both operands: 2 * layers - 1 of them.
  EXPECT_EQ(shared(false), 2 * (2 * 3 - 1));
  EXPECT_LT(shared(true), shared(false));
}

TEST_P(ActionLists, ChunkedLossIsTheSameLoss) {
  const std::vector<double> whole =
      Gradients(Build(GetParam(), DType::kF64),
                TrainingActions(Build(GetParam(), DType::kF64).graph, Recompute::kNone));
  const Model chunked = Build(GetParam(), DType::kF64, 9);
  const std::vector<double> parts =
      Gradients(chunked, TrainingActions(chunked.graph, Recompute::kNone));
  ASSERT_EQ(whole.size(), parts.size());
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_NEAR(whole[i], parts[i], 1e-11);
}

INSTANTIATE_TEST_SUITE_P(Families, ActionLists,
                         ::testing::Values("gpt2", "llama", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

// Gradients of a graph's inputs after one micro-batch in the planned frame.
std::vector<double> InputGradients(const Graph& graph, const std::vector<SlotId>& inputs) {
  Harness h(graph, 4);
  const PackedBatch batch = RandomBatch({5, 2}, 13, 1);
  const ActionList actions = TrainingActions(graph, Recompute::kNone);
  const FrameLayout layout = PlanFrame(graph, actions, batch.tokens()).value();
  std::vector<double> memory(static_cast<size_t>(layout.bytes()) / 8 + 1);
  Frame frame(&graph, &actions, &layout, reinterpret_cast<std::byte*>(memory.data()));
  frame.tokens = ViewsOf(batch);
  frame.Begin({ActionKind::kForward, 0});
  for (SlotId slot : inputs) {
    const Tensor t = frame.Value(slot);
    const Rng rng(3, graph.slots[slot.value].name);
    for (int64_t i = 0; i < t.elements(); ++i) testing::Set(t, i, rng.Normal(i));
  }
  h.run().BeginStep();
  Execute(graph, actions, h.run(), frame);
  EXPECT_TRUE(h.stream().Synchronize().ok());
  std::vector<double> all;
  for (SlotId slot : inputs) {
    const Tensor g = frame.Grad(slot);
    for (int64_t i = 0; i < g.elements(); ++i) all.push_back(testing::Get(g, i));
  }
  return all;
}

// Whoever fills an input (a pipeline boundary) reads its gradient after backward, so nobody may
// change the shared buffer before.
TEST(PlanFrame, GradientOfAnInputOutlivesWhatSharesItsMemory) {
  Builder b(DType::kF64);
  const auto linear = [&](const char* name, SlotId x) {
    return b.Linear(name, Role::kReplicated, x, 6, 6, {.init_std = 0.5});
  };
  const SlotId y = b.Input("y", 6), p = b.Input("p", 6), x = b.Input("x", 6);
  const auto [s1, n1] = b.AddNorm("a", y, p);
  const auto [s2, n2] = b.AddNorm("b", x, s1);  // a's backward adds to the gradient of s1 later
  const auto [s3, n3] = b.AddNorm("c", s2, linear("fc2", n2));
  const auto [s4, n4] = b.AddNorm("d", linear("fc1", n1), linear("fc3", n3));
  b.LossHead("head", n4, 13, 0, ParamId(), 0.5);
  Graph graph = b.Finish().value();
  const std::vector<double> planned = InputGradients(graph, {y, p, x});
  for (SlotInfo& s : graph.slots) s.share_with = -1;
  EXPECT_EQ(planned, InputGradients(graph, {y, p, x}));
}

// Recompute happens block by block, so what a layer outside of its block needs in backward stays.
TEST(TrainingActions, ValuesThatLeaveTheirBlockAreNotDropped) {
  Builder b(DType::kF64);
  const auto linear = [&](const char* name, SlotId x, int64_t in, int64_t out) {
    return b.Linear(name, Role::kReplicated, x, in, out, {.init_std = 0.5});
  };
  const SlotId x = b.Embedding("embed", 13, 6, 0, 1.0);
  b.BeginBlock();
  const SlotId first = linear("fc1", x, 6, 6);
  b.EndBlock();
  b.BeginBlock();  // its first layer reads the block before in backward
  const SlotId second = linear("fc2", b.Norm("norm2", first), 6, 6);
  const SlotId qkv = linear("qkv", second, 6, 12);
  b.EndBlock();
  b.BeginBlock();  // changes what the block before wrote
  const SlotId o = b.Attention("attn", qkv,
                               {.heads = 1,
                                .kv_heads = 1,
                                .head_dim = 4,
                                .rotary = true,
                                .max_positions = 8,
                                .inverse_frequency = [](int64_t i) { return 1.0 / (1 + i); }});
  const SlotId third = b.Gelu("gelu", linear("fc3", o, 4, 6));
  b.EndBlock();
  b.LossHead("head", b.Norm("norm", third), 13, 0, ParamId(), 0.5);
  Model model;
  model.config.vocabulary = 13;
  model.graph = b.Finish().value();
  const std::vector<double> expected =
      Gradients(model, TrainingActions(model.graph, Recompute::kNone));
  for (double g : expected) ASSERT_TRUE(std::isfinite(g));
  for (Recompute r : {Recompute::kNormsAndActivations, Recompute::kBlock}) {
    for (bool defer : {false, true}) {
      EXPECT_EQ(Gradients(model, TrainingActions(model.graph, r, defer)), expected) << Name(r);
    }
  }
}

TEST(Builder, ReportsShapesThatDoNotFit) {
  Builder b(DType::kF32);
  const SlotId x = b.Input("x", 8);
  b.Linear("fc", Role::kColumn, x, 9, 4);
  const absl::StatusOr<Graph> graph = b.Finish();
  EXPECT_EQ(graph.status().message(), "layer fc: its input has 8 features per token, not 9");
}

TEST(Builder, RefusesSecondReaderOfSlotChangedInPlace) {
  Builder b(DType::kF32);
  const SlotId x = b.Input("x", 12);
  b.Attention("attn", x, {.heads = 2, .kv_heads = 1, .head_dim = 3});
  b.Linear("fc", Role::kColumn, x, 12, 4);
  EXPECT_THAT(std::string(b.Finish().status().message()),
              ::testing::HasSubstr("slot x is changed in place by one of its 2 readers"));
}

// A prediction finds times that were measured in a graph with other layers, whatever their names.
TEST(Builder, SaysWhoseTimeIncludesALayer) {
  for (const bool apart : {false, true}) {
    Strategies strategies = LocalStrategies();
    if (apart) strategies.gated_linear = nullptr;
    Builder b(DType::kF32, std::move(strategies));
    const SlotId x = b.StageInput("from", 8);
    const auto [act, gate_up] = b.GatedLinear("both", "gate", x, 8, 6);
    b.StageOutput("to", x, b.Linear("fc", Role::kRow, act, 6, 8, {.swiglu_input = gate_up}));
    const absl::StatusOr<Graph> graph = b.Finish();
    ASSERT_TRUE(graph.ok()) << graph.status();
    std::string text;
    for (size_t l = 0; l < graph->layers.size(); ++l) {
      const LayerTiming& timing = graph->layer_timing[l];
      text += graph->layer_names[l];
      if (!timing.includes.empty()) text += " includes " + timing.includes;
      if (!timing.included_in.empty()) text += " in " + timing.included_in;
      text += timing.between_stages ? " between, " : ", ";
    }
    EXPECT_EQ(text, apart ? "from between, both, gate in both, fc, to between, "
                          : "from between, both includes gate, fc, to between, ");
  }
}

// A layer that only declares: Finish looks at declarations alone.
class Declares : public Layer {
 public:
  explicit Declares(std::function<void(Builder&)> declare) : declare_(std::move(declare)) {}
  const char* kind() const override { return "declares"; }
  absl::Status Declare(Builder& b) override {
    declare_(b);
    return absl::OkStatus();
  }
  void Forward(Run&, Frame&) const override {}
  void BackwardInput(Run&, Frame&) const override {}
  void BackwardWeight(Run&, Frame&) const override {}

 private:
  std::function<void(Builder&)> declare_;
};

// Why Finish refuses what `declare` builds; "" when it does not.
std::string Refusal(const std::function<void(Builder&)>& declare) {
  Builder b(DType::kF32);
  declare(b);
  return std::string(b.Finish().status().message());
}

TEST(Builder, RefusesBlocksThatAreNotOneAfterTheOther) {
  const auto linear = [](Builder& b, const char* name) {
    b.Linear(name, Role::kColumn, b.Input(std::string("in_") + name, 4), 4, 4);
  };
  EXPECT_EQ(Refusal([&](Builder& b) {
              b.BeginBlock();
              linear(b, "a");
              b.EndBlock();
            }),
            "");
  EXPECT_THAT(Refusal([&](Builder& b) {
                b.BeginBlock();
                linear(b, "a");
                b.BeginBlock();
                linear(b, "b");
                b.EndBlock();
                b.EndBlock();
              }),
              ::testing::HasSubstr("a block begins inside another one after layer a;"));
  EXPECT_THAT(Refusal([&](Builder& b) { b.EndBlock(); }),
              ::testing::HasSubstr("a block ends that has not begun;"));
  EXPECT_THAT(Refusal([&](Builder& b) {
                b.BeginBlock();
                linear(b, "a");
              }),
              ::testing::HasSubstr("a block has not ended after layer a;"));
}

TEST(Builder, RefusesReadersThatDoNotDifferentiateThroughActivations) {
  const auto gated = [](Builder& b) { return b.GatedLinear("up", "act", b.Input("x", 8), 8, 6); };
  EXPECT_EQ(Refusal([&](Builder& b) {
              const auto [act, gate_up] = gated(b);
              b.Linear("down", Role::kRow, act, 6, 8, {.swiglu_input = gate_up});
            }),
            "");
  EXPECT_THAT(Refusal([&](Builder& b) { b.Linear("down", Role::kRow, gated(b).first, 6, 8); }),
              ::testing::HasSubstr("layer down sends a gradient to slot up.act"));
  EXPECT_THAT(Refusal([&](Builder& b) {
                const auto [act, gate_up] = gated(b);
                b.Linear("down", Role::kRow, act, 6, 8, {.swiglu_input = act});
              }),
              ::testing::HasSubstr("its input is not SwiGLU of the slot named in swiglu_input"));
}

TEST(Builder, RefusesTwoGradientsBehindAnActivation) {
  EXPECT_THAT(Refusal([](Builder& b) {
                const auto [act, gate_up] = b.GatedLinear("up", "act", b.Input("x", 8), 8, 6);
                b.Linear("down", Role::kRow, act, 6, 8, {.swiglu_input = gate_up});
                b.Linear("aside", Role::kRow, act, 6, 8, {.swiglu_input = gate_up});
              }),
              ::testing::HasSubstr("2 layers send a gradient to slot up.y, which slot up.act is"));
  EXPECT_THAT(Refusal([](Builder& b) {
                SlotId act;
                const SlotId pre =
                    b.Linear("up", Role::kColumn, b.Input("x", 8), 8, 6, {.gelu_output = &act});
                b.Linear("down", Role::kRow, act, 6, 8, {.gelu_input = pre});
                b.Linear("aside", Role::kRow, pre, 6, 8);
              }),
              ::testing::HasSubstr("2 layers send a gradient to slot up.y, which slot up.gelu is"));
}

TEST(Builder, RefusesDeclarationsOutsideOfLayers) {
  EXPECT_THAT(Refusal([](Builder& b) { b.Reads(b.Input("x", 4), kInForward); }),
              ::testing::HasSubstr("the reader of a slot belongs to no layer"));
  EXPECT_THAT(Refusal([](Builder& b) { b.Output("y", 4, {}); }),
              ::testing::HasSubstr("slot y belongs to no layer"));
  EXPECT_THAT(Refusal([](Builder& b) { b.Scratch("s", 4, DType::kF32, kInForward); }),
              ::testing::HasSubstr("slot s belongs to no layer"));
  EXPECT_THAT(Refusal([](Builder& b) {
                b.Parameter({.name = "w", .shape = {2, 2}});
              }),
              ::testing::HasSubstr("parameter w belongs to no layer"));
}

TEST(Builder, RefusesValuesThatCannotBeComputedAgain) {
  // A layer that changes its input in place and writes an output that is changed in place in turn.
  const auto chain = [](bool block_between, unsigned value_uses) {
    return [=](Builder& b) {
      SlotId slot = b.Input("x", 4);
      b.BeginBlock();
      for (const char* name : {"first", "second"}) {
        b.Add(name, std::make_unique<Declares>([&](Builder& d) {
                d.Reads(slot, kInForward);
                d.ModifiesInPlace(slot);
                slot = d.Output("y", 4, {.value_uses = value_uses});
              }))
            .IgnoreError();
        if (block_between) b.EndBlock(), b.BeginBlock();
      }
      b.EndBlock();
    };
  };
  EXPECT_EQ(Refusal(chain(true, 0)), "");
  EXPECT_THAT(
      Refusal(chain(false, 0)),
      ::testing::HasSubstr("slot first.y is changed in place in the block of layer first,"));
  EXPECT_THAT(
      Refusal(chain(true, kInBackwardInput)),
      ::testing::HasSubstr("slot first.y is changed in place by layer second, but the layer "
                           "that writes it reads it in backward"));
}

TEST(Builder, RefusesToShareGradientsOfDifferentWidths) {
  const auto shares = [](int64_t width) {
    return [=](Builder& b) {
      const SlotId x = b.Input("x", 4);
      b.Add("add", std::make_unique<Declares>([&](Builder& d) {
              d.Reads(x, kInForward);
              d.ShareGradient(x, d.Output("y", width, {}));
            }))
          .IgnoreError();
    };
  };
  EXPECT_EQ(Refusal(shares(4)), "");
  EXPECT_THAT(Refusal(shares(5)),
              ::testing::HasSubstr("layer add shares the gradient of slot x with slot add.y"));
}

TEST(ModelConfig, ResolveNamesEveryProblem) {
  ModelConfig c;
  c.family = "llama";
  c.hidden = 10;
  c.heads = 3;
  c.kv_heads = 2;
  const std::string message(c.Resolve().message());
  EXPECT_THAT(message, ::testing::HasSubstr("model.hidden (10) is no multiple of model.heads (3)"));
  EXPECT_THAT(message, ::testing::HasSubstr("no multiple of model.kv_heads (2)"));
}

TEST(InitialValues, DoNotDependOnTheCut) {
  const ParameterSpec spec = {.name = "w", .shape = {11, 7}, .init = Init::kNormal, .std = 0.5};
  std::vector<float> whole(77), part(21);
  InitialValues(spec, 9, 0, Tensor::Of(whole.data(), DType::kF32, {11, 7}));
  InitialValues(spec, 9, 4, Tensor::Of(part.data(), DType::kF32, {3, 7}));
  EXPECT_EQ(std::vector<float>(whole.begin() + 28, whole.begin() + 49), part);
}

}  // namespace
}  // namespace stretto
