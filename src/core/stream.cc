#include "stretto/core/stream.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/core/device_runtime.h"
#include "src/core/wait_counter.h"
#include "stretto/core/copy.h"

namespace stretto {

// A ring of slots between the host and the worker. Tickets count entries from 1: entry t is in slot
// (t - 1) % capacity, has been pushed when pushed >= t, and has finished when finished >= t.
struct Stream::Queue {
  struct alignas(Stream::kSlotAlignment) Slot {
    std::byte work[kSlotBytes];
    void (*call)(void*);  // null ends the worker
  };

  void Loop() {
    for (uint64_t ticket = 1;; ++ticket) {
      pushed.WaitFor(ticket);
      Slot& slot = slots[(ticket - 1) % slots.size()];
      if (slot.call == nullptr) return;
      slot.call(slot.work);
      finished.Raise(ticket);
    }
  }

  std::vector<Slot> slots;
  uint64_t tickets = 0;  // the host's copy of `pushed`
  alignas(64) WaitCounter pushed;
  alignas(64) WaitCounter finished;
  std::thread worker;

  std::atomic<bool> failed{false};
  mutable std::mutex mutex;
  absl::Status error;  // the first one; guarded by mutex
};

StreamGraph::StreamGraph() = default;
StreamGraph::~StreamGraph() = default;
StreamGraph::StreamGraph(StreamGraph&&) noexcept = default;
StreamGraph& StreamGraph::operator=(StreamGraph&&) noexcept = default;

bool Event::Done() const { return stream_ == nullptr || stream_->DoneAt(ticket_); }

Stream::Stream(Device device, StreamOptions options)
    : device_(device), options_(options), queue_(std::make_unique<Queue>()) {}

absl::StatusOr<std::unique_ptr<Stream>> Stream::Create(Device device, StreamOptions options) {
  if (device.kind != DeviceKind::kCpu) {
    const DeviceRuntime* runtime = RuntimeOf(device.kind);
    if (runtime == nullptr) {
      return absl::UnimplementedError(
          absl::StrCat("a stream was asked for on ", Name(device),
                       ", but this build has no backend for it; use cpu"));
    }
    options.mode = StreamMode::kDevice;
    options.threads = 1;
    std::unique_ptr<Stream> stream(new Stream(device, options));
    stream->pool_ = std::make_unique<ThreadPool>(1);
    STRETTO_ASSIGN_OR_RETURN(stream->device_queue_, runtime->CreateQueue(device.index, options));
    return stream;
  }
  if (options.mode == StreamMode::kDevice) options.mode = StreamMode::kInline;
  if (options.threads < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a stream was asked for with ", options.threads,
                                                   " threads; give one or more"));
  }
  if (options.queue_capacity < 1) {
    return absl::InvalidArgumentError(absl::StrCat("a stream was asked for with a queue of ",
                                                   options.queue_capacity,
                                                   " entries; give one or more"));
  }
  std::unique_ptr<Stream> stream(new Stream(device, options));
  stream->pool_ = std::make_unique<ThreadPool>(options.threads);
  if (options.mode == StreamMode::kFifo) {
    Queue* queue = stream->queue_.get();
    queue->slots = std::vector<Queue::Slot>(options.queue_capacity);
    try {
      queue->worker = std::thread([queue] { queue->Loop(); });
    } catch (const std::system_error& e) {
      return absl::ResourceExhaustedError(
          absl::StrCat("the thread of a stream could not be started: ", e.what(),
                       "; raise the limit on threads (ulimit -u) or use inline streams"));
    }
    BackgroundThreads::Add(1);
  }
  return stream;
}

Stream::~Stream() {
  if (!queue_->worker.joinable()) return;
  BeginPush();
  EndPush(nullptr);
  queue_->worker.join();
  BackgroundThreads::Add(-1);
}

void* Stream::native() const { return device_queue_ ? device_queue_->native() : nullptr; }
Stream::Workspace Stream::workspace() const {
  return device_queue_ ? device_queue_->workspace() : Workspace();
}
DeviceFault* Stream::fault() const { return device_queue_ ? device_queue_->fault() : nullptr; }

