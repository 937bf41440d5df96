// Where memory lives and work runs.
#ifndef STRETTO_CORE_DEVICE_H_
#define STRETTO_CORE_DEVICE_H_

#include <cstdint>
#include <string>

namespace stretto {

enum class DeviceKind : uint8_t { kCpu, kCuda };

struct Device {
  DeviceKind kind = DeviceKind::kCpu;
  int index = 0;

  static Device Cpu() { return {DeviceKind::kCpu, 0}; }
  static Device Cuda(int index) { return {DeviceKind::kCuda, index}; }
  bool operator==(const Device&) const = default;
};

// "cpu" or "cuda:3".
std::string Name(Device device);

}  // namespace stretto

#endif  // STRETTO_CORE_DEVICE_H_
