// A run's snapshots in the memory of keepers (stretto/snapshot/snapshotter.h): found, restored,
// told of.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/train/trainer_impl.h"
#include "stretto/core/log.h"
#include "stretto/snapshot/slot.h"

namespace stretto {
namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// Of this rank.
std::string KeeperAt(const TrainConfig& config) {
  return config.snapshot.keeper.empty() ? Variable("STRETTO_KEEPER") : config.snapshot.keeper;
}

}  // namespace

absl::StatusOr<bool> Trainer::Impl::RestoreSnapshot(int64_t newest) {
  if (config.snapshot.every == 0) return false;
  SnapshotterOptions options;
  options.keeper = KeeperAt(config);
  options.token = Variable("STRETTO_JOB_TOKEN");
  options.timeout =
      std::chrono::milliseconds(static_cast<int64_t>(config.runtime.timeout_seconds * 1000));
  options.device = stream->device();
  // On the CPU training needs the cores; beside a GPU half of them have nothing to do.
  const bool cpu = options.device.kind == DeviceKind::kCpu;
  options.threads =
      cpu ? 1 : static_cast<int>(std::clamp<int64_t>(config.runtime.threads / 2, 1, 8));
  options.restart_threads = static_cast<int>(std::clamp<int64_t>(config.runtime.threads, 1, 64));
  if (!options.keeper.empty() && !cpu) {
    STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kHostMemory, "ring of snapshots",
                                           kSnapshotChunks * kSnapshotChunkBytes));
  }
  absl::StatusOr<std::unique_ptr<Snapshotter>> created =
      Snapshotter::Create(world, registry, std::move(options));
  if (absl::IsDataLoss(created.status()) && newest >= 0) {
    if (world.rank() == 0) {
      LogWarning(absl::StrCat(std::string(created.status().message()),
                              "; going on from the newest checkpoint, without snapshots"));
    }
    return false;
  }
  STRETTO_ASSIGN_OR_RETURN(snapshots, std::move(created));
  if (snapshots == nullptr) return false;
  if (config.checkpoint.resume == "never") {
    snapshots->Forget();
    return false;
  }
  if (snapshots->lost() && world.rank() == 0) {
    LogWarning(absl::StrCat(
        "the keepers held a snapshot, and too many nodes are gone to put it together; ",
        newest >= 0 ? "going on from the newest checkpoint" : "there is no checkpoint, either"));
  }
  const std::optional<RestorableSnapshot>& snapshot = snapshots->restorable();
  if (!snapshot || snapshot->epoch < newest) {
    snapshots->Forget();
    return false;
  }
  const std::string source = absl::StrCat("the keepers' snapshot of step ", snapshot->epoch);
  TrainerState saved;
  const auto load = [&]() -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(saved, ParseTrainerState(snapshot->trainer_state, source));
    if (saved.output != state.output) {
      // Its records and checkpoints are elsewhere, and it may be done.
      return absl::InvalidArgumentError(absl::StrCat(
          source, " is of the run with output ", saved.output, ", not ", state.output,
          "; set output back to go on with that, or give this run keepers of another --job, or "
          "none (snapshot.every=0)"));
    }
    STRETTO_RETURN_IF_ERROR(SameRunAs(saved, source));
    return snapshots->Restore();
  };
  const absl::Status loaded = world.Agree("restoring a snapshot", load());
  if (!loaded.ok()) {
    // What it wrote over is read again from the checkpoint; without one there is nothing to go on
    // from.
    if (newest < 0 || !absl::IsDataLoss(loaded)) return loaded;
    if (world.rank() == 0) {
      LogWarning(absl::StrCat(std::string(loaded.message()),
                              "; going on from the newest checkpoint instead"));
    }
    return false;
  }
  STRETTO_RETURN_IF_ERROR(Continue(saved, source));
  return true;
}

void Trainer::Impl::Snapshot() {
  if (snapshots == nullptr) return;
  // Written down by the other thread: this one has the next step to enqueue.
  snapshots->Capture(
      state.step, [saved = state] { return ToJson(saved); }, stream->Record());
}

void Trainer::Impl::WaitForSnapshot(int part) {
  if (snapshots == nullptr || !snapshots->copying()) return;
  const int before = timer->Begin(static_cast<int>(StepPhase::kExposedSnapshot));
  snapshots->WaitForPart(*stream, part);
  timer->Begin(before);
}

void Trainer::Impl::Update(double lr) {
  int first_part = 0;
  for (const Stage& stage : stages) {
    const auto wait = [&](int part) { WaitForSnapshot(first_part + part); };
    const bool copying = snapshots != nullptr && snapshots->copying();
    stage.optimizer->Step(scalars, lr, state.applied + 1,
                          copying ? std::function<void(int)>(std::cref(wait)) : nullptr);
    first_part += stage.optimizer->parts();
  }
  WaitForSnapshot(-1);  // what follows the update writes the rest
}

namespace {

// The newest step of which the keepers hold a snapshot of all ranks, as this rank's keeper says
// within a few seconds; -1: none.
int64_t NewestCommitted(const std::string& keeper) {
  constexpr std::chrono::seconds kPatience(2);
  int64_t newest = -1;
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (newest < 0 && std::chrono::steady_clock::now() < end) {
    const absl::StatusOr<std::string> status = AskKeeper(keeper, Variable("STRETTO_JOB_TOKEN"));
    if (!status.ok()) return -1;
    newest = CommittedStep(*status);
    if (newest < 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return newest;
}

}  // namespace

void Trainer::Impl::FinishSnapshots() {
  if (snapshots == nullptr) return;
  snapshots->Wait();
  const SnapshotStats stats = snapshots->stats();
  if (world.rank() != 0 || stats.captured + stats.passed_over == 0) return;
  const int64_t newest = NewestCommitted(KeeperAt(config));
  if (stats.captured > 0 && newest < 0) {
    LogWarning(
        "none of the snapshots is COMMITTED: the keepers do not hold one of all ranks; their logs "
        "and stretto-keeper --ask say why");
  }
  LogInfo(absl::StrFormat(
      "%d snapshots taken and %d passed over: one every %.1f steps; the host waited %.3f s for "
      "copies to be enqueued; %s",
      stats.captured, stats.passed_over,
      static_cast<double>(config.snapshot.every * (stats.captured + stats.passed_over)) /
          static_cast<double>(std::max<int64_t>(1, stats.captured)),
      stats.waited_seconds,
      newest < 0 ? "none is COMMITTED"
                 : absl::StrCat("the newest that is COMMITTED is of step ", newest)));
}

}  // namespace stretto
