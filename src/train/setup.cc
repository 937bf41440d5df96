// Trainer::Create, part by part.
#include <algorithm>
#include <filesystem>
#include <limits>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/copy.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/observe/memory.h"

namespace stretto {
namespace {

// The device of a rank: the GPU with its number on the machine. "auto" takes the CPU where the
// build or the machine has no GPU for it.
absl::StatusOr<Device> ChooseDevice(const std::string& name, const World& world) {
  if (name == "cpu") return Device::Cpu();
  const Device gpu = Device::Cuda(world.info().local_rank);
  const absl::Status usable = DescribeDevice(gpu).status();
  if (usable.ok()) return gpu;
  // A GPU that others have filled is there all the same.
  if (name != "auto" || absl::IsResourceExhausted(usable)) return usable;
  if (!absl::IsUnimplemented(usable) && world.rank() == 0) {
    LogInfo(absl::StrCat("on the CPU: ", std::string(usable.message())));
  }
  return Device::Cpu();
}

// Refuses a world in which ranks would compute on different kinds of device: their bits differ, and
// they could not talk to each other in one way. "auto" takes the CPU everywhere then.
absl::StatusOr<Device> SameDeviceEverywhere(World& world, Device device, const std::string& name) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("device", Name(Device{device.kind, 0})));
  for (int r = 1; r < world.size(); ++r) {
    if (all[r] == all[0]) continue;
    const std::string differ = absl::StrCat("rank ", r, " chose ", all[r], " and rank 0 ", all[0]);
    if (name == "auto") {
      if (world.rank() == 0) LogInfo(absl::StrCat("on the CPU: ", differ));
      return Device::Cpu();
    }
    return absl::FailedPreconditionError(
        absl::StrCat(differ, "; give every rank a GPU of its own, or set runtime.device=cpu"));
  }
  return device;
}

// Opens the libraries behind the kernels now: in the first step the ranks would fail one by one.
absl::Status CheckLibraries(const KernelTable& kernels, DType dtype, const World& world) {
  if (kernels.describe_libraries == nullptr) return absl::OkStatus();
  for (const LibraryInfo& library : kernels.describe_libraries()) {
    if (library.problem.empty()) continue;
    if (library.required) return absl::UnavailableError(library.problem);
    // Those that one can do without serve bf16 alone.
    if (dtype == DType::kBF16 && world.rank() == 0) LogWarning(library.problem);
  }
  return absl::OkStatus();
}

// Refuses ranks that were started with different configurations.
absl::Status SameConfigEverywhere(World& world, const TrainConfig& config) {
  TrainConfig mine = config;
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      world.AllGather("config", absl::StrCat(StableHash(PrintConfig(ConfigRef(&mine))))));
  for (int r = 1; r < world.size(); ++r) {
    if (all[r] != all[0]) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", r,
                       " was started with another configuration than rank 0; give all "
                       "ranks the same file and --set options"));
    }
  }
  return absl::OkStatus();
}

// The machine of each rank.
absl::StatusOr<std::vector<int>> Machines(World& world) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("machines", absl::StrCat(world.info().node)));
  std::vector<int> machines;
  for (const std::string& machine : all) {
    int number = 0;
    if (!absl::SimpleAtoi(machine, &number)) {
      return absl::InternalError(absl::StrCat("'", machine, "' is no number of a machine"));
    }
    machines.push_back(number);
  }
  return machines;
}

// The loader holds five numbers of 32 bits for each token of a step, and of the next one. In
// floating point, as nothing bounds batch.global.
double BatchBytes(const TrainConfig& config) {
  if (config.data.documents) {
    // A rank may have more than its share, and batches that are not full keep their room.
    return 2 * 40.0 * static_cast<double>(config.batch.tokens) /
           static_cast<double>(config.parallel.data_ranks());
  }
  return std::min(0x1p61, 40.0 * static_cast<double>(config.batch.global) /
                              static_cast<double>(config.parallel.dp) *
                              static_cast<double>(config.data.sequence_length));
}

