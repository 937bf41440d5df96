// In-order queues of device work, and events that order work between them.
#ifndef STRETTO_CORE_STREAM_H_
#define STRETTO_CORE_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "stretto/core/device.h"
#include "stretto/core/status.h"
#include "stretto/core/thread_pool.h"

namespace stretto {

class Stream;
class DeviceGraph;   // src/core/device_runtime.h
class DeviceQueue;   // src/core/device_runtime.h
struct DeviceFault;  // src/core/device_fault.h

// A point in a stream's order. Cheap to copy; a default-constructed event has always happened. The
// stream must outlive its events and the waits for them: synchronize the waiting streams first.
class Event {
 public:
  Event() = default;
  // True when everything enqueued before Record() has finished. Never blocks.
  bool Done() const;

 private:
  friend class Stream;
  const Stream* stream_ = nullptr;
  uint64_t ticket_ = 0;
};

// Work that was captured on a stream once and can be launched on it again and again. Ends before
// its stream.
class StreamGraph {
 public:
  StreamGraph();
  ~StreamGraph();
  StreamGraph(StreamGraph&&) noexcept;
  StreamGraph& operator=(StreamGraph&&) noexcept;

 private:
  friend class Stream;
  std::unique_ptr<DeviceGraph> graph_;
};

enum class StreamMode : uint8_t {
  kInline,  // CPU: Enqueue runs the work before it returns
  kFifo,    // CPU: a real thread runs the work in order, as a GPU stream would
  kDevice,  // the device's own queue; what a stream on another device than the CPU always is
};

struct StreamOptions {
  StreamMode mode = StreamMode::kInline;
  int threads = 1;            // size of the stream's thread pool
  int queue_capacity = 1024;  // kFifo: entries; Enqueue waits while the queue is full
  int64_t workspace_bytes = int64_t{64} << 20;  // kDevice: scratch memory for kernels and libraries
  // kDevice: its kernels get the parts of the device that become free before those of other streams
  // that wait for them.
  bool first_served = false;
};

// An in-order queue of work on one device. All calls come from one host thread (Event::Done may be
// asked from any). Errors of enqueued work are sticky: the first one is kept, later work still runs
// its course, and Synchronize() or status() reports it.
class Stream {
 public:
  static absl::StatusOr<std::unique_ptr<Stream>> Create(Device device, StreamOptions options = {});
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  Device device() const { return device_; }
  StreamMode mode() const { return options_.mode; }
  // For the kernels of a device's backend: its own handle (cudaStream_t), scratch memory that
  // belongs to whatever runs on the stream, and where a kernel reports bad data. Null on the CPU.
  struct Workspace {
    std::byte* data = nullptr;
    int64_t bytes = 0;
  };
  void* native() const;
  Workspace workspace() const;
  DeviceFault* fault() const;
  // The pool that CPU kernels on this stream run on. Only enqueued work may use it.
  ThreadPool& pool() const { return *pool_; }

  Event Record();
  // Later work on this stream starts after `event`. Never blocks the host unless the stream is
  // inline and the event belongs to a FIFO stream.
  void Wait(const Event& event);
  // Whether work can be captured. The CPU's is not: it would gain nothing.
  bool CanCapture() const { return device_queue_ != nullptr; }
  // From here to EndCapture work is kept instead of run. In between nobody records an event on this
  // stream, waits for one, copies, or asks for anything that makes the host wait. Every address and
  // number that the work was enqueued with stays in it.
  absl::Status BeginCapture();
  absl::StatusOr<StreamGraph> EndCapture();
  void Launch(const StreamGraph& graph);

  // Blocks until all enqueued work has finished; returns the first error so far.
  absl::Status Synchronize();

  // Records an error; only the first is kept. Safe from any thread.
  void Fail(absl::Status error);
  // The first error so far, without waiting for unfinished work.
  absl::Status status() const;

  // Runs `work()` on the stream (CPU). The callable is copied into a fixed slot: it must be
  // trivially copyable and at most kSlotBytes large (capture Tensors and scalars by value). On
  // another device the stream fails: there is no place for host code in its queue.
  static constexpr std::size_t kSlotBytes = 1280;
  static constexpr std::size_t kSlotAlignment = 64;
  template <class F>
  void Enqueue(const F& work) {
    static_assert(std::is_trivially_copyable_v<F>, "capture views and scalars by value");
    static_assert(sizeof(F) <= kSlotBytes && alignof(F) <= kSlotAlignment);
    if (options_.mode == StreamMode::kInline) {
      work();
      return;
    }
    void* slot = BeginPush();
    if (slot == nullptr) return;
    ::new (slot) F(work);
    EndPush([](void* f) { (*static_cast<F*>(f))(); });
  }

 private:
  friend class Event;
  friend class TimeMarks;
  friend void CopyBytes(Stream& stream, void* to, const void* from, int64_t bytes);
  struct Queue;
  Stream(Device device, StreamOptions options);
  void* BeginPush();
  void EndPush(void (*call)(void*));
  bool DoneAt(uint64_t ticket) const;

  Device device_;
  StreamOptions options_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<DeviceQueue> device_queue_;  // kDevice
  std::unique_ptr<Queue> queue_;               // also holds the sticky error, in both modes
};

}  // namespace stretto

#endif  // STRETTO_CORE_STREAM_H_
