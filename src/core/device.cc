#include "stretto/core/device.h"

#include <string>

namespace stretto {

std::string Name(Device device) {
  if (device.kind == DeviceKind::kCpu) return "cpu";
  return "cuda:" + std::to_string(device.index);
}

}  // namespace stretto