// Refuses a plan that this machine cannot hold, before any of it is touched: later the kernel would
// end some process.
absl::Status CheckMemory(const RunPlan& plan, const TrainConfig& config, const World& world,
                         Device device) {
  if (device.kind != DeviceKind::kCpu) {
    const bool shares = world.size() > config.parallel.tp * config.parallel.pp;
    const auto too_little = [&](const std::string& what) {
      return absl::ResourceExhaustedError(absl::StrCat(
          what,
          "; what saves most: runtime.recompute=block, a smaller batch.micro, "
          "runtime.loss_chunk=8192, optimizer.offload=true",
          shares && config.parallel.zero < 3 ? ", parallel.zero=3\n" : "\n", plan.MemoryTable()));
    };
    const int64_t budget = config.runtime.device_memory_bytes;
    const int64_t drawn = plan.arena_bytes + plan.overhead_bytes;
    if (budget >= 0 && drawn > budget) {
      return too_little(absl::StrCat("the plan needs ", HumanBytes(drawn), " on ", Name(device),
                                     ", but runtime.device_memory_bytes is ", HumanBytes(budget),
                                     "; raise it"));
    }
    STRETTO_ASSIGN_OR_RETURN(const DeviceInfo info, DescribeDevice(device));
    // The stream has its workspace already.
    const int64_t needed = plan.arena_bytes - DeviceWorkspaceBytes(device.kind);
    if (needed > info.free_bytes) {
      return too_little(absl::StrCat("the plan needs ", HumanBytes(needed), " more on ",
                                     Name(device), " (", info.name, "), of which ",
                                     HumanBytes(info.free_bytes), " of ",
                                     HumanBytes(info.total_bytes), " are free"));
    }
  }
  // Beside a GPU the host holds what was offloaded.
  const int64_t host_bytes =
      device.kind == DeviceKind::kCpu ? plan.arena_bytes : plan.host_arena_bytes;
  const int64_t available = AvailableMemory();
  const int ranks = std::max(1, world.info().local_size);
  const double needed = static_cast<double>(host_bytes) + BatchBytes(config);
  if (available < 0 || needed <= static_cast<double>(available) / ranks) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "each rank needs ", HumanBytes(static_cast<int64_t>(std::min(needed, 0x1p62))),
      plan.host_arena_bytes > 0 ? " of host memory (optimizer.offload)" : "", ", but ",
      HumanBytes(available), " are free on this machine for ", ranks,
      ranks == 1 ? " rank" : " ranks",
      "; shrink the model or the batch, or use more machines (stretto-plan shows the memory)"));
}

}  // namespace

