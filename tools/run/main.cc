// Runs a training job until it is done, whatever happens to its processes:
//
//   stretto-run --ranks 8 -- stretto-gpt my.json --set checkpoint.every=100
//
// docs/resilience.md says what it does and what its exit codes mean.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "stretto/core/exit_code.h"
#include "tools/arguments.h"
#include "tools/run/guard.h"
#include "tools/run/process.h"
#include "tools/run/supervisor.h"

namespace stretto {
namespace {

// stretto-run --guard LIVE RESTARTS prefix|plain KEEPERS|none PROGRAM...: what the launcher starts.
int GuardMain(int argc, char** argv) {
  constexpr int kProgram = 6;
  if (argc <= kProgram) {
    std::fprintf(stderr, "stretto-run: --guard is for stretto-run itself\n");
    return kWrongUsage;
  }
  GuardOptions options = {.directory = argv[2], .prefix = std::string(argv[4]) == "prefix"};
  setenv("STRETTO_RESTARTS", argv[3], 1);
  if (std::string(argv[5]) != "none") {
    options.keepers = absl::StrSplit(argv[5], ',');
    std::string token;
    if (std::getline(std::ifstream(options.directory + "/token"), token)) {
      setenv("STRETTO_JOB_TOKEN", token.c_str(), 1);
    }
  }
  OpenStandardStreams();
  return RunGuard(options, std::vector<std::string>(argv + kProgram, argv + argc));
}

absl::Status Check(const SupervisorOptions& o, int64_t ranks, int64_t min_ranks) {
  const auto wrong = [](const std::string& what) {
    return absl::InvalidArgumentError("stretto-run: " + what);
  };
  constexpr int64_t kMost = 1 << 16;
  if (o.launch.program.empty()) return wrong("name the program after --; see --help");
  if (ranks < 1 || ranks > kMost) {
    return wrong(
        absl::StrCat("--ranks must be a number of ranks from 1 to ", kMost, ", not ", ranks));
  }
  const int64_t room = ProcessLimit();
  if (o.launch.launcher == "env" && ranks > room / 2) {  // each has a guard
    return wrong(absl::StrCat("--ranks ", ranks, " with --launcher env needs ", 2 * ranks,
                              " processes of this machine, which allows ", room,
                              "; use fewer ranks, or --launcher mpi and more machines"));
  }
  if (min_ranks < 0 || min_ranks > ranks) {
    return wrong(absl::StrCat("--min-ranks must be between 1 and --ranks, ", ranks));
  }
  if (o.restart.restarts < 0 || o.restart.same < 0 || o.restart.shrink_after < 1) {
    return wrong("--restarts and --same must be at least 0, --shrink-after at least 1");
  }
  if (o.restart.window < 0 || o.restart.delay < 0 || o.restart.delay_cap < o.restart.delay) {
    return wrong("--window and --delay must be at least 0, and --delay-cap at least --delay");
  }
  if (o.stall < 0 || o.stall_start < 0 || o.launch.grace < 0 || o.save < 0) {
    return wrong("--stall, --stall-start, --grace and --save are seconds, at least 0");
  }
  // Each has a rank, also of the fewest.
  if (o.keepers.count < 0 || o.keepers.count > (min_ranks > 0 ? min_ranks : ranks)) {
    return wrong("--keepers must be between 0 and --ranks, or --min-ranks where that is given");
  }
  if (o.keepers.data == 0 || o.keepers.data < -1 || o.keepers.parity < -1) {
    return wrong("--data must be at least 1, --parity at least 0 (none), or -1 for the default");
  }
  if (o.keepers.count == 0 && (o.keepers.data != -1 || o.keepers.parity != -1)) {
    return wrong("--data and --parity are the keepers', of which there are none; add --keepers N");
  }
  if (o.launch.mpirun.find_first_not_of(' ') == std::string::npos) {
    return wrong("--mpirun must name a program");
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  SupervisorOptions options;
  int64_t ranks = 1, min_ranks = 0;
  std::string fatal_codes = "2,126,127";
  const char* slurm = std::getenv("SLURM_JOB_ID");
  options.keepers.job = slurm != nullptr ? slurm : absl::StrCat("run-", getpid());
  Arguments arguments(
      "stretto-run",
      "Runs a training job until it is done: watches its ranks, ends what a failure leaves, "
      "reports\n"
      "it, and starts again from the newest checkpoint. docs/resilience.md has the exit codes.",
      "-- PROGRAM [ARGUMENTS...]");
  arguments.Add("ranks", "N", "processes of the job", &ranks);
  arguments.Add("min-ranks", "N",
                "go on with as few when the same rank is lost again and again; 0: always --ranks",
                &min_ranks);
  arguments.Add("shrink-after", "N", "losses in a row without progress before that",
                &options.restart.shrink_after);
  arguments.AddChoice("launcher", {"mpi", "env"},
                      "who starts them: mpirun, or stretto-run itself on this machine, over TCP",
                      &options.launch.launcher);
  arguments.Add("mpirun", "COMMAND", "mpirun with further options, between blanks",
                &options.launch.mpirun);
  arguments.AddFlag("prefix", "begin each line of output with its rank", &options.launch.prefix);
  arguments.Add("directory", "DIR",
                "where incidents are reported; on several machines a shared one",
                &options.directory);
  arguments.Add("restarts", "N", "restarts within --window", &options.restart.restarts);
  arguments.Add("window", "SECONDS", "0: --restarts counts for the whole run",
                &options.restart.window);
  arguments.Add(
      "same", "N",
      "give up when the same failure comes so often without progress (twice when no rank ever "
      "started); 0: never",
      &options.restart.same);
  arguments.Add("delay", "SECONDS", "before a restart; doubles while there is no progress",
                &options.restart.delay);
  arguments.Add("delay-cap", "SECONDS", "... up to this", &options.restart.delay_cap);
  arguments.Add("fatal-codes", "LIST", "exit codes of ranks after which nothing is tried again",
                &fatal_codes);
  arguments.Add("stall", "SECONDS", "without a sign of life of any rank: it hangs; 0: never",
                &options.stall);
  arguments.Add("stall-start", "SECONDS", "the same before the first step", &options.stall_start);
  arguments.Add("grace", "SECONDS", "between SIGTERM and SIGKILL", &options.launch.grace);
  arguments.Add("save", "SECONDS", "that the ranks get to save when stretto-run is asked to stop",
                &options.save);
  arguments.Add("keepers", "N", "processes that keep snapshots in memory, on this machine; 0: none",
                &options.keepers.count);
  arguments.Add("keeper", "FILE",
                "their program; empty: stretto-keeper beside this program, or in PATH",
                &options.keepers.program);
  arguments.Add("keeper-dir", "DIR", "where they may spill, or none", &options.keepers.directory);
  arguments.Add("data", "N", "parts of their erasure code; -1: all but those of parity",
                &options.keepers.data);
  arguments.Add("parity", "N",
                "spare parts of it; 0: none, so that what one loses nobody has; -1: 1 where there "
                "are several",
                &options.keepers.parity);
  arguments.Add("job", "ID", "what tells this job's keepers from others'", &options.keepers.job);
  const absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  options.launch.program = arguments.rest();
  absl::Status checked = parsed.ok() ? Check(options, ranks, min_ranks) : parsed;
  options.restart.fatal_codes.clear();
  const std::vector<std::string> codes = absl::StrSplit(fatal_codes, ',', absl::SkipEmpty());
  for (const std::string& word : codes) {
    int code = 0;
    if (checked.ok() && (!absl::SimpleAtoi(word, &code) || code < 1 || code > 255)) {
      checked = absl::InvalidArgumentError(absl::StrCat("stretto-run: --fatal-codes has '", word,
                                                        "', which is no exit code from 1 to 255"));
    }
    options.restart.fatal_codes.push_back(code);
  }
  if (!checked.ok()) {
    std::fprintf(stderr, "%s\n", std::string(checked.message()).c_str());
    return kWrongUsage;
  }
  options.restart.ranks = static_cast<int>(ranks);
  options.restart.min_ranks = static_cast<int>(min_ranks == 0 ? ranks : min_ranks);
  OpenStandardStreams();
  return Supervise(options);
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "--guard") return stretto::GuardMain(argc, argv);
  return stretto::Main(argc, argv);
}
