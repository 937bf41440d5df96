#include "tools/suggest.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/train/config.h"
#include "stretto/train/memory.h"
#include "stretto/train/prediction.h"
#include "stretto/train/suggest.h"

namespace stretto {

// "80GiB", "1.5 TB", "4096": bytes. GiB and the like are powers of 1024, GB of 1000.
absl::StatusOr<int64_t> ParseBytes(const std::string& option, const std::string& text) {
  constexpr struct {
    const char* unit;
    double bytes;
  } kUnits[] = {{"", 1},      {"B", 1},        {"KB", 1e3},     {"MB", 1e6},     {"GB", 1e9},
                {"TB", 1e12}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30}, {"TiB", 0x1p40}};
  const absl::Status wrong = absl::InvalidArgumentError(absl::StrCat(
      "--", option, " must be a size such as 80GiB, 24GB or a number of bytes, not '", text, "'"));
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || !std::isfinite(number) || number <= 0) return wrong;
  while (*end == ' ') ++end;
  for (const auto& unit : kUnits) {
    const double bytes = number * unit.bytes;
    if (std::string(end) == unit.unit && bytes < 0x1p62) return static_cast<int64_t>(bytes);
  }
  return wrong;
}

void SuggestArguments::AddTo(Arguments& arguments) {
  arguments.Add("gpus", "N", "with --suggest: devices of the run", &gpus);
  arguments.Add("memory", "SIZE", "... what each of them has, e.g. 80GiB", &memory);
  arguments.Add("fit", "FILE", "... costs that stretto-bench fit measured; else an H100 is assumed",
                &fit);
  arguments.Add("machine", "N", "... devices of one machine", &machine);
  arguments.Add("top", "N", "... how many layouts are listed", &top);
}

absl::Status SuggestArguments::Check(const Arguments& arguments, bool suggest) {
  const std::string wrong =
      suggest
          ? arguments.FirstGiven({"json", "buckets", "ranks", "device-memory", "keepers", "parity"})
          : arguments.FirstGiven({"gpus", "memory", "fit", "machine", "top"});
  if (wrong.empty()) return absl::OkStatus();
  if (!suggest) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", wrong, " belongs to --suggest; give both or neither"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--", wrong, " does not go with --suggest",
      wrong == "ranks"           ? "; give --gpus, the devices of the run, in its place"
      : wrong == "device-memory" ? "; give --memory, what each device has, in its place"
                                 : absl::StrCat(", which lists many layouts as text; leave out --",
                                                wrong, ", or --suggest to plan one layout")));
}

namespace {

absl::StatusOr<CostModel> Costs(const std::string& fit, int64_t gpus, TrainConfig* config) {
  // Without a word about the device it is the one whose costs are known.
  const bool automatic = config->runtime.device == "auto";
  if (automatic) config->runtime.device = "cuda";
  if (fit.empty()) {
    const bool f64 = config->runtime.dtype == "f64";
    if (f64 || config->runtime.device != "cuda") {
      return absl::FailedPreconditionError(absl::StrCat(
          "without --fit an H100 is assumed, and runtime.",
          f64 ? "dtype is f64, which exists on the CPU only; give --fit, or another type"
              : "device is cpu; give --fit, or set runtime.device=auto"));
    }
    return AssumedH100(*config);
  }
  STRETTO_ASSIGN_OR_RETURN(CostModel cost, ReadCostModel(fit));
  if (!cost.parts) {
    return absl::FailedPreconditionError(
        absl::StrCat(fit, " has the costs of stages only; make one with stretto-bench fit"));
  }
  if (gpus > 1 && !cost.parts->assumed && cost.parts->ranks < 2) {
    return absl::FailedPreconditionError(
        absl::StrCat(fit,
                     " was fitted on one rank, so links cost nothing in it; fit it under "
                     "mpirun with 2 or more"));
  }
  if (automatic && ModelKey(*config) != cost.parts->model) config->runtime.device = "cpu";
  if (ModelKey(*config) != cost.parts->model) {
    if (automatic) config->runtime.device = "cuda";
    return absl::FailedPreconditionError(absl::StrCat(fit, " was fitted to ", cost.parts->model,
                                                      ", the configuration is ", ModelKey(*config),
                                                      "; fit it to this configuration"));
  }
  return cost;
}

std::string Row(size_t number, const Suggestion& s) {
  const TrainConfig::Parallel& p = s.config.parallel;
  std::string schedule = p.pp > 1 ? p.schedule : "-";
  if (p.pp > 1 && p.schedule == "interleaved") absl::StrAppend(&schedule, "/", p.chunks);
  const auto ms = [](double seconds) { return 1e3 * seconds; };
  return absl::StrFormat(
      "%4d %4d %3d %3d %-13s %4d %5d %-9s %10s %10.5g %9.4g %8.4g %8.4g %8.4g %8.4g\n", number,
      p.dp, p.tp, p.pp, schedule, p.zero, s.config.batch.micro, s.config.runtime.recompute,
      HumanBytes(s.memory_bytes), ms(s.step.seconds), ms(s.step.compute), ms(s.step.bubble),
      ms(s.step.data), ms(s.step.tensor), ms(s.step.pipeline));
}

std::string Text(const Suggestions& found, const CostModel& cost, const SuggestArguments& a,
                 const SuggestOptions& options) {
  const DeviceCost& parts = *cost.parts;
  std::string out = absl::StrFormat(
      "%d device%s of %s, %d a machine; costs: %s, %s\n", a.gpus, a.gpus == 1 ? "" : "s",
      HumanBytes(options.memory_bytes), a.machine, cost.device,
      parts.assumed ? "ASSUMED (" + parts.measured + ")" : "measured on " + parts.measured);
  if (!parts.network && a.gpus > a.machine) {
    absl::StrAppend(&out,
                    "links between machines were not measured: they count as those inside one\n");
  }
  if (!found.feasible.empty()) {
    absl::StrAppendFormat(&out,
                          "\n%4s %4s %3s %3s %-13s %4s %5s %-9s %10s %10s %9s %8s %8s %8s %8s\n",
                          "", "dp", "tp", "pp", "schedule", "zero", "micro", "recompute", "memory",
                          "step ms", "compute", "bubble", "data", "tensor", "between");
    const size_t shown = std::min(found.feasible.size(), static_cast<size_t>(a.top));
    for (size_t i = 0; i < shown; ++i) absl::StrAppend(&out, Row(i + 1, found.feasible[i]));
    absl::StrAppend(&out,
                    "\nsimulated ms of a step, and what they go into (the rest is the "
                    "update); data, tensor and\nbetween stages: exposed communication; "
                    "memory of the rank that needs most\n");
    const Suggestion& first = found.feasible.front();
    for (size_t i = 1; i < shown; ++i) {
      const StepPrediction& slow = found.feasible[i].step;
      absl::StrAppendFormat(&out, "%s%d is %.2f %% slower than 1: %s\n", i == 1 ? "\n" : "", i + 1,
                            100 * (slow.seconds / first.step.seconds - 1),
                            WhySlower(first.step, slow));
    }
    const TrainConfig& c = first.config;
    absl::StrAppend(&out, "\nthe first: --set parallel.dp=", c.parallel.dp,
                    " --set parallel.tp=", c.parallel.tp, " --set parallel.pp=", c.parallel.pp,
                    " --set parallel.schedule=", c.parallel.schedule,
                    " --set parallel.chunks=", c.parallel.chunks,
                    " --set parallel.zero=", c.parallel.zero, " --set batch.micro=", c.batch.micro,
                    " --set runtime.recompute=", c.runtime.recompute, "\n");
  }
  int64_t refused = 0;
  for (const Refusal& r : found.refused) refused += r.count;
  absl::StrAppend(&out, "\n", found.feasible.size(), " fit, ", refused, " do not",
                  refused > 0 ? ":" : "", "\n");
  for (const Refusal& r : found.refused) {
    absl::StrAppendFormat(&out, "%6d  %s%s\n", r.count, r.count > 1 ? "such as: " : "", r.reason);
  }
  return out;
}

}  // namespace

