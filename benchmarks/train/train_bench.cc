// Whole optimizer steps on random tokens: `stretto-train-bench CONFIG.json [--set ...]` makes its
// own token file, takes `steps` steps and prints the median of those after the third as one JSON
// line. Also the planned memory beside the process's peak.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/log.h"
#include "stretto/core/rng.h"
#include "stretto/data/dataset.h"
#include "stretto/observe/memory.h"
#include "stretto/train/memory.h"
#include "stretto/train/trainer.h"

namespace stretto {
namespace {

constexpr int64_t kWarmUp = 3;

double Median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.empty() ? 0 : (v[v.size() / 2] + v[(v.size() - 1) / 2]) / 2;
}

absl::Status Bench(World& world, TrainConfig config) {
  const std::string directory =
      (std::filesystem::temp_directory_path() / absl::StrCat("stretto-bench-", getpid())).string();
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> directories,
                           world.AllGather("directory", directory));
  config.output = directories[0];
  config.data.train = directories[0] + "/train.bin";
  config.checkpoint.resume = "never";
  config.steps = std::max(config.steps, kWarmUp + 1);
  absl::Status written;
  if (world.rank() == 0) {
    std::filesystem::create_directories(directory);
    const Rng rng(1, "bench/tokens");
    const int64_t count = 64 * config.batch.global * (config.data.sequence_length + 1);
    std::vector<int32_t> ids;
    const auto below = static_cast<uint64_t>(config.model.vocabulary);
    for (int64_t i = 0; i < count; ++i) {
      ids.push_back(static_cast<int32_t>(rng.Below(static_cast<uint64_t>(i), below)));
    }
    written = WriteTokenFile(config.data.train, ids, config.model.vocabulary);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("writing tokens", written));

  std::vector<double> step_ms, exposed_ms, data_ms;
  int64_t tokens = 0, planned = 0;
  int64_t before = 0;
  if (const auto memory = ReadProcessMemory(); memory.ok()) before = memory->peak_resident_bytes;
  {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    STRETTO_ASSIGN_OR_RETURN(const RunPlan plan,
                             PlanRun(trainer->config(), world.size(), world.rank()));
    planned = plan.arena_bytes;
    double mfu = 0;
    while (trainer->step() < config.steps) {
      STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
      mfu = stats.mfu_causal;
      if (stats.step <= kWarmUp) continue;
      step_ms.push_back(stats.step_ms);
      exposed_ms.push_back(stats.comm_exposed_ms);
      data_ms.push_back(stats.data_ms);
      tokens = stats.tokens;
    }
    STRETTO_RETURN_IF_ERROR(trainer->Finish());
    const auto memory = ReadProcessMemory();
    // On a GPU what is taken of its memory now; nothing is given back before the end.
    int64_t device_bytes = 0;
    if (trainer->config().runtime.device == "cuda") {
      STRETTO_ASSIGN_OR_RETURN(const DeviceInfo info,
                               DescribeDevice(Device::Cuda(world.info().local_rank)));
      device_bytes = info.total_bytes - info.free_bytes;
    }
    if (world.rank() == 0) {
      const double median = Median(step_ms);
      std::printf(
          "{\"ranks\": %d, \"threads\": %d, \"tokens_per_step\": %d, \"step_ms\": %.3f, "
          "\"tokens_per_second\": %.2f, \"exposed_ms\": %.3f, \"data_ms\": %.3f, \"mfu_causal\": "
          "%.4f, "
          "\"planned_bytes\": %ld, \"start_bytes\": %ld, \"peak_bytes\": %ld, "
          "\"device_bytes\": %ld}\n",
          world.size(), static_cast<int>(trainer->config().runtime.threads),
          static_cast<int>(tokens), median, static_cast<double>(tokens) / median * 1e3,
          Median(exposed_ms), Median(data_ms), mfu, static_cast<long>(planned),
          static_cast<long>(before),
          static_cast<long>(memory.ok() ? memory->peak_resident_bytes : 0),
          static_cast<long>(device_bytes));
    }
  }
  STRETTO_RETURN_IF_ERROR(world.Barrier("done"));
  std::error_code ignored;
  if (world.rank() == 0) std::filesystem::remove_all(directory, ignored);
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  std::string path;
  std::vector<std::string> sets;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--set" && i + 1 < argc) {
      sets.push_back(argv[++i]);
    } else {
      path = argument;
    }
  }
  stretto::TrainConfig config;
  const absl::Status loaded = stretto::LoadConfig(path, sets, stretto::ConfigRef(&config));
  if (!loaded.ok()) {
    std::fprintf(stderr, "stretto-train-bench: %s\n", std::string(loaded.message()).c_str());
    return 2;
  }
  stretto::SetLogLevel(stretto::LogLevel::kWarning);
  auto world = stretto::World::Create({});
  if (!world.ok()) {
    std::fprintf(stderr, "stretto-train-bench: %s\n",
                 std::string(world.status().message()).c_str());
    return 1;
  }
  const absl::Status status = stretto::Bench(**world, config);
  if (!status.ok()) {
    std::fprintf(stderr, "stretto-train-bench: %s\n", std::string(status.message()).c_str());
    _exit(1);
  }
  return 0;
}
