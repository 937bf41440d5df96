#include "stretto/train/memory.h"

#include <algorithm>
#include <limits>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/comm/communicator.h"
#include "stretto/model/float8.h"
#include "stretto/observe/step_trace.h"
#include "stretto/parallel/context.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/pipeline.h"
#include "stretto/parallel/stages.h"
#include "stretto/parallel/tensor_parallel.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/snapshot/parity.h"
#include "stretto/snapshot/slot.h"
#include "stretto/train/flops.h"

namespace stretto {

std::string HumanBytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 5) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%d B", bytes)
                   : absl::StrFormat("%.2f %s", value, units[unit]);
}

absl::StatusOr<Recompute> ParseRecompute(const std::string& name) {
  for (Recompute r : {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
    if (name == Name(r)) return r;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("runtime.recompute is '", name, "'; it must be none, norms or block"));
}

std::string RunPlan::MemoryTable() const {
  std::string out;
  for (const NamedBytes& a : arenas) {
    absl::StrAppendFormat(&out, "  %-18s %12s\n", a.name.c_str(), HumanBytes(a.bytes).c_str());
  }
  absl::StrAppendFormat(&out, "  %-18s %12s\n", "planned", HumanBytes(arena_bytes).c_str());
  for (const NamedBytes& a : host_arenas) {
    absl::StrAppendFormat(&out, "  %-18s %12s in host memory\n", a.name.c_str(),
                          HumanBytes(a.bytes).c_str());
  }
  for (const NamedBytes& o : overheads) {
    absl::StrAppendFormat(&out, "  %-18s %12s at most\n", o.name.c_str(),
                          HumanBytes(o.bytes).c_str());
  }
  return out;
}

AdamWOptions OptimizerOptions(const TrainConfig& config) {
  const TrainConfig::Optimizer& o = config.optimizer;
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .bf16_moments = o.moments == "bf16",
          .masters = o.masters,
          .offload = o.offload,
          .seed = static_cast<uint64_t>(config.seed),
          .part_bytes = config.snapshot.part_bytes};
}

int64_t DeviceWorkspaceBytes(DeviceKind device) {
  return device == DeviceKind::kCpu ? 0 : int64_t{2} << 30;
}

absl::StatusOr<std::vector<NamedBytes>> SnapshotMemory(const RunPlan& plan, int ranks, int keepers,
                                                       int parity) {
  if (keepers < 1 || ranks % keepers != 0) {
    return absl::InvalidArgumentError(absl::StrCat(ranks, " ranks cannot be dealt evenly to ",
                                                   keepers, " keepers; give a number that divides",
                                                   " the ranks"));
  }
  if (parity < 0) parity = keepers > 1 ? 1 : 0;
  if (parity > 0 && parity >= keepers) {
    return absl::InvalidArgumentError(
        absl::StrCat("parity ", parity, " leaves no data of ", keepers, " keepers; give less"));
  }
  STRETTO_ASSIGN_OR_RETURN(const ParityLayout layout,
                           ParityLayout::Create(keepers, keepers - parity, parity));
  const int64_t local = ranks / keepers, state = local * plan.snapshot_bytes;
  std::vector<NamedBytes> memory = {{"snapshot slots", kSlots * state}};
  if (parity > 0) {
    memory.push_back({"snapshot parity", kSlots * parity * layout.BlockBytes(state)});
  }
  if (plan.on_gpu) {
    memory.push_back({"snapshot rings", local * kSnapshotChunks * kSnapshotChunkBytes});
  }
  return memory;
}

absl::StatusOr<Mesh> MeshOf(const TrainConfig& config, int ranks, int rank) {
  return Mesh::Create(ranks, rank,
                      {{"pp", static_cast<int>(config.parallel.pp)},
                       {"dp", static_cast<int>(config.parallel.data_ranks())},
                       {"tp", static_cast<int>(config.parallel.tp)}});
}

