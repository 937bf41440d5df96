// What the subcommands of stretto-bench share.
#ifndef STRETTO_BENCHMARKS_BENCH_H_
#define STRETTO_BENCHMARKS_BENCH_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stretto/comm/world.h"
#include "stretto/core/device.h"
#include "stretto/core/device_name.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/status.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/train/config.h"
#include "stretto/train/trainer.h"

namespace stretto::bench {

using Json = nlohmann::ordered_json;

constexpr int kDone = kExitDone, kFailed = kExitFailed, kUsage = kExitUsage;

// A subcommand, with the arguments behind its name; returns the exit code and has printed what is
// wrong.
int Kernels(int argc, const char* const* argv);
int Comm(int argc, const char* const* argv);
int Train(int argc, const char* const* argv);
int Compare(int argc, const char* const* argv);
int Fit(int argc, const char* const* argv);
int Snapshot(int argc, const char* const* argv);
int Predict(int argc, const char* const* argv);
int Varlen(int argc, const char* const* argv);

// What one run measured, for --json and `compare`. Every result has a "name", unique in the run,
// and "seconds".
struct Results {
  std::string command;
  std::string device;
  int ranks = 1;
  std::vector<Json> results;

  // Does nothing for an empty path.
  absl::Status Write(const std::string& path) const;
};

// The file that is written while the one of this name stays as it is; a device or a link has none.
std::string Draft(const std::string& path);
// What writing to `path` would say, before there is anything to write; nothing of an empty path.
absl::Status CheckWritable(const std::string& path);

// Prints the sentence and returns `code`.
int Fail(const absl::Status& status, int code);

// The one configuration file that a subcommand takes, with overrides.
absl::StatusOr<TrainConfig> LoadOne(const std::string& subcommand,
                                    const std::vector<std::string>& files,
                                    const std::vector<std::string>& sets);

// Says on standard error, once for all ranks, what is measured next or has been.
void Tell(const World& world, const std::string& line);

// Runs `work` on all ranks of a new world; the exit code, when what is wrong has been printed. Does
// not return after an error that leaves the world in disorder.
int RunInWorld(const std::function<absl::Status(World&)>& work);

// --device: cuda and cpu are what they say, auto is a GPU where there is one. Ranks of a machine
// take a GPU each.
absl::StatusOr<Device> ChooseDevice(const std::string& device, int local_rank);

// Agrees that all ranks were started with the same configuration and the same other `options`.
absl::Status SameEverywhere(World& world, TrainConfig config, const std::string& options = "");

// Agrees that rank 0 can write to `path`; see CheckWritable.
absl::Status CheckOutput(World& world, const std::string& path);

inline constexpr int64_t kWarmUp = 3;  // steps

// Resolves the configuration of TimedSteps; INVALID_ARGUMENT also for what only it refuses: a batch
// of too many tokens to make up, a trace without a file.
absl::Status ResolveSteps(int ranks, TrainConfig* config, int64_t warm_up = kWarmUp);

// Calls `body` with a trainer on random tokens, on all ranks; with data.documents the tokens are
// documents of `lengths`, in this order. For a step more than `warm_up` at least.
absl::Status WithTrainer(World& world, TrainConfig config, const std::vector<int64_t>* lengths,
                         int64_t warm_up, const std::function<absl::Status(Trainer&)>& body);

// The steps behind the first `warm_up` of a run of config.steps steps on random tokens, on all
// ranks. Calls `inspect` with the trainer when they are done. `lengths`: see WithTrainer.
absl::StatusOr<std::vector<StepStats>> TimedSteps(
    World& world, TrainConfig config, const std::function<absl::Status(Trainer&)>& inspect,
    const std::vector<int64_t>* lengths = nullptr, int64_t warm_up = kWarmUp);

// Costs of this configuration's layers, and of communication between these ranks (fit.cc). Agreed
// errors for ranks that were started differently and for samples that are too few. Layers are
// scaled by that many whole steps of data parallelism; kDefaultSteps: 4 on GPUs, which a power
// limit slows down, none on CPUs. With data.documents several ranks also measure a ring so,
// by 4 steps unless told otherwise.
inline constexpr int64_t kDefaultSteps = -1;
absl::StatusOr<CostModel> FitCosts(World& world, TrainConfig config, int repetitions,
                                   int64_t steps = kDefaultSteps);

// What the planner's clock says of a step on documents, and the update (varlen.cc). `cost` may be
// null.
double PredictedSeconds(const TrainConfig& config, const CostModel* cost, const SequencePlan& plan);

// Milliseconds by layer of a micro-batch on one rank, each waited for (profile.cc).
absl::Status Profile(World& world, TrainConfig config, int64_t workspace_bytes, Results* results);

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double Median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : (v[v.size() / 2] + v[(v.size() - 1) / 2]) / 2;
}

// What a tenth of the measurements stay below: others on the machine only ever add time.
inline double LowerDecile(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : v[(v.size() - 1) / 10];
}

}  // namespace stretto::bench

#endif  // STRETTO_BENCHMARKS_BENCH_H_
