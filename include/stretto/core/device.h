// Where memory lives and work runs.
#ifndef STRETTO_CORE_DEVICE_H_
#define STRETTO_CORE_DEVICE_H_

#include <cstdint>
#include <string>

#include "stretto/core/status.h"

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

struct DeviceInfo {
  std::string name;         // "NVIDIA H100 80GB HBM3"
  std::string pci;          // "0000:1b:00.0"
  int devices = 1;          // of this kind that the process can see
  int64_t total_bytes = 0;  // of its memory
  int64_t free_bytes = 0;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
};

// What is there. UNIMPLEMENTED when the build has no backend for this kind; UNAVAILABLE when there
// is no driver or no such device, in one sentence that says what to do.
absl::StatusOr<DeviceInfo> DescribeDevice(Device device);

// What the calling thread asks of a backend from now on is for this device; every thread that works
// with streams or memory of a device that is not the first does so once. Nothing on the CPU.
absl::Status UseDevice(Device device);

// A library of somebody else that a backend opens when it is first needed.
struct LibraryInfo {
  std::string name;      // "cuBLASLt"
  std::string version;   // "13.0.2"; empty when it could not be opened
  std::string path;      // the file that it was loaded from
  std::string problem;   // why it is not used, in one sentence; empty when all is well
  bool required = true;  // false: there is a slower way without it
};

}  // namespace stretto

#endif  // STRETTO_CORE_DEVICE_H_
