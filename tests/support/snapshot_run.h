// A run that snapshots into a keeper each step, is left, and goes on from there; on any device and
// number of data-parallel ranks.
#ifndef STRETTO_TESTS_SUPPORT_SNAPSHOT_RUN_H_
#define STRETTO_TESTS_SUPPORT_SNAPSHOT_RUN_H_

#include <stdlib.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "stretto/comm/world.h"
#include "stretto/snapshot/keeper.h"
#include "stretto/snapshot/snapshotter.h"
#include "stretto/train/memory.h"
#include "stretto/train/trainer.h"

namespace stretto::testing {

// The keeper of a test's machine, in a thread of rank 0.
class KeeperThread {
 public:
  absl::Status Start(const std::string& socket) {
    KeeperOptions options = {.job = absl::StrCat("run-test-", getpid()), .token = "secret"};
    options.socket = socket;
    STRETTO_ASSIGN_OR_RETURN(keeper_, Keeper::Start(options));
    thread_ = std::thread([this] { (void)keeper_->Run(); });
    return absl::OkStatus();
  }
  ~KeeperThread() {
    if (keeper_ == nullptr) return;
    keeper_->Stop();
    thread_.join();
  }

 private:
  std::unique_ptr<Keeper> keeper_;
  std::thread thread_;
};

// The newest step that the keeper has committed; 0: none.
inline int64_t CommittedStep(const std::string& keeper) {
  const absl::StatusOr<std::string> state = AskKeeper(keeper, "secret");
  int64_t newest = 0;
  constexpr char kWord[] = "COMMITTED step ";
  for (size_t at = 0; state.ok() && (at = state->find(kWord, at)) != std::string::npos; ++at) {
    int64_t step = 0;
    const std::string rest = state->substr(at + sizeof(kWord) - 1);
    if (absl::SimpleAtoi(rest.substr(0, rest.find(' ')), &step)) newest = std::max(newest, step);
  }
  return newest;
}

// An error says what is wrong. `config` has outputs and data that all ranks see.
inline absl::Status CheckSnapshotRun(World& world, TrainConfig config) {
  constexpr int64_t kLeave = 12, kEnd = 15;
  setenv("STRETTO_JOB_TOKEN", "secret", 1);
  const std::string output = config.output;
  config.steps = kEnd;
  config.snapshot.part_bytes = 2048;  // several parts of the update
  config.checkpoint.resume = "auto";
  const auto wrong = [&](const std::string& what) { return absl::InternalError(what); };
  std::vector<double> expected;
  {
    TrainConfig alone = config;
    alone.output = output + "-alone";
    alone.snapshot.every = 0;
    STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, alone));
    while (trainer->step() < kEnd) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
      expected.push_back(stats.loss);
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
  }
  KeeperThread keeper;
  config.output = output + "-kept";
  config.snapshot.keeper = output + ".keeper";
  const absl::Status started =
      world.rank() == 0 ? keeper.Start(config.snapshot.keeper) : absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(world.Agree("starting a keeper", started));
  const auto step_as_expected = [&](Trainer& trainer) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer.Step());
    const double loss = expected[static_cast<size_t>(stats.step - 1)];
    if (stats.loss == loss) return absl::OkStatus();
    return wrong(absl::StrCat("step ", stats.step, " has loss ", stats.loss, ", alone ", loss));
  };
  int64_t committed = 0;
  {
    STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, config));
    while (trainer->step() < kLeave) {
      STRETTO_RETURN_IF_ERROR(step_as_expected(*trainer));
      trainer->Snapshot();
      // The keeper's memory is made, and page-locked, in the background.
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    }
    const SnapshotStats stats = *trainer->snapshot_stats();
    // What the data-parallel ranks own together is one copy of the state.
    STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                             world.AllGather("bytes", absl::StrCat(stats.bytes)));
    int64_t bytes = 0, of_rank = 0;
    for (const std::string& text : all) bytes += absl::SimpleAtoi(text, &of_rank) ? of_rank : 0;
    const Graph& graph = trainer->model().graph;
    const bool bf16 = graph.dtype == DType::kBF16;
    const int64_t state = graph.ParameterElements() * (bf16 ? 14 : 12);
    const auto entries = static_cast<int64_t>(graph.parameters.size()) * (bf16 ? 4 : 3);
    if (bytes < state || bytes > state + 64 * entries * world.size()) {
      return wrong(
          absl::StrCat("the ranks' snapshots have ", bytes, " bytes, the state has ", state));
    }
    STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                             PlanRun(trainer->config(), world.size(), world.rank()));
    const auto slack = static_cast<int64_t>(0.02 * static_cast<double>(stats.bytes)) + (256 << 10);
    if (plan.snapshot_bytes < stats.bytes || plan.snapshot_bytes > stats.bytes + slack) {
      return wrong(absl::StrCat("a snapshot of ", stats.bytes, " bytes was planned with ",
                                plan.snapshot_bytes));
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
    STRETTO_RETURN_IF_ERROR(world.Barrier("left"));
    for (int i = 0; i < 200 && committed == 0; ++i) {
      committed = CommittedStep(config.snapshot.keeper);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    if (committed == 0) return wrong("no snapshot was committed");
    STRETTO_RETURN_IF_ERROR(world.Barrier("asked"));
  }
  {
    STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, config));
    if (trainer->step() < committed) {
      return wrong(absl::StrCat("step ", committed, " was committed, and the run went on from ",
                                trainer->step()));
    }
    const int64_t from = trainer->step();
    while (trainer->step() < kEnd) STRETTO_RETURN_IF_ERROR(step_as_expected(*trainer));
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
    if (world.rank() == 0) {
      std::printf("went on from step %lld of %lld\n", static_cast<long long>(from),
                  static_cast<long long>(kEnd));
    }
  }
  return world.Barrier("end");
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_SNAPSHOT_RUN_H_
