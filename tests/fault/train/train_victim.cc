// Trains, evaluates, samples and saves step by step, until one rank is lost inside an operation
// that the command line names: the subject of faults_inside.py.
//
//   train_victim CONFIG.json RANK SIGNAL OPERATION COUNT STEPS [section.name=value]...
//
// The rank sends itself SIGNAL before it posts the COUNT-th message whose operation matches the
// regular expression OPERATION, once STEPS steps are done; 0: from the first step of set-up on.
// "file" as OPERATION means while its part of a checkpoint is written.
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "stretto/core/log.h"
#include "stretto/observe/signals.h"
#include "stretto/train/trainer.h"

namespace stretto {
namespace {

// The same clock on all ranks; mpirun may pass lines on late.
double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Fault {
  int rank = 0, signal = 0, count = 0, steps = 0;
  std::string operation;
  std::regex pattern;
  std::atomic<bool> armed = false;
  int matched = 0;

  std::atomic<bool> lost = false;

  // mpirun wakes a stopped rank before it ends it; it would then excuse itself.
  [[noreturn]] static void Hang() {
    while (true) pause();
  }
  void Inside(const std::string& what) {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the others come to it too
    std::printf("LOST rank %d at %.3f inside %s\n", rank, Now(), what.c_str());
    std::fflush(stdout);
    lost = true;
    raise(signal);
    Hang();
  }
  void Before(const std::string& what) {
    if (armed && operation != "file" && std::regex_search(what, pattern) && ++matched == count) {
      Inside(what);
    }
  }
};
Fault fault;

absl::Status Run(const TrainConfig& config) {
  WorldOptions options;
  options.timeout =
      std::chrono::milliseconds(static_cast<int64_t>(config.runtime.timeout_seconds * 1000));
  int rank = -1;
  options.before_message = [&rank](const std::string& what) {
    if (rank == fault.rank) fault.Before(what);
  };
  STRETTO_ASSIGN_OR_RETURN(std::unique_ptr<World> world, World::Create(options));
  rank = world->rank();
  std::printf("PID %d %d\n", rank, static_cast<int>(getpid()));
  std::fflush(stdout);
  // mpirun sends SIGTERM when a rank ends; the others say first what they know.
  auto signals = StopSignals::Install();
  const auto arm = [&](int64_t steps) { fault.armed = rank == fault.rank && steps >= fault.steps; };
  arm(0);
  std::unique_ptr<Trainer> trainer;
  const auto train = [&]() -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(trainer, Trainer::Create(*world, config));
    while (true) {
      STRETTO_RETURN_IF_ERROR(trainer->Step().status());
      arm(trainer->step());
      STRETTO_RETURN_IF_ERROR(trainer->Evaluate().status());
      STRETTO_RETURN_IF_ERROR(trainer->Save());
      if (config.parallel.pp == 1 && config.parallel.tp == 1) {
        STRETTO_RETURN_IF_ERROR(trainer->Sample("a", 2, 1, 0).status());
      }
      if (trainer->step() == config.steps) return trainer->Finish();
    }
  };
  const absl::Status status = train();
  std::fprintf(stderr, "FAULT rank %d at %.3f: %s\n", rank, Now(),
               std::string(status.message()).c_str());
  std::fflush(stderr);
  trainer.reset();
  world.reset();
  std::_Exit(status.ok() ? 0 : 1);
}

int Main(int argc, char** argv) {
  if (argc < 7 || !absl::SimpleAtoi(argv[2], &fault.rank) ||
      !absl::SimpleAtoi(argv[3], &fault.signal) || !absl::SimpleAtoi(argv[5], &fault.count) ||
      !absl::SimpleAtoi(argv[6], &fault.steps)) {
    std::fprintf(stderr, "train_victim: wrong arguments; see the head of train_victim.cc\n");
    return 2;
  }
  fault.operation = argv[4];
  fault.pattern = fault.operation;
  TrainConfig config;
  absl::Status status =
      LoadConfig(argv[1], std::vector<std::string>(argv + 7, argv + argc), ConfigRef(&config));
  if (status.ok()) status = Run(config);
  std::fprintf(stderr, "train_victim: %s\n", std::string(status.message()).c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

}  // namespace
}  // namespace stretto

// These take the place of the C library's. Writing a file ends with this one, and need not reach
// the disk here.
extern "C" int fsync(int descriptor) {
  stretto::Fault& fault = stretto::fault;
  std::error_code error;
  const std::string path =
      std::filesystem::read_symlink(absl::StrCat("/proc/self/fd/", descriptor), error).string();
  if (fault.armed && fault.operation == "file" && path.find(".safetensors") != std::string::npos &&
      ++fault.matched == fault.count) {
    fault.Inside("writing of a checkpoint");
  }
  return 0;
}
// The control plane's messages go through this one.
extern "C" ssize_t send(int descriptor, const void* data, size_t size, int flags) {
  if (stretto::fault.lost) stretto::Fault::Hang();
  return sendto(descriptor, data, size, flags, nullptr, 0);
}

int main(int argc, char** argv) { return stretto::Main(argc, argv); }
