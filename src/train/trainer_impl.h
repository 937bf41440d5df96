// The state behind Trainer; shared by the files that implement it.
#ifndef STRETTO_SRC_TRAIN_TRAINER_IMPL_H_
#define STRETTO_SRC_TRAIN_TRAINER_IMPL_H_

#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "src/train/output_lock.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/budget.h"
#include "stretto/core/stream.h"
#include "stretto/data/dataset.h"
#include "stretto/data/documents.h"
#include "stretto/data/loader.h"
#include "stretto/data/plan_loader.h"
#include "stretto/data/tokenizer.h"
#include "stretto/model/float8.h"
#include "stretto/observe/progress.h"
#include "stretto/observe/signals.h"
#include "stretto/observe/step_trace.h"
#include "stretto/optim/optimizer.h"
#include "stretto/parallel/context.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/pipeline.h"
#include "stretto/parallel/stages.h"
#include "stretto/parallel/tensor_parallel.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/snapshotter.h"
#include "stretto/train/flops.h"
#include "stretto/train/memory.h"
#include "stretto/train/schedule.h"
#include "stretto/train/trainer.h"

namespace stretto {

// What a checkpoint remembers besides the registry: stored as JSON.
struct TrainerState {
  int64_t step = 0;     // completed steps; the data order follows from it
  int64_t applied = 0;  // updates not skipped; Adam's bias correction counts these
  int64_t skipped = 0;
  std::string config;   // resolved
  std::string output;   // absolute
  std::string choices;  // what the backend chose by measuring (KernelTable::export_choices)
  std::string tokens;   // fingerprint of a sample of data.train (TokenFingerprint)
  // With data.documents: of their lengths, and what they cost (ToJson of a CostModel) by which
  // file; empty without a cost model.
  std::string documents, costs, costs_file;
  // Of the newest step, what is the same on all ranks and in each repetition (times are NaN): its
  // record may not have been written when a run is killed.
  std::optional<StepStats> record;
};
std::string ToJson(const TrainerState& state);
// FAILED_PRECONDITION names the first setting that makes the model another one, between a run's
// resolved configuration and this run's. `source` names the checkpoint. Fields that either side
// does not have are passed over.
absl::Status SameModel(const std::string& saved, const std::string& current,
                       const std::string& source);
// The same, and whatever else a run that goes on must not change: which samples come when, which
// random numbers are drawn, and in which types the parameters and the optimizer's state are kept.
absl::Status SameRun(const std::string& saved, const std::string& current,
                     const std::string& source);
absl::StatusOr<TrainerState> ParseTrainerState(const std::string& json, const std::string& source);

// What a rank writes to the step's scalars from the host, from StepScalars::kStop on.
inline constexpr int kHostInputs = 4;
// In StepScalars::kStop beside the ranks that were asked to stop: those that missed a snapshot.
// Sums of it are exact, and below 1 for all numbers of ranks.
inline constexpr double kMissedSnapshot = 0x1p-24;

// Where the time before and in the first step goes.
class SetUpTimes {
 public:
  // What was done since the last call, or since the object was made, belongs to this phase.
  void Enter(const char* phase) {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    for (auto& [name, sum] : seconds_) {
      if (name == phase) {
        sum += seconds;
        return;
      }
    }
    seconds_.emplace_back(phase, seconds);
  }
  const std::vector<std::pair<std::string, double>>& seconds() const { return seconds_; }
  // "device 1.20 s, communicators 0.40 s".
  std::string Text() const;

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::vector<std::pair<std::string, double>> seconds_;
};

// With data.documents the hash of the next step's plan is summed with the scalars, as two numbers
// of so few bits that sums are exact: StepScalars::kPlan has the lower half, this many numbers in
// front of the scalars the upper one. Where hashes differ, no rank's is the mean (but by a chance
// of 2^-64), so that all ranks see it, before any of them sends something of that step.
inline constexpr int kPlanSums = 1;
inline constexpr int kStepSums = kPlanSums + StepScalars::kCount;

struct Trainer::Impl {
  Impl(World& w, const TrainConfig& c)
      : world(w),
        config(c),
        budget(c.runtime.host_memory_bytes, c.runtime.device_memory_bytes, -1) {}

