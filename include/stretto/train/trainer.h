// The trainer loop: everything that one training run needs, set up from one configuration.
#ifndef STRETTO_TRAIN_TRAINER_H_
#define STRETTO_TRAIN_TRAINER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "stretto/comm/world.h"
#include "stretto/core/status.h"
#include "stretto/data/plan_loader.h"
#include "stretto/model/model.h"
#include "stretto/observe/metrics.h"
#include "stretto/observe/step_stats.h"
#include "stretto/snapshot/snapshotter.h"
#include "stretto/train/config.h"

namespace stretto {

// How Run() ended.
enum class RunResult : uint8_t {
  kFinished,   // all steps done
  kRequested,  // SIGTERM or SIGUSR1: saved and left early; start again to go on
};

struct TrainerOptions {
  // With data.documents: plans steps in place of what parallel.mesh names. The same function on all
  // ranks; its programs keep to the configuration's places, capacity and pipeline.
  DocumentPlanner planner;
};

// Created by all ranks of the world with the same configuration (checked). Owns model, storage,
// optimizer, data and outputs. Not thread-safe.
class Trainer {
 public:
  // Resolves `config`, reads the data's headers, plans memory, restores the newest checkpoint when
  // configured. All ranks return an error when one does. Of what the configuration, the files or
  // the machine do not allow, TrainerExitCode knows that starting again does not help.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(World& world, const TrainConfig& config,
                                                         TrainerOptions options = {});
  ~Trainer();

  // One optimizer step on the global batch. Allocates nothing after the third call.
  absl::StatusOr<StepStats> Step();
  // Steps until config.steps with evaluation, checkpoints, metrics and signal handling.
  absl::StatusOr<RunResult> Run();
  // Mean loss in nats per token over the first config.evaluate.samples validation samples, the same
  // on all ranks.
  absl::StatusOr<double> Evaluate();
  // Continues `prompt` on rank 0 (empty on the others): text of up to `tokens` new tokens.
  absl::StatusOr<std::string> Sample(const std::string& prompt, int64_t tokens, double temperature,
                                     int64_t top_k);
  absl::Status
  Save();  // asynchronous when configured; errors of it surface in the next Save or Finish
  // Run does it as configured: begins a snapshot of the state in the memory of this node's keeper,
  // copied beside the next step; passed over where there is none, or no room in it. All ranks
  // alike.
  void Snapshot();
  std::optional<SnapshotStats> snapshot_stats() const;  // of this rank; none without a keeper
  absl::Status Finish();

  // Sinks receive every step on rank 0; added before Run.
  void AddSink(std::unique_ptr<MetricsSink> sink);

  int64_t step() const;  // completed steps
  const TrainConfig& config() const;
  // By phase in order: "device", "communicators", "plan", "arenas", "data", "peak", "restore",
  // "initial values" where nothing was loaded, "warm-up", and "first step" behind that.
  const std::vector<std::pair<std::string, double>>& set_up_seconds() const;
  // Without pipelines the whole model, else this rank's first stage.
  const Model& model() const;
  // Payload bytes that this rank has sent to others since the start, on the axis "dp", "pp" or
  // "tp".
  int64_t BytesSent(const std::string& axis) const;
  // ... of them by copy engines.
  int64_t BytesCopied(const std::string& axis) const;
  // Memory by arena, the mesh and the resolved sizes, for the banner.
  std::string Describe() const;
  // A parameter's value on this rank, complete, until the next call (tests, export); with a tensor
  // axis its part of it. With parallel.zero=3 all ranks that share it call this together.
  absl::StatusOr<Tensor> Parameter(const std::string& name);

 private:
  struct Impl;
  explicit Trainer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// What a program exits with after an error of a trainer: kExitUsage where starting again in the
// same way cannot end otherwise, which the errors of Create are by their code (ExitCodeOf), and
// later ones only when they are INVALID_ARGUMENT; else kExitFailed.
int TrainerExitCode(const absl::Status& status);

// True for an error of Trainer::Create that all ranks hold: the model has no room on one of them,
// in its memory or in the configuration's budget for it. They are in one place, and nothing of the
// model is left, so the world can go on with something smaller.
bool IsNoRoom(const absl::Status& status);

}  // namespace stretto

#endif  // STRETTO_TRAIN_TRAINER_H_
