// Processes of this machine: starting them, finding all that came of them, ending them.
#ifndef STRETTO_TOOLS_RUN_PROCESS_H_
#define STRETTO_TOOLS_RUN_PROCESS_H_

#include <sys/types.h>

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

using Environment = std::vector<std::pair<std::string, std::string>>;

struct SpawnOptions {
  Environment environment;  // added to this process's
  int output = -1;          // descriptor that becomes standard output; -1: this process's
  int error = -1;           // the same for standard error
  int parent_death = 0;     // signal that the process gets when this one ends; 0: none
};
inline constexpr int kCannotRun = 126, kNoProgram = 127;  // exit codes, as of a shell
// Starts a program in a process group of its own, with no standard input and all signals as a shell
// would leave them. A program that cannot be started ends with kNoProgram (kCannotRun: not
// executable) after a sentence on its standard error.
absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& command, const SpawnOptions& options);

// All that descend from `ancestor` and have not ended. With BecomeReaper in the ancestor these are
// all processes that it ever started, since orphans come back to it.
std::set<pid_t> Descendants(pid_t ancestor);
// Orphans of this process's descendants become its children.
void BecomeReaper();
// Standard streams that are closed become /dev/null. Otherwise files of ours or of a rank get their
// numbers, and what is printed goes into them.
void OpenStandardStreams();
// SIGKILL to all descendants of this process but `spared` and theirs, again until none is left, at
// most for some seconds. Their ends are collected. Returns those that are still there.
std::set<pid_t> KillDescendants(const std::set<pid_t>& spared);

// Different TCP ports of the loopback device that nobody holds now.
absl::StatusOr<std::vector<int>> FreePorts(int count);
// How many processes this user may have here at most.
int64_t ProcessLimit();
// "SIGKILL".
std::string SignalName(int signal);
// The file of this program.
std::string OwnPath();

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_PROCESS_H_