absl::StatusOr<int> PrintSuggestions(const std::string& config,
                                     const std::vector<std::string>& sets,
                                     const SuggestArguments& a) {
  if (a.gpus < 1 || a.gpus > 4096) {
    return absl::InvalidArgumentError(absl::StrCat("--suggest needs --gpus, 1 to 4096 devices",
                                                   a.gpus == 0 ? "" : ", not ",
                                                   a.gpus == 0 ? "" : std::to_string(a.gpus)));
  }
  if (a.memory.empty()) {
    return absl::InvalidArgumentError("--suggest needs --memory, what each device has, e.g. 80GiB");
  }
  if (a.machine < 1 || a.machine > 4096 || a.top < 1) {
    return absl::InvalidArgumentError("--machine must be 1 to 4096, and --top 1 or more");
  }
  SuggestOptions options = {.ranks = static_cast<int>(a.gpus),
                            .machine_ranks = static_cast<int>(a.machine)};
  STRETTO_ASSIGN_OR_RETURN(options.memory_bytes, ParseBytes("memory", a.memory));
  constexpr int64_t kLeast = 1 << 20;
  if (options.memory_bytes < kLeast) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--memory ", a.memory, " is less than a megabyte; write its unit, such as 80GiB"));
  }
  TrainConfig c;
  STRETTO_RETURN_IF_ERROR(LoadConfig(config, sets, ConfigRef(&c)));
  STRETTO_RETURN_IF_ERROR(CheckSuggests(c));
  // Only for what a layout does not change, to say it once and before all others.
  TrainConfig alone = c;
  alone.parallel = {.bucket_bytes = c.parallel.bucket_bytes};
  STRETTO_RETURN_IF_ERROR(alone.Resolve(1));
  SetLogLevel(LogLevel::kError);
  c.model = alone.model;
  STRETTO_ASSIGN_OR_RETURN(const CostModel cost, Costs(a.fit, a.gpus, &c));
  // What a run of this configuration may have.
  const int64_t budget =
      c.runtime.device == "cpu" ? c.runtime.host_memory_bytes : c.runtime.device_memory_bytes;
  if (budget > 0) options.memory_bytes = std::min(options.memory_bytes, budget);
  for (const std::string& set : sets) options.fixed.push_back(set.substr(0, set.find('=')));
  STRETTO_ASSIGN_OR_RETURN(const Suggestions found, Suggest(c, cost, options));
  STRETTO_RETURN_IF_ERROR(PrintText(Text(found, cost, a, options)));
  return found.feasible.empty() ? 1 : 0;
}

}  // namespace stretto
