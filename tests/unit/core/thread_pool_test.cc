#include "stretto/core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "unit/core/allocation_count.h"

namespace stretto {
namespace {

TEST(ThreadPoolTest, RunsEveryTaskOnceOnItsThread) {
  for (int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int64_t tasks : {0, 1, 2, 3, 4, 7, 64}) {
      std::vector<int> runs(tasks, 0);
      std::vector<std::thread::id> ids(tasks);
      pool.Run(tasks, [&](int64_t t) {
        ++runs[t];
        ids[t] = std::this_thread::get_id();
      });
      std::set<std::thread::id> distinct;
      for (int64_t t = 0; t < tasks; ++t) {
        EXPECT_EQ(runs[t], 1);
        EXPECT_EQ(ids[t], ids[t % threads]);
        distinct.insert(ids[t]);
      }
      if (tasks > 0) {
        EXPECT_EQ(ids[0], std::this_thread::get_id());
      }
      EXPECT_EQ(static_cast<int64_t>(distinct.size()), std::min<int64_t>(tasks, threads));
    }
  }
}

TEST(ThreadPoolTest, AtLeastTheCaller) {
  ThreadPool pool(0);
  EXPECT_EQ(pool.threads(), 1);
  int runs = 0;
  pool.Run(3, [&](int64_t) { ++runs; });
  EXPECT_EQ(runs, 3);
}

TEST(ThreadPoolTest, ParallelForCoversTheRangeInAlignedParts) {
  for (int threads : {1, 2, 3, 4}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 5, 16, 17, 100, 1001}) {
      for (int64_t grain : {1, 4, 16, 1000}) {
        std::vector<int> hits(n, 0);
        std::vector<int> parts(threads, 0);
        pool.ParallelFor(n, grain, [&](int64_t begin, int64_t end, int part) {
          ASSERT_LT(begin, end);
          ASSERT_EQ(begin % grain, 0);
          ASSERT_TRUE(end == n || end % grain == 0);
          ++parts[part];
          for (int64_t i = begin; i < end; ++i) ++hits[i];
        });
        for (int64_t i = 0; i < n; ++i) ASSERT_EQ(hits[i], 1);
        for (int p : parts) EXPECT_LE(p, 1);
      }
    }
  }
}

TEST(ThreadPoolTest, SmallWorkStaysOnTheCaller) {
  ThreadPool pool(3);
  int calls = 0;
  pool.ParallelFor(
      100, 1,
      [&](int64_t begin, int64_t end, int part) {
        ++calls;
        EXPECT_EQ(begin, 0);
        EXPECT_EQ(end, 100);
        EXPECT_EQ(part, 0);
      },
      100);
  EXPECT_EQ(calls, 1);
}

// Runs of changing width, back to back and with pauses long enough that workers sleep. Each run
// reads what the one before wrote on other threads.
TEST(ThreadPoolTest, ManyRunsUnderStress) {
  ThreadPool pool(4);
  constexpr int kTasks = 9;
  std::vector<int64_t> value(kTasks, 0);
  int64_t expected = 0;
  for (int run = 0; run < 4000; ++run) {
    if (run % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    const int64_t tasks = 1 + run % kTasks;
    std::vector<int64_t> before = value;
    pool.Run(tasks, [&](int64_t t) { value[t] = before[(t + 1) % tasks] + 1; });
    for (int64_t t = 0; t < tasks; ++t) {
      ASSERT_EQ(value[t], before[(t + 1) % tasks] + 1) << "run " << run;
      expected += 1;
    }
  }
  EXPECT_GT(expected, 4000);
}

TEST(ThreadPoolTest, PoolsDoNotDisturbEachOther) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      ThreadPool pool(3);
      for (int run = 0; run < 500; ++run) {
        pool.Run(5, [&](int64_t t) { sum.fetch_add(t, std::memory_order_relaxed); });
      }
    });
  }
  for (std::thread& t : callers) t.join();
  EXPECT_EQ(sum.load(), 3 * 500 * (0 + 1 + 2 + 3 + 4));
}

TEST(ThreadPoolTest, IdleAndUnusedPoolsEnd) {
  for (int i = 0; i < 50; ++i) ThreadPool pool(4);
  ThreadPool slept(3);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

TEST(ThreadPoolTest, RunDoesNotAllocate) {
  ThreadPool pool(3);
  int64_t out[16] = {};
  const auto work = [&] { pool.Run(16, [&](int64_t t) { out[t] += t; }); };
  work();
  const int64_t before = AllocationCount();
  for (int i = 0; i < 100; ++i) work();
  EXPECT_EQ(AllocationCount(), before);
  EXPECT_EQ(out[15], 101 * 15);
}

}  // namespace
}  // namespace stretto
