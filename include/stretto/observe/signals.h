// Being asked to stop by a signal, politely.
#ifndef STRETTO_OBSERVE_SIGNALS_H_
#define STRETTO_OBSERVE_SIGNALS_H_

#include "stretto/core/status.h"

namespace stretto {

// While one exists, SIGTERM and SIGUSR1 (what schedulers send before the time is up, e.g. Slurm's
// --signal=B:USR1@120) only set a flag. A training loop reads it between steps and in every other
// long loop (evaluation, sampling), agrees with the other ranks, saves, and leaves. The handler
// stores one lock-free atomic and nothing else, and interrupted system calls are restarted. Keep it
// until the process ends: ranks are not asked in one moment, and one that has saved is not to die.
//
// SIGINT is left alone, so Ctrl-C still ends the program at once.
class StopSignals {
 public:
  // Replaces the handlers of both signals. FAILED_PRECONDITION when another instance lives.
  static absl::StatusOr<StopSignals> Install();
  // Puts the earlier handlers back. The flag stays as it is.
  ~StopSignals();
  StopSignals(StopSignals&& other) noexcept : installed_(other.installed_) {
    other.installed_ = false;
  }
  StopSignals& operator=(StopSignals&&) = delete;

  // The last signal that arrived since the start or Clear: SIGTERM, SIGUSR1, or 0 for none. Safe
  // from any thread, with or without an instance.
  static int Received();
  static void Clear();

 private:
  StopSignals() = default;
  bool installed_ = true;
};

}  // namespace stretto

#endif  // STRETTO_OBSERVE_SIGNALS_H_
