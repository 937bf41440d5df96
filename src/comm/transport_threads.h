// Ranks as threads of one process: messages are copied once, when a send meets its receive.
#ifndef STRETTO_SRC_COMM_TRANSPORT_THREADS_H_
#define STRETTO_SRC_COMM_TRANSPORT_THREADS_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "stretto/comm/transport.h"

namespace stretto {

// What the ranks of one process share.
class ThreadsHub {
 public:
  explicit ThreadsHub(int ranks) : boxes_(static_cast<std::size_t>(ranks)) {}
  int size() const { return static_cast<int>(boxes_.size()); }

 private:
  friend class ThreadsTransport;
  enum State : int { kFree, kPending, kDone, kWrongSize };
  struct Slot {
    std::atomic<int> state = kFree;
    char* data = nullptr;
    int64_t bytes = 0;
    int64_t other_bytes = 0;  // what the other side had, when kWrongSize
    int peer = 0;
    int tag = 0;
    bool receives = false;
  };
  struct Posted {
    int source = 0;
    int tag = 0;
    Slot* slot = nullptr;
  };
  // Sends and receives that have not met yet, in posting order. Copies happen under the lock, so
  // that whoever takes its entries out knows that nobody touches their buffers any more.
  struct Box {
    std::mutex mutex;
    std::vector<Posted> receives;
    std::vector<Posted> sends;
    std::atomic<bool> closed = false;
  };
  std::deque<Box> boxes_;
};

class ThreadsTransport : public Transport {
 public:
  ThreadsTransport(std::shared_ptr<ThreadsHub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~ThreadsTransport() override { Abandon(); }

  const char* name() const override { return "threads"; }
  int rank() const override { return rank_; }
  int size() const override { return hub_->size(); }
  absl::StatusOr<Request> Send(const void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<Request> Receive(void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<bool> Test(Request request) override;
  void Abandon() override;
  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  absl::StatusOr<Request> Post(char* data, int64_t bytes, int peer, int tag, bool receives);

  std::shared_ptr<ThreadsHub> hub_;
  int rank_;
  bool abandoned_ = false;
  int64_t bytes_sent_ = 0;
  std::deque<ThreadsHub::Slot> slots_;  // other ranks hold pointers: addresses are stable
  std::vector<Request> free_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_TRANSPORT_THREADS_H_
