// What a kind of device other than the CPU provides to this layer: memory, queues and copies. One
// implementation for each kind; src/core/CMakeLists.txt lists those that are built.
#ifndef STRETTO_SRC_CORE_DEVICE_RUNTIME_H_
#define STRETTO_SRC_CORE_DEVICE_RUNTIME_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "src/core/device_fault.h"
#include "stretto/core/device.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

namespace stretto {

// A piece of a queue's work that can be enqueued again as it is.
class DeviceGraph {
 public:
  virtual ~DeviceGraph() = default;
};

// An in-order queue of the device. Calls come from the stream's host thread, except Done.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  virtual void* native() const = 0;
  virtual Stream::Workspace workspace() const = 0;
  virtual DeviceFault* fault() const = 0;
  // A point in the queue's order, counted from 1.
  virtual uint64_t Record() = 0;
  virtual bool Done(uint64_t point) const = 0;
  virtual absl::Status WaitFor(const DeviceQueue& other, uint64_t point) = 0;
  // Waits for everything; returns a device error, or what a kernel reported.
  virtual absl::Status Synchronize() = 0;
  // What a kernel has reported so far, without waiting.
  virtual absl::Status Reported() const = 0;
  virtual absl::Status Copy(void* to, const void* from, int64_t bytes) = 0;
  // See Stream::BeginCapture.
  virtual absl::Status BeginCapture() = 0;
  virtual absl::StatusOr<std::unique_ptr<DeviceGraph>> EndCapture() = 0;
  virtual absl::Status Launch(const DeviceGraph& graph) = 0;
};

// Times of the device at points that its queues pass.
class DeviceMarks {
 public:
  virtual ~DeviceMarks() = default;
  // At this point of the queue. Makes room for the number where there is none.
  virtual absl::Status Mark(DeviceQueue& queue, size_t mark) = 0;
  // Between two marks that their queues have passed; negative when that is not known.
  virtual double SecondsBetween(size_t from, size_t to) const = 0;
};

class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;
  virtual DeviceKind kind() const = 0;
  virtual absl::StatusOr<DeviceInfo> Describe(int index) const = 0;
  // Zeroed. RESOURCE_EXHAUSTED says what the device answered.
  virtual absl::StatusOr<std::byte*> Allocate(int index, int64_t bytes) const = 0;
  virtual void Free(int index, std::byte* memory) const = 0;
  // Zeroed host memory that the device copies from and to without a detour, and that its kernels
  // read and write at the same address.
  virtual absl::StatusOr<std::byte*> AllocateHost(int index, int64_t bytes) const = 0;
  virtual void FreeHost(std::byte* memory) const = 0;
  // Makes host memory that somebody else allocated what AllocateHost gives, or undoes it. `memory`
  // lies on a page and `bytes` is a multiple of pages.
  virtual absl::Status RegisterHost(int index, std::byte* memory, int64_t bytes) const = 0;
  virtual void UnregisterHost(std::byte* memory) const = 0;
  // For the calling thread.
  virtual absl::Status Use(int index) const = 0;
  virtual absl::StatusOr<std::unique_ptr<DeviceQueue>> CreateQueue(
      int index, const StreamOptions& options) const = 0;
  // With room for `count` marks.
  virtual absl::StatusOr<std::unique_ptr<DeviceMarks>> CreateMarks(int index,
                                                                   size_t count) const = 0;
  // Rows of `row_bytes` bytes between host and device, or within the device; blocks.
  virtual absl::Status CopyRows(int index, void* to, int64_t to_pitch, const void* from,
                                int64_t from_pitch, int64_t row_bytes, int64_t rows) const = 0;
};

// Null when the build has none for this kind.
const DeviceRuntime* RuntimeOf(DeviceKind kind);

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_DEVICE_RUNTIME_H_
