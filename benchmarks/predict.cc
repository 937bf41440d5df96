// stretto-bench predict CONFIG: steps of several layouts of these ranks, measured, beside what a
// cost model predicts for them.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "stretto/core/log.h"
#include "stretto/train/prediction.h"
#include "tools/arguments.h"

namespace stretto::bench {
namespace {

struct Layout {
  std::string name;
  TrainConfig config;
  std::vector<double> seconds;
};

// One axis at a time, over all ranks.
std::vector<Layout> Layouts(const TrainConfig& config, int ranks) {
  std::vector<Layout> layouts;
  const auto add = [&](const std::string& name, int64_t TrainConfig::Parallel::*axis,
                       const std::string& schedule, int64_t zero) {
    TrainConfig c = config;
    c.parallel.dp = c.parallel.pp = c.parallel.tp = 1;
    c.parallel.chunks = 0;
    c.parallel.*axis = ranks;
    c.parallel.schedule = schedule;
    c.parallel.zero = zero;
    c.data.document_attention = false;  // made-up tokens have separators anywhere
    layouts.push_back({.name = absl::StrCat(name, ranks), .config = c});
  };
  add("dp ", &TrainConfig::Parallel::dp, "1f1b", 1);
  if (ranks == 1) return layouts;
  add("tp ", &TrainConfig::Parallel::tp, "1f1b", 1);
  add("1f1b, pp ", &TrainConfig::Parallel::pp, "1f1b", 1);
  add("zb-h1, pp ", &TrainConfig::Parallel::pp, "zb-h1", 1);
  add("zero 3, dp ", &TrainConfig::Parallel::dp, "1f1b", 3);
  return layouts;
}

// Of all layouts; an agreed error.
absl::StatusOr<std::vector<StepPrediction>> Predictions(World& world,
                                                        const std::vector<Layout>& layouts,
                                                        const CostModel& cost) {
  std::vector<StepPrediction> predictions;
  absl::Status status;
  for (size_t i = 0; i < layouts.size() && status.ok(); ++i) {
    absl::StatusOr<StepPrediction> p = PredictStep(layouts[i].config, world.size(), cost);
    status = p.status();
    if (p.ok()) predictions.push_back(*std::move(p));
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the cost model", status));
  return predictions;
}

// As the trainer resolves them, so that what is wrong is known before anything is measured.
absl::StatusOr<std::vector<Layout>> Resolved(World& world, std::vector<Layout> layouts) {
  const auto resolve = [&]() -> absl::Status {
    for (Layout& layout : layouts) {
      TrainConfig& config = layout.config;
      STRETTO_ASSIGN_OR_RETURN(const Device device,
                               ChooseDevice(config.runtime.device, world.info().local_rank));
      config.runtime.device = device.kind == DeviceKind::kCpu ? "cpu" : "cuda";
      STRETTO_RETURN_IF_ERROR(ResolveSteps(world.size(), &config));
    }
    return absl::OkStatus();
  };
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the configuration", resolve()));
  return layouts;
}

absl::Status Run(World& world, TrainConfig config, const std::string& fit, int64_t rounds,
                 Results* results) {
  STRETTO_RETURN_IF_ERROR(SameEverywhere(
      world, config, absl::StrCat("rounds ", rounds, fit.empty() ? "" : " fit ", fit)));
  std::vector<Layout> layouts = Layouts(config, world.size());
  STRETTO_ASSIGN_OR_RETURN(const std::vector<Layout> resolved, Resolved(world, layouts));
  CostModel cost;
  if (fit.empty()) {
    STRETTO_ASSIGN_OR_RETURN(cost, FitCosts(world, config, 21));
  } else {
    absl::StatusOr<CostModel> read = ReadCostModel(fit);
    absl::Status usable = read.status();
    if (read.ok()) cost = *std::move(read);
    if (usable.ok() && world.size() > 1 && cost.parts && !cost.parts->assumed &&
        cost.parts->ranks < 2) {
      usable = absl::FailedPreconditionError(absl::StrCat(
          fit, " was fitted on one rank, so links cost nothing in it; fit it under mpirun"));
    }
    STRETTO_RETURN_IF_ERROR(world.Agree("reading the cost model", usable));
    const auto device = ChooseDevice(config.runtime.device, world.info().local_rank);
    if (world.rank() == 0 && device.ok() && DeviceName(*device) != cost.device) {
      LogWarning(absl::StrCat("'", fit, "' was measured on '", cost.device, "', this is '",
                              DeviceName(*device), "'"));
    }
  }
  STRETTO_RETURN_IF_ERROR(Predictions(world, resolved, cost).status());
  // In turn, so that a machine that is slower for a while is so for all of them.
  Tell(world, absl::StrFormat("measuring %d layouts, in %d round%s of %d steps", layouts.size(),
                              rounds, rounds == 1 ? "" : "s", resolved.front().config.steps));
  for (int64_t round = 0; round < rounds; ++round) {
    for (Layout& layout : layouts) {
      const auto inspect = [&](Trainer& trainer) {
        layout.config = trainer.config();
        return absl::OkStatus();
      };
      STRETTO_ASSIGN_OR_RETURN(const std::vector<StepStats> steps,
                               TimedSteps(world, layout.config, inspect));
      double sum = 0;
      for (const StepStats& stats : steps) {
        layout.seconds.push_back(1e-3 * stats.step_ms);
        sum += stats.step_ms;
      }
      Tell(world, absl::StrFormat("round %d of %d, %s: %.1f ms a step", round + 1, rounds,
                                  layout.name, sum / static_cast<double>(steps.size())));
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const std::vector<StepPrediction> predictions,
                           Predictions(world, layouts, cost));
  results->command = "predict";
  results->device = cost.device;
  results->ranks = world.size();
  if (world.rank() == 0) {
    absl::PrintF(
        "costs: %s, %s\nms of a step, of the measured ones the lower decile; what the simulated "
        "one goes into\n%-14s %10s %10s %6s"
        "  %9s %9s %9s %9s %9s\n",
        cost.device, cost.parts ? cost.parts->measured : "", "layout", "measured", "simulated",
        "ratio", "compute", "update", "bubble", "exposed", "idle share");
  }
  for (size_t i = 0; i < layouts.size(); ++i) {
    const Layout& layout = layouts[i];
    const StepPrediction& p = predictions[i];
    const double measured = LowerDecile(layout.seconds);
    results->results.push_back({{"name", layout.name},
                                {"seconds", measured},
                                {"predicted_seconds", p.seconds},
                                {"ratio", p.seconds / measured}});
    if (world.rank() != 0) continue;
    absl::PrintF("%-14s %10.2f %10.2f %6.3f  %9.2f %9.2f %9.2f %9.2f %9.3f\n", layout.name,
                 1e3 * measured, 1e3 * p.seconds, p.seconds / measured, 1e3 * p.compute,
                 1e3 * p.update, 1e3 * p.bubble, 1e3 * p.exposed(), p.bubble / p.seconds);
  }
  return absl::OkStatus();
}

}  // namespace

int Predict(int argc, const char* const* argv) {
  std::vector<std::string> sets;
  std::string fit, json;
  int64_t rounds = 3;
  Arguments arguments("stretto-bench predict",
                      "Measures steps of data, tensor, pipeline (1F1B, ZB-H1) and ZeRO-3 "
                      "parallelism over all ranks and\nprints the ratio of the predicted time to "
                      "the measured one (mpirun -np 2 stretto-bench predict ...).",
                      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.Add("fit", "FILE", "the cost model; without one it is fitted first", &fit);
  arguments.Add("rounds", "N", "how often each layout runs `steps` steps", &rounds);
  arguments.Add("json", "FILE", "also write the results there", &json);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (rounds < 1 || rounds > 100)) {
    parsed = absl::InvalidArgumentError(absl::StrCat("--rounds must be 1 to 100, not ", rounds));
  }
  absl::StatusOr<TrainConfig> config;
  if (parsed.ok()) {
    config = LoadOne("predict", arguments.rest(), sets);
    parsed = config.status();
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  Results results;
  return RunInWorld([&](World& world) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(CheckOutput(world, json));
    STRETTO_RETURN_IF_ERROR(Run(world, *config, fit, rounds, &results));
    absl::Status written;
    if (world.rank() == 0) written = results.Write(json);
    return world.Agree("writing the results", written);
  });
}

}  // namespace stretto::bench
