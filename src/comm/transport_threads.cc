#include "src/comm/transport_threads.h"

#include <cstring>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::StatusOr<Transport::Request> ThreadsTransport::Post(char* data, int64_t bytes, int peer,
                                                          int tag, bool receives) {
  if (peer < 0 || peer >= size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", peer, " is outside a world of ", size(), " ranks"));
  }
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  if (free_.empty()) {
    free_.push_back(static_cast<Request>(slots_.size()));
    slots_.emplace_back();
  }
  const Request request = free_.back();
  free_.pop_back();
  ThreadsHub::Slot& slot = slots_[static_cast<std::size_t>(request)];
  slot.data = data;
  slot.bytes = bytes;
  slot.peer = peer;
  slot.tag = tag;
  slot.receives = receives;
  slot.state.store(ThreadsHub::kPending, std::memory_order_relaxed);

  // A message lives in the box of its receiver.
  const int receiver = receives ? rank_ : peer;
  const int source = receives ? peer : rank_;
  ThreadsHub::Box& box = hub_->boxes_[static_cast<std::size_t>(receiver)];
  const std::lock_guard<std::mutex> lock(box.mutex);
  std::vector<ThreadsHub::Posted>& others = receives ? box.sends : box.receives;
  for (auto i = others.begin(); i != others.end(); ++i) {
    if (i->source != source || i->tag != tag) continue;
    ThreadsHub::Slot& other = *i->slot;
    others.erase(i);
    int result = ThreadsHub::kDone;
    if (other.bytes != bytes) {
      slot.other_bytes = other.bytes;
      other.other_bytes = bytes;
      result = ThreadsHub::kWrongSize;
    } else if (bytes > 0) {
      std::memcpy(receives ? data : other.data, receives ? other.data : data,
                  static_cast<std::size_t>(bytes));
    }
    other.state.store(result, std::memory_order_release);
    slot.state.store(result, std::memory_order_release);
    return request;
  }
  (receives ? box.receives : box.sends).push_back({source, tag, &slot});
  return request;
}

absl::StatusOr<Transport::Request> ThreadsTransport::Send(const void* data, int64_t bytes, int peer,
                                                          int tag) {
  bytes_sent_ += bytes;
  return Post(static_cast<char*>(const_cast<void*>(data)), bytes, peer, tag, false);
}

absl::StatusOr<Transport::Request> ThreadsTransport::Receive(void* data, int64_t bytes, int peer,
                                                             int tag) {
  return Post(static_cast<char*>(data), bytes, peer, tag, true);
}

absl::StatusOr<bool> ThreadsTransport::Test(Request request) {
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  ThreadsHub::Slot& slot = slots_[static_cast<std::size_t>(request)];
  // Whether the peer left is read first: what it did before leaving is then visible in `state`.
  const bool left =
      hub_->boxes_[static_cast<std::size_t>(slot.peer)].closed.load(std::memory_order_acquire);
  const int state = slot.state.load(std::memory_order_acquire);
  if (state == ThreadsHub::kPending && !left) return false;
  if (state == ThreadsHub::kPending) {
    return absl::UnavailableError(
        absl::StrCat("rank ", slot.peer, " has left (tag ", slot.tag, ")"));
  }
  slot.state.store(ThreadsHub::kFree, std::memory_order_relaxed);
  free_.push_back(request);
  if (state == ThreadsHub::kWrongSize) {
    return absl::InternalError(absl::StrCat(
        "rank ", slot.peer, slot.receives ? " sent " : " expects ", slot.other_bytes,
        " bytes where ", slot.receives ? "the receive has " : "the send has ", slot.bytes, " (tag ",
        slot.tag, "); the ranks disagree on the size of the operation"));
  }
  return true;
}

void ThreadsTransport::Abandon() {
  if (abandoned_) return;
  abandoned_ = true;
  for (int r = 0; r < size(); ++r) {
    ThreadsHub::Box& box = hub_->boxes_[static_cast<std::size_t>(r)];
    const std::lock_guard<std::mutex> lock(box.mutex);
    std::erase_if(box.sends, [this](const ThreadsHub::Posted& p) { return p.source == rank_; });
    if (r == rank_) {
      box.receives.clear();
      box.closed.store(true, std::memory_order_release);
    }
  }
}

}  // namespace stretto
