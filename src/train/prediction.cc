#include "stretto/train/prediction.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "stretto/core/cut.h"
#include "stretto/model/layer.h"
#include "stretto/ops/kernels.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/stages.h"
#include "stretto/parallel/tensor_parallel.h"
#include "stretto/sim/timeline.h"

namespace stretto {
namespace {

constexpr size_t Index(int i) { return static_cast<size_t>(i); }

// What travels between the ranks of a layout, and over which links.
struct Links {
  int dp = 1, tp = 1, world = 1;
  int64_t pieces = 1;  // of the tokens, on the tensor axis
  const LinkCost *data = nullptr, *tensor = nullptr, *pipeline = nullptr, *all = nullptr;
  double hidden = 0;
};

// Seconds of what a stage does, on a full micro-batch and on the step's last one.
struct StageSeconds {
  const StagePlan* plan = nullptr;
  ListParts list;
  // By action.
  struct Sizes {
    std::vector<double> layer, exchange;
  } full, rest;
  // By layer: whether its sum of inputs' gradients is waited for in an action of its own.
  std::vector<uint8_t> finishes_apart;
  // Of one collective, by bucket.
  std::vector<double> reduce, gather;
  // Without rotating buffers (ZeRO-1 gradients, ZeRO-1 and 2 parameters).
  std::vector<int> ready_layer;                 // by bucket
  std::vector<std::vector<int>> layer_buckets;  // by layer
  double partial = 0;                           // of the sums of partial gradients
  double update = 0;                            // of the optimizer
};

// The clock of one rank: when its stream has come to what, and its collectives. The methods have
// the names of what the trainer does there (DataParallel, BucketBuffers).
class RankClock {
 public:
  RankClock(const TrainConfig& config, const Links& links, std::vector<StageSeconds> stages)
      : overlap_(config.parallel.overlap),
        prefetch_(config.parallel.prefetch),
        zero_(stages.front().plan->buckets.zero),
        links_(links) {
    for (StageSeconds& seconds : stages) {
      Stage& stage = stages_.emplace_back();
      stage.seconds = std::move(seconds);
      const BucketPlan& buckets = stage.seconds.plan->buckets;
      const size_t layers = stage.seconds.plan->model.graph.layers.size();
      for (auto* times : {&stage.input, &stage.summed, &stage.weight}) times->assign(layers, 0);
      stage.reduced.assign(buckets.buckets.size(), 0);
      stage.gathered.assign(buckets.buckets.size(), 0);
      stage.stays.resize(buckets.training.stays.size());
    }
    // What the step before it started under the forward of this one.
    if (links_.dp > 1 && prefetch_) GatherParameters();
  }

  // Before each program: `items` micro-batches from number `first` of `count`.
  void Begin(const Program& program, int rank, size_t first, size_t count, double offset) {
    offset_ = offset;
    first_ = first;
    count_ = count;
    for (Stage& stage : stages_) {
      stage.works.clear();
      stage.next = 0;
      stage.backwards_left = 0;
      for (const ProgramAction& a : program.of_rank[Index(rank)]) {
        if (a.stage != stage.seconds.plan->stage) continue;
        stage.works.push_back(a.work);
        stage.backwards_left += EndsBackward(a.work) ? 1 : 0;
      }
    }
    more_ = first + program.items.size() < count;
  }

  double Run(const ProgramAction& action, double start) {
    const double begin = offset_ + start;
    now_ = begin + std::exchange(debt_, 0);
    for (Stage& stage : stages_) {
      if (stage.seconds.plan->stage == action.stage) Run(stage, action);
    }
    return now_ - begin;
  }

  // What is left of the step's gradients, from `start` on; returns when it is done.
  double FinishGradients(double start) {
    now_ = start + std::exchange(debt_, 0);
    for (auto stage = stages_.rbegin(); stage != stages_.rend(); ++stage) {
      if (links_.dp > 1) FinishGradients(*stage);
      now_ += stage->seconds.partial;
      tensor_ += stage->seconds.partial;
    }
    return now_;
  }

  // Without prefetching the gathers end the step, from `start` on; returns when they are done.
  double GatherAtEnd(double start) {
    now_ = start;
    if (links_.dp == 1 || prefetch_) return now_;
    GatherParameters();
    now_ += std::exchange(debt_, 0);
    for (Stage& stage : stages_) WaitParameters(stage);
    return now_;
  }