void* Stream::BeginPush() {
  if (device_queue_) {
    Fail(
        absl::InternalError(absl::StrCat("host code was enqueued on a stream of ", Name(device_))));
    return nullptr;
  }
  Queue& q = *queue_;
  const uint64_t ticket = q.tickets + 1;
  // The slot is free when the entry one turn of the ring earlier has finished.
  if (ticket > q.slots.size()) q.finished.WaitFor(ticket - q.slots.size());
  return q.slots[(ticket - 1) % q.slots.size()].work;
}

void Stream::EndPush(void (*call)(void*)) {
  Queue& q = *queue_;
  q.slots[q.tickets % q.slots.size()].call = call;
  q.pushed.Raise(++q.tickets);
}

bool Stream::DoneAt(uint64_t ticket) const {
  return device_queue_ ? device_queue_->Done(ticket) : queue_->finished.Load() >= ticket;
}

Event Stream::Record() {
  Event event;
  if (options_.mode == StreamMode::kInline) return event;
  event.stream_ = this;
  event.ticket_ = device_queue_ ? device_queue_->Record() : queue_->tickets;
  return event;
}

void Stream::Wait(const Event& event) {
  if (event.stream_ == this || event.Done()) return;
  if (device_queue_ && event.stream_->device_queue_) {
    Fail(device_queue_->WaitFor(*event.stream_->device_queue_, event.ticket_));
    return;
  }
  if (device_queue_ || event.stream_->device_queue_) {
    // Between kinds of device the host waits.
    while (!event.Done()) std::this_thread::yield();
    return;
  }
  const WaitCounter* finished = &event.stream_->queue_->finished;
  const uint64_t ticket = event.ticket_;
  Enqueue([finished, ticket] { finished->WaitFor(ticket); });
}

absl::Status Stream::BeginCapture() {
  if (!CanCapture()) {
    return absl::UnimplementedError(
        absl::StrCat("work on a stream of ", Name(device_),
                     " cannot be captured; ask CanCapture and enqueue it each time"));
  }
  return device_queue_->BeginCapture();
}

absl::StatusOr<StreamGraph> Stream::EndCapture() {
  if (!CanCapture()) return absl::FailedPreconditionError("no capture has begun on this stream");
  StreamGraph graph;
  STRETTO_ASSIGN_OR_RETURN(graph.graph_, device_queue_->EndCapture());
  return graph;
}

void Stream::Launch(const StreamGraph& graph) {
  if (graph.graph_ == nullptr) {
    Fail(absl::InternalError("a stream was given a graph without work"));
    return;
  }
  Fail(device_queue_->Launch(*graph.graph_));
}

absl::Status Stream::Synchronize() {
  if (device_queue_) Fail(device_queue_->Synchronize());
  if (options_.mode == StreamMode::kFifo) queue_->finished.WaitFor(queue_->tickets);
  return status();
}

void CopyBytes(Stream& stream, void* to, const void* from, int64_t bytes) {
  if (bytes <= 0) return;
  if (stream.device_queue_) {
    stream.Fail(stream.device_queue_->Copy(to, from, bytes));
    return;
  }
  stream.Enqueue([=] { std::memcpy(to, from, static_cast<size_t>(bytes)); });
}

void Stream::Fail(absl::Status error) {
  if (error.ok()) return;
  std::lock_guard<std::mutex> lock(queue_->mutex);
  if (queue_->failed.load(std::memory_order_relaxed)) return;
  queue_->error = std::move(error);
  queue_->failed.store(true, std::memory_order_release);
}

absl::Status Stream::status() const {
  if (!queue_->failed.load(std::memory_order_acquire)) {
    return device_queue_ ? device_queue_->Reported() : absl::OkStatus();
  }
  std::lock_guard<std::mutex> lock(queue_->mutex);
  return queue_->error;
}

}  // namespace stretto
