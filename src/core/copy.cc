#include "stretto/core/copy.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/core/device_runtime.h"

namespace stretto {
namespace {

absl::Status NoBackend(Device device) {
  return absl::UnimplementedError(absl::StrCat(
      "memory on ", Name(device), " cannot be copied: this build has no backend for it; use cpu"));
}

absl::Status CopyRows(Device device, std::byte* to, int64_t to_pitch, const std::byte* from,
                      int64_t from_pitch, int64_t row_bytes, int64_t rows) {
  if (rows <= 0 || row_bytes <= 0) return absl::OkStatus();
  if (to_pitch == row_bytes && from_pitch == row_bytes) {
    row_bytes *= rows;
    rows = 1;
  }
  if (device.kind != DeviceKind::kCpu) {
    const DeviceRuntime* runtime = RuntimeOf(device.kind);
    if (runtime == nullptr) return NoBackend(device);
    return runtime->CopyRows(device.index, to, to_pitch, from, from_pitch, row_bytes, rows);
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * to_pitch, from + r * from_pitch, static_cast<size_t>(row_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CopyToHost(void* to, const Tensor& from) {
  const int64_t row = from.row_elements() * SizeOf(from.dtype);
  return CopyRows(from.device, static_cast<std::byte*>(to), row, from.data,
                  from.row_stride * SizeOf(from.dtype), row, from.rows());
}

absl::Status CopyFromHost(const Tensor& to, const void* from) {
  const int64_t row = to.row_elements() * SizeOf(to.dtype);
  return CopyRows(to.device, to.data, to.row_stride * SizeOf(to.dtype),
                  static_cast<const std::byte*>(from), row, row, to.rows());
}

absl::Status FillFromHost(
    const Tensor& to, const std::function<absl::Status(int64_t first, const Tensor& rows)>& fill) {
  if (to.device.kind == DeviceKind::kCpu) return fill(0, to);
  constexpr int64_t kBufferBytes = 16 << 20;
  const int64_t row_bytes = std::max<int64_t>(1, to.row_elements() * SizeOf(to.dtype));
  const int64_t most = std::max<int64_t>(1, kBufferBytes / row_bytes);
  std::vector<std::byte> buffer(static_cast<size_t>(std::min(most, to.rows()) * row_bytes));
  for (int64_t first = 0; first < to.rows(); first += most) {
    const Tensor rows = to.Rows(first, std::min(most, to.rows() - first));
    Tensor host = rows;
    host.data = buffer.data();
    host.device = Device::Cpu();
    host.row_stride = host.row_elements();
    STRETTO_RETURN_IF_ERROR(fill(first, host));
    STRETTO_RETURN_IF_ERROR(CopyFromHost(rows, buffer.data()));
  }
  return absl::OkStatus();
}

}  // namespace stretto
