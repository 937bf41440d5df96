// Whether, when and with how many ranks a failed job starts again. Pure: the caller has the clock.
#ifndef STRETTO_TOOLS_RUN_POLICY_H_
#define STRETTO_TOOLS_RUN_POLICY_H_

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "stretto/observe/progress.h"

namespace stretto {

struct RestartOptions {
  int64_t restarts = 3;   // at most so many ...
  double window = 3600;   // ... in this many seconds; 0: in all
  double delay = 1;       // seconds before a restart; doubles while there is no progress ...
  double delay_cap = 60;  // ... up to this
  int64_t same = 3;       // give up when the same failure comes so often without progress, or twice
                          // when no rank has ever started and the launcher says why; 0: never
  std::vector<int> fatal_codes = {2, 126, 127};  // exit codes that do not heal
  int ranks = 1;
  int min_ranks = 1;         // below `ranks`: may go on with fewer
  int64_t shrink_after = 2;  // losses of the same rank in a row without progress, then fewer ranks
};

struct Failure {
  std::string what;             // equal for equal failures: "rank 1 was killed by SIGKILL"
  int exit_code = 0;            // of a rank that ended by itself; 0: another kind
  std::optional<int64_t> step;  // the last completed one; nothing: none, or unknown
  std::vector<int> lost;        // ranks that died by a signal, or were stopped
  bool started = true;          // at least one rank
  std::string said;             // by a launcher that ended by itself and started none
};

struct Decision {
  bool restart = false;
  double delay = 0;  // seconds
  int ranks = 0;
  std::string reason;  // why not again, or why with other ranks; may be empty
};

class RestartPolicy {
 public:
  explicit RestartPolicy(RestartOptions options);
  // `now` in seconds of any clock that never goes back. `facts`: the layout, where it is known.
  Decision OnFailure(const Failure& failure, const std::optional<JobFacts>& facts, double now);
  int64_t restarts() const { return restarts_; }  // in all
  int ranks() const { return ranks_; }

 private:
  RestartOptions options_;
  int ranks_;
  int64_t restarts_ = 0;
  std::deque<double> recent_;         // times of restarts in the window
  std::optional<int64_t> furthest_;   // step that was ever reached
  int64_t without_progress_ = 0;      // failures in a row
  int64_t same_ = 0, same_lost_ = 0;  // in a row, without progress
  std::string last_what_;
  std::optional<int64_t> last_step_;
  std::vector<int> last_lost_;
  bool ever_started_ = false;  // a rank
  int64_t refused_ = 0;        // in a row, in the same words
  std::string last_said_;
};

// The most ranks below `ranks` - `lost` on which the job could go on: whole copies of the model
// only, since only the data axis may shrink. 0 with a reason when there is none.
int FewerRanks(int ranks, int lost, int min_ranks, const std::optional<JobFacts>& facts,
               std::string* reason);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_POLICY_H_