absl::Status Trainer::Impl::SetUpRuntime() {
  STRETTO_RETURN_IF_ERROR(SameConfigEverywhere(world, config));
  STRETTO_RETURN_IF_ERROR(config.Resolve(world.size()));
  absl::StatusOr<Device> chosen = ChooseDevice(config.runtime.device, world);
  STRETTO_RETURN_IF_ERROR(world.Agree("choosing the device", chosen.status()));
  STRETTO_ASSIGN_OR_RETURN(const Device device,
                           SameDeviceEverywhere(world, *chosen, config.runtime.device));
  config.runtime.device = device.kind == DeviceKind::kCpu ? "cpu" : "cuda";
  STRETTO_RETURN_IF_ERROR(config.Resolve(world.size()));  // some settings depend on the device
  STRETTO_ASSIGN_OR_RETURN(kernels, KernelsFor(device));
  const std::optional<DType> dtype = ParseDType(config.runtime.dtype);
  if (!dtype || !kernels->supports(*dtype)) {
    return absl::UnimplementedError(
        absl::StrCat("the ", kernels->name, " backend has no kernels for ", config.runtime.dtype,
                     "; choose another "
                     "runtime.dtype or runtime.device"));
  }
  if (config.runtime.fp8 != "none" && device.kind == DeviceKind::kCuda) {
    STRETTO_ASSIGN_OR_RETURN(const DeviceInfo info, DescribeDevice(device));
    if (10 * info.major + info.minor < 89) {
      return absl::UnimplementedError(
          absl::StrCat(info.name, " has compute capability ", info.major, ".", info.minor,
                       ", and products in FP8 need 8.9; set runtime.fp8=none"));
    }
  }
  STRETTO_RETURN_IF_ERROR(
      world.Agree("opening the libraries", CheckLibraries(*kernels, *dtype, world)));
  if (config.runtime.threads == 0) {
    const int cores = std::max(1u, std::thread::hardware_concurrency());
    config.runtime.threads = std::max(1, cores / std::max(1, world.info().local_size));
  }
  absl::StatusOr<std::unique_ptr<Stream>> made = Stream::Create(
      device, {.mode = config.runtime.stream == "fifo" ? StreamMode::kFifo : StreamMode::kInline,
               .threads = static_cast<int>(config.runtime.threads),
               .workspace_bytes = DeviceWorkspaceBytes(device.kind)});
  STRETTO_RETURN_IF_ERROR(world.Agree("starting the device's stream", made.status()));
  stream = *std::move(made);
  set_up.Enter("device");
  timer = std::make_unique<PhaseTimer>(*stream, static_cast<int>(StepPhase::kCount));
  comm = std::make_unique<Communicator>(world);
  STRETTO_RETURN_IF_ERROR(comm->UseDevice(device));
  STRETTO_ASSIGN_OR_RETURN(mesh, MeshOf(config, world.size(), world.rank()));
  STRETTO_ASSIGN_OR_RETURN(machines, Machines(world));
  STRETTO_RETURN_IF_ERROR(world.Agree("placing the ranks", CheckMachines(*mesh, machines)));
  STRETTO_ASSIGN_OR_RETURN(dp_group, comm->MakeGroup("dp", mesh->Along({"dp"})));
  STRETTO_ASSIGN_OR_RETURN(pp_group, comm->MakeGroup("pp", mesh->Along({"pp"})));
  STRETTO_ASSIGN_OR_RETURN(tp_group, comm->MakeGroup("tp", mesh->Along({"tp"})));
  tensor_axis = std::make_unique<TensorAxis>(*comm, tp_group, timer.get());
  if (config.data.documents) {
    STRETTO_ASSIGN_OR_RETURN(cp_group, comm->MakeGroup("cp", mesh->Along({"dp"})));
    context_axis = std::make_unique<ContextAxis>(*comm, cp_group, timer.get());
  }
  if (config.metrics.trace_steps > 0) {
    if (device.kind != DeviceKind::kCpu) {  // else it is in the plan
      STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kHostMemory, "trace", StepTrace::Bytes({})));
    }
    std::string name = absl::StrCat("rank ", world.rank());
    for (const Axis& axis : mesh->axes()) {
      if (axis.size > 1) absl::StrAppend(&name, ", ", axis.name, " ", mesh->Coord(axis.name));
    }
    STRETTO_ASSIGN_OR_RETURN(trace, StepTrace::Create(*comm, *stream,
                                                      {.file = config.metrics.trace_file,
                                                       .process = name,
                                                       .first_step = config.metrics.trace_from,
                                                       .steps = config.metrics.trace_steps}));
  }
  STRETTO_ASSIGN_OR_RETURN(learning_rate, LearningRate::Create(config.optimizer, config.steps));
  if (config.optimizer.warmup > config.steps && world.rank() == 0) {
    // Short runs of a long configuration are common and harmless, so this is no error.
    LogWarning(absl::StrCat("optimizer.warmup is ", config.optimizer.warmup,
                            " but the run has only ", config.steps,
                            " steps; the learning rate never reaches its peak."));
  }
  return absl::OkStatus();
}

