// What a step needs, read while the step before it runs.
#ifndef STRETTO_SRC_DATA_PREFETCHER_H_
#define STRETTO_SRC_DATA_PREFETCHER_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/core/status.h"

namespace stretto::internal {

// `fill` makes the data of a step, in place of another step's. It runs in the caller or in the
// prefetcher's thread, never in both at once.
template <class Data>
class Prefetcher {
 public:
  using Fill = std::function<absl::Status(int64_t step, Data* data)>;

  explicit Prefetcher(Fill fill) : fill_(std::move(fill)) {}
  ~Prefetcher() {
    if (!thread_.joinable()) return;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;

  // From now on the next step is made while the caller has one. RESOURCE_EXHAUSTED without the
  // thread that it needs.
  absl::Status Start() {
    try {
      thread_ = std::thread([this] { Work(); });
    } catch (const std::system_error& error) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the loader cannot start its thread: ", error.what(),
                       "; raise the limit (ulimit -u) or set prefetch to false"));
    }
    return absl::OkStatus();
  }
  // Applies `prepare` to the data of all steps that may exist at a time: two once started, else
  // one. Before the first Step.
  template <class Prepare>
  void ForEach(const Prepare& prepare) {
    prepare(&slots_[0].data);
    if (thread_.joinable()) prepare(&slots_[1].data);
  }

  // The data of `step`, until the next call. A step that fails is made again when it is asked for
  // again. One caller at a time.
  absl::StatusOr<const Data*> Step(int64_t step) {
    const bool threaded = thread_.joinable();
    if (threaded) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return wanted_ < 0; });
      front_ = 1 - front_;
    }
    if (!threaded && slots_[1 - front_].step == step) {
      front_ = 1 - front_;  // made ahead
      slots_[1 - front_].step = -1;
    } else if (!threaded) {
      slots_[front_].step = -1;
    }
    Slot& slot = slots_[front_];
    if (slot.step != step) Make(step, &slot);
    if (!slot.status.ok()) {
      slot.step = -1;
      return slot.status;
    }
    if (threaded) {
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        wanted_ = step + 1;
      }
      changed_.notify_all();
    }
    return &slot.data;
  }

  // The data of `step`, which the next call of Step is to be for, made now where it is not there
  // yet; what Step returned stays valid. Then two steps exist without a thread, too.
  absl::StatusOr<const Data*> Ahead(int64_t step) {
    Slot& slot = slots_[1 - front_];
    if (thread_.joinable()) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return wanted_ < 0; });
      if (slot.step != step) {
        wanted_ = step;
        changed_.notify_all();
        changed_.wait(lock, [this] { return wanted_ < 0; });
      }
    } else if (slot.step != step) {
      Make(step, &slot);
    }
    if (slot.status.ok()) return &slot.data;
    const absl::Status status = slot.status;
    slot.step = -1;
    return status;
  }

 private:
  struct Slot {
    int64_t step = -1;  // -1: holds nothing
    absl::Status status;
    Data data;
  };

  void Make(int64_t step, Slot* slot) {
    slot->step = step;
    slot->status = fill_(step, &slot->data);
  }
  void Work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stop_ || wanted_ >= 0; });
      if (stop_) return;
      const int64_t step = wanted_;
      Slot* const back = &slots_[1 - front_];  // `front_` does not move while `wanted_` is set
      lock.unlock();
      Make(step, back);
      lock.lock();
      wanted_ = -1;
      changed_.notify_all();
    }
  }

  Fill fill_;
  Slot slots_[2];
  int front_ = 0;  // the slot handed out; touched by the caller only

  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t wanted_ = -1;  // step that the thread is to make into the other slot; -1: idle
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_DATA_PREFETCHER_H_
