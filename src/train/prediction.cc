#include "stretto/train/prediction.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "src/train/rank_clock.h"
#include "stretto/core/cut.h"
#include "stretto/model/layer.h"
#include "stretto/ops/kernels.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/stages.h"
#include "stretto/parallel/tensor_parallel.h"
#include "stretto/sim/timeline.h"

namespace stretto {
namespace {

using train_internal::Links;
using train_internal::RankClock;
using train_internal::StageSeconds;

constexpr size_t Index(int i) { return static_cast<size_t>(i); }

class Clocks final : public ActionTimes {
 public:
  Clocks(std::vector<RankClock>& ranks, double boundary) : ranks_(ranks), boundary_(boundary) {}
  double Seconds(int rank, const ProgramAction& action, double start) override {
    return ranks_[Index(rank)].Run(action, start);
  }
  double BoundarySeconds(const PlanItem& /*item*/) const override { return boundary_; }

 private:
  std::vector<RankClock>& ranks_;
  double boundary_;
};

// Costs of each layer of the graph, in the parts that were measured (LayerTiming).
absl::StatusOr<std::vector<std::vector<const LayerCost*>>> CostsOfLayers(const Graph& graph,
                                                                         const DeviceCost& cost) {
  const auto find = [&](const std::string& name) -> const LayerCost* {
    return name.empty() ? nullptr : cost.Find(LayerKind(name));
  };
  std::vector<std::vector<const LayerCost*>> costs;
  for (size_t l = 0; l < graph.layer_names.size(); ++l) {
    const LayerTiming& timing = graph.layer_timing[l];
    const LayerCost *const own = find(graph.layer_names[l]), *const part = find(timing.includes);
    if (own == nullptr && !timing.between_stages && find(timing.included_in) == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("the cost model has no layer '", LayerKind(graph.layer_names[l]),
                       "'; fit it to this model (stretto-bench fit)"));
    }
    std::vector<const LayerCost*>& parts = costs.emplace_back();
    if (own != nullptr) parts.push_back(own);
    if (part != nullptr) parts.push_back(part);
  }
  return costs;
}

absl::Status LayerSeconds(const Graph& graph, const ActionList& actions, const DeviceCost& cost,
                          const LinkCost& tensor, int64_t tokens, int64_t length,
                          StageSeconds::Sizes* sizes) {
  const double share = graph.tokens.ranks;
  const double pairs = 0.5 * static_cast<double>(tokens) * static_cast<double>(length + 1);
  STRETTO_ASSIGN_OR_RETURN(const auto of_layer, CostsOfLayers(graph, cost));
  sizes->exchange.assign(actions.actions.size(), 0);
  for (const PlannedExchange& e : ExchangesOf(graph, actions, tokens)) {
    const OperationCost& operation = e.info->sum ? tensor.reduce_scatter : tensor.all_gather;
    const int64_t bytes = e.rows * e.info->width * SizeOf(e.info->dtype) * (graph.tokens.ranks - 1);
    sizes->exchange[e.action] += operation.Seconds(graph.tokens.ranks, bytes);
  }
  // A product that is kept does not run again, only the activation behind it: next to nothing of
  // what the layer's forward takes.
  std::vector<uint8_t> keeps_product(graph.layers.size(), 0);
  for (size_t i = 0; i < graph.slots.size(); ++i) {
    const SlotInfo& slot = graph.slots[i];
    if (!slot.recompute_source || actions.dropped[i]) continue;
    keeps_product[Index(slot.producer)] =
        absl::c_any_of(graph.parameters, [&](const ParameterInfo& p) {
          return p.spec.shape.size() > 1 && absl::c_linear_search(p.layers, slot.producer);
        });
  }
  for (const Action& action : actions.actions) {
    const auto l = Index(action.layer);
    const bool exchange = action.kind == ActionKind::kStartInput ||
                          action.kind == ActionKind::kFinishInput ||
                          action.kind == ActionKind::kStartWeight;
    const bool again = action.kind == ActionKind::kRecompute && keeps_product[l] != 0;
    double seconds = 0;
    for (const LayerCost* layer : of_layer[l]) {
      if (exchange || again) break;
      const StageCost& half = action.kind == ActionKind::kBackwardInput    ? layer->backward_input
                              : action.kind == ActionKind::kBackwardWeight ? layer->backward_weight
                                                                           : layer->forward;
      seconds += half.Seconds(static_cast<double>(tokens) / share, pairs / share);
    }
    sizes->layer.push_back(seconds);
  }
  return absl::OkStatus();
}

absl::StatusOr<StageSeconds::List> ListSeconds(const TrainConfig& config, const Graph& graph,
                                               const ActionList& actions, const DeviceCost& cost,
                                               const Links& links, int64_t samples) {
  const int64_t length = config.data.sequence_length, micro = config.batch.micro;
  const int64_t rest = samples % micro > 0 ? samples % micro : micro;
  StageSeconds::List list = {.actions = &actions, .parts = PartsOf(actions)};
  for (const auto& [sizes, count] : {std::pair(&list.full, micro), std::pair(&list.rest, rest)}) {
    STRETTO_RETURN_IF_ERROR(
        LayerSeconds(graph, actions, cost, *links.tensor, count * length, length, sizes));
  }
  list.finishes_apart.assign(graph.layers.size(), 0);
  for (const Action& action : actions.actions) {
    if (action.kind == ActionKind::kFinishInput) list.finishes_apart[Index(action.layer)] = 1;
  }
  return list;
}

absl::StatusOr<StageSeconds> SecondsOf(const TrainConfig& config, const StagePlan& stage,
                                       const DeviceCost& cost, const Links& links,
                                       int64_t samples) {
  StageSeconds s;
  const Graph& graph = stage.model.graph;
  s.plan = &stage;
  STRETTO_ASSIGN_OR_RETURN(s.list,
                           ListSeconds(config, graph, stage.train_actions, cost, links, samples));
  if (stage.whole) {
    STRETTO_ASSIGN_OR_RETURN(
        s.whole, ListSeconds(config, graph, stage.whole->actions, cost, links, samples));
  }
  s.layer_buckets.resize(graph.layers.size());
  for (size_t b = 0; b < stage.buckets.buckets.size(); ++b) {
    const std::vector<int>& params = stage.buckets.buckets[b];
    s.ready_layer.push_back(ReadyLayer(graph, params));
    s.reduce.push_back(links.data->reduce_scatter.Seconds(
        links.dp, CollectiveBytes(graph, params, links.dp, AccumulateType(graph.dtype))));
    s.gather.push_back(links.data->all_gather.Seconds(
        links.dp, CollectiveBytes(graph, params, links.dp, graph.dtype)));
    for (const int p : params) {
      for (const int layer : graph.parameters[Index(p)].layers) {
        s.layer_buckets[Index(layer)].push_back(static_cast<int>(b));
      }
    }
  }
  const int64_t partial = PartialGradients::CostsOf(graph, links.dp, 0).sent;
  // A scattered sum and a gather, of as many bytes each.
  if (partial > 0) {
    s.partial = links.tensor->reduce_scatter.Seconds(links.tp, partial / 2) +
                links.tensor->all_gather.Seconds(links.tp, partial / 2);
  }
  int64_t elements = 0;
  for (size_t p = 0; p < graph.parameters.size(); ++p) {
    if (static_cast<int>(p) == stage.copy.value) continue;
    const ParameterInfo& info = graph.parameters[p];
    elements += CutRows(info.rows(), links.dp, 0).part * info.columns();
  }
  s.update = cost.update_per_element * static_cast<double>(elements);
  return s;
}

// Everything of a step but what is between stages, when that takes `boundary` seconds.
struct StepRun {
  double seconds = 0;  // until the gradients of all ranks are there
  double end = 0;      // of the gathers that end the step, behind it
  std::vector<RankClock> ranks;
};

// Equal but for rounding.
bool Near(const std::vector<double>& a, const std::vector<double>& b, double error) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [&](double x, double y) {
           return std::abs(x - y) <= error;
         });
}