namespace {

// How often a step waits for other ranks, at most.
int64_t WaitsOfStep(const RunPlan& plan) {
  int64_t waits = 16;  // for scalars, tied values, magnitudes of FP8
  for (const StagePlan& stage : plan.stages) {
    const auto waits_in = [&](const ActionList& list) {  // in a micro-batch
      const auto exchanges = ExchangesOf(stage.model.graph, list, plan.micro_batch_tokens).size();
      return static_cast<int64_t>(exchanges) + RingWaits(stage.model.graph, list, plan.rings.ranks);
    };
    int64_t each = waits_in(stage.train_actions);
    if (stage.whole) each = std::max(each, waits_in(stage.whole->actions));
    for (const auto* events : {&stage.buckets.training.before, &stage.buckets.training.after}) {
      for (const std::vector<BucketEvent>& e : *events) each += static_cast<int64_t>(e.size());
    }
    waits +=
        plan.micro_batches * (each + 1) + 2 * static_cast<int64_t>(stage.buckets.buckets.size());
  }
  size_t actions = 0;  // each may wait for a message and for a buffer
  for (const std::vector<ProgramAction>& of_rank : plan.step.of_rank) {
    actions = std::max(actions, of_rank.size());
  }
  return waits + 2 * static_cast<int64_t>(actions);
}

}  // namespace

