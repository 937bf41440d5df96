#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/gradient_check.h"

namespace stretto {
namespace {

using testing::CheckAllLayers;
using testing::Harness;
using ::testing::IsEmpty;
using ::testing::Not;
using testing::OddModel;
using testing::RandomBatch;

Model Build(const std::string& family, bool tied, int64_t loss_chunk = 0) {
  ModelConfig config = OddModel(family, tied);
  EXPECT_TRUE(config.Resolve().ok());
  return BuildModel(config, {.dtype = DType::kF64, .loss_chunk = loss_chunk}).value();
}

struct Case {
  std::string family;
  bool tied;
  int64_t loss_chunk;
};

class LayerGradients : public ::testing::TestWithParam<Case> {};

TEST_P(LayerGradients, EqualCentralDifferences) {
  const Model model = Build(GetParam().family, GetParam().tied, GetParam().loss_chunk);
  const PackedBatch batch = RandomBatch({7, 1, 5}, model.config.vocabulary, 3);
  EXPECT_THAT(CheckAllLayers(model.graph, batch), IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(Families, LayerGradients,
                         ::testing::Values(Case{"gpt2", true, 0}, Case{"gpt2", false, 20},
                                           Case{"llama", false, 0}, Case{"qwen2", true, 17},
                                           Case{"qwen3", false, 0}),
                         [](const auto& info) {
                           return info.param.family + (info.param.tied ? "_tied" : "_untied") +
                                  (info.param.loss_chunk > 0 ? "_chunked" : "");
                         });

// A layer whose weight gradient is wrong by a factor: the check has to see it.
class WrongLayer : public Layer {
 public:
  explicit WrongLayer(SlotId x) : x_(x) {}
  const char* kind() const override { return "wrong"; }
  absl::Status Declare(Builder& b) override {
    b.Reads(x_, kInForward | kInBackwardInput | kInBackwardWeight);
    y = b.Output("y", b.Width(x_), {.grad_uses = kInBackwardInput});
    return absl::OkStatus();
  }
  void Forward(Run& run, Frame& frame) const override {
    ops::Gelu(run.ops(), frame.Value(y), frame.Value(x_));
  }
  void BackwardInput(Run& run, Frame& frame) const override {
    ops::Copy(run.ops(), frame.Grad(x_), frame.Grad(y));  // forgets gelu's derivative
  }
  void BackwardWeight(Run&, Frame&) const override {}
  SlotId y;

 protected:
  SlotId x_;
};

TEST(LayerGradientsControl, WrongBackwardIsReported) {
  Builder b(DType::kF64);
  const SlotId x = b.Input("x", 6);
  auto wrong = std::make_unique<WrongLayer>(x);
  const WrongLayer* raw = wrong.get();
  ASSERT_TRUE(b.Add("wrong", std::move(wrong)).ok());
  b.Linear("out", Role::kReplicated, raw->y, 6, 3);
  const Graph graph = b.Finish().value();
  const PackedBatch batch = RandomBatch({4}, 5, 1);
  EXPECT_THAT(testing::LayerGradientCheck(graph, 0, batch).Run(), Not(IsEmpty()));
}

// A layer that declares a parameter and never writes its gradient.
class ForgetfulLayer : public WrongLayer {
 public:
  using WrongLayer::WrongLayer;
  absl::Status Declare(Builder& b) override {
    b.Parameter({.name = "weight", .shape = {b.Width(x_)}});
    return WrongLayer::Declare(b);
  }
  void BackwardInput(Run& run, Frame& frame) const override {
    ops::GeluBackward(run.ops(), frame.Grad(x_), frame.Grad(y), frame.Value(x_), false);
  }
};

TEST(LayerGradientsControl, MissingWeightGradientIsReported) {
  Builder b(DType::kF64);
  const SlotId x = b.Input("x", 6);
  auto forgetful = std::make_unique<ForgetfulLayer>(x);
  const ForgetfulLayer* raw = forgetful.get();
  ASSERT_TRUE(b.Add("forgetful", std::move(forgetful)).ok());
  b.Linear("out", Role::kReplicated, raw->y, 6, 3);
  const Graph graph = b.Finish().value();
  EXPECT_THAT(testing::LayerGradientCheck(graph, 0, RandomBatch({4}, 5, 1)).Run(),
              ::testing::ElementsAre(::testing::HasSubstr("forgetful.weight")));
}

// The loss of a whole model against differences in a few elements of every parameter.
TEST_P(LayerGradients, WholeModelEqualsCentralDifferences) {
  const Model model = Build(GetParam().family, GetParam().tied, GetParam().loss_chunk);
  const PackedBatch batch = RandomBatch({6, 9}, model.config.vocabulary, 5);
  Harness h(model.graph, 21);
  const ActionList train = TrainingActions(model.graph, Recompute::kNone);
  const ActionList evaluate = EvaluationActions(model.graph);
  h.run().BeginStep();
  ASSERT_TRUE(h.RunBatch(train, batch).ok());
  const auto loss = [&] {
    h.run().BeginStep();
    EXPECT_TRUE(h.RunBatch(evaluate, batch).ok());
    return h.loss_total[0];
  };
  constexpr double kStep = 1e-5;
  for (size_t p = 0; p < h.parameters.size(); ++p) {
    double largest = 1e-3;
    for (int64_t i = 0; i < h.gradients[p].elements(); ++i) {
      largest = std::max(largest, std::abs(testing::Get(h.gradients[p], i)));
    }
    for (int64_t k = 0; k < 3; ++k) {
      const int64_t i = (2 * k + 1) * h.parameters[p].elements() / 6;
      const double value = testing::Get(h.parameters[p], i);
      testing::Set(h.parameters[p], i, value + kStep);
      const double up = loss();
      testing::Set(h.parameters[p], i, value - kStep);
      const double down = loss();
      testing::Set(h.parameters[p], i, value);
      EXPECT_NEAR((up - down) / (2 * kStep), testing::Get(h.gradients[p], i), 1e-6 * largest)
          << model.graph.parameters[p].spec.name << " [" << i << "]";
    }
  }
}

}  // namespace
}  // namespace stretto
