#include "stretto/core/device.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "src/core/device_runtime.h"

namespace stretto {

std::string Name(Device device) {
  if (device.kind == DeviceKind::kCpu) return "cpu";
  return "cuda:" + std::to_string(device.index);
}

absl::StatusOr<DeviceInfo> DescribeDevice(Device device) {
  if (device.kind == DeviceKind::kCpu) return DeviceInfo{.name = "cpu"};
  const DeviceRuntime* runtime = RuntimeOf(device.kind);
  if (runtime == nullptr) {
    return absl::UnimplementedError(absl::StrCat(
        "this build has no backend for ", Name(device),
        "; configure with -DSTRETTO_CUDA=ON where the CUDA toolkit is installed, or use cpu"));
  }
  return runtime->Describe(device.index);
}

absl::Status UseDevice(Device device) {
  const DeviceRuntime* runtime = RuntimeOf(device.kind);
  return runtime == nullptr ? absl::OkStatus() : runtime->Use(device.index);
}

}  // namespace stretto
