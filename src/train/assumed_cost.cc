// Cost models that nobody measured, and what is derived from measured ones.
#include <algorithm>
#include <cstddef>
#include <string>

#include "stretto/model/layer.h"
#include "stretto/train/prediction.h"

namespace stretto {

void AddBlockCosts(const Graph& graph, CostModel* cost) {
  cost->forward = cost->backward_input = cost->backward_weight = {StageCost()};
  const auto add = [](StageCost& sum, const StageCost& half) {
    sum.fixed += half.fixed;
    sum.per_token += half.per_token;
    sum.per_pair += half.per_pair;
  };
  for (size_t l = 0; l < graph.layers.size(); ++l) {
    const LayerCost* layer = cost->parts->Find(LayerKind(graph.layer_names[l]));
    if (graph.layer_block[l] != 0 || layer == nullptr) continue;
    add(cost->forward[0], layer->forward);
    add(cost->backward_input[0], layer->backward_input);
    add(cost->backward_weight[0], layer->backward_weight);
  }
}

void SetBoundary(const TrainConfig& config, CostModel* cost) {
  const DType dtype = ParseDType(config.runtime.dtype).value_or(DType::kF32);
  cost->boundary_bytes_per_token = static_cast<double>(config.model.hidden * SizeOf(dtype));
  cost->link_latency = cost->parts->machine.point_to_point.latency;
  cost->link_bytes_per_second = cost->parts->machine.point_to_point.bytes_per_second;
}

namespace {

// NVIDIA H100 SXM5 data sheet (2023): dense bf16, HBM3, NVLink 4 in one direction; ConnectX-7 at
// 400 Gbit/s. The shares of them that kernels and collectives reach are assumptions.
constexpr struct H100 {
  double bf16_flops = 989e12, f32_flops = 67e12;
  double products = 0.65, attention = 0.4;  // share of the FLOPs
  double bytes_per_second = 3.35e12, copies = 0.8;
  double launch = 3e-6;  // of a layer's half
  double nvlink = 450e9, network = 50e9, moved = 0.8;
  double machine_latency = 3e-6, network_latency = 8e-6;
  double hidden = 0.9;
  double step = 1e-3;
} kH100{};

StageCost AssumedHalf(double flops, double pair_flops, double bytes, double peak) {
  return {.fixed = kH100.launch,
          .per_token =
              flops / (peak * kH100.products) + bytes / (kH100.bytes_per_second * kH100.copies),
          .per_pair = pair_flops / (peak * kH100.attention)};
}

OperationCost Assumed(double latency, double bytes_per_second) {
  return {.latency = latency, .bytes_per_second = bytes_per_second * kH100.moved};
}

}  // namespace

absl::StatusOr<CostModel> AssumedH100(const TrainConfig& config) {
  TrainConfig one = config;
  one.parallel.dp = one.parallel.pp = one.parallel.tp = one.parallel.chunks = 1;
  one.parallel.cp = 1;
  one.batch.global = one.batch.micro = 1;
  one.model.layers = std::min<int64_t>(2, one.model.layers);
  STRETTO_ASSIGN_OR_RETURN(const RunPlan plan, PlanRun(one, 1, 0));
  const Graph& graph = plan.stages.front().model.graph;
  const double peak = graph.dtype == DType::kBF16 ? kH100.bf16_flops : kH100.f32_flops;
  CostModel cost = {.device = "NVIDIA H100 (assumed)"};
  DeviceCost& parts = cost.parts.emplace();
  parts.assumed = true;
  parts.model = ModelKey(config);
  parts.measured = "nothing: FLOPs and bytes of the layers over figures of the data sheet";
  for (size_t l = 0; l < graph.layers.size(); ++l) {
    const std::string kind = LayerKind(graph.layer_names[l]);
    if (parts.Find(kind) != nullptr) continue;
    double matrix = 0, bytes = 0;
    for (const ParameterInfo& p : graph.parameters) {
      const bool uses =
          std::find(p.layers.begin(), p.layers.end(), static_cast<int>(l)) != p.layers.end();
      // An embedding looks up rows of its matrices.
      if (uses && p.spec.shape.size() > 1 && l > 0) matrix += static_cast<double>(p.elements());
    }
    for (const SlotInfo& slot : graph.slots) {
      bool touches = slot.producer == static_cast<int>(l);
      for (const SlotInfo::Reader& r : slot.readers) touches |= r.layer == static_cast<int>(l);
      if (touches) bytes += static_cast<double>(slot.width * SizeOf(slot.dtype));
    }
    const ModelConfig& m = config.model;
    // Scores and weighted sum, each a multiply-add for every pair and feature of a head.
    const double pair =
        kind == "attn" ? 4.0 * static_cast<double>(m.heads) * static_cast<double>(m.head_dim) : 0;
    const bool weights = (graph.layers[l]->WritesGradients() & kInBackwardWeight) != 0;
    LayerCost layer = {.name = kind};
    layer.forward = AssumedHalf(2 * matrix, pair, bytes, peak);
    layer.backward_input = AssumedHalf(2 * matrix, 2.5 * pair, bytes, peak);
    if (weights) layer.backward_weight = AssumedHalf(2 * matrix, 0, bytes, peak);
    parts.layers.push_back(layer);
  }
  AddBlockCosts(graph, &cost);
  parts.hidden = kH100.hidden;
  // Gradient, two moments and a master weight read, moments, master and parameter written.
  constexpr double kUpdateBytes = 4 + 3 * 8 + 2;
  parts.update_per_element = kUpdateBytes / (kH100.bytes_per_second * kH100.copies);
  parts.step_fixed = kH100.step;
  const auto link = [](double latency, double bytes_per_second) {
    const OperationCost operation = Assumed(latency, bytes_per_second);
    return LinkCost{operation, operation, operation, operation};
  };
  parts.machine = link(kH100.machine_latency, kH100.nvlink);
  parts.network = link(kH100.network_latency, kH100.network);
  SetBoundary(config, &cost);
  return cost;
}

}  // namespace stretto