absl::Status CheckMachines(const Mesh& mesh, const std::vector<int>& machines) {
  const RankList ranks = mesh.Along({"tp"});
  const auto machine = [&](int rank) { return machines[static_cast<size_t>(rank)]; };
  for (const int r : ranks) {
    if (machine(r) == machine(ranks.front())) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("parallel.tp is ", ranks.size(), ", but ranks ", ranks.front(), " and ", r,
                     " of one tensor axis are on different machines; start a multiple of ",
                     ranks.size(), " ranks on each machine, or lower parallel.tp"));
  }
  return absl::OkStatus();
}

absl::StatusOr<Program> StepProgram(const TrainConfig& config, int micro_batches) {
  const TrainConfig::Parallel& p = config.parallel;
  STRETTO_ASSIGN_OR_RETURN(ScheduleKind kind, ParseScheduleKind(p.schedule));
  if (p.pp == 1) kind = ScheduleKind::kOneF1B;
  const PlanItem item = {.tokens = config.micro_batch_tokens(), .pipelines = {0}};
  return MakeProgram(kind, 1, static_cast<int>(p.pp), static_cast<int>(p.chunks),
                     std::vector<PlanItem>(static_cast<size_t>(micro_batches), item));
}

absl::StatusOr<Program> EvaluationProgram(const TrainConfig& config) {
  STRETTO_ASSIGN_OR_RETURN(Program program, StepProgram(config, 1));
  for (std::vector<ProgramAction>& actions : program.of_rank) {
    std::erase_if(actions, [](const ProgramAction& a) { return a.work != StageWork::kForward; });
    for (ProgramAction& a : actions) a.with_next = false;
  }
  return program;
}

namespace {

// What the parts of a model cost in FLOPs a token, for the cut into stages.
struct PartCosts {
  double block = 1, head = 0;
};
PartCosts CostsOf(const TrainConfig& config) {
  const int64_t length = config.data.sequence_length;
  ModelConfig one = config.model, two = config.model;
  one.layers = 1;
  two.layers = 2;
  const TokenWork work = {length, length * length};
  const double with_one = TrainingFlops(one, work).causal;
  const double block = TrainingFlops(two, work).causal - with_one;
  return {block, with_one - block};
}

// Of a rank in a step, about: with documents more than their mean, as packs are not full.
int64_t MostMicroBatches(const TrainConfig& config) {
  if (config.data.documents) {
    const int64_t ranks = config.parallel.data_ranks();
    const int64_t full = (config.batch.tokens - 1) / (ranks * config.batch.capacity) + 1;
    return full + full / 2 + 1;
  }
  const int64_t samples = (config.batch.global + config.parallel.dp - 1) / config.parallel.dp;
  return (samples + config.batch.micro - 1) / config.batch.micro;
}

// Static rings share packs of documents; how many these may hold is bounded by what describes them.
RingCapacity RingsOf(const TrainConfig& config) {
  if (!config.data.documents) return {};
  const bool fixed = config.parallel.mesh == "static";
  RingCapacity rings;
  rings.ranks = static_cast<int>(fixed ? config.parallel.cp : config.parallel.data_ranks());
  rings.shares = fixed ? config.batch.capacity * rings.ranks
                       : std::max<int64_t>(rings.ranks, SequencePlanOptions().most_shares);
  return rings;
}

// The micro-batches of the rank that has the most samples, when those are full: so many of so many
// tokens.
struct MicroBatches {
  int64_t count = 0, tokens = 0;
};
std::vector<MicroBatches> MicroBatchesOf(const TrainConfig& config) {
  if (config.data.documents) return {{MostMicroBatches(config), config.batch.capacity}};
  const int64_t samples = (config.batch.global + config.parallel.dp - 1) / config.parallel.dp;
  const int64_t micro = config.batch.micro, length = config.data.sequence_length;
  std::vector<MicroBatches> all = {{samples / micro, micro * length}};
  if (samples % micro > 0) all.push_back({1, samples % micro * length});
  return all;
}

// Nothing bounds batch.global, so what it multiplies ends at the largest number.
int64_t Times(int64_t count, int64_t bytes) {
  int64_t product = 0;
  const bool too_large = __builtin_mul_overflow(count, bytes, &product);
  return too_large ? std::numeric_limits<int64_t>::max() / 4 : product;
}

}  // namespace