absl::StatusOr<StepRun> RunStep(const TrainConfig& config, const std::vector<RunPlan>& plans,
                                const std::vector<RankClock>& fresh, const Links& links,
                                double boundary) {
  StepRun run = {.ranks = fresh};
  const RunPlan& plan = plans.front();
  const bool pipeline = plan.step.stages > 1;
  const auto count = static_cast<size_t>(plan.micro_batches);
  std::vector<double> ends(run.ranks.size(), 0);
  Clocks clocks(run.ranks, boundary);
  // Without a pipeline micro-batches run one after the other, and are soon all alike but for the
  // last one: those between are counted, not run. So many at most come before them.
  constexpr size_t kMostBefore = 32;
  std::vector<double> ahead;
  for (size_t first = 0; first < count; first += plan.step.items.size()) {
    const RankClock::Totals before = run.ranks[0].totals();
    const double begin = ends[0];
    for (size_t r = 0; r < run.ranks.size(); ++r) {
      run.ranks[r].Begin(plan.step, static_cast<int>(r), first, count, ends[r]);
    }
    STRETTO_ASSIGN_OR_RETURN(const Timeline timeline, Simulate(plan.step, clocks));
    for (size_t r = 0; r < run.ranks.size(); ++r) {
      if (!timeline.of_rank[r].empty()) ends[r] += timeline.of_rank[r].back().end;
    }
    if (pipeline) break;  // its program has all of them
    const double seconds = ends[0] - begin;
    const std::vector<double> now_ahead = run.ranks[0].Ahead(ends[0]);
    const bool steady = Near(now_ahead, ahead, 1e-9 * seconds) || first + 1 == kMostBefore;
    if (steady && first + 2 < count) {
      const size_t alike = count - first - 2;
      run.ranks[0].Repeat(before, seconds, static_cast<double>(alike));
      ends[0] += static_cast<double>(alike) * seconds;
      first += alike;
    }
    ahead = now_ahead;
  }
  for (size_t r = 0; r < run.ranks.size(); ++r) {
    run.seconds = std::max(run.seconds, run.ranks[r].FinishGradients(ends[r]));
  }
  for (RankClock& rank : run.ranks) {
    run.end = std::max(run.end, rank.GatherAtEnd(run.seconds) - run.seconds);
  }
  return run;
}

}  // namespace

