// Trains on documents of very unequal length, a few steps with each way of sharing them among the
// ranks, and shows what each rank did with its time:
//
//   mpirun -np 4 train_varlen configs/varlen.json --steps 8
//
// The steps are the same every time: the same documents, so the same losses up to rounding.
// Exit codes: 0 finished, 1 failed, 2 wrong usage, configuration or files.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "stretto/comm/world.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/train/trainer.h"

namespace {

using stretto::kExitUsage;
constexpr char kHelp[] =
    "usage: train_varlen CONFIG.json [--steps N] [--set section.name=value]...\n"
    "       mpirun -np RANKS train_varlen ...\n"
    "Runs N steps (default 8) with a static mesh, in which all ranks share each document, and "
    "with\n"
    "a dynamic one, unbalanced and balanced. data.documents must be on.\n";

struct Mesh {
  std::string name, mesh;
  int64_t cp = 1;
};

// What a rank did in one run, in seconds.
struct Times {
  double working = 0, waiting = 0, steps = 0;
};

struct Outcome {
  std::vector<Times> of_rank;
  std::vector<double> losses;
  double bytes_sent = 0;  // of all ranks around rings
};

absl::StatusOr<Outcome> RunSteps(stretto::World& world, stretto::TrainConfig config,
                                 const Mesh& mesh, int64_t steps) {
  config.parallel.mesh = mesh.mesh;
  config.parallel.cp = mesh.cp;
  config.parallel.dp = 0;
  config.checkpoint.resume = "auto";
  absl::StrAppend(&config.output, "/", mesh.name);
  STRETTO_ASSIGN_OR_RETURN(const auto trainer, stretto::Trainer::Create(world, config));
  Outcome outcome;
  Times mine;
  for (int64_t s = 0; s < steps; ++s) {
    STRETTO_ASSIGN_OR_RETURN(const stretto::StepStats stats, trainer->Step());
    outcome.losses.push_back(stats.loss);
    if (s == 0 && steps > 1) continue;  // the first one meets everything for the first time
    mine.working += (stats.forward_ms + stats.backward_ms + stats.update_ms) / 1e3;
    mine.waiting += stats.comm_exposed_ms / 1e3;
    mine.steps += stats.step_ms / 1e3;
  }
  STRETTO_RETURN_IF_ERROR(trainer->Finish());
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> all,
      world.AllGather("times", absl::StrJoin({mine.working, mine.waiting, mine.steps,
                                              static_cast<double>(trainer->BytesSent("cp"))},
                                             " ")));
  for (const std::string& text : all) {
    std::vector<double> numbers;
    for (const std::string& word : std::vector<std::string>(absl::StrSplit(text, ' '))) {
      numbers.push_back(0);
      if (!absl::SimpleAtod(word, &numbers.back())) {
        return absl::InternalError(absl::StrCat("'", word, "' is no number of seconds"));
      }
    }
    outcome.of_rank.push_back({numbers[0], numbers[1], numbers[2]});
    outcome.bytes_sent += numbers[3];
  }
  return outcome;
}

void Print(const Mesh& mesh, const Outcome& outcome, int64_t steps, double longest) {
  const double counted = static_cast<double>(std::max<int64_t>(1, steps - 1));
  double step = 0, working = 0;
  for (const Times& t : outcome.of_rank) {
    step = std::max(step, t.steps / counted);
    working += t.working / counted / static_cast<double>(outcome.of_rank.size());
  }
  std::printf("\n%s: %.0f ms a step, %.1f MB sent around rings, loss %.4f to %.4f\n",
              mesh.name.c_str(), 1e3 * step, outcome.bytes_sent / 1e6 / static_cast<double>(steps),
              outcome.losses.front(), outcome.losses.back());
  constexpr int kColumns = 50;
  for (size_t r = 0; r < outcome.of_rank.size(); ++r) {
    const Times& t = outcome.of_rank[r];
    const auto columns = [&](double seconds) {
      return static_cast<size_t>(std::clamp(seconds / longest * kColumns + 0.5, 0.0, 1e3));
    };
    std::printf("  rank %2d %s%s  %.0f ms working, %.0f waiting\n", static_cast<int>(r),
                std::string(columns(t.working), '#').c_str(),
                std::string(columns(t.waiting), '.').c_str(), 1e3 * t.working / counted,
                1e3 * t.waiting / counted);
  }
  std::printf("  the slowest rank works %.2f times as long as the mean\n",
              std::max_element(
                  outcome.of_rank.begin(), outcome.of_rank.end(),
                  [](const Times& a, const Times& b) {
                    return a.working < b.working;
                  })->working /
                  counted / std::max(working, 1e-9));
}