std::vector<int> StepCounts(const TrainConfig& config) {
  if (config.parallel.pp == 1) return {1};
  // Enough that more of them are not in flight at a time.
  if (config.data.documents) {
    return {4 * static_cast<int>(config.parallel.pp * config.parallel.chunks)};
  }
  const int64_t dp = config.parallel.dp, micro = config.batch.micro;
  std::vector<int> counts;
  for (const int64_t samples : {(config.batch.global + dp - 1) / dp, config.batch.global / dp}) {
    // Resolve keeps it far below the limits of an int.
    const auto count = static_cast<int>((samples + micro - 1) / micro);
    if (counts.empty() || counts.back() != count) counts.push_back(count);
  }
  return counts;
}

namespace {

// Of the boxes that a rank owns, as the optimizer and the storage of parameters register them.
int64_t SnapshotBytes(const RunPlan& plan, const TrainConfig& config, int dp, int dp_index) {
  constexpr int64_t kEntry = 192, kState = int64_t{128} << 10;  // of the table of contents
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  int64_t bytes = kState;
  for (const StagePlan& stage : plan.stages) {
    const Graph& graph = stage.model.graph;
    const AdamWOptions options = OptimizerOptions(config);
    const DType moments = options.bf16_moments ? DType::kBF16 : AccumulateType(graph.dtype);
    const bool masters = graph.dtype == DType::kBF16 && options.masters;
    for (size_t i = 0; i < graph.parameters.size(); ++i) {
      const ParameterInfo& p = graph.parameters[i];
      if (static_cast<int>(i) == stage.copy.value) continue;
      bytes += (masters ? 4 : 3) * kEntry;
      if (!p.owned) continue;
      const int64_t elements = CutRows(p.rows(), dp, dp_index).count * p.columns();
      bytes += aligned(elements * SizeOf(graph.dtype)) + 2 * aligned(elements * SizeOf(moments)) +
               (masters ? aligned(elements * SizeOf(DType::kF32)) : 0);
    }
  }
  return bytes;
}

// Over the tensor axis, of all micro-batches on a stage.
int64_t TensorBytes(const TrainConfig& config, const RunPlan& plan, int place,
                    const StagePlan& stage) {
  std::vector<uint8_t> halves;
  FindHalves(plan.step.of_rank[static_cast<size_t>(place)], stage.stage, plan.step.items.size(),
             &halves);
  int64_t bytes = 0;
  size_t first = 0;  // micro-batch
  for (const MicroBatches& m : MicroBatchesOf(config)) {
    int64_t whole = 0;
    if (stage.whole) {
      // Those that a program of fewer items does not have come in its middle.
      const size_t end = std::min(first + static_cast<size_t>(m.count), halves.size());
      whole = m.count;
      for (; first < end; ++first) whole -= halves[first];
      bytes += Times(whole, ExchangedBytes(stage.model.graph, stage.whole->actions, m.tokens));
    }
    bytes +=
        Times(m.count - whole, ExchangedBytes(stage.model.graph, stage.train_actions, m.tokens));
  }
  return bytes;
}

}  // namespace