  World& world;
  TrainConfig config;
  TrainerOptions options;
  Budget budget;
  RunPlan plan;
  const KernelTable* kernels = nullptr;
  std::optional<Mesh> mesh;
  std::vector<int> machines;  // of the ranks
  Group dp_group, pp_group, tp_group;
  bool dp_copied = false, tp_copied = false;  // by copy engines
  Group cp_group;  // the ranks of dp_group, for what they pass around in rings
  // What a stage of this rank runs with; stages[i] is planned in plan.stages[i].
  struct Stage {
    std::unique_ptr<DataParallel> dp;
    std::unique_ptr<PartialGradients> partial;
    std::unique_ptr<AdamW> optimizer;
    std::optional<stretto::Run> run, evaluation_run;
    Arena frames;
  };
  std::vector<Stage> stages;
  std::unique_ptr<Float8State> float8;  // null without layers in FP8; those have one stage
  Tensor tied_gradient;                 // where another rank's part of it arrives
  std::optional<LearningRate> learning_rate;
  Arena tied_arena, scalar_arena, host_arena;
  Tensor sums;              // f64 [kStepSums]
  Tensor scalars;           // f64 [StepScalars::kCount], in `sums`
  Tensor evaluation_total;  // f64 [2]
  // On the host, for copies from and to the stream's device: what this rank adds to the scalars
  // kStop, kSeenTokens, kSquaredLengths and kPlan (behind what goes in front of them), and the
  // scalars as they came back.
  double* host_inputs = nullptr;
  double* host_sums = nullptr;
  double* host_scalars = nullptr;  // in host_sums
  std::unique_ptr<ModelStages> worker;
  std::unique_ptr<PipelineExecutor> executor;
  // With a pipeline for each number of micro-batches that this rank can have in a step, else for
  // one micro-batch; and of an evaluation.
  std::vector<std::unique_ptr<RankProgram>> step_programs;
  std::vector<StageParts> parts;  // of the run under way
  std::optional<RankProgram> evaluation_program;

  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<TokenDataset> train_data, validation_data;
  std::unique_ptr<Loader> loader;
  // With data.documents in place of `train_data` and `loader`.
  std::unique_ptr<DocumentDataset> documents;
  std::unique_ptr<PlanLoader> plan_loader;
  // Of this rank, with a pipeline: of the step that runs and of the next one, by the step's parity.
  std::unique_ptr<RankProgram> planned_programs[2];
  std::vector<PackedBatch> evaluation_batch;  // one
  std::vector<PackedBatch> no_batch;          // none

  OutputLock lock;  // rank 0
  StateRegistry registry;
  std::unique_ptr<CheckpointWriter> checkpoints;
  std::unique_ptr<Snapshotter> snapshots;  // null without keepers
  TrainerState state;
  int64_t consecutive_skips = 0;
  double peak_tflops = 0;  // of one rank
  bool stop_agreed = false;
  std::vector<std::unique_ptr<MetricsSink>> sinks;
  std::chrono::steady_clock::time_point last_step_end;
  bool clock_started = false;
  ProgressFile progress;  // where STRETTO_PROGRESS says
  SetUpTimes set_up;
  bool dp_fixed = false;  // by the configuration as it was asked for

  // Last, so that they end first: whatever is in flight reads and writes the memory above.
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> comm;
  std::unique_ptr<PhaseTimer> timer;
  std::unique_ptr<StepTrace> trace;  // with metrics.trace_steps
  std::unique_ptr<TensorAxis> tensor_axis;
  std::unique_ptr<ContextAxis> context_axis;  // with data.documents
  std::optional<ReplayCache> replays;         // with runtime.graphs