  // What the rank's time has gone into so far.
  struct Totals {
    double compute = 0, tensor = 0, data = 0;
  };
  Totals totals() const { return {compute_, tensor_, data_}; }
  // Lets `count` micro-batches pass that are like the last one, which took `seconds` and before
  // which the totals were `before`.
  void Repeat(const Totals& before, double seconds, double count) {
    compute_ += count * (compute_ - before.compute);
    tensor_ += count * (tensor_ - before.tensor);
    data_ += count * (data_ - before.data);
    ForTimes([&](double& t) {
      if (t > 0) t += count * seconds;
    });
  }
  // How far what is on its way reaches beyond `end`. With the same a micro-batch later the clock is
  // in a steady state: from there on all are alike.
  std::vector<double> Ahead(double end) {
    std::vector<double> ahead;
    ForTimes([&](const double& t) { ahead.push_back(std::max(0.0, t - end)); });
    return ahead;
  }

  double compute() const { return compute_; }
  double tensor() const { return tensor_; }
  double data() const { return data_; }
  double update() const {
    double seconds = 0;
    for (const Stage& stage : stages_) seconds += stage.seconds.update;
    return seconds;
  }

 private:
  struct Stay {
    bool submitted = false;
    double finish = 0;  // 0: nothing is on its way
  };
  struct Stage {
    StageSeconds seconds;
    std::vector<StageWork> works;
    size_t next = 0;
    int backwards_left = 0;
    std::vector<double> reduced, gathered;  // by bucket, when: 0: nothing is on its way
    // By layer: when what other ranks send is there (TrainingActions).
    std::vector<double> input, summed, weight;
    size_t submitted = 0;  // buckets whose reduce-scatter has been submitted
    std::vector<Stay> stays;
  };
  static bool EndsBackward(StageWork work) {
    return work == StageWork::kBackward || work == StageWork::kBackwardWeight;
  }

  // All points in time that are kept from one action to the next.
  template <class F>
  void ForTimes(const F& f) {
    f(channel_);
    f(tensor_channel_);
    for (Stage& stage : stages_) {
      for (auto* times :
           {&stage.reduced, &stage.gathered, &stage.input, &stage.summed, &stage.weight}) {
        for (double& t : *times) f(t);
      }
      for (Stay& stay : stage.stays) f(stay.finish);
    }
  }

  // The collectives of a rank follow each other beside its computation, which they hold up by the
  // part that is not hidden.
  double Submit(double seconds, double* held_up) {
    const double serial = (1 - links_.hidden) * seconds;
    *held_up += serial;
    data_ += serial;
    channel_ = std::max(channel_, now_) + links_.hidden * seconds;
    return channel_;
  }
  void WaitFor(double* finish) { WaitFor(finish, &data_); }
  void WaitFor(double* finish, double* exposed) {
    if (*finish > now_) {
      *exposed += *finish - now_;
      now_ = *finish;
    }
    *finish = 0;
  }

  // An action of a layer with what it exchanges over the tensor axis, which takes `exchange`
  // seconds of its own. What starts and ends apart is held up by computation as little as other
  // collectives are; the rest is waited for, piece by piece.
  void Layer(Stage& stage, const Action& action, double seconds, double exchange) {
    const auto l = Index(action.layer);
    const auto start = [&] {
      const double serial = (1 - links_.hidden) * exchange;
      now_ += serial;
      tensor_ += serial;
      tensor_channel_ = std::max(tensor_channel_, now_) + links_.hidden * exchange;
      return tensor_channel_;
    };
    double waited = exchange;
    switch (action.kind) {
      case ActionKind::kStartInput:
        stage.input[l] = start();
        return;
      case ActionKind::kStartWeight:
        stage.weight[l] = start();
        return;
      case ActionKind::kFinishInput:
        return WaitFor(&stage.summed[l], &tensor_);
      case ActionKind::kBackwardWeight:
        WaitFor(&stage.weight[l], &tensor_);
        break;
      case ActionKind::kBackwardInput:
        WaitFor(&stage.input[l], &tensor_);
        if (stage.seconds.finishes_apart[l] != 0) waited = 0;
        break;
      case ActionKind::kForward:
      case ActionKind::kRecompute:
        break;
    }
    // The first piece is waited for, the others travel under products.
    const double hidden = links_.hidden * std::min(waited, seconds) * (1 - 1.0 / links_.pieces);
    now_ += seconds + waited - hidden;
    compute_ += seconds;
    tensor_ += waited - hidden;
    if (waited == 0 && exchange > 0) stage.summed[l] = start();
  }

