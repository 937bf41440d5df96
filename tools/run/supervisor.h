// Keeps a job running until it is done: starts it, watches it, ends what a failure leaves, reports,
// starts it again.
#ifndef STRETTO_TOOLS_RUN_SUPERVISOR_H_
#define STRETTO_TOOLS_RUN_SUPERVISOR_H_

#include <string>

#include "tools/run/job.h"
#include "tools/run/keepers.h"
#include "tools/run/policy.h"

namespace stretto {

// How a supervised job ends: exit codes of stretto-run. A failure that cannot heal gives the code
// of the rank instead (2, 126, 127).
enum ExitCode {
  kDone = 0,
  kGaveUp = 1,
  kWrongUsage = 2,
  kSaved = 75,     // asked to stop; the ranks saved and left (their own code for it)
  kNotSaved = 76,  // asked to stop; the ranks ended without saving
  kInterrupted = 130,
};

struct SupervisorOptions {
  LaunchOptions launch;
  RestartOptions restart;
  KeeperOptions keepers;
  std::string directory = "incidents";  // for reports; on a file system that all machines share
  double stall = 600;  // seconds without a sign of life of any rank, once steps are done; 0: off
  double stall_start = 1800;  // the same, before the first step
  double save = 110;          // seconds that ranks get to save when asked to stop
};
// Blocks. To be called once, in a process without threads.
int Supervise(const SupervisorOptions& options);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_SUPERVISOR_H_