std::string LayerKind(const std::string& name) {
  constexpr char kBlocks[] = "blocks.";
  constexpr size_t kLength = sizeof(kBlocks) - 1;
  if (name.rfind(kBlocks, 0) != 0) return name;
  const size_t dot = name.find('.', kLength);
  return dot == std::string::npos ? name : name.substr(dot + 1);
}

std::string ModelKey(const TrainConfig& config) {
  const ModelConfig& m = config.model;
  return absl::StrCat(m.family, " hidden ", m.hidden, " heads ", m.heads, "/", m.kv_heads, "x",
                      m.head_dim, " ffn ", m.ffn, " vocabulary ", m.vocabulary, " ",
                      config.runtime.dtype, " fp8 ", config.runtime.fp8, " loss_chunk ",
                      config.runtime.loss_chunk, " on ",
                      config.runtime.device == "cuda" ? "cuda" : "cpu");
}

absl::StatusOr<RunPlan> PlanPlace(const TrainConfig& config, int ranks, int64_t place,
                                  int64_t tensor) {
  const TrainConfig::Parallel& p = config.parallel;
  return PlanRun(config, ranks, static_cast<int>(place * p.dp * p.tp + tensor));
}

absl::StatusOr<std::vector<RunPlan>> PlanPlaces(const TrainConfig& config, int ranks) {
  std::vector<RunPlan> plans;
  for (int64_t place = 0; place < config.parallel.pp; ++place) {
    STRETTO_ASSIGN_OR_RETURN(RunPlan plan, PlanPlace(config, ranks, place));
    plans.push_back(std::move(plan));
  }
  return plans;
}