  ops::Context ops() const { return {stream.get(), kernels}; }
  absl::Status SetUp();
  // The parts of SetUp, in order; each ends in an agreement of all ranks.
  absl::Status SetUpRuntime();
  // For who watches from outside. A failure is a warning.
  void OpenProgress();
  void WriteFacts() const;
  absl::Status SetUpModel();
  absl::Status SetUpCopyEngines();
  absl::Status ShareMemory();
  absl::Status SetUpData();
  absl::Status CompareData();  // with that of the other ranks
  absl::Status SetUpPlans();
  // Rank 0: state.costs and state.costs_file become those of parallel.cost_model where that names
  // others than the checkpoint has. `source` names them.
  absl::Status ChooseCosts(std::string* source);
  // Refuses ranks whose next step is planned in another way, naming them. All ranks come here.
  absl::Status ComparePlans(uint64_t hash);
  // SameRun, and the documents that a step takes. Warns of other tokens where there are none.
  absl::Status SameRunAs(const TrainerState& saved, const std::string& source) const;
  absl::Status Restore();
  // Random parameters, where nothing was loaded.
  absl::Status Initialize();
  // What the registry was loaded with becomes the run's state: `saved`, from `source`.
  absl::Status Continue(const TrainerState& saved, const std::string& source);
  // Finds the keepers, if there are any, and restores from their memory; false: they have nothing
  // as new as step `newest`, or it cannot be read and there is a checkpoint (newest >= 0).
  absl::StatusOr<bool> RestoreSnapshot(int64_t newest);
  // Begins one of the state as it is now, where there is a keeper.
  void Snapshot();
  // Work enqueued from now on may write what part `part` of the update does; -1: everything.
  void WaitForSnapshot(int part);
  // The optimizer of all stages, in parts where a snapshot still reads what it writes.
  void Update(double lr);
  void FinishSnapshots();
  absl::StatusOr<bool> LacksRecord();
  absl::Status MeasurePeak();
  // Runs one micro-batch of made-up tokens, so that libraries are loaded and what the backend
  // chooses by measuring is chosen before the first step.
  absl::Status WarmUp();

  absl::StatusOr<StepStats> Step();
  // What a step does, recorded in `recorder` unless that is null.
  absl::StatusOr<StepStats> Step(TraceRecorder* recorder);
  // Writes the trace where one is open. What stops the run is an error, a full disk is not.
  absl::Status WriteTrace();
  // The same by this rank alone, which cannot go on.
  void WriteTraceAlone();
  absl::StatusOr<double> Evaluate();
  absl::StatusOr<RunResult> Run(Trainer& trainer);
  // Ends a step for the scales of FP8 operands, which all ranks then have alike.
  absl::Status EndFloat8Step();
  // What is enqueued from now on waits for `ticket` in `phase`.
  absl::Status WaitIn(StepPhase phase, Ticket ticket) {
    return TimedWait(*comm, *stream, timer.get(), phase, ticket);
  }
  // In place, over all ranks.
  absl::Status SumOverRanks(Tensor data, const char* label);
  // Forward and backward, or forward alone, of this rank's micro-batches, and as many empty ones as
  // others have more where they exchange something in each. Without `hooks` gradients stay here and
  // parameters must be complete; those that are not are whatever lies in their buffers.
  // `planned`: the step of these batches, where documents are planned, else null.
  absl::Status RunBatches(std::span<const PackedBatch> batches, bool training, bool hooks,
                          const PlannedStep* planned = nullptr);
  // The table that the first and the last stage share: its gradients are summed where it is
  // updated, and the copy receives the new values.
  absl::Status SumTiedGradients();
  absl::Status SendTiedValues();
  absl::Status GatherParameters();
  absl::Status WaitParameters();
  const Graph& first_graph() const { return plan.stages.front().model.graph; }
  int zero() const { return plan.stages.front().buckets.zero; }
};

}  // namespace stretto

#endif  // STRETTO_SRC_TRAIN_TRAINER_IMPL_H_
