#include "tools/run/job.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "src/observe/file.h"
#include "tools/run/process.h"
#include "tools/run/words.h"

namespace stretto {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  if (file) text << file.rdbuf();
  return text.str();
}

}  // namespace

absl::StatusOr<Job> Job::Start(const LaunchOptions& options, int ranks, int64_t restarts,
                               const std::string& live, const std::vector<std::string>& keepers,
                               const std::function<bool()>& asked) {
  Job job;
  job.live_ = live;
  job.ranks_ = ranks;
  job.started_ = observe_internal::UnixSeconds();
  // Values travel as arguments: a launcher need not pass the environment on to other machines.
  std::vector<std::string> guard = {OwnPath(), "--guard", live, absl::StrCat(restarts),
                                    options.prefix ? "prefix" : "plain"};
  std::string addresses;
  for (const std::string& keeper : keepers) {
    absl::StrAppend(&addresses, addresses.empty() ? "" : ",", keeper);
  }
  guard.push_back(addresses.empty() ? "none" : addresses);
  guard.insert(guard.end(), options.program.begin(), options.program.end());

  int error[2];
  if (pipe2(error, O_CLOEXEC) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no pipe for the launcher's output: ", std::strerror(errno)));
  }
  // Cleaned it gets shorter.
  job.words_ = std::make_unique<Stream>(error[0], STDERR_FILENO, "", 2 * kWordBytes);
  const absl::Status launched = job.Launch(options, guard, error[1], asked);
  close(error[1]);
  if (!launched.ok()) return launched;
  return job;
}

absl::Status Job::Launch(const LaunchOptions& options, const std::vector<std::string>& guard,
                         int error, const std::function<bool()>& asked) {
  SpawnOptions spawn = {.error = error, .parent_death = SIGKILL};
  // A launcher gives ranks a terminal, whatever its own output is.
  if (isatty(STDOUT_FILENO) == 0) spawn.environment = {{"TERM", "dumb"}, {"NO_COLOR", "1"}};
  if (options.launcher == "env") {
    STRETTO_ASSIGN_OR_RETURN(const std::vector<int> ports, FreePorts(1));
    const Environment common = spawn.environment;
    for (int rank = 0; rank < ranks_; ++rank) {
      spawn.environment = common;
      spawn.environment.insert(spawn.environment.end(), {{"RANK", absl::StrCat(rank)},
                                                         {"WORLD_SIZE", absl::StrCat(ranks_)},
                                                         {"LOCAL_RANK", absl::StrCat(rank)},
                                                         {"LOCAL_WORLD_SIZE", absl::StrCat(ranks_)},
                                                         {"MASTER_ADDR", "127.0.0.1"},
                                                         {"MASTER_PORT", absl::StrCat(ports[0])}});
      const absl::StatusOr<pid_t> pid =
          asked() ? absl::CancelledError("asked to stop") : Spawn(guard, spawn);
      if (!pid.ok()) {
        for (const auto& [started, unused] : running_) {
          kill(started, SIGKILL);
          waitpid(started, nullptr, 0);
        }
        return pid.status();
      }
      running_[*pid] = rank;
    }
    return absl::OkStatus();
  }
  // What is left after a failure gets as long as with us.
  spawn.environment.emplace_back(
      "OMPI_MCA_odls_base_sigkill_timeout",
      absl::StrCat(std::max(1, static_cast<int>(std::ceil(options.grace)))));
  if (geteuid() == 0) {
    spawn.environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT", "1");
    spawn.environment.emplace_back("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
  }
  std::vector<std::string> command;
  std::istringstream words(options.mpirun);
  for (std::string word; words >> word;) command.push_back(word);
  command.insert(command.end(), {"-np", absl::StrCat(ranks_)});
  command.insert(command.end(), guard.begin(), guard.end());
  STRETTO_ASSIGN_OR_RETURN(const pid_t pid, Spawn(command, spawn));
  running_[pid] = -1;
  return absl::OkStatus();
}

void Job::Ended(pid_t pid, int status) {
  if (running_.erase(pid) == 0) return;
  if (code_ != 0 || signal_ != 0) return;
  if (WIFSIGNALED(status)) {
    signal_ = WTERMSIG(status);
  } else {
    code_ = WEXITSTATUS(status);
  }
}

void Job::Signal(int signal) const {
  for (const auto& [pid, unused] : running_) kill(pid, signal);
}

std::vector<RankFate> Job::Fates() const {
  std::vector<RankFate> fates;
  for (int rank = 0; rank < ranks_; ++rank) {
    fates.push_back(ParseEvents(rank, ReadAll(EventsPath(live_, rank))));
  }
  return fates;
}

std::vector<RankProgress> Job::Progress() const {
  std::vector<RankProgress> progress;
  for (int rank = 0; rank < ranks_; ++rank) {
    progress.push_back(ParseProgress(ReadAll(ProgressPath(live_, rank))));
  }
  return progress;
}

}  // namespace stretto