absl::StatusOr<RunPlan> PlanRun(const TrainConfig& config, int ranks, int rank) {
  const DeviceKind device = config.runtime.device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
  RunPlan plan;
  const std::optional<DType> dtype = ParseDType(config.runtime.dtype);
  if (!dtype) {
    return absl::InvalidArgumentError(absl::StrCat("runtime.dtype '", config.runtime.dtype,
                                                   "' is not known; use f64, f32 or bf16"));
  }
  STRETTO_ASSIGN_OR_RETURN(const Recompute recompute, ParseRecompute(config.runtime.recompute));
  STRETTO_ASSIGN_OR_RETURN(const Mesh mesh, MeshOf(config, ranks, rank));
  const int dp = mesh.Size("dp"), dp_index = mesh.Coord("dp"), place = mesh.Coord("pp");
  const int tp = mesh.Size("tp");
  plan.micro_batch_tokens = config.micro_batch_tokens();
  plan.micro_batches = MostMicroBatches(config);
  plan.rings = RingsOf(config);
  plan.boundary_tokens = CutRows(plan.micro_batch_tokens, tp, 0).part;
  const std::vector<int> counts = StepCounts(config);
  STRETTO_ASSIGN_OR_RETURN(plan.step, StepProgram(config, counts.front()));
  STRETTO_ASSIGN_OR_RETURN(const Program evaluation, EvaluationProgram(config));
  plan.buffers = BuffersOf(plan.step, place);
  plan.buffers.Include(BuffersOf(evaluation, place));
  if (counts.size() > 1) {
    STRETTO_ASSIGN_OR_RETURN(const Program fewer, StepProgram(config, counts.back()));
    plan.buffers.Include(BuffersOf(fewer, place));
  }
  // Steps of documents have as many as it takes.
  for (int count = 1; config.data.documents && count < counts.front(); ++count) {
    STRETTO_ASSIGN_OR_RETURN(const Program fewer, StepProgram(config, count));
    plan.buffers.Include(BuffersOf(fewer, place));
  }
  STRETTO_ASSIGN_OR_RETURN(
      const Schedule schedule,
      MakeSchedule(plan.step.kind, plan.step.pipeline_ranks,
                   plan.step.stages / plan.step.pipeline_ranks, counts.front()));
  const std::vector<int> in_flight = FramesInFlight(schedule);
  const std::vector<ProgramAction>& actions = plan.step.of_rank[static_cast<size_t>(place)];
  const PartCosts costs = CostsOf(config);
  STRETTO_ASSIGN_OR_RETURN(
      plan.blocks, CutBlocks(config.model.layers, plan.step.stages, costs.block, 0, costs.head));

  // A build without the backend can still plan for it, without the scratch it asks layers to keep.
  const absl::StatusOr<const KernelTable*> kernels = KernelsFor(Device{device, 0});
  ModelOptions options = {.dtype = *dtype, .loss_chunk = config.runtime.loss_chunk};
  if (kernels.ok() && (*kernels)->supports(*dtype)) options.kernels = *kernels;
  if (const std::optional<DType> gradients = Float8GradientType(config.runtime.fp8)) {
    options.strategies = Float8Strategies(*gradients);
  }
  options.strategies = ContextStrategies(plan.rings.ranks, options.strategies);
  if (tp > 1) {
    options.strategies = TensorStrategies(
        tp, mesh.Coord("tp"), static_cast<int>(config.parallel.tp_chunks), options.strategies);
  }
  ModelPart part;
  for (int s = 0; s < plan.step.stages; ++s) {
    part.end_block = part.first_block + plan.blocks[static_cast<size_t>(s)];
    if (plan.step.place_of_stage[static_cast<size_t>(s)] == place) {
      StagePlan& stage = plan.stages.emplace_back();
      stage.stage = s;
      options.part = part;
      STRETTO_ASSIGN_OR_RETURN(stage.model, BuildModel(config.model, options));
      if (s > 0) stage.copy = stage.model.tied;
      // Weight halves come last where the schedule runs any of them apart.
      const bool halves = absl::c_any_of(actions, [&](const ProgramAction& a) {
        return a.stage == s && a.work == StageWork::kBackwardWeight;
      });
      stage.train_actions =
          TrainingActions(stage.model.graph, recompute, halves, config.parallel.tp_overlap);
      stage.evaluation_actions = EvaluationActions(stage.model.graph);
      STRETTO_ASSIGN_OR_RETURN(stage.train_frame, PlanFrame(stage.model.graph, stage.train_actions,
                                                            plan.micro_batch_tokens));
      STRETTO_ASSIGN_OR_RETURN(
          stage.evaluation_frame,
          PlanFrame(stage.model.graph, stage.evaluation_actions, plan.micro_batch_tokens));
      stage.buckets = PlanBuckets(stage.model.graph, stage.train_actions, stage.evaluation_actions,
                                  {.zero = static_cast<int>(config.parallel.zero),
                                   .ranks = dp,
                                   .bucket_bytes = config.parallel.bucket_bytes,
                                   .pieces = plan.step.stages > 1,
                                   .halves = halves});
      if (halves && stage.buckets.zero == 1) {
        StagePlan::Whole& whole = stage.whole.emplace();
        whole.actions = TrainingActions(stage.model.graph, recompute, /*defer_weights=*/false,
                                        config.parallel.tp_overlap);
        STRETTO_ASSIGN_OR_RETURN(
            whole.frame, PlanFrame(stage.model.graph, whole.actions, plan.micro_batch_tokens));
      }
      stage.frames = std::max(1, in_flight[static_cast<size_t>(s)]);
    }
    part.first_block = part.end_block;
  }

  StorageBytes storage;
  int64_t constants = 0, activations = 0, tokens = 0, float8_bytes = 0, tied_bytes = 0;
  int64_t bucket_buffers = 0;
  int64_t float8_operands = 0, partial_bytes = 0;
  AdamW::Bytes update;
  for (const StagePlan& stage : plan.stages) {
    const Graph& graph = stage.model.graph;
    const StorageBytes of_stage = DataParallelStorage(graph, dp, stage.buckets.zero);
    bucket_buffers += stage.buckets.buffer_bytes;
    storage.parameters += of_stage.parameters;
    storage.gradients += of_stage.gradients;
    for (const ConstantInfo& c : graph.constants) constants += c.rows * c.columns * SizeOf(c.dtype);
    AdamWOptions optimizer = OptimizerOptions(config);
    optimizer.without = stage.copy;
    const AdamW::Bytes of_update = AdamW::BytesOf(graph, dp, dp_index, optimizer);
    const PartialGradients::Costs partial = PartialGradients::CostsOf(graph, dp, dp_index);
    partial_bytes += partial.memory;
    plan.tensor_bytes_sent += partial.sent;
    plan.tensor_bytes_sent += TensorBytes(config, plan, place, stage);
    update.state += of_update.state;
    update.table += of_update.table;
    activations += stage.frames * stage.frame_bytes();
    tokens += stage.frames * TokenFeeder::DeviceBytes(device, plan.micro_batch_tokens, plan.rings);
    float8_bytes += Float8State::Bytes(graph);
    float8_operands += static_cast<int64_t>(graph.float8_operands.size());
    if (plan.step.stages > 1 && stage.model.tied.valid()) {
      const ParameterInfo& table = graph.parameters[static_cast<size_t>(stage.model.tied.value)];
      const int64_t elements = CutRows(table.rows(), dp, dp_index).count * table.columns();
      const bool travels = plan.step.place_of_stage.front() != plan.step.place_of_stage.back();
      if (stage.stage == 0) {
        if (travels) tied_bytes = elements * SizeOf(AccumulateType(graph.dtype));
        if (travels) plan.tied_bytes_sent += elements * SizeOf(graph.dtype);
      } else if (travels) {
        plan.tied_bytes_sent += elements * SizeOf(AccumulateType(graph.dtype));
      }
    }
  }
  plan.on_gpu = device != DeviceKind::kCpu;
  plan.snapshot_bytes = SnapshotBytes(plan, config, dp, dp_index);
  plan.arenas = {
      {"parameters", storage.parameters},
      {"gradients", storage.gradients},
      {"constants", constants},
  };
  if (bucket_buffers > 0) plan.arenas.push_back({"bucket buffers", bucket_buffers});
  const bool offload = config.optimizer.offload && device != DeviceKind::kCpu;
  (offload ? plan.host_arenas : plan.arenas).push_back({"optimizer state", update.state});
  plan.arenas.push_back({"optimizer table", update.table});
  plan.arenas.push_back({"activations", activations});
  if (tp > 1) plan.arenas.push_back({"partial gradients", partial_bytes});
  if (plan.step.stages > 1) {
    plan.arenas.push_back({"boundaries", PipelineExecutor::Bytes(plan.buffers, plan.boundary_tokens,
                                                                 config.model.hidden, *dtype)});
    if (tied_bytes > 0) plan.arenas.push_back({"tied gradients", tied_bytes});
    int64_t sends = 0;  // of one micro-batch
    for (const BoundaryMessage& m : MessagesOf(plan.step, place)) {
      sends += m.receive || m.item != 0 ? 0 : 1;
    }
    for (const MicroBatches& m : MicroBatchesOf(config)) {
      plan.boundary_bytes_sent += m.count * sends *
                                  PartOf(plan.stages.front().model.graph.tokens, m.tokens).count *
                                  config.model.hidden * SizeOf(*dtype);
    }
  }
  if (float8_bytes > 0) plan.arenas.push_back({"fp8 weights", float8_bytes});
  if (config.parallel.copy_engines != "off" && device != DeviceKind::kCpu) {
    const int axes = (dp > 1 ? 1 : 0) + (tp > 1 ? 1 : 0);
    if (axes > 0) plan.arenas.push_back({"copy windows", axes * Communicator::kCopyEngineBytes});
  }
  if (tokens > 0) plan.arenas.push_back({"tokens", tokens});
  if (device != DeviceKind::kCpu) {
    plan.arenas.push_back({"workspace", DeviceWorkspaceBytes(device)});
  }
  for (const NamedBytes& a : plan.arenas) plan.arena_bytes += a.bytes;
  for (const NamedBytes& a : plan.host_arenas) plan.host_arena_bytes += a.bytes;
  // Measured on Debian 12 with OpenBLAS 0.3.21 and Open MPI 4.1.4: code, heap and thread stacks of
  // a process; the panels that OpenBLAS packs (most for a wide vocabulary); MPI's shared segments
  // and the staging buffers of reductions.
  constexpr int64_t kMiB = 1 << 20;
  plan.overheads = {{"process", 16 * kMiB}, {"matrix products", 56 * kMiB}};
  // On a GPU what the driver keeps for the process and the code of kernels and libraries.
  if (device != DeviceKind::kCpu) plan.overheads = {{"context and libraries", 1024 * kMiB}};
  if (ranks > 1) plan.overheads.push_back({"messages", 32 * kMiB});
  if (plan.step.stages > 1) {
    // Each program: its items, and the actions of all ranks of a pipeline. Kept on the host.
    constexpr int64_t kItem = 256, kAction = 96;
    const int64_t each = kItem + 3 * kAction * plan.step.stages;
    plan.overheads.push_back({"programs", static_cast<int64_t>(counts.front()) * each *
                                              static_cast<int64_t>(counts.size() + 1)});
  }
  if (config.metrics.trace_steps > 0 && device == DeviceKind::kCpu) {
    plan.overheads.push_back({"trace", StepTrace::Bytes({})});
  }
  for (const NamedBytes& o : plan.overheads) plan.overhead_bytes += o.bytes;
  for (const StagePlan& stage : plan.stages) {
    const BucketBytes sent = SentBytes(stage.model.graph, stage.buckets, plan.micro_batches);
    plan.gradient_bytes_sent += sent.gradients;
    plan.parameter_bytes_sent += sent.parameters;
  }
  // Small all-reduces send everything to everybody.
  const int sums = StepScalars::kReduced + (config.data.documents ? 1 : 0);  // the plan's hash
  plan.scalar_bytes_sent =
      sums * SizeOf(DType::kF64) * (ranks - 1) + float8_operands * SizeOf(DType::kF32) * (dp - 1);
  return plan;
}

}  // namespace stretto
