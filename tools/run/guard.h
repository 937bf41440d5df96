// The parent of one rank: writes down how the rank ends, and lets nothing of it stay behind.
#ifndef STRETTO_TOOLS_RUN_GUARD_H_
#define STRETTO_TOOLS_RUN_GUARD_H_

#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// The signal that all guards of a job are asked to pass on, in a file of its directory: a launcher
// need not pass on any, and an mpirun that still starts its ranks does not. 0: none.
absl::Status WriteRequest(const std::string& directory, int signal);
int ReadRequest(const std::string& directory);

struct GuardOptions {
  std::string directory;             // for <directory>/rank-<r>.events
  bool prefix = false;               // "[r] " before each line of output
  std::vector<std::string> keepers;  // addresses; a rank gets its share's as STRETTO_KEEPER
};
// Runs `command` as the rank that the launcher's variables name, between the launcher and the
// program, and ends as the program does: with its code, or by its signal. A launcher such as mpirun
// does not tell which rank ended first and how; a parent knows both for certain, on every machine.
// Signals are passed on, and those that are requested as above. When the launcher is gone, the
// program is ended.
int RunGuard(const GuardOptions& options, const std::vector<std::string>& command);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_GUARD_H_
