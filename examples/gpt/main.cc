// Trains a GPT- or Llama-family model from one configuration file:
//
//   mpirun -np 2 stretto-gpt configs/quickstart.json --set steps=500 --set optimizer.lr=1e-3
//
// Exit codes: 0 finished, 1 failed, 2 wrong usage, configuration or files, 75 asked to stop by
// SIGTERM or SIGUSR1 and saved (start again to go on).
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/comm/world.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/observe/metrics.h"
#include "stretto/observe/signals.h"
#include "stretto/train/trainer.h"

namespace {

using stretto::kExitFailed, stretto::kExitUsage;
constexpr int kRequeue = 75;
constexpr char kHelp[] =
    "usage: stretto-gpt CONFIG.json [--set section.name=value]...\n"
    "       mpirun -np RANKS stretto-gpt ...\n"
    "The fields of the configuration are listed in docs/config.md.\n";

// Ends the process when World::Create hangs in MPI_Init, which it does for ever when another rank
// is stopped or left before it: nobody can leave that call. A library must not end its host; a
// program may.
class InitWatch {
 public:
  explicit InitWatch(std::chrono::milliseconds timeout) {
    thread_ = std::thread([this, timeout] {
      std::unique_lock<std::mutex> lock(mutex_);
      if (changed_.wait_for(lock, timeout, [this] { return done_; })) return;
      std::fprintf(stderr,
                   "stretto-gpt: MPI_Init did not finish within %lld s: another rank is stopped or "
                   "ended before "
                   "it; look at the output of the other ranks\n",
                   static_cast<long long>(timeout.count() / 1000));
      _exit(kExitFailed);
    });
  }
  ~InitWatch() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::thread thread_;
};

// Adds the files and lines that the configuration asks for; rank 0 only.
absl::Status AddSinks(stretto::Trainer& trainer) {
  const stretto::TrainConfig& config = trainer.config();
  trainer.AddSink(std::make_unique<stretto::ConsoleSink>(
      stdout,
      stretto::ConsoleOptions{.total_steps = config.steps, .log_every = config.metrics.log_every}));
  const int64_t first_step = trainer.step() + 1;
  if (config.metrics.json) {
    STRETTO_ASSIGN_OR_RETURN(
        auto sink,
        stretto::JsonLinesSink::Open(absl::StrCat(config.output, "/metrics.jsonl"), first_step));
    trainer.AddSink(std::move(sink));
  }
  if (config.metrics.tensorboard) {
    STRETTO_ASSIGN_OR_RETURN(
        auto sink,
        stretto::TensorBoardSink::Open(absl::StrCat(config.output, "/tensorboard"), first_step));
    trainer.AddSink(std::move(sink));
  }
  return absl::OkStatus();
}

// The configuration as it was resolved, and the banner.
absl::Status WriteBanner(const stretto::Trainer& trainer) {
  stretto::TrainConfig config = trainer.config();
  const std::string path = absl::StrCat(config.output, "/config.json");
  const std::string text = stretto::PrintConfig(stretto::ConfigRef(&config));
  std::FILE* file = std::fopen(path.c_str(), "w");
  const bool written = file != nullptr && std::fputs(text.c_str(), file) >= 0;
  if (file != nullptr && std::fclose(file) != 0) file = nullptr;
  if (file == nullptr || !written) {
    return absl::UnavailableError(
        absl::StrCat("cannot write ", path, "; check that the directory is writable and not full"));
  }
  std::printf("%s", trainer.Describe().c_str());
  std::printf("configuration in %s\n", path.c_str());
  return absl::OkStatus();
}

absl::Status WriteCurve(const stretto::TrainConfig& config) {
  if (!config.metrics.curve || !config.metrics.json) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(const std::vector<stretto::LossPoint> points,
                           stretto::ReadLossPoints(absl::StrCat(config.output, "/metrics.jsonl")));
  const std::string path = absl::StrCat(config.output, "/loss.svg");
  STRETTO_RETURN_IF_ERROR(stretto::WriteLossCurve(path, points, config.output));
  std::printf("loss curve in %s\n", path.c_str());
  return absl::OkStatus();
}

// The trainer outlives this: it may take long to end after an error, and the message comes first.
absl::StatusOr<stretto::RunResult> Train(stretto::World& world,
                                         const stretto::TrainConfig& requested,
                                         std::unique_ptr<stretto::Trainer>& trainer) {
  STRETTO_ASSIGN_OR_RETURN(trainer, stretto::Trainer::Create(world, requested));
  const stretto::TrainConfig& config = trainer->config();
  const bool first = world.rank() == 0;
  absl::Status outputs;
  if (first) {
    std::error_code ignored;
    std::filesystem::create_directories(config.output, ignored);
    outputs = WriteBanner(*trainer);
    if (outputs.ok()) outputs = AddSinks(*trainer);
    std::fflush(stdout);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("opening the outputs", outputs));

  STRETTO_ASSIGN_OR_RETURN(const stretto::RunResult result, trainer->Run());
  if (first) {
    const absl::Status curve = WriteCurve(config);
    if (!curve.ok()) stretto::LogWarning(std::string(curve.message()));
  }
  if (result == stretto::RunResult::kFinished && config.sample.tokens > 0) {
    STRETTO_ASSIGN_OR_RETURN(const std::string text,
                             trainer->Sample(config.sample.prompt, config.sample.tokens,
                                             config.sample.temperature, config.sample.top_k));
    if (first)
      std::printf("--- sample ---\n%s%s\n---\n", config.sample.prompt.c_str(), text.c_str());
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  std::string path;
  std::vector<std::string> sets;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h")
      return stretto::EndProgram(stretto::PrintText(kHelp));
    if (argument == "--set") {
      if (i + 1 == argc) {
        std::fprintf(stderr, "stretto-gpt: --set needs section.name=value\n%s", kHelp);
        return kExitUsage;
      }
      sets.push_back(argv[++i]);
    } else if (argument.rfind("--set=", 0) == 0) {
      sets.push_back(argument.substr(6));
    } else if (argument.rfind("-", 0) == 0 || !path.empty()) {
      std::fprintf(stderr, "stretto-gpt: did not expect '%s'\n%s", argument.c_str(), kHelp);
      return kExitUsage;
    } else {
      path = argument;
    }
  }
  if (path.empty()) {
    std::fprintf(stderr, "stretto-gpt: name a configuration file\n%s", kHelp);
    return kExitUsage;
  }

  stretto::TrainConfig config;
  const absl::Status loaded = stretto::LoadConfig(path, sets, stretto::ConfigRef(&config));
  if (!loaded.ok()) {
    std::fprintf(stderr, "stretto-gpt: %s\n", std::string(loaded.message()).c_str());
    return kExitUsage;
  }

  int code = stretto::kExitDone;
  {
    const std::chrono::milliseconds timeout(
        static_cast<int64_t>(std::clamp(config.runtime.timeout_seconds, 1e-3, 1e9) * 1000));
    // A file that may not grow is an error of the write, to be told like a full disk.
    signal(SIGXFSZ, SIG_IGN);
    // torchrun's variables mean TCP, whose waits have deadlines of their own.
    std::optional<InitWatch> watch;
    if (std::getenv("MASTER_ADDR") == nullptr) watch.emplace(timeout);
    auto world = stretto::World::Create({.timeout = timeout});
    watch.reset();
    if (!world.ok()) {
      std::fprintf(stderr, "stretto-gpt: %s\n", std::string(world.status().message()).c_str());
      return stretto::TrainerExitCode(world.status());
    }
    stretto::SetLogRank((*world)->rank(), (*world)->size());
    // Until the process is gone: a rank that is asked while it leaves has saved, and is not to die.
    [[maybe_unused]] static const auto* const signals =
        new absl::StatusOr<stretto::StopSignals>(stretto::StopSignals::Install());
    std::unique_ptr<stretto::Trainer> trainer;
    const absl::StatusOr<stretto::RunResult> result = Train(**world, config, trainer);
    if (!result.ok()) {
      // An agreed error is the same on all ranks, so one speaks and all leave together. After a
      // communication error every rank says what it knows: it may be the only one left, and MPI
      // cannot be finalised then.
      const bool agreed = stretto::IsAgreed(result.status());
      if ((*world)->rank() == 0 || !agreed) {
        std::fprintf(stderr, "stretto-gpt: %s\n", std::string(result.status().message()).c_str());
      }
      std::fflush(nullptr);
      code = stretto::TrainerExitCode(result.status());
      if (!agreed) {
        trainer.reset();
        // Rank 0's holds the control plane, where others look for the reason.
        if ((*world)->failed()) world->reset();
        _exit(code);
      }
    }
    if (result.ok() && *result == stretto::RunResult::kRequested) {
      if ((*world)->rank() == 0) std::printf("asked to stop: saved, exit code %d\n", kRequeue);
      code = kRequeue;
    }
  }
  // Of the others the code says more than a lost line does.
  return code == stretto::kExitDone ? stretto::EndProgram(code) : code;
}
