// One start of the ranks of a job, through a launcher, each under a guard.
#ifndef STRETTO_TOOLS_RUN_JOB_H_
#define STRETTO_TOOLS_RUN_JOB_H_

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/observe/progress.h"
#include "tools/run/fate.h"
#include "tools/run/stream.h"

namespace stretto {

struct LaunchOptions {
  std::vector<std::string> program;  // and its arguments
  std::string launcher = "mpi";      // or "env": torchrun's variables, on this machine
  std::string mpirun = "mpirun";     // with its options, words between blanks
  bool prefix = false;               // of lines of output
  double grace = 10;                 // seconds between SIGTERM and SIGKILL
};

class Job {
 public:
  // `live` is an absolute directory that the job's files may fill. `restarts`: how often the job
  // was started before. `keepers`: addresses, may be none. CANCELLED, with nothing left running, as
  // soon as `asked` says that it is to stop.
  static absl::StatusOr<Job> Start(const LaunchOptions& options, int ranks, int64_t restarts,
                                   const std::string& live, const std::vector<std::string>& keepers,
                                   const std::function<bool()>& asked);

  // To be told of each child of this process that has ended.
  void Ended(pid_t pid, int status);
  // Whether the launcher, or a guard where there is none, still runs.
  bool running() const { return !running_.empty(); }
  // Of the first of them that did not end with code 0.
  int code() const { return code_; }
  int signal() const { return signal_; }
  // What the launcher, or the guards where there is none, write to standard error; it has to be
  // pumped there.
  Stream& words() const { return *words_; }
  // To the launcher, which may pass it on, or to the guards where there is none.
  void Signal(int signal) const;

  int ranks() const { return ranks_; }
  double started() const { return started_; }  // Unix seconds
  std::vector<RankFate> Fates() const;
  std::vector<RankProgress> Progress() const;

 private:
  // Starts the guards, which write to the descriptor `error`.
  absl::Status Launch(const LaunchOptions& options, const std::vector<std::string>& guard,
                      int error, const std::function<bool()>& asked);

  std::string live_;
  int ranks_ = 0;
  double started_ = 0;
  std::map<pid_t, int> running_;
  std::unique_ptr<Stream> words_;
  int code_ = 0, signal_ = 0;
};

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_JOB_H_
