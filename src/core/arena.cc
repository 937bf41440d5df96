#include "stretto/core/arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/device_runtime.h"
#include "src/core/format.h"
#include "src/core/touch_pages.h"

namespace stretto {
namespace {

constexpr int64_t kPageBytes = 4096;
constexpr int64_t kHugePageBytes = int64_t{4} << 20;  // from here on huge pages pay

// The mapped size. An empty arena owns a page too, so that data() is never null: a Tensor without
// data means "absent".
int64_t MappedBytes(int64_t bytes) {
  return (std::max<int64_t>(bytes, 1) + kPageBytes - 1) / kPageBytes * kPageBytes;
}

}  // namespace

absl::StatusOr<Arena> Arena::Create(Device device, const std::string& name, int64_t bytes,
                                    bool prefault) {
  if (bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat("the arena \"", name, "\" was asked for ", bytes,
                                                   " bytes; ask for zero or more"));
  }
  if (device.kind != DeviceKind::kCpu) return CreateOn(device, name, bytes, /*host=*/false);
  const auto exhausted = [&](int error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the arena \"", name, "\" of ", HumanBytes(bytes), " (", bytes, " bytes) on ",
                     Name(device), " could not be allocated: ", strerror(error),
                     "; shrink the model or the micro-batch, or raise the memory limit"));
  };
  if (bytes > std::numeric_limits<int64_t>::max() - kPageBytes) return exhausted(ENOMEM);
  const int64_t mapped = MappedBytes(bytes);
  void* memory = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return exhausted(errno);
  Arena arena;
  arena.device_ = device;
  arena.name_ = name;
  arena.data_ = static_cast<std::byte*>(memory);
  arena.bytes_ = bytes;
#ifdef MADV_HUGEPAGE
  // Advice only: kernels without transparent huge pages refuse it, which costs speed and no more.
  if (mapped >= kHugePageBytes) madvise(memory, static_cast<size_t>(mapped), MADV_HUGEPAGE);
#endif
  if (prefault) {
    if (const int error = TouchPages(arena.data_, mapped); error != 0) return exhausted(error);
  }
  return arena;
}

absl::StatusOr<Arena> Arena::CreateHost(Device device, const std::string& name, int64_t bytes) {
  if (device.kind == DeviceKind::kCpu) return Create(device, name, bytes);
  if (bytes < 0) return Create(Device::Cpu(), name, bytes);  // refuses it
  return CreateOn(device, name, bytes, /*host=*/true);
}

absl::StatusOr<Arena> Arena::CreateOn(Device device, const std::string& name, int64_t bytes,
                                      bool host) {
  const DeviceRuntime* runtime = RuntimeOf(device.kind);
  if (runtime == nullptr) {
    return absl::UnimplementedError(
        absl::StrCat("the arena \"", name, "\" was asked for on ", Name(device),
                     ", but this build has no backend for it; use cpu"));
  }
  const int64_t size = MappedBytes(bytes);
  absl::StatusOr<std::byte*> memory =
      host ? runtime->AllocateHost(device.index, size) : runtime->Allocate(device.index, size);
  if (!memory.ok()) {
    return absl::Status(
        memory.status().code(),
        absl::StrCat("the arena \"", name, "\" of ", HumanBytes(bytes), " (", bytes, " bytes) ",
                     host ? "of page-locked host memory for " : "on ", Name(device),
                     " could not be allocated: ", std::string(memory.status().message()),
                     "; shrink the model or the micro-batch"));
  }
  Arena arena;
  arena.device_ = device;
  arena.host_ = host;
  arena.name_ = name;
  arena.data_ = *memory;
  arena.bytes_ = bytes;
  return arena;
}

Arena::~Arena() { Release(); }

Arena::Arena(Arena&& other) noexcept
    : device_(other.device_),
      host_(other.host_),
      name_(std::move(other.name_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Arena& Arena::operator=(Arena&& other) noexcept {
  if (this == &other) return *this;
  Release();
  device_ = other.device_;
  host_ = other.host_;
  name_ = std::move(other.name_);
  data_ = std::exchange(other.data_, nullptr);
  bytes_ = std::exchange(other.bytes_, 0);
  return *this;
}

absl::StatusOr<HostRegistration> HostRegistration::Create(Device device, std::byte* memory,
                                                          int64_t bytes) {
  const DeviceRuntime* runtime = RuntimeOf(device.kind);
  if (runtime == nullptr) return HostRegistration(device, nullptr);
  STRETTO_RETURN_IF_ERROR(runtime->RegisterHost(device.index, memory, bytes));
  return HostRegistration(device, memory);
}

HostRegistration::~HostRegistration() {
  if (memory_ != nullptr) RuntimeOf(device_.kind)->UnregisterHost(memory_);
}

HostRegistration::HostRegistration(HostRegistration&& other) noexcept
    : device_(other.device_), memory_(std::exchange(other.memory_, nullptr)) {}

HostRegistration& HostRegistration::operator=(HostRegistration&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(memory_, other.memory_);
  return *this;
}

void Arena::Release() {
  if (data_ == nullptr) return;
  if (device_.kind == DeviceKind::kCpu) {
    munmap(data_, static_cast<size_t>(MappedBytes(bytes_)));
  } else if (host_) {
    RuntimeOf(device_.kind)->FreeHost(data_);
  } else {
    RuntimeOf(device_.kind)->Free(device_.index, data_);
  }
  data_ = nullptr;
  bytes_ = 0;
}

}  // namespace stretto
