// Central differences for every layer of a graph, generated from what the layers declared: inputs,
// outputs and parameters. A layer that is in a graph is checked; there is no list to add it to.
#ifndef STRETTO_TESTS_SUPPORT_GRADIENT_CHECK_H_
#define STRETTO_TESTS_SUPPORT_GRADIENT_CHECK_H_

#include <algorithm>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "tests/support/harness.h"

namespace stretto::testing {

struct GradientCheckOptions {
  double step = 1e-5;
  double tolerance = 1e-6;     // of max|gradient of the tensor|
  int64_t most_elements = 24;  // checked of each tensor, spread evenly
};

// Checks layer `index` of an f64 graph alone: random inputs, random output gradients, slots in
// memory of their own. Returns one line a mismatch.
class LayerGradientCheck {
 public:
  LayerGradientCheck(const Graph& graph, int index, const PackedBatch& batch,
                     const GradientCheckOptions& options = {})
      : graph_(graph), index_(index), batch_(batch), options_(options), harness_(graph, 11) {
    for (size_t p = 0; p < graph.parameters.size(); ++p) {
      // Norm weights and biases away from one and zero.
      const Rng rng(12, graph.parameters[p].spec.name);
      for (int64_t i = 0; i < harness_.parameters[p].elements(); ++i) {
        Set(harness_.parameters[p], i, 0.4 * rng.Normal(static_cast<uint64_t>(i)) + 0.3);
      }
    }
  }

  std::vector<std::string> Run() {
    std::vector<std::string> errors;
    const std::string where =
        absl::StrFormat("%s (%s)", graph_.layer_names[index_], graph_.layers[index_]->kind());
    actions_ = TrainingActions(graph_, Recompute::kNone);
    LayOut();
    Frame frame(&graph_, &actions_, &layout_, reinterpret_cast<std::byte*>(memory_.data()));
    frame.tokens = ViewsOf(batch_);
    FillInputs(frame);
    const Layer& layer = *graph_.layers[index_];

    frame.Begin({ActionKind::kForward, index_});
    harness_.run().BeginStep();
    layer.Forward(harness_.run(), frame);
    for (int s : outputs_) FillGradient(frame, s);
    frame.Begin({ActionKind::kBackwardInput, index_});
    constexpr double kPresent = 0.75;  // what an earlier contribution left
    for (int s : inputs_) {
      const Tensor g = frame.Grad({s});
      if (!g.present()) continue;
      const bool add = frame.AccumulateGrad({s});
      for (int64_t i = 0; i < g.elements(); ++i) {
        Set(g, i, add ? kPresent : std::numeric_limits<double>::quiet_NaN());
      }
    }
    layer.BackwardInput(harness_.run(), frame);
    frame.Begin({ActionKind::kBackwardWeight, index_});
    layer.BackwardWeight(harness_.run(), frame);
    if (!harness_.stream().status().ok()) {
      return {where + ": " + std::string(harness_.stream().status().message())};
    }

    // Gradients by the layer, before the frame is used again.
    std::vector<std::vector<double>> input_grads, param_grads;
    for (int s : inputs_) {
      const Tensor g = frame.Grad({s});
      input_grads.emplace_back();
      if (!g.present()) continue;
      frame.Begin({ActionKind::kBackwardInput, index_});
      const double left = frame.AccumulateGrad({s}) ? kPresent : 0;
      for (int64_t i = 0; i < g.elements(); ++i) input_grads.back().push_back(Get(g, i) - left);
    }
    for (size_t p = 0; p < graph_.parameters.size(); ++p) {
      param_grads.emplace_back();
      if (!harness_.run().touched().gradients[p]) {
        const std::vector<int>& users = graph_.parameters[p].layers;
        if (std::find(users.begin(), users.end(), index_) != users.end()) {
          errors.push_back(where + " d " + graph_.parameters[p].spec.name + ": never written");
        }
        continue;
      }
      for (int64_t i = 0; i < harness_.gradients[p].elements(); ++i) {
        param_grads.back().push_back(Get(harness_.gradients[p], i));
      }
    }

    for (size_t k = 0; k < inputs_.size(); ++k) {
      if (input_grads[k].empty()) continue;
      Compare(
          where + " d " + graph_.slots[inputs_[k]].name, input_grads[k],
          [&](int64_t i, double d) { pristine_[k][static_cast<size_t>(i)] += d; }, frame, &errors);
    }
    for (size_t p = 0; p < graph_.parameters.size(); ++p) {
      if (param_grads[p].empty()) continue;
      const Tensor value = harness_.parameters[p];
      Compare(
          where + " d " + graph_.parameters[p].spec.name, param_grads[p],
          [&](int64_t i, double d) { Set(value, i, Get(value, i) + d); }, frame, &errors);
    }
    return errors;
  }

 private:
  // Every slot in its own memory, forward and backward alike.
  void LayOut() {
    const int64_t capacity = batch_.tokens() + 2;
    int64_t bytes = 0;
    const auto place = [&](const SlotInfo& s) {
      const int64_t at = bytes;
      bytes += (capacity * s.width * SizeOf(s.dtype) + s.fixed_bytes + 63) / 64 * 64;
      return at;
    };
    layout_.token_capacity = capacity;
    for (size_t i = 0; i < graph_.slots.size(); ++i) {
      const SlotInfo& s = graph_.slots[i];
      layout_.forward_offset.push_back(place(s));
      layout_.backward_offset.push_back(layout_.forward_offset.back());
      const bool has_gradient =
          s.kind == SlotKind::kInput ||
          (s.kind == SlotKind::kActivation &&
           std::any_of(s.readers.begin(), s.readers.end(), [](auto& r) { return r.writes_grad; }));
      layout_.grad_offset.push_back(has_gradient ? place(s) : -1);
      const bool read = std::any_of(s.readers.begin(), s.readers.end(),
                                    [&](auto& r) { return r.layer == index_; });
      if (read) inputs_.push_back(static_cast<int>(i));
      if (s.producer == index_ && s.kind == SlotKind::kActivation) {
        outputs_.push_back(static_cast<int>(i));
      }
    }
    memory_.assign(static_cast<size_t>(bytes) / 8 + 8, std::numeric_limits<double>::quiet_NaN());
  }

