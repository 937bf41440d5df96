// One step of a model under any layout of ranks: loss and the gradients of the whole model, put
// together from what the ranks have of them. The same body runs on threads and under mpirun.
#ifndef STRETTO_TESTS_SUPPORT_LAYOUT_STEP_H_
#define STRETTO_TESTS_SUPPORT_LAYOUT_STEP_H_

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/context.h"
#include "stretto/parallel/stages.h"
#include "stretto/parallel/tensor_parallel.h"
#include "stretto/plan/program.h"
#include "tests/support/harness.h"

namespace stretto::testing {

struct Layout {
  int dp = 1, pp = 1, tp = 1;
  ScheduleKind kind = ScheduleKind::kOneF1B;
  int chunks = 1;
  int pieces = 1;  // of the tokens, on the tensor axis
  int zero = 1;
  bool in_stages() const { return pp * chunks > 1; }  // stages run halves of micro-batches
  int ranks() const { return dp * pp * tp; }
  std::string Name() const {
    std::string name = absl::StrCat("Dp", dp, "Pp", pp, "Tp", tp);
    if (in_stages()) absl::StrAppend(&name, stretto::Name(kind), "Chunks", chunks);
    if (pieces > 1) absl::StrAppend(&name, "Pieces", pieces);
    if (zero > 1) absl::StrAppend(&name, "Zero", zero);
    std::erase_if(name, [](char c) { return c == '-'; });
    return name;
  }
};

inline void PrintTo(const Layout& layout, std::ostream* out) { *out << layout.Name(); }

struct StepOptions {
  DType dtype = DType::kF64;
  Recompute recompute = Recompute::kNone;
  int64_t loss_chunk = 0;
  StreamMode stream = StreamMode::kInline;
  bool overlap = true;  // also see TrainingActions
  // How parameters and gradients are kept.
  bool prefetch = true, poison = true;
  // Whether stages that run weight halves apart have two lists; by default as the trainer has it.
  std::optional<bool> two_lists;
  int64_t bucket_bytes = 1000;
  // Tests spoil the actions, or the plan of the buckets, here.
  std::function<void(ActionList&)> change = [](ActionList&) {};
  std::function<void(BucketPlan&)> sabotage;
  // Tests put other layers into the model here.
  std::function<void(Strategies&)> layers;
};

struct StepOutcome {
  double loss = 0, tokens = 0;
  std::map<std::string, std::vector<double>> gradients;  // of the whole model
  int64_t tensor_bytes = 0;                              // sent by rank 0 over the tensor axis
  int64_t planned_bytes = 0;                             // that it should have sent
  int64_t ring_bytes = 0;  // sent by all ranks around rings, as planned
};

// Whether the newest operations over the tensor axis are `planned`, in this order.
inline absl::Status SameOrder(const FlightRecorder& recorder, const Group& tp,
                              const std::vector<PlannedExchange>& planned) {
  std::vector<FlightRecord> records = recorder.Snapshot();
  std::erase_if(records, [&](const FlightRecord& r) {
    return r.group != tp.id || std::string(r.label).find("gradients") != std::string::npos;
  });
  const size_t known = std::min(records.size(), planned.size());
  if (known == 0 && !planned.empty()) return absl::InternalError("the recorder is empty");
  for (size_t i = 0; i < known; ++i) {
    const FlightRecord& r = records[records.size() - known + i];
    const PlannedExchange& p = planned[planned.size() - known + i];
    const bool sum = p.info->sum;
    const int64_t count = p.rows * p.info->width * (sum ? tp.size() : 1);
    if (r.op == (sum ? CommOp::kReduceScatter : CommOp::kAllGather) && r.count == count &&
        p.info->label.compare(0, sizeof(r.label) - 1, r.label) == 0) {
      continue;
    }
    return absl::InternalError(absl::StrCat("the recorder has ", Name(r.op), " of ", r.count, " [",
                                            r.label, "] where ", count, " [", p.info->label,
                                            "] were planned"));
  }
  return absl::OkStatus();
}

// The mesh is pp x dp x tp, the tensor axis innermost; pipeline p has the micro-batches batches[p].
// Where pipelines share some (PackedBatch::Ring), those have the same place in the vectors of all
// of them, and who has no micro-batch in a place has one without documents there. All ranks return
// the same outcome.
inline absl::StatusOr<StepOutcome> StepUnder(World& world, const ModelConfig& config,
                                             const Layout& layout, const StepOptions& options,
                                             const std::vector<std::vector<PackedBatch>>& batches) {
  STRETTO_ASSIGN_OR_RETURN(const Mesh mesh,
                           Mesh::Create(world.size(), world.rank(),
                                        {{"pp", layout.pp}, {"dp", layout.dp}, {"tp", layout.tp}}));
  STRETTO_ASSIGN_OR_RETURN(const auto stream,
                           Stream::Create(Device::Cpu(), {.mode = options.stream}));
  STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(Device::Cpu()));
  Communicator comm(world);
  STRETTO_ASSIGN_OR_RETURN(const Group pp, comm.MakeGroup("pp", mesh.Along({"pp"})));
  STRETTO_ASSIGN_OR_RETURN(const Group dp, comm.MakeGroup("dp", mesh.Along({"dp"})));
  STRETTO_ASSIGN_OR_RETURN(const Group tp, comm.MakeGroup("tp", mesh.Along({"tp"})));
  STRETTO_ASSIGN_OR_RETURN(const Group cp, comm.MakeGroup("cp", mesh.Along({"dp"})));
  TensorAxis axis(comm, tp);
  ContextAxis context(comm, cp);
  const std::vector<PackedBatch>& mine = batches[static_cast<size_t>(dp.index)];
  std::vector<PlanItem> items;
  int64_t capacity = 1;
  for (const PackedBatch& b : mine) {
    const int64_t tokens = std::max<int64_t>(1, b.tokens());
    items.push_back({.tokens = tokens, .lengths = {tokens}, .pipelines = {0}});
    capacity = std::max(capacity, b.tokens());
  }
  RingCapacity rings;
  for (const auto& of_pipeline : batches) {
    for (const PackedBatch& b : of_pipeline) {
      if (b.ring.size() == 1) continue;
      rings.ranks = std::max(rings.ranks, b.ring.size());
      rings.shares = std::max(rings.shares, b.ring.size() * b.sequences());
    }
  }
  const bool shared = rings.ranks > 1;
  // Ranks that exchange something in each micro-batch have as many, some of them empty.
  for (const auto& of_pipeline : batches) {
    for (const PackedBatch& b : of_pipeline) {
      if (shared) capacity = std::max(capacity, b.tokens());
    }
    while ((layout.zero > 1 || shared) && items.size() < of_pipeline.size()) {
      items.push_back({.tokens = 1, .lengths = {1}, .pipelines = {0}});
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const Program program,
                           MakeProgram(layout.kind, 1, layout.pp, layout.chunks, items));
  STRETTO_ASSIGN_OR_RETURN(
      const Schedule schedule,
      MakeSchedule(layout.kind, layout.pp, layout.chunks, static_cast<int>(items.size())));
  const std::vector<int> in_flight = FramesInFlight(schedule);
  STRETTO_ASSIGN_OR_RETURN(const std::vector<int64_t> blocks,
                           CutBlocks(config.layers, program.stages, 1, 0, 0));

  Budget budget(-1, -1, -1);
  double totals[2] = {};
  const Tensor total = Tensor::Of(totals, DType::kF64, {2});
  struct Stage {
    Model model;
    ActionList actions, whole;
    FrameLayout frame, whole_frame;
    int64_t frame_bytes = 0;
    std::vector<uint8_t> apart;  // by item
    const ActionList& ListOf(size_t item) const {
      return whole.actions.empty() || apart[item] != 0 ? actions : whole;
    }
    BucketPlan buckets;
    Arena memory;
    std::unique_ptr<DataParallel> parameters;
    std::unique_ptr<PartialGradients> partial;
    std::unique_ptr<Run> run;
  };
  StepOutcome out;
  std::vector<std::unique_ptr<Stage>> stages;
  std::vector<StageParts> parts;
  std::vector<StageMemory> memory;
  Strategies strategies =
      TensorStrategies(layout.tp, tp.index, layout.pieces, ContextStrategies(rings.ranks));
  if (options.layers) options.layers(strategies);
  int64_t ring_bytes = 0;
  const RankProgram rank_program(program, pp.index);
  ModelPart part;
  for (int s = 0; s < program.stages; ++s) {
    part.end_block = part.first_block + blocks[static_cast<size_t>(s)];
    if (program.place_of_stage[static_cast<size_t>(s)] == pp.index) {
      auto stage = std::make_unique<Stage>();
      STRETTO_ASSIGN_OR_RETURN(stage->model, BuildModel(config, {.dtype = options.dtype,
                                                                 .loss_chunk = options.loss_chunk,
                                                                 .strategies = strategies,
                                                                 .part = part}));
      const Graph& graph = stage->model.graph;
      // As the trainer has it.
      FindHalves(rank_program.actions(), s, program.items.size(), &stage->apart);
      const bool halves = absl::c_linear_search(stage->apart, 1);
      const bool two_lists =
          halves && options.two_lists.value_or(layout.zero == 1 || layout.dp == 1);
      const auto make = [&](bool defer, ActionList* list, FrameLayout* frame) -> absl::Status {
        *list = TrainingActions(graph, options.recompute, defer, options.overlap);
        options.change(*list);
        STRETTO_ASSIGN_OR_RETURN(*frame, PlanFrame(graph, *list, capacity));
        stage->frame_bytes = std::max(stage->frame_bytes, frame->bytes());
        return absl::OkStatus();
      };
      STRETTO_RETURN_IF_ERROR(make(/*defer=*/halves, &stage->actions, &stage->frame));
      if (two_lists) STRETTO_RETURN_IF_ERROR(make(false, &stage->whole, &stage->whole_frame));
      stage->buckets = PlanBuckets(graph, stage->actions, EvaluationActions(graph),
                                   {.zero = layout.zero,
                                    .ranks = layout.dp,
                                    .bucket_bytes = options.bucket_bytes,
                                    .pieces = layout.in_stages(),
                                    .halves = halves});
      if (options.sabotage) options.sabotage(stage->buckets);
      STRETTO_ASSIGN_OR_RETURN(stage->parameters,
                               DataParallel::Create(comm, dp, graph, *stream, *kernels, 5, budget,
                                                    {.overlap = options.overlap,
                                                     .prefetch = options.prefetch,
                                                     .buckets = &stage->buckets,
                                                     .poison = options.poison}));
      STRETTO_ASSIGN_OR_RETURN(stage->partial,
                               PartialGradients::Create(comm, tp, graph, *stage->parameters,
                                                        {stream.get(), kernels}, budget));
      stage->run = std::make_unique<Run>(ops::Context{stream.get(), kernels});
      stage->run->SetTensorAxis(&axis);
      stage->run->SetContextAxis(&context);
      stage->parameters->Attach(stage->run.get(), total);
      stage->parameters->BeginStep(*stage->run);
      parts.push_back({.graph = &graph,
                       .list = {&stage->actions, &stage->frame},
                       .run = stage->run.get(),
                       .parameters = stage->parameters.get()});
      if (two_lists) parts.back().whole = {&stage->whole, &stage->whole_frame};
      const int frames = std::max(1, in_flight[static_cast<size_t>(s)]);
      // NaN, so that reading what nothing wrote shows.
      STRETTO_ASSIGN_OR_RETURN(
          stage->memory, Arena::Create(Device::Cpu(), "frames", frames * stage->frame_bytes + 8));
      std::fill_n(reinterpret_cast<double*>(stage->memory.data()), frames * stage->frame_bytes / 8,
                  std::numeric_limits<double>::quiet_NaN());
      memory.push_back({s, stage->memory.data(), stage->frame_bytes, frames});
      for (size_t i = 0; i < mine.size(); ++i) {
        out.planned_bytes += ExchangedBytes(graph, stage->ListOf(i), mine[i].tokens());
        ring_bytes += RingBytes(graph, stage->ListOf(i), mine[i].ring);
      }
      out.planned_bytes += PartialGradients::CostsOf(graph, dp.size(), dp.index).sent;
      stages.push_back(std::move(stage));
    }
    part.first_block = part.end_block;
  }
  STRETTO_ASSIGN_OR_RETURN(const auto worker,
                           ModelStages::Create(*stream, memory, capacity, budget, rings));
  STRETTO_RETURN_IF_ERROR(worker->Use(parts));
  STRETTO_ASSIGN_OR_RETURN(const auto executor,
                           PipelineExecutor::Create(comm, pp, *stream, BuffersOf(program, pp.index),
                                                    CutRows(capacity, layout.tp, 0).part,
                                                    config.hidden, options.dtype, budget));
  worker->SetBatches(rank_program, mine);
  STRETTO_RETURN_IF_ERROR(executor->Run(rank_program, *worker));
  for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) {
    STRETTO_RETURN_IF_ERROR((*stage)->parameters->FinishGradients(*(*stage)->run));
    STRETTO_RETURN_IF_ERROR((*stage)->partial->Sum());
  }
  STRETTO_RETURN_IF_ERROR(executor->Finish());
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  out.tensor_bytes = comm.BytesSent("tp");
  STRETTO_RETURN_IF_ERROR(world.Agree(
      "comparing the traffic of rings",
      comm.BytesSent("cp") == ring_bytes
          ? absl::OkStatus()
          : absl::InternalError(absl::StrCat(comm.BytesSent("cp"), " bytes went around rings, ",
                                             ring_bytes, " were planned"))));
  double around = static_cast<double>(ring_bytes);
  absl::Status in_order;
  if (layout.tp > 1) {
    std::vector<PlannedExchange> planned;
    for (const ProgramAction& a : rank_program.actions()) {
      const auto item = static_cast<size_t>(a.item);
      if (item >= mine.size() || mine[item].sequences() == 0) continue;
      for (size_t i = 0; i < stages.size(); ++i) {
        if (memory[i].stage != a.stage) continue;
        const ActionList& list = stages[i]->ListOf(item);
        const auto [first, end] = PartsOf(list).Of(a.work);
        for (const PlannedExchange& e :
             ExchangesOf(stages[i]->model.graph, list, mine[item].tokens())) {
          if (e.action >= first && e.action < end) planned.push_back(e);
        }
      }
    }
    in_order = SameOrder(comm.recorder(), tp, planned);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("comparing the order of operations", in_order));