absl::Status Trainer::Impl::SetUpModel() {
  absl::StatusOr<RunPlan> planned = PlanRun(config, world.size(), world.rank());
  // Agreed on here, since a rank that goes on takes memory that another one counts as free.
  STRETTO_RETURN_IF_ERROR(world.Agree(
      "planning the memory",
      planned.ok() ? CheckMemory(*planned, config, world, stream->device()) : planned.status()));
  plan = *std::move(planned);
  set_up.Enter("plan");
  if (config.parallel.copy_engines != "off" && stream->device().kind != DeviceKind::kCpu) {
    STRETTO_RETURN_IF_ERROR(SetUpCopyEngines());
  }
  timer->Reserve(
      2 * (WaitsOfStep(plan) +
           static_cast<int64_t>(plan.stages.size()) *
               (AdamW::kMostParts + 1)));  // a phase begins with each wait, and another behind it
  const Graph& graph = first_graph();
  const DType dtype = graph.dtype;
  std::vector<StageMemory> memory;
  for (StagePlan& planned : plan.stages) {
    Stage& stage = stages.emplace_back();
    const Graph& part = planned.model.graph;
    STRETTO_ASSIGN_OR_RETURN(
        stage.dp, DataParallel::Create(*comm, dp_group, part, *stream, *kernels,
                                       static_cast<uint64_t>(config.seed), budget,
                                       {.overlap = config.parallel.overlap,
                                        .prefetch = config.parallel.prefetch,
                                        .bucket_bytes = config.parallel.bucket_bytes,
                                        .buckets = &planned.buckets,
                                        .add_in_transit = dp_copied,
                                        .timer = timer.get(),
                                        .threads = static_cast<int>(config.runtime.threads),
                                        // When it is known that nothing is loaded (Restore).
                                        .initialize = false}));
    STRETTO_ASSIGN_OR_RETURN(
        stage.partial,
        PartialGradients::Create(*comm, tp_group, part, *stage.dp, ops(), budget, timer.get()));
    AdamWOptions options = OptimizerOptions(config);
    options.without = planned.copy;
    STRETTO_ASSIGN_OR_RETURN(stage.optimizer,
                             AdamW::Create(part, *stage.dp, ops(), budget, options));
    const int64_t bytes = planned.frames * planned.frame_bytes();
    STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(stream->device()), "activations", bytes));
    STRETTO_ASSIGN_OR_RETURN(stage.frames, Arena::Create(stream->device(), "activations", bytes));
    memory.push_back({planned.stage, stage.frames.data(), planned.frame_bytes(), planned.frames});
  }
  parts.resize(stages.size());
  evaluation_batch.resize(1);
  if (!graph.float8_operands.empty()) {
    STRETTO_ASSIGN_OR_RETURN(float8, Float8State::Create(graph, stream->device(), budget));
  } else if (config.runtime.fp8 != "none" && world.rank() == 0) {
    LogWarning(
        absl::StrCat("runtime.fp8 is ", config.runtime.fp8,
                     ", but no linear layer has widths that are multiples of 16: all stay in ",
                     config.runtime.dtype));
  }
  STRETTO_ASSIGN_OR_RETURN(scalar_arena, Arena::Create(stream->device(), "scalars",
                                                       (kStepSums + 2) * SizeOf(DType::kF64)));
  sums = Tensor::Of(scalar_arena.data(), DType::kF64, {kStepSums}, stream->device());
  scalars = sums.Rows(kPlanSums, StepScalars::kCount);
  evaluation_total =
      Tensor::Of(scalars.as<double>() + StepScalars::kCount, DType::kF64, {2}, stream->device());
  STRETTO_ASSIGN_OR_RETURN(
      host_arena, Arena::CreateHost(stream->device(), "scalars",
                                    (kStepSums + kPlanSums + kHostInputs) * SizeOf(DType::kF64)));
  host_sums = reinterpret_cast<double*>(host_arena.data());
  host_scalars = host_sums + kPlanSums;
  host_inputs = host_sums + kStepSums + kPlanSums;
  STRETTO_ASSIGN_OR_RETURN(
      worker, ModelStages::Create(*stream, memory, plan.micro_batch_tokens, budget, plan.rings));
  STRETTO_ASSIGN_OR_RETURN(
      executor, PipelineExecutor::Create(*comm, pp_group, *stream, plan.buffers,
                                         plan.boundary_tokens, config.model.hidden, dtype, budget));
  executor->SetTimer(timer.get());
  for (const int count : StepCounts(config)) {
    STRETTO_ASSIGN_OR_RETURN(Program made, StepProgram(config, count));
    step_programs.push_back(std::make_unique<RankProgram>(std::move(made), pp_group.index));
  }
  STRETTO_ASSIGN_OR_RETURN(Program forward, EvaluationProgram(config));
  evaluation_program.emplace(std::move(forward), pp_group.index);
  int update_parts = 0;
  for (size_t i = 0; i < stages.size(); ++i) {
    Stage& stage = stages[i];
    stage.run.emplace(ops());
    stage.evaluation_run.emplace(ops());
    stage.dp->Attach(&*stage.run, scalars.Rows(StepScalars::kLossSum, 2));
    stage.dp->Attach(&*stage.evaluation_run, evaluation_total);
    for (stretto::Run* run : {&*stage.run, &*stage.evaluation_run}) {
      run->SetFloat8(float8.get());
      run->SetTensorAxis(tensor_axis.get());
      run->SetContextAxis(context_axis.get());
    }
    STRETTO_RETURN_IF_ERROR(stage.dp->Register(&registry, plan.stages[i].copy));
    STRETTO_RETURN_IF_ERROR(stage.optimizer->Register(&registry, update_parts));
    update_parts += stage.optimizer->parts();
  }
  if (plan.stages.front().stage == 0 && !plan.stages.back().copy.valid() && plan.step.stages > 1 &&
      config.model.tie_embeddings) {
    tied_gradient =
        stages.front().dp->shards()[static_cast<size_t>(plan.stages.front().model.tied.value)].grad;
    STRETTO_RETURN_IF_ERROR(
        budget.Reserve(MemoryOf(stream->device()), "tied gradients", tied_gradient.bytes()));
    STRETTO_ASSIGN_OR_RETURN(
        tied_arena, Arena::Create(stream->device(), "tied gradients", tied_gradient.bytes()));
    tied_gradient.data = tied_arena.data();
  }
  if (float8 != nullptr) {
    STRETTO_RETURN_IF_ERROR(float8->Register(&registry, /*owner=*/dp_group.index == 0));
  }
  // What others take without asking draws on the same budget: libraries, messages, the loader's two
  // steps of tokens, and the copy that a checkpoint is written from.
  const Device device = stream->device();
  for (const NamedBytes& o : plan.overheads) {
    STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(device), o.name, o.bytes));
  }
  if (device.kind != DeviceKind::kCpu) {
    STRETTO_RETURN_IF_ERROR(
        budget.Reserve(Resource::kDeviceMemory, "workspace", DeviceWorkspaceBytes(device.kind)));
  }
  STRETTO_RETURN_IF_ERROR(
      budget.Reserve(Resource::kHostMemory, "batches", static_cast<int64_t>(BatchBytes(config))));
  if (config.checkpoint.async || device.kind != DeviceKind::kCpu) {
    STRETTO_RETURN_IF_ERROR(
        budget.Reserve(Resource::kHostMemory, "checkpoint", registry.LocalBytes()));
  }
  // Master weights are copied on the stream; loading a checkpoint writes them from this thread.
  return stream->Synchronize();
}

