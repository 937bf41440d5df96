// How threads of the core layer wait for each other.
#ifndef STRETTO_SRC_CORE_WAIT_COUNTER_H_
#define STRETTO_SRC_CORE_WAIT_COUNTER_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace stretto {

// Threads that the pools and streams of this process have running. Spinning is worth while only as
// long as they all fit on the cores.
class BackgroundThreads {
 public:
  static void Add(int count);
  // Microseconds to spin before going to sleep.
  static int SpinMicroseconds();
};

// A number that one thread raises and others wait for: they spin for some microseconds, which is
// about the length of a small kernel, and then sleep. No allocation, and no system call in Raise()
// unless somebody sleeps.
class WaitCounter {
 public:
  uint64_t Load() const { return value_.load(std::memory_order_acquire); }

  // By one thread at a time. What it did before is seen by those who waited.
  void Raise(uint64_t value) {
    // Sequentially consistent on both sides: either the sleeper sees the value, or we see it.
    value_.store(value, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    { std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
  }

  void WaitFor(uint64_t value) const {
    if (Load() >= value || Spin(value)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) >= value; });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

 private:
  bool Spin(uint64_t value) const;

  std::atomic<uint64_t> value_{0};
  mutable std::atomic<int> sleepers_{0};
  mutable std::mutex mutex_;
  mutable std::condition_variable wake_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_WAIT_COUNTER_H_