  // Every element of the whole model's gradient is somebody's, once: what is added up twice or not
  // at all differs from one rank's. A tied table's two copies add up.
  STRETTO_ASSIGN_OR_RETURN(const Model whole, BuildModel(config, {.dtype = options.dtype}));
  for (const ParameterInfo& p : whole.graph.parameters) {
    out.gradients[p.spec.name].assign(static_cast<size_t>(p.elements()), 0.0);
  }
  absl::Status alike;
  for (const auto& stage : stages) {
    for (const ParameterShard& shard : stage->parameters->shards()) {
      const ParameterInfo& info =
          stage->model.graph.parameters[static_cast<size_t>(shard.param.value)];
      const ParameterSpec& spec = info.spec;
      const auto at = out.gradients.find(spec.name);
      if (at == out.gradients.end()) return absl::InternalError(absl::StrCat("no ", spec.name));
      if (spec.part.whole.empty()) {
        // Who has the same parameter has the same bits of its gradient.
        for (const ReduceOp op : {ReduceOp::kMax, ReduceOp::kMin}) {
          std::vector<double> values;
          for (int64_t i = 0; i < shard.grad.elements(); ++i) values.push_back(Get(shard.grad, i));
          const std::vector<double> before = values;
          STRETTO_RETURN_IF_ERROR(comm.Wait(comm.AllReduce(
              tp, Tensor::Of(values.data(), DType::kF64, {static_cast<int64_t>(values.size())}), op,
              "alike")));
          if (values != before) {
            alike = absl::InternalError(absl::StrCat("ranks have unlike gradients of ", spec.name));
          }
        }
      }
      if (!info.owned) continue;
      const std::vector<int64_t>& shape = spec.whole_shape();
      const int64_t columns = shape.size() > 1 ? shape[1] : 1;
      for (const ParameterBox& box : BoxesOf(spec, shard.first_row, shard.grad.rows())) {
        for (int64_t r = 0; r < box.rows.count; ++r) {
          const Tensor row = shard.grad.Rows(box.rows.first - shard.first_row + r, 1);
          for (int64_t c = 0; c < info.columns(); ++c) {
            at->second[static_cast<size_t>((box.whole + r) * columns + spec.part.first_column +
                                           c)] += Get(row, c);
          }
        }
      }
    }
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("comparing replicas", alike));
  const auto sum = [&](double* data, size_t count) {
    return comm.Wait(comm.AllReduce(comm.all(),
                                    Tensor::Of(data, DType::kF64, {static_cast<int64_t>(count)}),
                                    ReduceOp::kSum, "outcome"));
  };
  STRETTO_RETURN_IF_ERROR(sum(totals, 2));
  STRETTO_RETURN_IF_ERROR(sum(&around, 1));
  out.ring_bytes = static_cast<int64_t>(around);
  out.loss = totals[0];
  out.tokens = totals[1];
  for (auto& [name, gradient] : out.gradients) {
    STRETTO_RETURN_IF_ERROR(sum(gradient.data(), gradient.size()));
  }
  // The traffic of rank 0, for all to return the same.
  double bytes[2] = {};
  if (world.rank() == 0) {
    bytes[0] = static_cast<double>(out.tensor_bytes);
    bytes[1] = static_cast<double>(out.planned_bytes);
  }
  const bool exact = out.tensor_bytes == out.planned_bytes;
  STRETTO_RETURN_IF_ERROR(world.Agree(
      "comparing traffic", exact ? absl::OkStatus()
                                 : absl::InternalError(absl::StrCat(
                                       out.tensor_bytes, " bytes went over the tensor axis, ",
                                       out.planned_bytes, " were planned"))));
  STRETTO_RETURN_IF_ERROR(sum(bytes, 2));
  out.tensor_bytes = static_cast<int64_t>(bytes[0]);
  out.planned_bytes = static_cast<int64_t>(bytes[1]);
  return out;
}

