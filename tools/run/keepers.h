// The keepers of a job: processes that hold snapshots in memory while trainers come and go.
#ifndef STRETTO_TOOLS_RUN_KEEPERS_H_
#define STRETTO_TOOLS_RUN_KEEPERS_H_

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

struct KeeperOptions {
  int64_t count = 0;               // keepers, all on this machine; 0: none
  std::string program;             // empty: the stretto-keeper beside this program, or in PATH
  std::string job;                 // what tells this job's keepers from others'
  std::string directory = "none";  // where they may spill
  int64_t data = -1, parity = -1;  // of the erasure code; -1: the keeper's default
};

class Keepers {
 public:
  Keepers() = default;
  // Starts them and waits until all are ready. UNAVAILABLE names the one that is not,
  // FAILED_PRECONDITION one that was called wrongly. STRETTO_JOB_TOKEN must be set. CANCELLED as
  // soon as `asked` says that nobody waits for them any more.
  static absl::StatusOr<Keepers> Start(
      const KeeperOptions& options, std::function<bool()> asked = [] { return false; });
  ~Keepers();  // SIGTERM, and SIGKILL where that does not help
  Keepers(Keepers&& other) noexcept { *this = std::move(other); }
  Keepers& operator=(Keepers&& other) noexcept {
    options_.swap(other.options_);
    nodes_.swap(other.nodes_);
    asked_.swap(other.asked_);
    return *this;
  }

  // To be told of each child of this process that has ended; the number of a keeper, or -1.
  int Ended(pid_t pid);
  // Starts those again that have ended: they ask the others for what is lost. Does not wait.
  absl::Status Restart();
  // Hears those that Restart has started. Ends the one that is not ready in time, and names it.
  absl::Status Check();
  bool ready() const;  // all that run are

  std::vector<std::string> addresses() const;
  std::set<pid_t> pids() const;

 private:
  struct Node {
    pid_t pid = -1;  // -1: ended
    int port = 0;
    int output = -1;
    bool starting = false;
    std::string said;  // since it was started
    std::chrono::steady_clock::time_point deadline;
  };
  absl::Status StartNode(size_t n);
  absl::Status Launch(size_t n);
  // Whether it has said that it is ready, waiting for so long at most. DEADLINE_EXCEEDED when it
  // is late, UNAVAILABLE when its output has ended, INTERNAL when it says something else.
  static absl::StatusOr<bool> Look(Node& node, int milliseconds);
  std::string Trouble(size_t n, const absl::Status& status) const;
  // Ends and collects those that still run.
  static void End(const std::vector<Node*>& nodes);
  std::vector<KeeperOptions> options_;  // one
  std::vector<Node> nodes_;
  std::function<bool()> asked_ = [] { return false; };
};

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_KEEPERS_H_
