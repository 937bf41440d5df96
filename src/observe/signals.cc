#include "stretto/observe/signals.h"

#include <signal.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

std::atomic<int> received{0};
static_assert(std::atomic<int>::is_always_lock_free);  // else not allowed in a signal handler
std::atomic<bool> installed{false};
struct sigaction old_term, old_usr1;

void Handle(int signal) { received.store(signal, std::memory_order_relaxed); }

}  // namespace

absl::StatusOr<StopSignals> StopSignals::Install() {
  if (installed.exchange(true)) {
    return absl::FailedPreconditionError(
        "Stop signals are already caught in this process; keep one StopSignals for the whole run.");
  }
  struct sigaction action;
  std::memset(&action, 0, sizeof(action));
  action.sa_handler = Handle;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  if (sigaction(SIGTERM, &action, &old_term) != 0) {
    installed = false;
    return absl::InternalError(
        absl::StrCat("SIGTERM cannot be caught: ", std::strerror(errno), "."));
  }
  if (sigaction(SIGUSR1, &action, &old_usr1) != 0) {
    const int error = errno;
    sigaction(SIGTERM, &old_term, nullptr);
    installed = false;
    return absl::InternalError(
        absl::StrCat("SIGUSR1 cannot be caught: ", std::strerror(error), "."));
  }
  return StopSignals();
}

StopSignals::~StopSignals() {
  if (!installed_) return;
  sigaction(SIGTERM, &old_term, nullptr);
  sigaction(SIGUSR1, &old_usr1, nullptr);
  installed = false;
}

int StopSignals::Received() { return received.load(std::memory_order_relaxed); }
void StopSignals::Clear() { received.store(0, std::memory_order_relaxed); }

}  // namespace stretto