  void FillInputs(Frame& frame) {
    for (size_t k = 0; k < inputs_.size(); ++k) {
      const Tensor t = frame.Value({inputs_[k]});
      if (pristine_.size() <= k) {
        const Rng rng(13, graph_.slots[inputs_[k]].name);
        pristine_.emplace_back();
        for (int64_t i = 0; i < t.elements(); ++i) {
          pristine_[k].push_back(rng.Normal(static_cast<uint64_t>(i)));
        }
      }
      for (int64_t i = 0; i < t.elements(); ++i) Set(t, i, pristine_[k][static_cast<size_t>(i)]);
    }
    // A value that is a function of another input follows it.
    for (int s : inputs_) {
      const bool gelu = graph_.slots[s].gelu_of >= 0;
      const int pre = gelu ? graph_.slots[s].gelu_of : graph_.slots[s].swiglu_of;
      if (pre < 0 || std::find(inputs_.begin(), inputs_.end(), pre) == inputs_.end()) continue;
      const Tensor x = frame.Value({pre}), y = frame.Value({s});
      for (int64_t i = 0; !gelu && i < y.elements(); ++i) {
        const int64_t f = y.dims[1], gate = i / f * 2 * f + i % f;
        Set(y, i, Get(x, gate) / (1 + std::exp(-Get(x, gate))) * Get(x, gate + f));
      }
      for (int64_t i = 0; gelu && i < x.elements(); ++i) {
        const double v = Get(x, i);
        const double u = std::sqrt(2 / std::numbers::pi) * (v + 0.044715 * v * v * v);
        Set(y, i, 0.5 * v * (1 + std::tanh(u)));
      }
    }
  }

  void FillGradient(Frame& frame, int slot) {
    const Tensor g = frame.Grad({slot});
    if (!g.present()) return;
    const Rng rng(14, graph_.slots[slot].name);
    for (int64_t i = 0; i < g.elements(); ++i) Set(g, i, rng.Normal(static_cast<uint64_t>(i)));
  }

  // The scalar whose gradient the backward halves give: loss (if any) + <output, output gradient>.
  double Objective(Frame& frame) {
    FillInputs(frame);
    frame.Begin({ActionKind::kForward, index_});
    harness_.run().BeginStep();
    harness_.loss_total[0] = 0;
    graph_.layers[index_]->Forward(harness_.run(), frame);
    double sum = harness_.run().touched().loss ? harness_.loss_total[0] : 0;
    for (int s : outputs_) {
      if (!frame.Grad({s}).present()) continue;
      const Rng rng(14, graph_.slots[s].name);
      const Tensor y = frame.Value({s});
      for (int64_t i = 0; i < y.elements(); ++i) {
        sum += Get(y, i) * rng.Normal(static_cast<uint64_t>(i));
      }
    }
    return sum;
  }

  void Compare(const std::string& what, const std::vector<double>& gradient,
               const std::function<void(int64_t, double)>& nudge, Frame& frame,
               std::vector<std::string>* errors) {
    double largest = 1e-3;
    for (double g : gradient) largest = std::max(largest, std::abs(g));
    const int64_t n = static_cast<int64_t>(gradient.size());
    const int64_t count = std::min(n, options_.most_elements);
    for (int64_t c = 0; c < count; ++c) {
      const int64_t i = c * n / count;
      nudge(i, options_.step);
      const double up = Objective(frame);
      nudge(i, -2 * options_.step);
      const double down = Objective(frame);
      nudge(i, options_.step);
      const double expected = (up - down) / (2 * options_.step);
      const double error = std::abs(expected - gradient[static_cast<size_t>(i)]);
      if (!(error <= options_.tolerance * largest)) {
        errors->push_back(absl::StrFormat("%s [%d]: %.9g, central difference %.9g", what, i,
                                          gradient[static_cast<size_t>(i)], expected));
        return;
      }
    }
  }

  const Graph& graph_;
  int index_;
  const PackedBatch& batch_;
  GradientCheckOptions options_;
  Harness harness_;
  ActionList actions_;
  FrameLayout layout_;
  std::vector<double> memory_;
  std::vector<int> inputs_, outputs_;
  std::vector<std::vector<double>> pristine_;
};

// All layers of a graph. `kinds` receives what was checked.
inline std::vector<std::string> CheckAllLayers(const Graph& graph, const PackedBatch& batch,
                                               std::set<std::string>* kinds = nullptr) {
  std::vector<std::string> errors;
  for (size_t l = 0; l < graph.layers.size(); ++l) {
    for (std::string& e : LayerGradientCheck(graph, static_cast<int>(l), batch).Run()) {
      errors.push_back(std::move(e));
    }
    if (kinds != nullptr) kinds->insert(graph.layers[l]->kind());
  }
  return errors;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_GRADIENT_CHECK_H_
