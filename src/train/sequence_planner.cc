#include "stretto/train/sequence_planner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/core/dtype.h"
#include "stretto/plan/cost.h"
#include "stretto/train/flops.h"
#include "stretto/train/prediction.h"

namespace stretto {
namespace {

// A core of a server with AVX2, and shared memory between processes: for proportions, not for
// times.
constexpr double kCoreFlops = 30e9, kCoreAttention = 0.5;
constexpr double kCopies = 2e9, kMessage = 50e-6;

CostModel AssumedCore(const TrainConfig& config) {
  // FLOPs of forward, backward and weights, a third each, of a whole model; they count pairs of
  // (squares + tokens) / 2.
  const auto third = [&](const TokenWork& work) {
    return TrainingFlops(config.model, work).causal / 3;
  };
  const double per_pair = 2 * third({.tokens = 0, .squared_lengths = 1});
  const double per_token = third({.tokens = 1, .squared_lengths = 1}) - per_pair;
  CostModel cost = {.device = "a core (assumed)"};
  const StageCost forward = {.per_token = per_token / kCoreFlops,
                             .per_pair = per_pair / (kCoreFlops * kCoreAttention)};
  cost.forward = {forward};
  cost.backward_input = {{.per_token = forward.per_token, .per_pair = 2 * forward.per_pair}};
  cost.backward_weight = {{.per_token = forward.per_token}};
  cost.link_latency = kMessage;
  cost.link_bytes_per_second = kCopies;
  return cost;
}

// What is outside of the blocks, embedding and head with the loss, shared out among them.
void AddRest(const CostModel& cost, int64_t layers, SequenceCost* sequence) {
  if (!cost.parts) return;  // entries are of the whole model
  const auto add = [&](const StageCost& all, const StageCost& block, StageCost* sum) {
    const auto share = [&](double a, double b) {
      return std::max(0.0, a - b) / static_cast<double>(layers);
    };
    sum->fixed += share(all.fixed, block.fixed);
    sum->per_token += share(all.per_token, block.per_token);
    sum->per_pair += share(all.per_pair, block.per_pair);
  };
  const auto sum_of = [&](StageCost LayerCost::*half) {
    StageCost sum;
    for (const LayerCost& layer : cost.parts->layers) {
      sum.fixed += (layer.*half).fixed;
      sum.per_token += (layer.*half).per_token;
      sum.per_pair += (layer.*half).per_pair;
    }
    return sum;
  };
  add(sum_of(&LayerCost::forward), cost.forward[0], &sequence->forward);
  add(sum_of(&LayerCost::backward_input), cost.backward_input[0], &sequence->backward);
  add(sum_of(&LayerCost::backward_weight), cost.backward_weight[0], &sequence->backward);
}

absl::StatusOr<CostModel> CostOf(const TrainConfig& config) {
  const std::string& path = config.parallel.cost_model;
  if (path.empty()) {
    if (config.runtime.device == "cuda") return AssumedH100(config);
    return AssumedCore(config);
  }
  STRETTO_ASSIGN_OR_RETURN(CostModel cost, ReadCostModel(path));
  STRETTO_RETURN_IF_ERROR(CheckCosts(cost, absl::StrCat("'", path, "'"), config, /*device=*/""));
  return cost;
}

}  // namespace

absl::Status CheckCosts(const CostModel& costs, const std::string& source,
                        const TrainConfig& config, const std::string& device) {
  const auto refuse = [&](const auto&... parts) {
    return absl::FailedPreconditionError(
        absl::StrCat("the costs in ", source, " (parallel.cost_model) ", parts...));
  };
  const std::string key = ModelKey(config);
  const char* const fit =
      "run stretto-bench fit with its configuration, or leave "
      "parallel.cost_model empty";
  if (!costs.parts) {
    return refuse("are those of stages, without the layers and links that planning needs; ", fit);
  }
  if (costs.parts->model != key) {
    return refuse("are of ", costs.parts->model, " (", costs.device, "), but this run trains ", key,
                  device.empty() ? "" : absl::StrCat(" (", device, ")"), "; ", fit);
  }
  if (!costs.parts->assumed && costs.parts->ranks < 2 && config.parallel.data_ranks() > 1) {
    return refuse("were fitted on one rank, so that messages cost nothing in them, but ",
                  config.parallel.data_ranks(), " ranks share documents; fit under mpirun");
  }
  if (!device.empty() && costs.device != device && !config.parallel.cost_model_any_device) {
    return refuse("were measured on '", costs.device, "', but this run is on '", device,
                  "'; fit them there, or set parallel.cost_model_any_device=true");
  }
  return absl::OkStatus();
}

absl::StatusOr<SequencePlanOptions> SequenceOptionsOf(const TrainConfig& config,
                                                      int places_per_machine,
                                                      const CostModel* costs) {
  SequencePlanOptions options;
  options.pipelines = static_cast<int>(config.parallel.data_ranks());
  options.stages = static_cast<int>(config.parallel.pp);
  options.capacity = config.batch.capacity;
  options.context = static_cast<int>(config.parallel.cp);
  options.pipelines_per_machine = std::clamp(places_per_machine, 1, options.pipelines);
  options.method = config.parallel.mesh == "static"       ? SequenceMethod::kStatic
                   : config.parallel.mesh == "unbalanced" ? SequenceMethod::kUnbalanced
                   : config.parallel.pp > 1               ? SequenceMethod::kBalancedPipelines
                                                          : SequenceMethod::kBalanced;
  const DType dtype = ParseDType(config.runtime.dtype).value_or(DType::kF32);
  const int64_t tp = config.parallel.tp;
  const int64_t key_heads = (config.model.kv_heads + tp - 1) / tp;
  const auto key_and_value = static_cast<double>(2 * key_heads * config.model.head_dim);
  CostModel cost;
  if (costs != nullptr) {
    cost = *costs;
  } else {
    STRETTO_ASSIGN_OR_RETURN(cost, CostOf(config));
  }
  options.cost =
      SequenceCostOf(cost, config.model.layers, key_and_value * static_cast<double>(SizeOf(dtype)));
  // Blocks are computed again in backward, with their rings.
  const bool again = config.runtime.recompute == "block";
  if (again) {
    options.cost.backward.fixed += options.cost.forward.fixed;
    options.cost.backward.per_token += options.cost.forward.per_token;
    options.cost.backward.per_pair += options.cost.forward.per_pair;
    options.cost.backward_sums += options.cost.forward_sums;
  }
  AddRest(cost, config.model.layers, &options.cost);
  // Ranks of a tensor axis share a layer's work.
  for (StageCost* half : {&options.cost.forward, &options.cost.backward}) {
    half->per_token /= static_cast<double>(tp);
    half->per_pair /= static_cast<double>(tp);
  }
  for (double* sums : {&options.cost.forward_sums, &options.cost.backward_sums}) {
    *sums /= static_cast<double>(tp);
  }
  // Behind keys and values travel the sums of their gradients.
  options.cost.backward_messages =
      (again ? 2 : 1) +
      static_cast<double>(SizeOf(AccumulateType(dtype))) / static_cast<double>(SizeOf(dtype));
  return options;
}

absl::StatusOr<DocumentPlanner> DocumentPlannerOf(const TrainConfig& config, int places_per_machine,
                                                  const CostModel* costs) {
  STRETTO_ASSIGN_OR_RETURN(const SequencePlanOptions options,
                           SequenceOptionsOf(config, places_per_machine, costs));
  STRETTO_ASSIGN_OR_RETURN(ScheduleKind kind, ParseScheduleKind(config.parallel.schedule));
  if (config.parallel.pp == 1) kind = ScheduleKind::kOneF1B;
  const int pp = static_cast<int>(config.parallel.pp);
  const int chunks = static_cast<int>(config.parallel.chunks);
  return [=](const std::vector<int64_t>& lengths) -> absl::StatusOr<Program> {
    STRETTO_ASSIGN_OR_RETURN(SequencePlan plan, PlanSequences(lengths, options));
    return MakeProgram(kind, options.pipelines, pp, chunks, std::move(plan.items));
  };
}

}  // namespace stretto
