// Threads without exceptions.
#ifndef STRETTO_SRC_CORE_START_THREAD_H_
#define STRETTO_SRC_CORE_START_THREAD_H_

#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

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

// Calls body(0) here and body(1) .. body(threads - 1) in threads of their own, as many as the
// system gives; returns when all have. For bodies that share work out among those who are there.
template <class Body>
void OnThreads(int threads, const std::string& whose, const Body& body) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    absl::StatusOr<std::thread> thread = StartThread(whose, [&body, i] { body(i); });
    if (!thread.ok()) break;
    others.push_back(*std::move(thread));
  }
  body(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_START_THREAD_H_