absl::Status Trainer::Impl::Restore() {
  state.config = PrintConfig(ConfigRef(&config));
  std::error_code ignored;
  // The same name before and after the directory is there.
  std::filesystem::path output =
      std::filesystem::weakly_canonical(std::filesystem::absolute(config.output, ignored), ignored);
  if (!output.has_filename()) output = output.parent_path();
  state.output = output.string();
  absl::Status locked;
  if (world.rank() == 0) {
    absl::StatusOr<OutputLock> taken = OutputLock::Take(config.output);
    locked = taken.status();
    if (taken.ok()) lock = *std::move(taken);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("taking the output directory", locked));
  const std::string directory = config.output + "/checkpoints";
  checkpoints = std::make_unique<CheckpointWriter>(
      world, CheckpointOptions{.directory = directory,
                               .keep = static_cast<int>(std::min<int64_t>(
                                   config.checkpoint.keep, std::numeric_limits<int>::max())),
                               .async = config.checkpoint.async,
                               .timeout = std::chrono::milliseconds(
                                   static_cast<int64_t>(config.runtime.timeout_seconds * 1000))});
  // The checkpoint at `where`, or the newest sound one below it; none when it may be absent. The
  // same on all ranks, each of which checks a part of the bytes.
  const auto choose = [&](const std::string& where,
                          bool required) -> absl::StatusOr<std::optional<CheckpointInfo>> {
    const bool is_checkpoint = std::filesystem::exists(where + "/stretto.json", ignored);
    absl::StatusOr<CheckpointInfo> found =
        is_checkpoint ? ReadCheckpointInfo(where) : FindNewestCheckpoint(world, where);
    if (found.ok()) return std::optional<CheckpointInfo>(*std::move(found));
    if (absl::IsNotFound(found.status()) && !required) return std::optional<CheckpointInfo>();
    return found.status();
  };
  std::optional<CheckpointInfo> newest;
  if (config.checkpoint.resume != "never") {
    STRETTO_ASSIGN_OR_RETURN(newest, choose(directory, config.checkpoint.resume == "must"));
  } else {
    // A new run beside an old one's checkpoints: the next restart could not tell them apart.
    absl::Status empty;
    if (world.rank() == 0) {
      const absl::StatusOr<CheckpointInfo> old = FindNewestCheckpoint(directory);
      if (old.ok()) {
        empty = absl::FailedPreconditionError(absl::StrCat(
            "checkpoint.resume is never, but ", directory, " holds a checkpoint of step ",
            old->step, "; choose another output, remove it, or set checkpoint.resume=auto"));
      } else if (!absl::IsNotFound(old.status())) {
        empty = old.status();
      }
    }
    STRETTO_RETURN_IF_ERROR(world.Agree("looking for an earlier run", empty));
  }
  if (newest) checkpoints->Distrust(newest->passed_over);
  STRETTO_ASSIGN_OR_RETURN(const bool restored_snapshot,
                           RestoreSnapshot(newest ? newest->step : -1));
  if (restored_snapshot) return absl::OkStatus();
  if (!newest) {
    if (config.checkpoint.initial.empty()) return Initialize();
    // A new run that starts from given weights: data order, step and optimizer begin at 0.
    STRETTO_ASSIGN_OR_RETURN(const std::optional<CheckpointInfo> initial,
                             choose(config.checkpoint.initial, /*required=*/true));
    const auto load_weights = [&]() -> absl::Status {
      const absl::StatusOr<TrainerState> saved =
          ParseTrainerState(initial->trainer_state, initial->path);
      if (saved.ok()) {  // weights that were converted come without
        STRETTO_RETURN_IF_ERROR(SameModel(saved->config, state.config, initial->path));
      }
      StateRegistry weights;
      for (size_t i = 0; i < stages.size(); ++i) {
        STRETTO_RETURN_IF_ERROR(stages[i].dp->Register(&weights, plan.stages[i].copy));
      }
      return LoadCheckpoint(*initial, weights, {.allow_unused = pp_group.size() > 1});
    };
    STRETTO_RETURN_IF_ERROR(world.Agree("loading the initial weights", load_weights()));
    STRETTO_RETURN_IF_ERROR(GatherParameters());
    STRETTO_RETURN_IF_ERROR(WaitParameters());
    for (const Stage& stage : stages) stage.optimizer->ResetMasters();
    if (world.rank() == 0) LogInfo(absl::StrCat("starting from the weights in ", initial->path));
    return absl::OkStatus();
  }

  TrainerState restored;
  const auto load = [&](const CheckpointInfo& info) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(const TrainerState saved,
                             ParseTrainerState(info.trainer_state, info.path));
    STRETTO_RETURN_IF_ERROR(SameRunAs(saved, info.path));
    // The tensors of other stages are for other ranks.
    STRETTO_RETURN_IF_ERROR(LoadCheckpoint(info, registry, {.allow_unused = pp_group.size() > 1}));
    restored = saved;
    return absl::OkStatus();
  };
  absl::Status loaded = world.Agree("loading the checkpoint", load(*newest));
  if (absl::IsNotFound(loaded) || absl::IsDataLoss(loaded)) {
    // Keepers that were still writing to disk may have removed it for a newer one.
    const auto newer = choose(directory, /*required=*/true);
    if (newer.ok() && (*newer)->step > newest->step) {
      newest = *newer;
      checkpoints->Distrust(newest->passed_over);
      loaded = world.Agree("loading the checkpoint", load(*newest));
    }
  }
  STRETTO_RETURN_IF_ERROR(loaded);
  return Continue(restored, newest->path);
}

