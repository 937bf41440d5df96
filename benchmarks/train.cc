// stretto-bench train: whole optimizer steps on random tokens. Makes its own token file, takes the
// configuration's `steps` steps and prints the median of those after the third as one JSON line,
// also the planned memory beside the process's peak.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "benchmarks/bench.h"
#include "stretto/core/rng.h"
#include "stretto/data/dataset.h"
#include "stretto/data/tokenizer.h"
#include "stretto/observe/memory.h"
#include "stretto/observe/signals.h"
#include "stretto/train/memory.h"
#include "stretto/train/trainer.h"
#include "tools/arguments.h"
#include "tools/nvml.h"

namespace stretto::bench {
namespace {

// GPU memory that this process has, as the driver counts it; 0 where it does not tell. Nothing is
// given back during a run, so at its end this is the peak.
int64_t DriverBytes(Device device) {
  const absl::StatusOr<DeviceInfo> info = DescribeDevice(device);
  if (device.kind == DeviceKind::kCpu || !info.ok()) return 0;
  const auto processes = Nvml().Processes(info->pci);
  if (!processes) return 0;
  for (const Nvml::Process& process : *processes) {
    // In a container the driver may know this process by another number.
    if (process.pid == static_cast<unsigned>(getpid()) || processes->size() == 1) {
      return std::max<int64_t>(process.bytes, 0);
    }
  }
  return 0;
}

// Ids that are made up at most, and batches of them; the loader goes through them again and again.
constexpr double kMostIds = 1 << 28;
constexpr int64_t kMostBatches = 64;

double IdsOfABatch(const TrainConfig& config) {
  if (config.data.documents) return static_cast<double>(config.batch.tokens) + 1;
  return static_cast<double>(config.batch.global) *
         (static_cast<double>(config.data.sequence_length) + 1);
}

// Documents of so many inputs each: a separator is the first input of the document behind it.
std::vector<int32_t> Documents(const std::vector<int64_t>& lengths, int64_t separator,
                               int64_t vocabulary, const Rng& rng) {
  std::vector<int32_t> ids;
  for (const int64_t length : lengths) {
    ids.push_back(static_cast<int32_t>(separator));
    for (int64_t i = 1; i < length; ++i) {
      auto id = static_cast<int32_t>(rng.Below(ids.size(), static_cast<uint64_t>(vocabulary)));
      if (id == separator) id = separator == 0 ? 1 : 0;
      ids.push_back(id);
    }
  }
  ids.push_back(static_cast<int32_t>(separator));
  return ids;
}

// A new folder with a token file, which goes with the object.
class Tokens {
 public:
  ~Tokens() { Remove(); }

  absl::Status Make(const TrainConfig& config, const std::vector<int64_t>* lengths) {
    std::error_code error;
    const std::filesystem::path parent = std::filesystem::temp_directory_path(error);
    std::string folder = (parent / "stretto-bench-XXXXXX").string();
    if (error || mkdtemp(folder.data()) == nullptr) {
      return absl::UnavailableError(absl::StrCat(
          "no folder for made-up tokens can be made",
          error ? "" : absl::StrCat(" in ", parent.string()), ": ",
          error ? error.message() : std::strerror(errno), "; set TMPDIR to a writable folder"));
    }
    folder_ = folder;
    const Rng rng(1, "bench/tokens");
    if (lengths != nullptr) {
      STRETTO_ASSIGN_OR_RETURN(const auto tokenizer, OpenTokenizer(config.data.tokenizer));
      return WriteTokenFile(
          File(folder_),
          Documents(*lengths, tokenizer->end_of_text(), config.model.vocabulary, rng),
          config.model.vocabulary);
    }
    const double batch = IdsOfABatch(config);
    const auto count = static_cast<int64_t>(batch) *
                       std::clamp<int64_t>(static_cast<int64_t>(kMostIds / batch), 1, kMostBatches);
    std::vector<int32_t> ids;
    ids.reserve(static_cast<size_t>(count));
    const auto below = static_cast<uint64_t>(config.model.vocabulary);
    for (int64_t i = 0; i < count; ++i) {
      ids.push_back(static_cast<int32_t>(rng.Below(static_cast<uint64_t>(i), below)));
    }
    return WriteTokenFile(File(folder_), ids, config.model.vocabulary);
  }

  void Remove() {
    std::error_code ignored;
    if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
    folder_.clear();
  }

