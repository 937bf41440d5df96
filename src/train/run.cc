// Trainer::Run: steps until the configured one, with what belongs between them: checkpoints,
// snapshots, evaluations, records.
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/log.h"

namespace stretto {

absl::StatusOr<RunResult> Trainer::Run() {
  Impl& t = *impl_;
  absl::StatusOr<RunResult> result = t.Run(*this);
  if (!result.ok()) t.WriteTraceAlone();
  if (!result.ok() && t.world.size() > 1) {
    // What this rank had communicated, for whoever asks why.
    const absl::Status dumped =
        t.comm->recorder().Dump(t.config.metrics.flight_directory, t.world.rank(), t.world.size());
    if (!dumped.ok()) LogWarning(std::string(dumped.message()));
  }
  return result;
}

// Of the step that was restored, on the rank that writes records; the same answer on all ranks.
absl::StatusOr<bool> Trainer::Impl::LacksRecord() {
  if (!state.record || state.record->step != state.step) return false;
  const bool lacks = std::any_of(sinks.begin(), sinks.end(),
                                 [this](const auto& sink) { return sink->Lacks(state.step); });
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("records of the restored step", lacks ? "lacks" : ""));
  return std::any_of(all.begin(), all.end(), [](const auto& text) { return !text.empty(); });
}

absl::StatusOr<RunResult> Trainer::Impl::Run(Trainer& trainer) {
  Impl& t = *this;
  // One process may hold several ranks as threads; the first of them answers SIGUSR2.
  std::error_code ignored;
  std::filesystem::create_directories(config.metrics.flight_directory, ignored);  // Dump reports it
  InstallFlightDumpOnSignal(*comm, config.metrics.flight_directory).IgnoreError();
  const auto every = [](int64_t step, int64_t n) { return n > 0 && step % n == 0; };
  int64_t saved_step = -1;
  std::vector<bool> sink_failed(t.sinks.size(), false);
  const auto record = [&](const StepStats& stats) {
    for (size_t i = 0; i < t.sinks.size(); ++i) {
      const absl::Status written = t.sinks[i]->Write(stats);
      // Said when it begins, not in every step of a full disk.
      if (!written.ok() && !sink_failed[i]) {
        LogWarning(absl::StrCat(std::string(written.message()),
                                " Training goes on without it; said once."));
      }
      sink_failed[i] = !written.ok();
    }
  };
  const auto evaluate = [&](StepStats* stats) -> absl::Status {
    if (t.validation_data == nullptr ||
        (stats->step != t.config.steps && !every(stats->step, t.config.evaluate.every))) {
      return absl::OkStatus();
    }
    STRETTO_ASSIGN_OR_RETURN(stats->eval_loss, t.Evaluate());
    return absl::OkStatus();
  };
  // A run that was killed may have saved its newest step and not recorded it.
  STRETTO_ASSIGN_OR_RETURN(const bool unrecorded, t.LacksRecord());
  if (unrecorded) {
    STRETTO_RETURN_IF_ERROR(evaluate(&*t.state.record));
    record(*t.state.record);
  }
  const auto save = [&]() -> absl::Status {
    if (saved_step == t.state.step) return absl::OkStatus();
    saved_step = t.state.step;
    return trainer.Save();
  };
  while (t.state.step < t.config.steps) {
    STRETTO_ASSIGN_OR_RETURN(StepStats stats, t.Step());
    const bool last = t.state.step == t.config.steps;
    // Before the evaluation, which may fail. Not while updates are skipped: weights that have gone
    // bad must not take the place of good ones.
    const bool sound = t.consecutive_skips == 0 || (last && std::isfinite(stats.loss));
    if ((every(t.state.step, t.config.checkpoint.every) || last) && sound && !t.stop_agreed) {
      STRETTO_RETURN_IF_ERROR(save());
    }
    if (t.snapshots != nullptr && every(t.state.step, t.config.snapshot.every) && sound) {
      t.Snapshot();
    }
    if (last && !sound) {
      const absl::Status finished = trainer.Finish();
      return absl::DataLossError(absl::StrFormat(
          "the run ended with %d skipped updates in a row (loss %g), so the weights of step %d are "
          "not saved; lower optimizer.lr, or go on from an older checkpoint%s%s",
          t.consecutive_skips, stats.loss, t.state.step, finished.ok() ? "" : ". ",
          std::string(finished.message()).c_str()));
    }
    STRETTO_RETURN_IF_ERROR(evaluate(&stats));
    record(stats);
    if (t.stop_agreed) {
      const std::vector<int> dead = t.world.DeadRanks();
      if (!dead.empty()) {
        return absl::UnavailableError(absl::StrCat(
            "asked to stop, but rank ", dead[0],
            " is gone, so nothing is saved; the newest earlier checkpoint stays valid"));
      }
      STRETTO_RETURN_IF_ERROR(save());
      STRETTO_RETURN_IF_ERROR(trainer.Finish());
      return RunResult::kRequested;
    }
  }
  STRETTO_RETURN_IF_ERROR(trainer.Finish());
  return RunResult::kFinished;
}

}  // namespace stretto