absl::Status Compare(stretto::World& world, const stretto::TrainConfig& config, int64_t steps) {
  if (!config.data.documents) {
    return absl::InvalidArgumentError(
        "data.documents is off, and this program compares ways of sharing documents; set "
        "data.documents=true and batch.capacity");
  }
  const std::vector<Mesh> meshes = {
      {"static", "static", world.size()}, {"unbalanced", "unbalanced"}, {"dynamic", "dynamic"}};
  std::vector<Outcome> outcomes;
  for (const Mesh& mesh : meshes) {
    STRETTO_ASSIGN_OR_RETURN(Outcome outcome, RunSteps(world, config, mesh, steps));
    outcomes.push_back(std::move(outcome));
  }
  if (world.rank() > 0) return absl::OkStatus();
  double longest = 1e-9;
  for (const Outcome& outcome : outcomes) {
    for (const Times& t : outcome.of_rank) longest = std::max(longest, t.working + t.waiting);
  }
  std::printf("%d ranks, %d steps of up to %d tokens each; # working, . waiting for others\n",
              world.size(), static_cast<int>(steps), static_cast<int>(config.batch.tokens));
  for (size_t i = 0; i < meshes.size(); ++i) Print(meshes[i], outcomes[i], steps, longest);
  return absl::OkStatus();
}

}  // namespace

int main(int argc, char** argv) {
  std::string path;
  std::vector<std::string> sets;
  int64_t steps = 8;
  const auto usage = [](const std::string& problem) {
    std::fprintf(stderr, "train_varlen: %s\n%s", problem.c_str(), kHelp);
    return kExitUsage;
  };
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help" || argument == "-h")
      return stretto::EndProgram(stretto::PrintText(kHelp));
    if (argument == "--set" || argument == "--steps") {
      if (i + 1 == argc) return usage(absl::StrCat(argument, " needs a value"));
      const std::string value = argv[++i];
      if (argument == "--set") {
        sets.push_back(value);
      } else if (!absl::SimpleAtoi(value, &steps) || steps < 1 || steps > 1000000) {
        return usage(absl::StrCat("--steps is '", value, "'; give a number from 1 to 1000000"));
      }
    } else if (argument.rfind('-', 0) == 0 || !path.empty()) {
      return usage(absl::StrCat("did not expect '", argument, "'"));
    } else {
      path = argument;
    }
  }
  if (path.empty()) return usage("name a configuration file");

  stretto::TrainConfig config;
  sets.push_back(absl::StrCat("steps=", steps));
  const absl::Status loaded = stretto::LoadConfig(path, sets, stretto::ConfigRef(&config));
  if (!loaded.ok()) {
    std::fprintf(stderr, "train_varlen: %s\n", std::string(loaded.message()).c_str());
    return kExitUsage;
  }
  auto world = stretto::World::Create({});
  if (!world.ok()) {
    std::fprintf(stderr, "train_varlen: %s\n", std::string(world.status().message()).c_str());
    return stretto::TrainerExitCode(world.status());
  }
  stretto::SetLogRank((*world)->rank(), (*world)->size());
  const absl::Status status = Compare(**world, config, steps);
  if (status.ok()) return stretto::EndProgram(status);
  const bool agreed = stretto::IsAgreed(status) || absl::IsInvalidArgument(status);
  if ((*world)->rank() == 0 || !agreed) {
    std::fprintf(stderr, "train_varlen: %s\n", std::string(status.message()).c_str());
  }
  std::fflush(nullptr);
  const int code = stretto::TrainerExitCode(status);
  if (!agreed) _exit(code);  // MPI cannot be finalised after an error between ranks
  return code;
}
