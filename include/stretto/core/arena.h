// One allocation per memory class, made once.
#ifndef STRETTO_CORE_ARENA_H_
#define STRETTO_CORE_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "stretto/core/device.h"
#include "stretto/core/status.h"

namespace stretto {

// Owns `bytes` of zeroed memory on a device, aligned to 4096 bytes. Movable, not copyable.
class Arena {
 public:
  Arena() = default;
  // `name` appears in messages and reports. Returns RESOURCE_EXHAUSTED with the size and the name
  // when the memory cannot be had. CPU arenas are page-backed (mmap), so untouched pages cost
  // nothing; `prefault` touches them all.
  static absl::StatusOr<Arena> Create(Device device, const std::string& name, int64_t bytes,
                                      bool prefault = false);
  // Page-locked host memory: `device` copies from and to it without holding the host up, and its
  // kernels read and write it at the same address. Plain memory for the CPU.
  static absl::StatusOr<Arena> CreateHost(Device device, const std::string& name, int64_t bytes);
  ~Arena();
  Arena(Arena&& other) noexcept;
  Arena& operator=(Arena&& other) noexcept;

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  // Where the memory lies: the CPU for CreateHost.
  Device device() const { return host_ ? Device::Cpu() : device_; }
  const std::string& name() const { return name_; }

 private:
  static absl::StatusOr<Arena> CreateOn(Device device, const std::string& name, int64_t bytes,
                                        bool host);
  void Release();
  Device device_;
  bool host_ = false;  // page-locked for device_
  std::string name_;
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Host memory of somebody else, page-locked for a device while the object lives: the device copies
// from and to it as from an arena of CreateHost. Movable, not copyable. A copy must not reach from
// one registration into another, also where their memory is adjacent.
class HostRegistration {
 public:
  // `memory` lies on a page and `bytes` is a multiple of pages. Takes seconds for some GiB. The
  // driver's words where it refuses. Nothing on the CPU.
  static absl::StatusOr<HostRegistration> Create(Device device, std::byte* memory, int64_t bytes);
  ~HostRegistration();
  HostRegistration(HostRegistration&& other) noexcept;
  HostRegistration& operator=(HostRegistration&& other) noexcept;

 private:
  HostRegistration(Device device, std::byte* memory) : device_(device), memory_(memory) {}
  Device device_;
  std::byte* memory_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_CORE_ARENA_H_