  const std::string& folder() const { return folder_; }
  static std::string File(const std::string& folder) { return folder + "/train.bin"; }

 private:
  std::string folder_;
};

}  // namespace

absl::Status ResolveSteps(int ranks, TrainConfig* config, int64_t warm_up) {
  // Before anything is computed from the sizes.
  if (config->data.documents && IdsOfABatch(*config) > kMostIds) {
    return absl::InvalidArgumentError(absl::StrCat(
        "batch.tokens is ", config->batch.tokens, ", more than the ",
        static_cast<int64_t>(kMostIds), " tokens that are made up for a measurement; lower it"));
  }
  if (IdsOfABatch(*config) > kMostIds) {
    return absl::InvalidArgumentError(absl::StrCat(
        "batch.global (", config->batch.global, ") times data.sequence_length (",
        config->data.sequence_length, ") is more than the ", static_cast<int64_t>(kMostIds),
        " tokens that are made up for a measurement; lower one of them"));
  }
  if (config->metrics.trace_steps > 0 && config->metrics.trace_file.empty()) {
    return absl::InvalidArgumentError(
        "metrics.trace_steps is set, but the output of a measurement is not kept; name a file in "
        "metrics.trace_file");
  }
  config->steps = std::max(config->steps, warm_up + 1);
  if (config->output.empty()) config->output = std::string(".");  // TimedSteps sets it
  return config->Resolve(ranks);
}

absl::Status WithTrainer(World& world, TrainConfig config, const std::vector<int64_t>* lengths,
                         int64_t warm_up, const std::function<absl::Status(Trainer&)>& body) {
  STRETTO_RETURN_IF_ERROR(SameEverywhere(world, config));
  TrainConfig resolved = config;
  STRETTO_RETURN_IF_ERROR(
      world.Agree("reading the configuration", ResolveSteps(world.size(), &resolved, warm_up)));
  Tokens tokens;
  absl::Status made;
  if (world.rank() == 0) made = tokens.Make(resolved, lengths);
  STRETTO_RETURN_IF_ERROR(world.Agree("making tokens up", made));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> folders,
                           world.AllGather("folder", tokens.folder()));
  config.output = folders[0];
  config.data.train = Tokens::File(folders[0]);
  config.checkpoint.resume = "never";
  config.steps = resolved.steps;
  // Its learning rates matter to nobody, and the run that it stands for is longer.
  config.optimizer.warmup = std::min(config.optimizer.warmup, config.steps);
  {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    // All ranks have the tokens open, and steps alone write nothing there: from here on nothing is
    // left behind however the program ends.
    tokens.Remove();
    STRETTO_RETURN_IF_ERROR(body(*trainer));
  }
  return world.Barrier("done");
}

absl::StatusOr<std::vector<StepStats>> TimedSteps(
    World& world, TrainConfig config, const std::function<absl::Status(Trainer&)>& inspect,
    const std::vector<int64_t>* lengths, int64_t warm_up) {
  // Alone, a rank ends in order between steps. Several would have to agree on when, which takes
  // time that a measurement does not have: there a signal ends the program at once.
  std::optional<StopSignals> signals;
  if (world.size() == 1) {
    STRETTO_ASSIGN_OR_RETURN(StopSignals installed, StopSignals::Install());
    signals.emplace(std::move(installed));
  }
  std::vector<StepStats> steps;
  const auto body = [&](Trainer& trainer) -> absl::Status {
    const int64_t last = trainer.config().steps;
    while (trainer.step() < last && StopSignals::Received() == 0) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer.Step());
      if (stats.step > warm_up) steps.push_back(stats);
    }
    STRETTO_RETURN_IF_ERROR(trainer.Finish());
    if (trainer.step() < last) {
      return world.Agree(
          "measuring", absl::CancelledError(absl::StrCat("a signal asked to stop after ",
                                                         trainer.step(), " of ", last, " steps")));
    }
    return inspect(trainer);
  };
  STRETTO_RETURN_IF_ERROR(WithTrainer(world, std::move(config), lengths, warm_up, body));
  return steps;
}