absl::Status Trainer::Impl::Continue(const TrainerState& saved, const std::string& source) {
  state.step = saved.step;
  state.applied = saved.applied;
  state.skipped = saved.skipped;
  state.choices = saved.choices;
  state.costs = saved.costs;
  state.costs_file = saved.costs_file;
  state.record = saved.record;
  if (state.step >= config.steps && world.rank() == 0) {
    LogWarning(absl::StrCat(source, " is of step ", state.step, " and steps is ", config.steps,
                            ": nothing is left to train; raise steps to go on"));
  }
  if (float8 != nullptr) {
    if (dp_group.size() > 1) {
      STRETTO_RETURN_IF_ERROR(comm->Wait(
          comm->Broadcast(dp_group, float8->Registered(), /*root_index=*/0, "fp8 scales")));
    }
    STRETTO_RETURN_IF_ERROR(float8->Restored());
    float8->SetJustInTime(state.applied == 0);
  }
  STRETTO_RETURN_IF_ERROR(GatherParameters());
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  if (world.rank() == 0) LogInfo(absl::StrCat("continuing from ", source));
  return absl::OkStatus();
}

absl::Status Trainer::Impl::Initialize() {
  set_up.Enter("restore");
  for (const Stage& stage : stages) STRETTO_RETURN_IF_ERROR(stage.dp->Initialize());
  for (const Stage& stage : stages) stage.optimizer->ResetMasters();
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  set_up.Enter("initial values");
  return absl::OkStatus();
}

