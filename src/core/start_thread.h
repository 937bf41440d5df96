// Threads without exceptions.
#ifndef STRETTO_SRC_CORE_START_THREAD_H_
#define STRETTO_SRC_CORE_START_THREAD_H_

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/core/status.h"

namespace stretto {

// Runs `body` in a thread. std::thread throws where the system gives no more threads; here that is
// RESOURCE_EXHAUSTED. `whose` names the owner: "the watchdog".
template <class Body>
absl::StatusOr<std::thread> StartThread(const std::string& whose, Body&& body) {
  try {
    return std::thread(std::forward<Body>(body));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(absl::StrCat("the thread of ", whose,
                                                     " could not be started: ", error.what(),
                                                     "; raise the limit on threads (ulimit -u)"));
  }
}

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_START_THREAD_H_
