#include "stretto/core/device_name.h"

#include <fstream>

namespace stretto {

std::string DeviceName(Device device) {
  if (device.kind != DeviceKind::kCpu) {
    const auto info = DescribeDevice(device);
    return info.ok() ? info->name : Name(device);
  }
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(colon + 2);
    }
  }
  return "cpu";
}

}  // namespace stretto
