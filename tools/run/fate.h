// What became of the ranks of a job: written by their guards, read by the supervisor.
#ifndef STRETTO_TOOLS_RUN_FATE_H_
#define STRETTO_TOOLS_RUN_FATE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace stretto {

// One event in the life of a rank: a line of JSON in <directory>/rank-<r>.events.
struct RankEvent {
  enum class Kind { kStarted, kStopped, kContinued, kAsked, kEnded };
  Kind kind = Kind::kStarted;
  double time = 0;   // Unix seconds of the rank's machine
  int pid = 0;       // kStarted: of the program
  std::string host;  // kStarted
  int signal = 0;    // kStopped, kAsked; kEnded by a signal
  int code = 0;      // kEnded by itself
  std::string said;  // kEnded: the end of its standard error
};
std::string EventsPath(const std::string& directory, int rank);
std::string ToLine(const RankEvent& event);

struct RankFate {
  enum class State { kUnknown, kRunning, kStopped, kExited, kKilled };
  int rank = -1;
  State state = State::kUnknown;  // kUnknown: it never started, as far as is known
  double since = 0;               // Unix seconds
  std::string host;
  int pid = 0;
  int code = 0;    // kExited
  int signal = 0;  // kStopped, kKilled
  int asked = 0;   // the first signal that was to end it, when one came before it ended; 0: none
  double asked_at = 0;
  std::string said;  // the end of its standard error
};
// Lines that make no sense are passed over: the last may be cut off.
RankFate ParseEvents(int rank, const std::string& text);
// "killed by SIGKILL", "ended with code 1", "stopped by SIGSTOP", "running", "unknown".
std::string Describe(const RankFate& fate);

// What ended a job.
struct Cause {
  enum class Kind {
    kUnknown,
    kKilled,    // ranks, by `signal`
    kExited,    // ranks, with `code`
    kStopped,   // ranks, by `signal`: they wait to be continued
    kHung,      // nothing moved any more; ranks: those that the others waited for, where known
    kLauncher,  // the launcher ended with `code` (or by `signal`), and no rank had ended by itself
  };
  Kind kind = Kind::kUnknown;
  std::vector<int> ranks;  // empty: unknown which
  int code = 0;
  int signal = 0;
  double time = 0;       // Unix seconds; 0: unknown
  bool started = false;  // kLauncher: at least one rank, as far as is known
  bool hung = false;     // kLauncher: it did not end, but was ended
};
// The first trouble that came without being asked for: what follows it is not its own. Ranks that
// end within a tenth of a second in the same way ended together. A rank that left as it should
// (code 0, or `requested` after a signal) is no trouble.
Cause FindCause(const std::vector<RankFate>& fates, int requested);
// "rank 1 was killed by SIGKILL"; `when`, such as "after step 7", stands where it belongs.
std::string Describe(const Cause& cause, const std::string& when = "");
// "after step 7", the last that is done; "before any step".
std::string When(const std::optional<int64_t>& step);
// "rank 1", "ranks 0 and 2", "ranks 0 to 7".
std::string RankNames(const std::vector<int>& ranks);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_FATE_H_