void Trainer::Impl::OpenProgress() {
  const char* directory = std::getenv(kProgressVariable);
  if (directory == nullptr || *directory == '\0') return;
  absl::StatusOr<ProgressFile> file = ProgressFile::Create(directory, world.rank());
  if (!file.ok()) {
    LogWarning(absl::StrCat(kProgressVariable, ": ", std::string(file.status().message())));
    return;
  }
  progress = *std::move(file);
  progress.Met();
}

void Trainer::Impl::WriteFacts() const {
  const char* directory = std::getenv(kProgressVariable);
  if (directory == nullptr || *directory == '\0' || world.rank() != 0) return;
  std::error_code ignored;
  const absl::Status written = WriteJobFacts(
      directory, {.output = std::filesystem::absolute(config.output, ignored).string(),
                  .flight_directory =
                      std::filesystem::absolute(config.metrics.flight_directory, ignored).string(),
                  .dp = config.parallel.dp,
                  .pp = config.parallel.pp,
                  .tp = config.parallel.tp,
                  .cp = config.parallel.cp,
                  .dp_fixed = dp_fixed});
  if (!written.ok()) LogWarning(std::string(written.message()));
}

namespace {
constexpr char kSetUpPayload[] = "stretto/set-up", kNoRoomPayload[] = "stretto/no-room";
}  // namespace

absl::Status Trainer::Impl::SetUp() {
  dp_fixed = config.parallel.dp != 0;
  OpenProgress();
  STRETTO_RETURN_IF_ERROR(world.Agree("setting up the runtime", SetUpRuntime()));
  set_up.Enter("communicators");
  absl::Status built = world.Agree("planning and building the model", SetUpModel());
  if (IsAgreed(built) && absl::IsResourceExhausted(built)) {
    built.SetPayload(kNoRoomPayload, absl::Cord("1"));
  }
  STRETTO_RETURN_IF_ERROR(built);
  STRETTO_RETURN_IF_ERROR(world.Agree("sharing memory", ShareMemory()));
  set_up.Enter("arenas");
  WriteFacts();
  STRETTO_RETURN_IF_ERROR(world.Agree("opening the data", SetUpData()));
  STRETTO_RETURN_IF_ERROR(world.Agree("comparing the data", CompareData()));
  set_up.Enter("data");
  STRETTO_RETURN_IF_ERROR(world.Agree("measuring the device", MeasurePeak()));
  set_up.Enter("peak");
  STRETTO_RETURN_IF_ERROR(world.Agree("restoring a checkpoint", Restore()));
  set_up.Enter("restore");
  STRETTO_RETURN_IF_ERROR(world.Agree("planning the documents", SetUpPlans()));
  set_up.Enter("data");
  progress.Restored(state.step);
  STRETTO_RETURN_IF_ERROR(world.Agree("warming up", WarmUp()));
  set_up.Enter("warm-up");
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(World& world, const TrainConfig& config,
                                                         TrainerOptions options) {
  auto impl = std::make_unique<Impl>(world, config);
  impl->options = std::move(options);
  absl::Status status = impl->SetUp();
  if (status.ok()) return std::unique_ptr<Trainer>(new Trainer(std::move(impl)));
  // What ranks do not agree on is an error between them.
  if (IsAgreed(status)) status.SetPayload(kSetUpPayload, absl::Cord("1"));
  return status;
}

int TrainerExitCode(const absl::Status& status) {
  const bool by_code =
      absl::IsInvalidArgument(status) || status.GetPayload(kSetUpPayload).has_value();
  return by_code || status.ok() ? ExitCodeOf(status) : kExitFailed;
}

bool IsNoRoom(const absl::Status& status) { return status.GetPayload(kNoRoomPayload).has_value(); }

}  // namespace stretto
