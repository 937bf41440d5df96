#include "benchmarks/fit_steps.h"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "benchmarks/bench.h"
#include "stretto/core/log.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/train/prediction.h"
#include "stretto/train/sequence_planner.h"

namespace stretto::bench {
namespace {

// Of documents in one measured micro-batch, on a rank.
constexpr int64_t kMostTokens = 32768;

// What a step takes, the same number on all ranks, and the configuration as it ran.
struct Measured {
  TrainConfig config;
  double seconds = 0;
};
// Nothing where a rank has no room for the model: a fit has its other parts all the same, and says
// what it does `instead`. With `lengths` of documents the time is without waits for the data axis's
// sums, of which the planner's clock knows nothing.
absl::StatusOr<std::optional<Measured>> Measure(World& world, TrainConfig config, int64_t count,
                                                const std::string& instead,
                                                const std::vector<int64_t>* lengths = nullptr) {
  config.steps = kWarmUp + count;
  Measured measured;
  const auto resolve = [&](Trainer& trainer) {
    measured.config = trainer.config();
    return absl::OkStatus();
  };
  const absl::StatusOr<std::vector<StepStats>> steps =
      TimedSteps(world, std::move(config), resolve, lengths);
  if (IsNoRoom(steps.status())) {
    if (world.rank() == 0) {
      // A table of what takes room may be behind the sentence.
      const absl::string_view message = steps.status().message();
      LogWarning(absl::StrCat("no room for whole steps: ", instead, " (",
                              absl::StripSuffix(message.substr(0, message.find('\n')), ":"), ")"));
    }
    return std::nullopt;
  }
  STRETTO_RETURN_IF_ERROR(steps.status());
  std::vector<double> seconds;
  for (const StepStats& stats : *steps) {
    seconds.push_back(1e-3 * (stats.step_ms - (lengths != nullptr ? stats.exposed_data_ms : 0)));
  }
  const bool gpu = measured.config.runtime.device == "cuda";
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      world.AllGather("a step's time",
                      absl::StrFormat("%.17g", gpu ? Median(seconds) : LowerDecile(seconds))));
  if (!absl::SimpleAtod(all[0], &measured.seconds)) return absl::InternalError("a time is cut");
  return measured;
}

}  // namespace

TrainConfig OfDataParallelism(TrainConfig config) {
  config.parallel.dp = config.parallel.pp = config.parallel.tp = config.parallel.zero = 1;
  config.parallel.schedule = "1f1b";
  config.parallel.chunks = 0;
  config.data.document_attention = false;  // made-up tokens have separators anywhere
  if (!config.data.documents) return config;
  config.data.documents = false;
  config.data.sequence_length =
      std::min({kMostTokens, config.batch.capacity > 0 ? config.batch.capacity : kMostTokens,
                config.data.sequence_length});
  config.batch.global = config.batch.micro = 1;
  config.batch.tokens = config.batch.capacity = 0;
  config.parallel.cp = 1;
  config.parallel.mesh = "static";
  return config;
}

absl::Status ScaleByStep(World& world, const TrainConfig& of, int64_t count, CostModel* cost,
                         double* scale) {
  if (count == kDefaultSteps) {
    const absl::StatusOr<Device> device = ChooseDevice(of.runtime.device, world.info().local_rank);
    STRETTO_RETURN_IF_ERROR(world.Agree("choosing the device", device.status()));
    count = device->kind == DeviceKind::kCpu ? 0 : 4;
  }
  if (count == 0) return absl::OkStatus();
  TrainConfig config = OfDataParallelism(of);
  config.parallel.dp = world.size();
  config.batch.global = std::max(config.batch.global, 2 * config.batch.micro * world.size());
  config.batch.global -= config.batch.global % world.size();
  Tell(world,
       absl::StrCat("measuring ", kWarmUp + count, " whole steps, by which layers are scaled"));
  STRETTO_ASSIGN_OR_RETURN(const std::optional<Measured> measured,
                           Measure(world, config, count, "layers are as in a few blocks"));
  if (!measured) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(const StepPrediction predicted,
                           PredictStep(measured->config, world.size(), *cost));
  const double others = predicted.seconds - predicted.compute;
  if (measured->seconds <= others || predicted.compute <= 0) {
    return absl::UnavailableError(absl::StrCat("a step took ", 1e3 * measured->seconds,
                                               " ms, less than its communication alone (",
                                               1e3 * others, " ms); run the fit again"));
  }
  *scale = (measured->seconds - others) / predicted.compute;
  ScaleLayers(*scale, cost);
  return absl::OkStatus();
}

absl::Status FitRing(World& world, const TrainConfig& of, int64_t count, CostModel* cost) {
  if (count == kDefaultSteps) count = 4;
  constexpr int64_t kLongest = 2048, kMicroBatches = 2;
  constexpr double kUnit = 1e-9;
  const int64_t ranks = world.size();
  TrainConfig config = of;
  // As much as a run's micro-batches have.
  if (config.batch.capacity == 0) config.batch.capacity = config.data.sequence_length;
  config.batch.capacity = std::min(kMostTokens, config.batch.capacity);
  const int64_t length = std::min({kLongest, config.data.sequence_length, config.batch.capacity});
  if (length < 2) return absl::OkStatus();  // no document
  const int64_t documents = kMicroBatches * (config.batch.capacity / length) * ranks;
  config.data.sequence_length = length;
  config.data.shuffle = false;
  config.batch.tokens = documents * length;
  config.parallel.pp = config.parallel.tp = config.parallel.zero = 1;
  config.parallel.mesh = "static";
  config.parallel.schedule = "1f1b";
  config.parallel.chunks = 0;
  config.parallel.cost_model.clear();
  const std::vector<int64_t> batch(static_cast<size_t>(documents), length);
  cost->parts->ring_per_token = 0;
  const auto predicted = [&](const TrainConfig& measured) -> absl::StatusOr<double> {
    STRETTO_ASSIGN_OR_RETURN(const SequencePlanOptions options,
                             SequenceOptionsOf(measured, world.info().local_size, cost));
    STRETTO_ASSIGN_OR_RETURN(const SequencePlan plan, PlanSequences(batch, options));
    return PredictedSeconds(measured, cost, plan);
  };
  // What sharing adds to a step, less what it adds by the clock: whatever else the costs have wrong
  // is in both.
  double added = 0, unit = 0;
  for (const int64_t cp : {int64_t{1}, ranks}) {
    config.parallel.cp = cp;
    config.parallel.dp = ranks / cp;
    Tell(world, absl::StrCat("measuring rings: ", kWarmUp + count, " steps on documents that ",
                             cp == 1 ? "each rank has alone" : "all ranks share"));
    // All of an epoch, so every step has them again.
    STRETTO_ASSIGN_OR_RETURN(
        const std::optional<Measured> measured,
        Measure(world, config, count, "what rings add up costs nothing", &batch));
    if (!measured) return absl::OkStatus();
    STRETTO_ASSIGN_OR_RETURN(const double clock, predicted(measured->config));
    added += (cp == 1 ? -1 : 1) * (measured->seconds - clock);
    if (cp == 1) continue;
    cost->parts->ring_per_token = kUnit;
    STRETTO_ASSIGN_OR_RETURN(unit, predicted(measured->config));
    unit -= clock;
  }
  // Where something held up a step: no more than all of a block's forward.
  const double most = std::min(cost->forward[0].per_token, DeviceCost::kMostRingPerToken);
  cost->parts->ring_per_token = std::clamp(added / unit * kUnit, 0.0, most);
  return absl::OkStatus();
}

}  // namespace stretto::bench
