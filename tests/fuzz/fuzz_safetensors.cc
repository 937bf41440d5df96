// Any bytes as a safetensors file: the parser refuses or gives a layout that makes sense.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "stretto/snapshot/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  const int64_t bytes = static_cast<int64_t>(size);
  const auto file = stretto::SafetensorsFile::Parse("fuzz", data, bytes, bytes);
  if (!file.ok()) return 0;
  int64_t end = 0;
  for (const stretto::SafetensorsEntry& entry : file->entries()) {
    if (entry.begin != end || entry.end < entry.begin || entry.elements() < 0) std::abort();
    if (file->Find(entry.name) != &entry) std::abort();
    end = entry.end;
  }
  if (end > bytes - 8) std::abort();
  return 0;
}
