#include "src/core/wait_counter.h"

#include <atomic>
#include <chrono>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace stretto {
namespace {

constexpr int kSpinMicroseconds = 30;
constexpr int kCrowdedSpinMicroseconds = 1;

std::atomic<int> background_threads{0};

void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void BackgroundThreads::Add(int count) {
  background_threads.fetch_add(count, std::memory_order_relaxed);
}

int BackgroundThreads::SpinMicroseconds() {
  // Counts the cores that this process may run on, so ranks that are bound to cores see their own.
  static const int cores = static_cast<int>(std::thread::hardware_concurrency());
  const bool fits = background_threads.load(std::memory_order_relaxed) + 1 <= cores;
  return fits ? kSpinMicroseconds : kCrowdedSpinMicroseconds;
}

bool WaitCounter::Spin(uint64_t value) const {
  const auto deadline = std::chrono::steady_clock::now() +
                        std::chrono::microseconds(BackgroundThreads::SpinMicroseconds());
  do {
    for (int i = 0; i < 16; ++i) {
      if (Load() >= value) return true;
      Pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace stretto