// The same with ranks as threads.
inline absl::StatusOr<StepOutcome> StepOnThreads(
    const ModelConfig& config, const Layout& layout, const StepOptions& options,
    const std::vector<std::vector<PackedBatch>>& batches, WorldOptions world_options = {}) {
  StepOutcome outcome;
  world_options.timeout = std::chrono::seconds(60);
  STRETTO_RETURN_IF_ERROR(World::RunThreads(
      layout.ranks(),
      [&](World& world) -> absl::Status {
        STRETTO_ASSIGN_OR_RETURN(StepOutcome mine,
                                 StepUnder(world, config, layout, options, batches));
        if (world.rank() == 0) outcome = std::move(mine);
        return world.Barrier("done");
      },
      world_options));
  return outcome;
}

// The largest difference, of the loss relative to the loss and of each gradient relative to its
// largest element; and where it is.
struct StepError {
  double worst = 0;
  std::string where;
};
inline StepError CompareSteps(const StepOutcome& got, const StepOutcome& expected) {
  StepError e = {std::abs(got.loss / expected.loss - 1), "loss"};
  if (got.tokens != expected.tokens) return {1, "tokens"};
  if (!(e.worst < 1)) e.worst = 1;  // also NaN
  for (const auto& [name, values] : expected.gradients) {
    const auto found = got.gradients.find(name);
    if (found == got.gradients.end() || found->second.size() != values.size()) return {1, name};
    double scale = 1e-6, error = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      scale = std::max(scale, std::abs(values[i]));
      const double difference = std::abs(values[i] - found->second[i]);
      error = difference <= error ? error : difference;  // NaN stays
    }
    if (!(error / scale <= e.worst)) e = {error / scale, name};
  }
  return e;
}

// Micro-batches of unequal lengths, one of a single token, dealt out in unequal numbers.
inline std::vector<std::vector<PackedBatch>> UnevenBatches(int64_t vocabulary, int pipelines) {
  const std::vector<std::vector<int64_t>> documents = {{7, 1, 5}, {12},   {3, 4}, {9, 2},
                                                       {1},       {6, 6}, {11}};
  std::vector<std::vector<PackedBatch>> of_pipeline(static_cast<size_t>(pipelines));
  for (size_t i = 0; i < documents.size(); ++i) {
    of_pipeline[(i + i * i) / 2 % static_cast<size_t>(pipelines)].push_back(
        RandomBatch(documents[i], vocabulary, 10 + static_cast<uint64_t>(i)));
  }
  return of_pipeline;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_LAYOUT_STEP_H_