absl::StatusOr<StepPrediction> PredictStep(const TrainConfig& config,
                                           const std::vector<RunPlan>& plans, const CostModel& cost,
                                           int machine_ranks) {
  if (config.data.documents) {
    return absl::UnimplementedError(
        "data.documents is on, and steps are predicted for samples of equal length only; set "
        "data.documents=false");
  }
  if (!cost.parts) {
    return absl::FailedPreconditionError(
        "the cost model has stages only, no layers and links: make one with stretto-bench fit");
  }
  const DeviceCost& device = *cost.parts;
  if (device.model != ModelKey(config)) {
    return absl::FailedPreconditionError(absl::StrCat("the cost model is for ", device.model,
                                                      ", the configuration for ", ModelKey(config),
                                                      "; fit it to this one"));
  }
  const TrainConfig::Parallel& p = config.parallel;
  const LinkCost* network = device.network ? &*device.network : &device.machine;
  // Ranks of an axis are so far apart: the tensor axis is innermost, the pipeline's outermost. Runs
  // of `reach` neighbours stay inside machines when they fill them, or when there is one machine.
  const auto within = [&](int64_t reach) {
    const bool one = machine_ranks <= 0 || p.dp * p.tp * p.pp <= machine_ranks;
    return one || machine_ranks % reach == 0 ? &device.machine : network;
  };
  const Links links = {.dp = static_cast<int>(p.dp),
                       .tp = static_cast<int>(p.tp),
                       .world = static_cast<int>(p.dp * p.tp * p.pp),
                       .pieces = p.tp > 1 ? p.tp_chunks : 1,
                       .data = within(p.dp * p.tp),
                       .tensor = within(p.tp),
                       .pipeline = within(p.dp * p.tp * p.pp),
                       .all = within(p.dp * p.tp * p.pp),
                       .hidden = device.hidden};
  const int64_t samples = (config.batch.global - 1) / p.dp + 1;
  std::vector<RankClock> ranks;
  for (const RunPlan& plan : plans) {
    std::vector<StageSeconds> stages;
    for (const StagePlan& stage : plan.stages) {
      STRETTO_ASSIGN_OR_RETURN(stages.emplace_back(),
                               SecondsOf(config, stage, device, links, samples));
    }
    ranks.emplace_back(config, links, std::move(stages));
  }
  const int64_t boundary_bytes = plans.front().boundary_tokens * config.model.hidden *
                                 SizeOf(plans.front().stages.front().model.graph.dtype);
  const double boundary = links.pipeline->point_to_point.Seconds(2, boundary_bytes);
  STRETTO_ASSIGN_OR_RETURN(const StepRun run, RunStep(config, plans, ranks, links, boundary));

  StepPrediction step;
  // The table that the first and the last stage share: its gradient there, its values back.
  for (const RunPlan& plan : plans) {
    if (plan.tied_bytes_sent == 0) continue;
    step.pipeline += links.pipeline->point_to_point.Seconds(2, plan.tied_bytes_sent);
  }
  const int64_t scalar_bytes = StepScalars::kReduced * SizeOf(DType::kF64) * (links.world - 1);
  for (const RankClock& rank : run.ranks) step.update = std::max(step.update, rank.update());
  step.update += device.step_fixed + links.all->all_reduce.Seconds(links.world, scalar_bytes);
  step.seconds = run.seconds + step.pipeline + step.update + run.end;
  const double mean = 1 / static_cast<double>(run.ranks.size());
  for (const RankClock& rank : run.ranks) {
    step.compute += mean * rank.compute();
    step.tensor += mean * rank.tensor();
    step.data += mean * rank.data();
  }
  double idle = step.seconds - step.compute - step.tensor - step.data - step.update - step.pipeline;
  if (p.pp > 1) {
    // What bringing things from stage to stage adds to a step in which that takes no time.
    STRETTO_ASSIGN_OR_RETURN(const StepRun free, RunStep(config, plans, ranks, links, 0));
    const double added = std::clamp(run.seconds - free.seconds, 0.0, std::max(idle, 0.0));
    step.pipeline += added;
    idle -= added;
  }
  // Sums of many terms are not exact.
  step.bubble = idle > 1e-9 * step.seconds ? idle : 0;
  if (!std::isfinite(step.seconds) || step.seconds <= 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("the cost model predicts a step of ", step.seconds, " s; fit it again"));
  }
  return step;
}

absl::StatusOr<StepPrediction> PredictStep(const TrainConfig& config, int ranks,
                                           const CostModel& cost, int machine_ranks) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<RunPlan> plans, PlanPlaces(config, ranks));
  return PredictStep(config, plans, cost, machine_ranks);
}

}  // namespace stretto
