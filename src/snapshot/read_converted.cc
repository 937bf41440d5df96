#include "src/snapshot/read_converted.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/snapshot/convert.h"

namespace stretto::snapshot_internal {

absl::Status ReadConverted(const SafetensorsFile& file, const SafetensorsEntry& entry,
                           int64_t first, int64_t count, DType dtype, void* out) {
  const absl::StatusOr<DType> stored = FromSafetensorsType(entry.dtype);
  if (!stored.ok() || !CanConvert(*stored, dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(file.path(), ": tensor \"", entry.name,
                                                   "\" is stored as ", entry.dtype,
                                                   " and cannot be read as ", Name(dtype)));
  }
  const int64_t width = SizeOf(*stored);
  if (*stored == dtype) return file.Read(entry, first * width, count * width, out);

  constexpr int64_t kChunk = int64_t{1} << 18;  // elements
  std::vector<char> buffer(std::min(count, kChunk) * width);
  char* cursor = static_cast<char*>(out);
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t n = std::min(kChunk, count - done);
    STRETTO_RETURN_IF_ERROR(file.Read(entry, (first + done) * width, n * width, buffer.data()));
    ConvertElements(*stored, buffer.data(), dtype, cursor, n);
    cursor += n * SizeOf(dtype);
  }
  return absl::OkStatus();
}

}  // namespace stretto::snapshot_internal
