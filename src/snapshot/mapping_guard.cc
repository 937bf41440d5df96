#include "src/snapshot/mapping_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <mutex>

namespace stretto::snapshot_internal {
namespace {

constexpr uintptr_t kPage = 4096;

// What the handler reads, without a lock.
struct Guarded {
  std::atomic<uintptr_t> begin = 0, end = 0;  // end 0: none
  std::atomic<bool> lost = false;
};
static_assert(std::atomic<uintptr_t>::is_always_lock_free &&
              std::atomic<bool>::is_always_lock_free);

std::array<Guarded, MappingGuard::kMost> guarded;
std::mutex mutex;  // of who changes it
struct sigaction before = {};

void OnBusError(int signal_number, siginfo_t* info, void* context) {
  const int error = errno;
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  const bool of_access = info->si_code > 0;  // not sent by somebody
  for (Guarded& g : guarded) {
    uintptr_t begin = 0, end = 0;
    do {  // until both are of one mapping
      end = g.end;
      begin = g.begin;
    } while (g.end != end);
    if (!of_access || at < begin || at >= end) continue;
    const uintptr_t page = at / kPage * kPage;
    g.lost = true;
    // A system call and no more, so that a handler may make it.
    if (mmap(reinterpret_cast<void*>(page), end - page, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED) {
      break;
    }
    errno = error;
    return;
  }
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    before.sa_sigaction(signal_number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(signal_number);
  } else if (of_access || before.sa_handler == SIG_DFL) {
    sigaction(signal_number, &before, nullptr);
    if (!of_access) raise(signal_number);  // else the access is made again, and ends the process
  }
  errno = error;
}

}  // namespace

MappingGuard::MappingGuard(std::byte* base, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = OnBusError;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    return sigaction(SIGBUS, &action, &before) == 0;
  }();
  if (!installed) return;
  for (size_t i = 0; i < guarded.size() && index_ < 0; ++i) {
    if (guarded[i].end == 0) index_ = static_cast<int>(i);
  }
  if (index_ < 0) return;
  Guarded& mine = guarded[static_cast<size_t>(index_)];
  mine.lost = false;
  mine.begin = reinterpret_cast<uintptr_t>(base);
  mine.end = reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(bytes);
}

MappingGuard::~MappingGuard() {
  if (index_ < 0) return;
  const std::lock_guard<std::mutex> lock(mutex);
  guarded[static_cast<size_t>(index_)].end = 0;
}

bool MappingGuard::lost() const { return index_ >= 0 && guarded[static_cast<size_t>(index_)].lost; }

}  // namespace stretto::snapshot_internal
