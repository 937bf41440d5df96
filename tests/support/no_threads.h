// A process that can start no more threads.
#ifndef STRETTO_TESTS_SUPPORT_NO_THREADS_H_
#define STRETTO_TESTS_SUPPORT_NO_THREADS_H_

#include <pthread.h>

#include <cstddef>

namespace stretto::testing {

// While it lives, every std::thread fails to start (limits on threads do not bind root): the
// default stack is larger than the address space.
class NoMoreThreads {
 public:
  NoMoreThreads() {
    pthread_getattr_default_np(&before_);
    pthread_attr_t none;
    pthread_getattr_default_np(&none);
    pthread_attr_setstacksize(&none, std::size_t{1} << 50);
    pthread_setattr_default_np(&none);
    pthread_attr_destroy(&none);
  }
  ~NoMoreThreads() {
    pthread_setattr_default_np(&before_);
    pthread_attr_destroy(&before_);
  }
  NoMoreThreads(const NoMoreThreads&) = delete;
  NoMoreThreads& operator=(const NoMoreThreads&) = delete;

 private:
  pthread_attr_t before_;
};

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_NO_THREADS_H_
