// A small pool with static partitions: the same work is always cut in the same way, whatever the
// machine does, so results do not depend on timing.
#ifndef STRETTO_CORE_THREAD_POOL_H_
#define STRETTO_CORE_THREAD_POOL_H_

#include <cstdint>
#include <memory>

namespace stretto {

// Runs bodies on `threads` threads, the caller included. One caller at a time. Workers spin briefly
// and then sleep, so an idle pool costs nothing. Allocates only in the constructor.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Calls body(task) for every task in [0, tasks); task t runs on thread t % threads. Returns when
  // all have finished. `body` is any callable with `void operator()(int64_t) const`; it is not
  // copied and may not call Run on the same pool.
  template <class Body>
  void Run(int64_t tasks, const Body& body) {
    RunErased(tasks, &body, [](const void* b, int64_t t) { (*static_cast<const Body*>(b))(t); });
  }

  // Cuts [0, n) into `threads()` ranges whose starts are multiples of `grain` and calls
  // body(begin, end, part) for each non-empty one. The cut depends on n, grain and threads() only.
  // Work of at most `serial_below` elements runs on the caller alone, as one range.
  template <class Body>
  void ParallelFor(int64_t n, int64_t grain, const Body& body, int64_t serial_below = 0) {
    if (n <= 0) return;
    if (threads_ == 1 || n <= serial_below || n <= grain) {
      body(int64_t{0}, n, 0);
      return;
    }
    const int64_t units = (n + grain - 1) / grain;
    const int64_t parts = units < threads_ ? units : threads_;
    Run(parts, [&](int64_t part) {
      const int64_t begin = units * part / parts * grain;
      const int64_t end = units * (part + 1) / parts * grain;
      if (begin < n) body(begin, end < n ? end : n, static_cast<int>(part));
    });
  }

 private:
  using Erased = void (*)(const void*, int64_t);
  void RunErased(int64_t tasks, const void* body, Erased call);

  struct State;
  int threads_;
  std::unique_ptr<State> state_;
};

}  // namespace stretto

#endif  // STRETTO_CORE_THREAD_POOL_H_