  void GatherParameters() {
    for (Stage& stage : stages_) {
      if (zero_ == 3) {
        GatherFor(stage, 0, &debt_);
        continue;
      }
      for (size_t b = stage.gathered.size(); b-- > 0;) {
        stage.gathered[b] = Submit(stage.seconds.gather[b], &debt_);
      }
    }
  }
  void WaitParameters(Stage& stage) {
    for (double& finish : stage.gathered) WaitFor(&finish);
    const std::vector<BucketStay>& stays = stage.seconds.plan->buckets.training.stays;
    for (size_t s = 0; s < stays.size(); ++s) {
      if (!stays[s].gradients) WaitFor(&stage.stays[s].finish);
    }
  }
  void FinishGradients(Stage& stage) {
    WaitParameters(stage);
    if (zero_ > 1) {
      const std::vector<BucketStay>& stays = stage.seconds.plan->buckets.training.stays;
      for (size_t s = 0; s < stays.size(); ++s) {
        if (stays[s].gradients) Collect(stage.stays[s]);
      }
      return;
    }
    while (stage.submitted < stage.reduced.size()) SubmitReduce(stage);
    for (double& finish : stage.reduced) WaitFor(&finish);
  }
  void SubmitReduce(Stage& stage) {
    const size_t bucket = stage.submitted++;
    stage.reduced[bucket] = Submit(stage.seconds.reduce[bucket], &now_);
  }
  void Gather(Stage& stage, int stay, double* held_up) {
    Stay& state = stage.stays[Index(stay)];
    if (state.submitted) return;
    state.submitted = true;
    const int bucket = stage.seconds.plan->buckets.training.stays[Index(stay)].bucket;
    state.finish = Submit(stage.seconds.gather[Index(bucket)], held_up);
  }
  void GatherFor(Stage& stage, size_t action, double* held_up) {
    const BucketTimeline& timeline = stage.seconds.plan->buckets.training;
    if (!prefetch_ || action >= timeline.before.size()) return;
    for (const BucketEvent& event : timeline.before[action]) {
      if (event.kind == BucketEventKind::kCollect) return;
      if (event.kind == BucketEventKind::kGather && !event.ahead) {
        Gather(stage, event.stay, held_up);
      }
    }
  }
  void Collect(Stay& stay) {
    if (!stay.submitted) return;
    stay.submitted = false;
    WaitFor(&stay.finish);
  }
  void Do(Stage& stage, const BucketEvent& event, bool last) {
    Stay& stay = stage.stays[Index(event.stay)];
    const int bucket = stage.seconds.plan->buckets.training.stays[Index(event.stay)].bucket;
    switch (event.kind) {
      case BucketEventKind::kCollect:
        return Collect(stay);
      case BucketEventKind::kGather:
        if (prefetch_ && !(event.ahead && last)) Gather(stage, event.stay, &now_);
        return;
      case BucketEventKind::kOpen:
        return;
      case BucketEventKind::kUse:
        Gather(stage, event.stay, &now_);
        return WaitFor(&stay.finish);
      case BucketEventKind::kRelease:
        stay.submitted = false;
        return;
      case BucketEventKind::kReduce:
        stay.submitted = true;
        stay.finish = Submit(stage.seconds.reduce[Index(bucket)], &now_);
        if (!overlap_) Collect(stay);
        return;
    }
  }

  void Run(Stage& stage, const ProgramAction& action) {
    const StageSeconds& s = stage.seconds;
    const StageSeconds::Sizes& sizes = first_ + Index(action.item) + 1 == count_ ? s.rest : s.full;
    const BucketTimeline& timeline = s.plan->buckets.training;
    const std::vector<Action>& actions = s.plan->train_actions.actions;
    const auto [first, end] = s.list.Of(action.work);
    const bool last = EndsBackward(action.work) && stage.backwards_left == 1 && !more_;
    if (EndsBackward(action.work)) --stage.backwards_left;
    ++stage.next;
    for (size_t i = first; i < end; ++i) {
      if (links_.dp > 1 && actions[i].kind == ActionKind::kForward && zero_ < 3) {
        for (const int b : s.layer_buckets[Index(actions[i].layer)]) WaitFor(&stage.gathered[b]);
      }
      if (zero_ > 1) {
        for (const BucketEvent& event : timeline.before[i]) Do(stage, event, last);
      }
      Layer(stage, actions[i], sizes.layer[i], sizes.exchange[i]);
      if (zero_ > 1) {
        for (const BucketEvent& event : timeline.after[i]) Do(stage, event, last);
      } else if (links_.dp > 1 && last && overlap_ &&
                 actions[i].kind == ActionKind::kBackwardWeight &&
                 stage.submitted < s.ready_layer.size() &&
                 s.ready_layer[stage.submitted] == actions[i].layer) {
        SubmitReduce(stage);
      }
    }
    if (zero_ == 3 && stage.next < stage.works.size()) {
      GatherFor(stage, s.list.Of(stage.works[stage.next]).first, &now_);
    }
  }

