// The convenience calls of Builder: one line a standard layer.
#include "src/model/layers.h"
#include "stretto/model/layer.h"

namespace stretto {

using internal::ActivationLayer;

Strategies LocalStrategies() {
  Strategies s;
  s.linear = [](SlotId x, Role, int64_t in, int64_t out, const LinearOptions& options, SlotId* y) {
    return std::make_unique<internal::LinearLayer>(x, in, out, options, y);
  };
  s.gated_linear = [](SlotId x, int64_t in, int64_t features, const LinearOptions& options,
                      SlotId* act, SlotId* gate_up) {
    return std::make_unique<internal::GatedLinearLayer>(x, in, features, options, act, gate_up);
  };
  s.attention = [](SlotId qkv, const AttentionOptions& options, SlotId* o) {
    return std::make_unique<internal::LocalAttentionLayer>(qkv, options, o);
  };
  s.embedding = [](int64_t vocabulary, int64_t width, int64_t positions, double init_std, SlotId* y,
                   ParamId* table) {
    return std::make_unique<internal::EmbeddingLayer>(vocabulary, width, positions, init_std, y,
                                                      table);
  };
  s.loss_head = [](SlotId x, int64_t vocabulary, int64_t chunk, ParamId tied, double init_std,
                   const std::string& tied_to, ParamId* weight) {
    return std::make_unique<internal::LossHeadLayer>(x, vocabulary, chunk, tied, init_std, tied_to,
                                                     weight);
  };
  return s;
}

// Each standard layer writes its output slot through a pointer while Add runs Declare.
SlotId Builder::Embedding(const std::string& name, int64_t vocabulary, int64_t width,
                          int64_t positions, double init_std, ParamId* table) {
  SlotId y;
  Add(name, strategies_.embedding(vocabulary, width, positions, init_std, &y, table))
      .IgnoreError();  // kept in status_, as below
  return y;
}

SlotId Builder::Linear(const std::string& name, Role role, SlotId x, int64_t in, int64_t out,
                       const LinearOptions& options) {
  SlotId y;
  Add(name, strategies_.linear(x, role, in, out, options, &y)).IgnoreError();
  return y;
}

std::pair<SlotId, SlotId> Builder::GatedLinear(const std::string& name, const std::string& act,
                                               SlotId x, int64_t in, int64_t features,
                                               double init_std) {
  const LinearOptions options = {.init_std = init_std, .features = {.parts = {features, features}}};
  if (!strategies_.gated_linear) {
    const SlotId y = Swiglu(act, Linear(name, Role::kColumn, x, in, 2 * features, options));
    if (status_.ok()) graph_.layer_timing.back().included_in = name;
    return {y, SlotId()};
  }
  std::pair<SlotId, SlotId> out;
  Add(name, strategies_.gated_linear(x, in, features, options, &out.first, &out.second))
      .IgnoreError();
  if (status_.ok()) graph_.layer_timing.back().includes = act;
  return out;
}

SlotId Builder::Norm(const std::string& name, SlotId x, const NormOptions& options) {
  SlotId n;
  Add(name, std::make_unique<internal::NormLayer>(x, options, &n)).IgnoreError();
  return n;
}

std::pair<SlotId, SlotId> Builder::AddNorm(const std::string& name, SlotId x, SlotId branch,
                                           const NormOptions& options) {
  std::pair<SlotId, SlotId> out;
  Add(name, std::make_unique<internal::AddNormLayer>(x, branch, options, &out)).IgnoreError();
  return out;
}

SlotId Builder::Gelu(const std::string& name, SlotId x) {
  SlotId y;
  Add(name, std::make_unique<ActivationLayer>(ActivationLayer::Kind::kGelu, x, &y)).IgnoreError();
  return y;
}

SlotId Builder::Swiglu(const std::string& name, SlotId gate_up) {
  SlotId y;
  Add(name, std::make_unique<ActivationLayer>(ActivationLayer::Kind::kSwiglu, gate_up, &y))
      .IgnoreError();
  return y;
}

SlotId Builder::Attention(const std::string& name, SlotId qkv, const AttentionOptions& options) {
  SlotId o;
  Add(name, strategies_.attention(qkv, options, &o)).IgnoreError();
  return o;
}

SlotId Builder::StageInput(const std::string& name, int64_t width) {
  SlotId y;
  Add(name, std::make_unique<internal::StageInputLayer>(width, &y)).IgnoreError();
  if (status_.ok()) graph_.layer_timing.back().between_stages = true;
  return y;
}

void Builder::StageOutput(const std::string& name, SlotId x, SlotId branch) {
  Add(name, std::make_unique<internal::StageOutputLayer>(x, branch)).IgnoreError();
  if (status_.ok()) graph_.layer_timing.back().between_stages = true;
}

ParamId Builder::LossHead(const std::string& name, SlotId x, int64_t vocabulary, int64_t chunk,
                          ParamId tied, double init_std, const std::string& tied_to) {
  ParamId weight;
  Add(name, strategies_.loss_head(x, vocabulary, chunk, tied, init_std, tied_to, &weight))
      .IgnoreError();
  return weight;
}

}  // namespace stretto
