#include "stretto/observe/memory.h"

#include <fcntl.h>
#include <unistd.h>

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

}  // namespace

absl::StatusOr<ProcessMemory> ReadProcessMemory() {
  const int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return absl::UnavailableError(
        absl::StrCat("/proc/self/status cannot be opened: ", std::strerror(errno), "."));
  }
  char text[8192];
  size_t size = 0;
  while (size + 1 < sizeof(text)) {
    const ssize_t n = read(fd, text + size, sizeof(text) - 1 - size);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) break;
    size += static_cast<size_t>(n);
  }
  close(fd);
  text[size] = '\0';

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

}  // namespace stretto
