#include "stretto/core/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "src/core/wait_counter.h"

namespace stretto {

struct ThreadPool::State {
  // On its own cache line, so that waking one worker does not disturb the others.
  struct alignas(64) Worker {
    WaitCounter go;     // raised once for each Run that gives this worker tasks
    uint64_t runs = 0;  // the caller's copy of `go`
    std::thread thread;
  };

  void Loop(int index);
  // Runs the tasks of thread `index`.
  void RunShare(int index) const {
    for (int64_t task = index; task < tasks; task += threads) call(body, task);
  }

  int threads = 1;
  std::vector<Worker> workers;  // worker i is thread i + 1
  int started = 0;              // workers that the system gave us

  // The work of the present Run: written by the caller before `go`, read by workers after it.
  const void* body = nullptr;
  Erased call = nullptr;
  int64_t tasks = 0;
  bool stop = false;

  alignas(64) std::atomic<int> pending{0};  // workers still busy with this Run
  WaitCounter done;                         // Runs whose workers have all finished
  uint64_t dispatched = 0;
};

void ThreadPool::State::Loop(int index) {
  Worker& me = workers[index - 1];
  for (uint64_t run = 1;; ++run) {
    me.go.WaitFor(run);
    if (stop) return;
    RunShare(index);
    // The last one reads `dispatched` before the caller can change it: the caller waits for us.
    const uint64_t number = dispatched;
    if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) done.Raise(number);
  }
}

ThreadPool::ThreadPool(int threads)
    : threads_(std::max(threads, 1)), state_(std::make_unique<State>()) {
  state_->threads = threads_;
  state_->workers = std::vector<State::Worker>(threads_ - 1);
  for (int i = 1; i < threads_; ++i) {
    try {
      state_->workers[i - 1].thread = std::thread([state = state_.get(), i] { state->Loop(i); });
    } catch (const std::system_error&) {
      // No more threads can be had. The caller runs the tasks of those that are missing, so the
      // partition and with it every result stay as asked for.
      break;
    }
    ++state_->started;
  }
  BackgroundThreads::Add(state_->started);
}

ThreadPool::~ThreadPool() {
  state_->stop = true;
  for (int i = 0; i < state_->started; ++i) {
    State::Worker& worker = state_->workers[i];
    worker.go.Raise(++worker.runs);
  }
  for (int i = 0; i < state_->started; ++i) state_->workers[i].thread.join();
  BackgroundThreads::Add(-state_->started);
}

void ThreadPool::RunErased(int64_t tasks, const void* body, Erased call) {
  if (tasks <= 0) return;
  State& s = *state_;
  const int busy = static_cast<int>(std::min<int64_t>(tasks - 1, s.started));
  if (busy == 0 && s.started == threads_ - 1) {
    for (int64_t task = 0; task < tasks; ++task) call(body, task);
    return;
  }
  s.body = body;
  s.call = call;
  s.tasks = tasks;
  const uint64_t number = ++s.dispatched;
  s.pending.store(busy, std::memory_order_relaxed);
  for (int i = 0; i < busy; ++i) s.workers[i].go.Raise(++s.workers[i].runs);
  s.RunShare(0);
  for (int i = s.started + 1; i < threads_; ++i) s.RunShare(i);
  if (busy > 0) s.done.WaitFor(number);
}

}  // namespace stretto
