#include "src/core/touch_pages.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

#include "src/core/start_thread.h"

namespace stretto {

int TouchPages(std::byte* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  if (bytes <= 0) return 0;
  const uintptr_t into = reinterpret_cast<uintptr_t>(data) % kPage;
  std::byte* const begin = data - into;
  const int64_t size = bytes + static_cast<int64_t>(into);
#ifdef MADV_POPULATE_WRITE
  if (madvise(begin, static_cast<size_t>(size), MADV_POPULATE_WRITE) == 0) return 0;
  // EFAULT is a touch that would be a SIGBUS: the file system of these pages is full.
  if (errno != EINVAL) return errno == EFAULT ? ENOSPC : errno;
#endif
  for (int64_t i = 0; i < size; i += static_cast<int64_t>(kPage)) {
    std::atomic_ref<uint8_t> byte(reinterpret_cast<uint8_t&>(begin[i]));
    byte.fetch_or(0);
  }
  return 0;
}

int TouchPages(std::byte* data, int64_t bytes, int threads) {
  constexpr int64_t kPiece = int64_t{4} << 20;
  std::atomic<int64_t> next = 0;
  std::atomic<int> error = 0;
  OnThreads(threads, "touching memory", [&](int) {
    while (error == 0) {
      const int64_t at = next.fetch_add(kPiece);
      if (at >= bytes) return;
      const int refused = TouchPages(data + at, std::min(kPiece, bytes - at));
      if (refused != 0) error = refused;
    }
  });
  return error;
}

}  // namespace stretto