namespace {

absl::Status Steps(World& world, const TrainConfig& config, Results* results) {
  Json set_up = Json::object();
  int64_t before = 0, planned = 0, overhead = 0, peak = 0, driver = 0, threads = 0;
  if (const auto memory = ReadProcessMemory(); memory.ok()) before = memory->peak_resident_bytes;
  const auto inspect = [&](Trainer& trainer) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                             PlanRun(trainer.config(), world.size(), world.rank()));
    planned = plan.arena_bytes;
    overhead = plan.overhead_bytes;
    threads = trainer.config().runtime.threads;
    if (const auto memory = ReadProcessMemory(); memory.ok()) peak = memory->peak_resident_bytes;
    const Device device = trainer.config().runtime.device == "cuda"
                              ? Device::Cuda(world.info().local_rank)
                              : Device::Cpu();
    results->device = DeviceName(device);
    driver = DriverBytes(device);
    for (const auto& [phase, seconds] : trainer.set_up_seconds()) set_up[phase] = seconds;
    return absl::OkStatus();
  };
  STRETTO_ASSIGN_OR_RETURN(const std::vector<StepStats> steps, TimedSteps(world, config, inspect));
  const auto median = [&](double StepStats::*field) {
    std::vector<double> values;
    for (const StepStats& stats : steps) values.push_back(stats.*field);
    return Median(std::move(values));
  };
  results->command = "train";
  results->ranks = world.size();
  const double step_ms = median(&StepStats::step_ms);
  const int64_t tokens = steps.back().tokens;
  const Json figures = {
      {"ranks", world.size()},
      {"threads", threads},
      {"tokens_per_step", tokens},
      {"step_ms", step_ms},
      {"tokens_per_second", static_cast<double>(tokens) / step_ms * 1e3},
      {"exposed_ms", median(&StepStats::comm_exposed_ms)},
      {"exposed_data_ms", median(&StepStats::exposed_data_ms)},
      {"exposed_tensor_ms", median(&StepStats::exposed_tensor_ms)},
      {"exposed_context_ms", median(&StepStats::exposed_context_ms)},
      {"exposed_pipeline_ms", median(&StepStats::exposed_pipeline_ms)},
      {"exposed_world_ms", median(&StepStats::exposed_world_ms)},
      {"data_ms", median(&StepStats::data_ms)},
      {"forward_ms", median(&StepStats::forward_ms)},
      {"backward_ms", median(&StepStats::backward_ms)},
      {"update_ms", median(&StepStats::update_ms)},
      {"mfu_causal", steps.back().mfu_causal},
      {"planned_bytes", planned},
      {"start_bytes", before},
      {"overhead_bytes", overhead},
      {"peak_bytes", peak},
      {"device_bytes", driver},
  };
  if (world.rank() == 0) {
    std::string line;  // with the blanks that train/compare.py looks for
    for (const auto& [key, value] : figures.items()) {
      absl::StrAppend(&line, line.empty() ? "{" : ", ", "\"", key, "\": ", value.dump());
    }
    std::printf("%s}\n", line.c_str());
  }
  Json result = {{"name", "step"}, {"seconds", step_ms * 1e-3}};
  result.update(figures);
  result["set_up_seconds"] = set_up;
  results->results.push_back(std::move(result));
  return absl::OkStatus();
}

}  // namespace

int Train(int argc, const char* const* argv) {
  std::vector<std::string> sets;
  std::string json;
  int64_t workspace_mib = 0;
  bool profile = false;
  Arguments arguments("stretto-bench train",
                      "Median of the optimizer steps behind the third, as a JSON line; also under "
                      "mpirun.",
                      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.AddFlag("profile", "time each kind of layer instead, on one rank", &profile);
  arguments.Add("workspace-mib", "N", "scratch memory of kernels with --profile; 0: as in runs",
                &workspace_mib);
  arguments.Add("json", "FILE", "also write the results there", &json);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (workspace_mib < 0 || workspace_mib > (1 << 20))) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--workspace-mib must be 0 to 1048576, not ", workspace_mib));
  }
  absl::StatusOr<TrainConfig> config;
  if (parsed.ok()) {
    config = LoadOne("train", arguments.rest(), sets);
    parsed = config.status();
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  Results results;
  if (profile) {
    absl::Status status = World::RunThreads(
        1, [&](World& world) { return Profile(world, *config, workspace_mib << 20, &results); });
    if (status.ok()) status = results.Write(json);
    return status.ok() ? EndProgram(status) : Fail(status, kFailed);
  }
  return RunInWorld([&](World& world) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(CheckOutput(world, json));
    STRETTO_RETURN_IF_ERROR(Steps(world, *config, &results));
    absl::Status written;
    if (world.rank() == 0) written = results.Write(json);
    return world.Agree("writing the results", written);
  });
}

}  // namespace stretto::bench
