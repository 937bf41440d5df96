#include "stretto/train/trainer.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "src/train/trainer_impl.h"
#include "stretto/comm/transport.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"
#include "stretto/observe/memory.h"

namespace stretto {
namespace {

double Seconds(std::chrono::steady_clock::time_point from,
               std::chrono::steady_clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

absl::Status Trainer::Impl::RunBatches(std::span<const PackedBatch> batches, bool training,
                                       bool hooks, const PlannedStep* planned) {
  for (size_t i = 0; i < stages.size(); ++i) {
    const StagePlan& of_stage = plan.stages[i];
    Stage& stage = stages[i];
    StageList list = {&of_stage.evaluation_actions, &of_stage.evaluation_frame}, whole;
    if (training) {
      list = {&of_stage.train_actions, &of_stage.train_frame};
      if (of_stage.whole) whole = {&of_stage.whole->actions, &of_stage.whole->frame};
    }
    parts[i] = {
        .graph = &of_stage.model.graph,
        .list = list,
        .whole = whole,
        .run = training ? &*stage.run : &*stage.evaluation_run,
        .parameters = hooks || zero() > 1 ? stage.dp.get() : nullptr,
        .local = !hooks,
    };
  }
  STRETTO_RETURN_IF_ERROR(worker->Use(parts));
  worker->SetReplays(training && hooks && replays ? &*replays : nullptr);
  // Gradients leave behind the last micro-batch, not in it.
  const bool later = planned != nullptr && !planned->ends_together;
  const auto run = [&](const RankProgram& program, size_t first, bool more) -> absl::Status {
    worker->SetBatches(program, batches, first, more);
    return executor->Run(program, *worker);
  };
  if (!training) return run(*evaluation_program, 0, false);
  // With ZeRO-2 and 3 ranks exchange something in every micro-batch: all go through as many.
  const bool all_alike = zero() > 1 && hooks;
  if (all_alike && batches.size() > static_cast<size_t>(plan.micro_batches)) {
    return absl::InternalError(absl::StrCat("a step has ", batches.size(), " micro-batches, ",
                                            plan.micro_batches, " were planned"));
  }
  if (plan.step.stages > 1 && planned != nullptr) {
    // Of several stages on a rank one is done while others still have documents that this rank
    // shares with some that have more to do on the first.
    return run(*planned_programs[state.step % 2], 0, /*more=*/stages.size() > 1 || later);
  }
  if (plan.step.stages > 1) {
    if (all_alike) return run(*step_programs.front(), 0, false);
    for (const auto& program : step_programs) {
      if (program->program().items.size() == batches.size()) return run(*program, 0, false);
    }
    return absl::InternalError(
        absl::StrCat("no program was made for ", batches.size(), " micro-batches"));
  }
  // Without a pipeline one after the other.
  const size_t count = all_alike ? static_cast<size_t>(plan.micro_batches) : batches.size();
  for (size_t i = 0; i < count; ++i) {
    STRETTO_RETURN_IF_ERROR(run(*step_programs.front(), i, i + 1 < count || later));
  }
  return absl::OkStatus();
}

absl::Status Trainer::Impl::SumOverRanks(Tensor data, const char* label) {
  if (world.size() == 1) return absl::OkStatus();
  return WaitIn(StepPhase::kExposedWorld,
                comm->AllReduce(comm->all(), data, ReduceOp::kSum, label, stream->Record()));
}

namespace {

const ParameterShard* ShardOf(const DataParallel& dp, ParamId id) {
  return id.valid() ? &dp.shards()[static_cast<size_t>(id.value)] : nullptr;
}

}  // namespace

absl::Status Trainer::Impl::SumTiedGradients() {
  if (plan.step.stages == 1 || !config.model.tie_embeddings) return absl::OkStatus();
  const int first = plan.step.place_of_stage.front(), last = plan.step.place_of_stage.back();
  const StagePlan &lowest = plan.stages.front(), &highest = plan.stages.back();
  const bool has_table = lowest.stage == 0, has_copy = highest.copy.valid();
  const auto table = [&] { return ShardOf(*stages.front().dp, lowest.model.tied)->grad; };
  const auto copy = [&] { return ShardOf(*stages.back().dp, highest.copy)->grad; };
  if (has_table && has_copy) {
    if (table().rows() > 0) ops::Add(ops(), table(), copy());
  } else if (has_copy && copy().rows() > 0) {
    return WaitIn(StepPhase::kExposedPipeline,
                  comm->Send(pp_group, copy(), first, "tied gradient", stream->Record()));
  } else if (has_table && tied_gradient.present() && tied_gradient.rows() > 0) {
    STRETTO_RETURN_IF_ERROR(
        WaitIn(StepPhase::kExposedPipeline,
               comm->Receive(pp_group, tied_gradient, last, "tied gradient", stream->Record())));
    ops::Add(ops(), table(), tied_gradient);
  }
  return absl::OkStatus();
}

absl::Status Trainer::Impl::SendTiedValues() {
  if (plan.step.stages == 1 || !config.model.tie_embeddings) return absl::OkStatus();
  const int first = plan.step.place_of_stage.front(), last = plan.step.place_of_stage.back();
  const StagePlan &lowest = plan.stages.front(), &highest = plan.stages.back();
  const bool has_table = lowest.stage == 0, has_copy = highest.copy.valid();
  const auto table = [&] { return ShardOf(*stages.front().dp, lowest.model.tied)->value; };
  const auto copy = [&] { return ShardOf(*stages.back().dp, highest.copy)->value; };
  if (has_table && has_copy) {
    if (table().rows() > 0) ops::Copy(ops(), copy(), table());
  } else if (has_table && table().rows() > 0) {
    return comm->Wait(*stream,
                      comm->Send(pp_group, table(), last, "tied values", stream->Record()));
  } else if (has_copy && copy().rows() > 0) {
    return comm->Wait(*stream,
                      comm->Receive(pp_group, copy(), first, "tied values", stream->Record()));
  }
  return absl::OkStatus();
}

absl::Status Trainer::Impl::GatherParameters() {
  STRETTO_RETURN_IF_ERROR(SendTiedValues());
  for (size_t s = 0; s < stages.size(); ++s) {
    const TraceScope scope(comm->trace(), {.stage = plan.stages[s].stage});
    STRETTO_RETURN_IF_ERROR(stages[s].dp->GatherParameters());
  }
  return absl::OkStatus();
}

absl::Status Trainer::Impl::WaitParameters() {
  for (Stage& stage : stages) STRETTO_RETURN_IF_ERROR(stage.dp->WaitParameters());
  return absl::OkStatus();
}

absl::Status Trainer::Impl::EndFloat8Step() {
  if (float8 == nullptr) return absl::OkStatus();
  if (dp_group.size() > 1) {
    STRETTO_RETURN_IF_ERROR(WaitIn(StepPhase::kExposedData,
                                   comm->AllReduce(dp_group, float8->Magnitudes(), ReduceOp::kMax,
                                                   "fp8 magnitudes", stream->Record())));
  }
  float8->EndStep(ops());
  return absl::OkStatus();
}

absl::Status Trainer::Impl::WriteTrace() {
  if (trace == nullptr) return absl::OkStatus();
  // Gathers of parameters may still be under way.
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  const absl::Status written = trace->Close();
  STRETTO_RETURN_IF_ERROR(comm->status());
  if (!written.ok()) {
    LogWarning(absl::StrCat(std::string(written.message()), " The run goes on without a trace."));
  }
  return absl::OkStatus();
}

void Trainer::Impl::WriteTraceAlone() {
  if (trace == nullptr) return;
  const absl::Status written = trace->CloseAlone();
  if (!written.ok()) LogWarning(std::string(written.message()));
}

absl::StatusOr<StepStats> Trainer::Impl::Step() {
  if (trace == nullptr) return Step(nullptr);
  // What tracing itself takes belongs to no step.
  const auto apart = [&](const std::function<absl::Status()>& work) {
    const auto begin = std::chrono::steady_clock::now();
    absl::Status status = work();
    last_step_end += std::chrono::steady_clock::now() - begin;
    return status;
  };
  TraceRecorder* recorder = nullptr;
  STRETTO_RETURN_IF_ERROR(apart([&]() -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(recorder, trace->BeginStep(state.step + 1));
    return absl::OkStatus();
  }));
  absl::StatusOr<StepStats> stats = Step(recorder);
  if (recorder != nullptr && trace->EndStep() && stats.ok()) {
    STRETTO_RETURN_IF_ERROR(apart([&] { return WriteTrace(); }));
  }
  return stats;
}

absl::StatusOr<StepStats> Trainer::Impl::Step(TraceRecorder* recorder) {
  const auto start = std::chrono::steady_clock::now();
  if (!clock_started) last_step_end = start;
  const bool first = !std::exchange(clock_started, true);
  if (first) set_up.Enter("warm-up");  // what the caller did in between, too
  std::span<const PackedBatch> batches;
  const PlannedStep* planned = nullptr;
  {
    const TraceSpan span(recorder, "host", "data wait");
    if (plan_loader != nullptr) {
      STRETTO_ASSIGN_OR_RETURN(planned, plan_loader->Step(state.step));
      batches = planned->shares();
    } else {
      STRETTO_ASSIGN_OR_RETURN(const std::vector<PackedBatch>* const read,
                               loader->Step(state.step));
      batches = *read;
    }
  }
  const auto data_ready = std::chrono::steady_clock::now();

  timer->Restart(static_cast<int>(StepPhase::kForward));
  for (Stage& stage : stages) stage.dp->BeginStep(*stage.run);
  ops::Zero(ops(), scalars);
  TokenWork work;
  // All ranks of a pipeline and of a tensor axis work on the same tokens.
  if (pp_group.index == 0 && tp_group.index == 0) {
    for (const PackedBatch& batch : batches) {
      if (batch.ring.size() == 1) {
        work += WorkOf(batch.cu_seqlens);
        continue;
      }
      work.tokens += batch.tokens();
      if (batch.ring.index > 0) continue;  // one of them counts the pairs
      for (const int64_t length : batch.ring.lengths) work.squared_lengths += length * length;
    }
  }
  STRETTO_RETURN_IF_ERROR(RunBatches(batches, /*training=*/true, /*hooks=*/true, planned));
  // In the order in which backward completes stages, on all ranks alike.
  for (size_t s = stages.size(); s-- > 0;) {
    const TraceScope scope(recorder, {.stage = plan.stages[s].stage});
    STRETTO_RETURN_IF_ERROR(stages[s].dp->FinishGradients(*stages[s].run));
    STRETTO_RETURN_IF_ERROR(stages[s].partial->Sum());
  }
  STRETTO_RETURN_IF_ERROR(executor->Finish());
  STRETTO_RETURN_IF_ERROR(SumTiedGradients());
  timer->Begin(static_cast<int>(StepPhase::kUpdate));
  static_assert(StepScalars::kSeenTokens == StepScalars::kStop + 1 &&
                StepScalars::kSquaredLengths == StepScalars::kStop + 2 &&
                StepScalars::kPlan == StepScalars::kStop + 3);
  // Ranks whose last snapshot came too early are counted in the fraction.
  const bool missed = snapshots != nullptr && snapshots->missed();
  host_inputs[0] = (StopSignals::Received() != 0 ? 1 : 0) + (missed ? kMissedSnapshot : 0);
  host_inputs[1] = static_cast<double>(work.tokens);
  host_inputs[2] = static_cast<double>(work.squared_lengths);
  const bool compares = plan_loader != nullptr && state.step + 1 < config.steps;
  uint64_t next_plan = 0;
  double ahead_seconds = 0;
  if (plan_loader != nullptr) {
    double *const upper = host_inputs - kPlanSums, *const lower = host_inputs + 3;
    *upper = *lower = 0;
    if (compares) {
      const TraceSpan span(recorder, "host", "data wait");
      const auto begin = std::chrono::steady_clock::now();
      const auto next = plan_loader->Ahead(state.step + 1);
      ahead_seconds = Seconds(begin, std::chrono::steady_clock::now());
      next_plan = next.ok() ? (*next)->hash : 0;
      // What fails there is an error of that step, not of this one.
      const double unknown = next.ok() ? 0 : std::numeric_limits<double>::quiet_NaN();
      *upper = static_cast<double>(next_plan >> 32) + unknown;
      *lower = static_cast<double>(next_plan & 0xffffffff) + unknown;
    }
    CopyBytes(*stream, sums.data, upper, kPlanSums * static_cast<int64_t>(sizeof(double)));
  } else {
    host_inputs[3] = 0;
  }
  CopyBytes(*stream, scalars.Rows(StepScalars::kStop, 1).data, host_inputs,
            kHostInputs * static_cast<int64_t>(sizeof(double)));
  for (const Stage& stage : stages) stage.optimizer->AddSumSquares(scalars);
  STRETTO_RETURN_IF_ERROR(SumOverRanks(plan_loader != nullptr
                                           ? sums.Rows(0, kPlanSums + StepScalars::kReduced)
                                           : scalars.Rows(0, StepScalars::kReduced),
                                       "step scalars"));
  ops::PrepareStep(ops(), scalars, config.optimizer.clip_norm, config.spikes.max_loss);
  const double lr = learning_rate->At(state.step);
  {
    const TraceSpan span(recorder, "compute", "optimizer", &*stream);
    Update(lr);
  }
  STRETTO_RETURN_IF_ERROR(EndFloat8Step());
  CopyBytes(*stream, host_sums, sums.data, sums.bytes());
  if (config.parallel.prefetch) timer->End();
  // The update is known to be good before parameters leave: a failed stream must not spread.
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  STRETTO_RETURN_IF_ERROR(GatherParameters());
  if (!config.parallel.prefetch) {
    timer->End();
    STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  }

  const double* v = host_scalars;
  StepStats stats;
  stats.step = ++state.step;
  stats.skipped = v[StepScalars::kSkip] != 0;
  if (stats.skipped) {
    ++state.skipped;
    ++consecutive_skips;
  } else {
    ++state.applied;
    consecutive_skips = 0;
    if (float8 != nullptr) float8->SetJustInTime(false);
  }
  const double asked_to_stop = std::floor(v[StepScalars::kStop]);
  stop_agreed = stop_agreed || asked_to_stop > 0;
  if (snapshots != nullptr) snapshots->Adapt(v[StepScalars::kStop] > asked_to_stop);
  const auto end = std::chrono::steady_clock::now();
  const double seconds = Seconds(last_step_end, end);
  last_step_end = end;
  const TokenWork global = {
      .tokens = static_cast<int64_t>(v[StepScalars::kSeenTokens]),
      .squared_lengths = static_cast<int64_t>(v[StepScalars::kSquaredLengths])};
  const StepFlops flops = TrainingFlops(config.model, global);
  stats.loss = v[StepScalars::kLossSum] / v[StepScalars::kTokens];
  stats.grad_norm = v[StepScalars::kGradNorm];
  stats.lr = lr;
  stats.tokens = global.tokens;
  stats.tokens_per_second = static_cast<double>(global.tokens) / seconds;
  stats.step_ms = seconds * 1e3;
  stats.mfu_causal = ModelFlopsUtilization(flops.causal, seconds, peak_tflops, world.size());
  stats.mfu_palm = ModelFlopsUtilization(flops.palm, seconds, peak_tflops, world.size());
  stats.skipped_total = state.skipped;
  stats.data_ms = (Seconds(start, data_ready) + ahead_seconds) * 1e3;
  const std::vector<double>& phases = timer->Seconds();
  const auto ms = [&](StepPhase phase) { return 1e3 * phases[static_cast<size_t>(phase)]; };
  stats.forward_ms = ms(StepPhase::kForward);
  stats.backward_ms = ms(StepPhase::kBackward);
  stats.update_ms = ms(StepPhase::kUpdate);
  stats.exposed_data_ms = ms(StepPhase::kExposedData);
  stats.exposed_tensor_ms = ms(StepPhase::kExposedTensor);
  stats.exposed_context_ms = ms(StepPhase::kExposedContext);
  stats.exposed_pipeline_ms = ms(StepPhase::kExposedPipeline);
  stats.exposed_world_ms = ms(StepPhase::kExposedWorld);
  stats.exposed_snapshot_ms = ms(StepPhase::kExposedSnapshot);
  stats.comm_exposed_ms = stats.exposed_data_ms + stats.exposed_tensor_ms +
                          stats.exposed_context_ms + stats.exposed_pipeline_ms +
                          stats.exposed_world_ms;
  if (stream->device().kind != DeviceKind::kCpu) {
    stats.memory_bytes = budget.Used(Resource::kDeviceMemory);
  } else if (const absl::StatusOr<ProcessMemory> memory = ReadProcessMemory(); memory.ok()) {
    stats.memory_bytes = memory->peak_resident_bytes;
  }
  if (stats.skipped) {
    // All ranks see the same numbers and end here together.
    const bool stop = config.spikes.nonfinite == "stop";
    if (stop || consecutive_skips >= config.spikes.max_skipped) {
      STRETTO_RETURN_IF_ERROR(WaitParameters());
    }
    if (stop) {
      return absl::DataLossError(absl::StrFormat(
          "step %d: loss %g, gradient norm %g: not finite or above spikes.max_loss, and "
          "spikes.nonfinite is stop; parameters are those of step %d",
          stats.step, stats.loss, stats.grad_norm, stats.step - 1));
    }
    if (consecutive_skips >= config.spikes.max_skipped) {
      return absl::DataLossError(absl::StrFormat(
          "step %d: %d updates in a row were skipped (loss %g, gradient norm %g); lower "
          "optimizer.lr, or go on from an older checkpoint",
          stats.step, consecutive_skips, stats.loss, stats.grad_norm));
    }
  }
  state.record = stats;
  progress.Step(state.step);
  if (first) {
    set_up.Enter("first step");
    if (world.rank() == 0) LogInfo(absl::StrCat("set-up: ", set_up.Text()));
  }
  const auto differs = [&](double sum, uint64_t mine) {
    return !std::isnan(sum) && sum != static_cast<double>(mine) * world.size();
  };
  if (compares && (differs(host_sums[0], next_plan >> 32) ||
                   differs(v[StepScalars::kPlan], next_plan & 0xffffffff))) {
    STRETTO_RETURN_IF_ERROR(WaitParameters());
    STRETTO_RETURN_IF_ERROR(ComparePlans(next_plan));
  }
  return stats;
}

absl::StatusOr<double> Trainer::Impl::Evaluate() {
  if (validation_data == nullptr) {
    return absl::FailedPreconditionError(
        "there is nothing to evaluate on; name a token file in data.validation");
  }
  STRETTO_RETURN_IF_ERROR(WaitParameters());
  const int64_t samples = std::min(config.evaluate.samples, validation_data->samples());
  for (Stage& stage : stages) stage.evaluation_run->BeginStep();
  ops::Zero(ops(), evaluation_total);
  for (int64_t first = 0; first < samples; first += config.batch.micro * dp_group.size()) {
    // One micro-batch for each rank at a time, samples dealt in order.
    const int64_t begin = std::min(samples, first + config.batch.micro * dp_group.index);
    const int64_t end = std::min(samples, begin + config.batch.micro);
    if (begin == end && zero() < 3) continue;  // else others gather what this rank has a part of
    evaluation_batch[0].Clear();
    for (int64_t i = begin; i < end; ++i) {
      STRETTO_RETURN_IF_ERROR(validation_data->Append(i, &evaluation_batch[0]));
    }
    STRETTO_RETURN_IF_ERROR(RunBatches(begin == end ? no_batch : evaluation_batch,
                                       /*training=*/false, /*hooks=*/true));
    STRETTO_RETURN_IF_ERROR(stream->Synchronize());  // the batch is about to be overwritten
    progress.Beat("evaluate", state.step);
  }
  STRETTO_RETURN_IF_ERROR(executor->Finish());
  STRETTO_RETURN_IF_ERROR(SumOverRanks(evaluation_total, "evaluation"));
  CopyBytes(*stream, host_scalars, evaluation_total.data, evaluation_total.bytes());
  STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  const double* total = host_scalars;
  if (total[1] == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("no token of the ", samples, " validation samples counts for the loss"));
  }
  return total[0] / total[1];
}

Trainer::Trainer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Trainer::~Trainer() {
  // Its copies wait for an event of the stream, which ends before them.
  if (impl_->snapshots != nullptr) impl_->snapshots->Wait();
  impl_->WriteTraceAlone();
}

absl::StatusOr<StepStats> Trainer::Step() { return impl_->Step(); }
absl::StatusOr<double> Trainer::Evaluate() { return impl_->Evaluate(); }

absl::Status Trainer::Save() {
  Impl& t = *impl_;
  STRETTO_RETURN_IF_ERROR(t.WaitParameters());
  STRETTO_RETURN_IF_ERROR(t.stream->Synchronize());
  t.progress.Beat("save", t.state.step);
  t.registry.SetEpoch(t.state.step);
  return t.checkpoints->Save(t.state.step, t.registry, ToJson(t.state));
}

void Trainer::Snapshot() { impl_->Snapshot(); }

std::optional<SnapshotStats> Trainer::snapshot_stats() const {
  if (impl_->snapshots == nullptr) return std::nullopt;
  return impl_->snapshots->stats();
}

absl::Status Trainer::Finish() {
  Impl& t = *impl_;
  t.progress.Beat("finish", t.state.step);
  absl::Status status = t.WaitParameters();
  status.Update(t.stream->Synchronize());
  if (status.ok()) status = t.WriteTrace();  // of a window that the run did not reach the end of
  status.Update(t.checkpoints->Finish());
  t.FinishSnapshots();
  for (auto& sink : t.sinks) status.Update(sink->Finish());
  return status;
}

void Trainer::AddSink(std::unique_ptr<MetricsSink> sink) {
  impl_->sinks.push_back(std::move(sink));
}

const std::vector<std::pair<std::string, double>>& Trainer::set_up_seconds() const {
  return impl_->set_up.seconds();
}
int64_t Trainer::step() const { return impl_->state.step; }
const TrainConfig& Trainer::config() const { return impl_->config; }
int64_t Trainer::BytesSent(const std::string& axis) const { return impl_->comm->BytesSent(axis); }
int64_t Trainer::BytesCopied(const std::string& axis) const {
  return impl_->comm->BytesCopied(axis);
}
const Model& Trainer::model() const { return impl_->plan.stages.front().model; }

std::string Trainer::Describe() const {
  const Impl& t = *impl_;
  std::string where = t.kernels->name;
  if (t.stream->device().kind == DeviceKind::kCpu) {
    where = absl::StrCat(t.config.runtime.threads, " threads each");
  } else if (const auto info = DescribeDevice(t.stream->device()); info.ok()) {
    where = absl::StrCat(info->name, ", ", info->total_bytes >> 30, " GiB");
  }
  std::string out = absl::StrFormat(
      "%s, %.2f M parameters in %s, %d %s (%s) on %s: %s\n", t.config.model.family.c_str(),
      static_cast<double>(ParameterCount(t.config.model)) / 1e6, Name(t.first_graph().dtype),
      t.world.size(), t.world.size() == 1 ? "rank" : "ranks", t.world.info().source.c_str(),
      Name(t.stream->device()).c_str(), where);
  if (t.documents != nullptr) {
    absl::StrAppendFormat(&out,
                          "%d documents of %d tokens at most and %d together, %d a step; ranks of "
                          "%d tokens share them by a %s mesh",
                          t.documents->documents(), t.config.data.sequence_length,
                          t.documents->tokens(), t.config.batch.tokens, t.plan.micro_batch_tokens,
                          t.config.parallel.mesh);
    if (t.config.parallel.cp > 1) absl::StrAppendFormat(&out, " of %d", t.config.parallel.cp);
  } else {
    absl::StrAppendFormat(&out, "%d samples of %d tokens, %d a step; %d micro-batch tokens planned",
                          t.train_data->samples(), t.config.data.sequence_length,
                          t.config.batch.global, t.plan.micro_batch_tokens);
  }
  if (t.plan.step.stages > 1) {
    absl::StrAppendFormat(&out, "; %d pipelines of %d ranks, %s, blocks of the stages %s",
                          t.dp_group.size(), t.pp_group.size(), Name(t.plan.step.kind),
                          absl::StrJoin(t.plan.blocks, "+"));
  }
  if (t.zero() > 1) absl::StrAppendFormat(&out, "; ZeRO-%d", t.zero());
  if (t.tp_group.size() > 1) {
    absl::StrAppendFormat(&out, "; each layer shared by %d ranks", t.tp_group.size());
  }
  if (t.float8 != nullptr) {
    absl::StrAppendFormat(&out, "; %d linear layers in FP8 (%s)", t.float8->weights(),
                          t.config.runtime.fp8.c_str());
  }
  if (t.peak_tflops > 0) {
    absl::StrAppendFormat(&out, "; MFU against %.3f TFLOP/s a rank (%s)", t.peak_tflops,
                          t.config.runtime.peak_tflops > 0 ? "configured" : "measured product");
  }
  absl::StrAppend(&out, "\n");
  if (t.world.size() > 1) {
    const bool cpu = t.stream->device().kind == DeviceKind::kCpu;
    absl::StrAppend(&out, "ranks\n",
                    t.mesh->Describe(t.machines, cpu ? t.world.transport().name() : "NCCL"));
  }
  absl::StrAppend(&out, "memory of a rank\n", t.plan.MemoryTable());
  return out;
}

absl::StatusOr<Tensor> Trainer::Parameter(const std::string& name) {
  Impl& t = *impl_;
  STRETTO_RETURN_IF_ERROR(t.WaitParameters());
  STRETTO_RETURN_IF_ERROR(t.stream->Synchronize());
  for (size_t s = 0; s < t.stages.size(); ++s) {
    const Graph& graph = t.plan.stages[s].model.graph;
    for (size_t i = 0; i < graph.parameters.size(); ++i) {
      if (graph.parameters[i].spec.name == name) {
        return t.stages[s].dp->CompleteParameter(ParamId{static_cast<int>(i)});
      }
    }
  }
  return absl::NotFoundError(
      absl::StrCat("the model has no parameter named ", name,
                   t.pp_group.size() > 1 ? " on this rank; others have other stages of it" : ""));
}

}  // namespace stretto