  bool overlap_, prefetch_;
  int zero_;
  Links links_;
  std::vector<Stage> stages_;
  double offset_ = 0, now_ = 0;
  double debt_ = 0;     // by which the next action begins later
  double channel_ = 0;  // when the collectives submitted so far are done
  double tensor_channel_ = 0;
  size_t first_ = 0, count_ = 0;
  bool more_ = false;
  double compute_ = 0, tensor_ = 0, data_ = 0;
};

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

// Layers that copy what comes from a neighbouring stage: part of what it takes to bring it.
bool IsStageEnd(const std::string& kind) { return kind == "stage_input" || kind == "stage_output"; }

// Costs of each layer of the graph, in the parts that were measured. A gated linear layer and its
// activation are two layers where a tensor axis or FP8 cuts them apart and one elsewhere
// (Builder::GatedLinear), here and where the costs come from.
absl::StatusOr<std::vector<std::vector<const LayerCost*>>> CostsOfLayers(const Graph& graph,
                                                                         const DeviceCost& cost) {
  const std::string gated = "mlp.gate_up", activation = "mlp.act";
  const LayerCost* const apart = cost.Find(activation);
  const bool apart_here = absl::c_any_of(
      graph.layer_names, [&](const std::string& name) { return LayerKind(name) == activation; });
  std::vector<std::vector<const LayerCost*>> costs;
  for (const std::string& name : graph.layer_names) {
    const std::string kind = LayerKind(name);
    std::vector<const LayerCost*>& parts = costs.emplace_back();
    if (const LayerCost* const layer = cost.Find(kind)) {
      parts.push_back(layer);
    } else if (!IsStageEnd(kind) && !(kind == activation && cost.Find(gated) != nullptr)) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the cost model has no layer '", kind, "'; fit it to this model (stretto-bench fit)"));
    }
    if (kind == gated && !apart_here && apart != nullptr) parts.push_back(apart);
  }
  return costs;
}

absl::Status LayerSeconds(const StagePlan& stage, const DeviceCost& cost, const LinkCost& tensor,
                          int64_t tokens, int64_t length, StageSeconds::Sizes* sizes) {
  const Graph& graph = stage.model.graph;
  const double share = graph.tokens.ranks;
  const double pairs = 0.5 * static_cast<double>(tokens) * static_cast<double>(length + 1);
  STRETTO_ASSIGN_OR_RETURN(const auto of_layer, CostsOfLayers(graph, cost));
  sizes->exchange.assign(stage.train_actions.actions.size(), 0);
  for (const PlannedExchange& e : ExchangesOf(graph, stage.train_actions, tokens)) {
    const OperationCost& operation = e.info->sum ? tensor.reduce_scatter : tensor.all_gather;
    const int64_t bytes = e.rows * e.info->width * SizeOf(e.info->dtype) * (graph.tokens.ranks - 1);
    sizes->exchange[e.action] += operation.Seconds(graph.tokens.ranks, bytes);
  }
  // A product that is kept does not run again, only the activation behind it: next to nothing of
  // what the layer's forward takes.
  std::vector<uint8_t> keeps_product(graph.layers.size(), 0);
  for (size_t i = 0; i < graph.slots.size(); ++i) {
    const SlotInfo& slot = graph.slots[i];
    if (!slot.recompute_source || stage.train_actions.dropped[i]) continue;
    keeps_product[Index(slot.producer)] =
        absl::c_any_of(graph.parameters, [&](const ParameterInfo& p) {
          return p.spec.shape.size() > 1 && absl::c_linear_search(p.layers, slot.producer);
        });
  }
  for (const Action& action : stage.train_actions.actions) {
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

absl::StatusOr<StageSeconds> SecondsOf(const TrainConfig& config, const StagePlan& stage,
                                       const DeviceCost& cost, const Links& links,
                                       int64_t samples) {
  StageSeconds s;
  const Graph& graph = stage.model.graph;
  const int64_t length = config.data.sequence_length, micro = config.batch.micro;
  s.plan = &stage;
  s.list = PartsOf(stage.train_actions);
  STRETTO_RETURN_IF_ERROR(
      LayerSeconds(stage, cost, *links.tensor, micro * length, length, &s.full));
  const int64_t rest = samples % micro > 0 ? samples % micro : micro;
  STRETTO_RETURN_IF_ERROR(LayerSeconds(stage, cost, *links.tensor, rest * length, length, &s.rest));
  s.finishes_apart.assign(graph.layers.size(), 0);
  for (const Action& action : stage.train_actions.actions) {
    if (action.kind == ActionKind::kFinishInput) s.finishes_apart[Index(action.layer)] = 1;
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
