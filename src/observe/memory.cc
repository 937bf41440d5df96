#include "stretto/observe/memory.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

// The value of a line "VmRSS:    1234 kB" in bytes, or -1.
int64_t Field(const char* text, const char* key) {
  const char* at = std::strstr(text, key);
  if (at == nullptr) return -1;
  return std::strtoll(at + std::strlen(key), nullptr, 10) * 1024;
}

// Reads the beginning of a file into text[0, size), ended by a NUL; returns 0 or errno.
int ReadText(const char* path, char* text, size_t size) {
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno;
  size_t at = 0;
  while (at + 1 < size) {
    const ssize_t n = read(fd, text + at, size - 1 - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    at += static_cast<size_t>(n);
  }
  close(fd);
  text[at] = '\0';
  return 0;
}

}  // namespace

absl::StatusOr<ProcessMemory> ReadProcessMemory() {
  char text[8192];
  if (const int error = ReadText("/proc/self/status", text, sizeof(text)); error != 0) {
    return absl::UnavailableError(
        absl::StrCat("/proc/self/status cannot be opened: ", std::strerror(error), "."));
  }

  ProcessMemory memory;
  memory.resident_bytes = Field(text, "\nVmRSS:");
  memory.peak_resident_bytes = Field(text, "\nVmHWM:");
  if (memory.resident_bytes < 0) {
    return absl::UnavailableError("/proc/self/status has no VmRSS line.");
  }
  // Some sandboxed kernels leave the peak out, and the kernel updates it lazily.
  if (memory.peak_resident_bytes < memory.resident_bytes) {
    memory.peak_resident_bytes = memory.resident_bytes;
  }
  return memory;
}

int64_t AvailableMemory() {
  char text[8192];
  if (ReadText("/proc/meminfo", text, sizeof(text)) != 0) return -1;
  int64_t available = Field(text, "\nMemAvailable:");
  if (available < 0) return -1;
  available += std::max<int64_t>(Field(text, "\nSwapFree:"), 0);
  // The limit of a container; page cache inside it can be taken back, so the whole limit counts.
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    if (ReadText(path, text, sizeof(text)) != 0) continue;
    const int64_t limit = std::strtoll(text, nullptr, 10);  // "max": 0
    if (limit > 0) available = std::min(available, limit);
  }
  return available;
}

}  // namespace stretto
