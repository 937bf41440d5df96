#include "src/core/touch_pages.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>

namespace stretto {

int TouchPages(std::byte* data, int64_t bytes) {
  constexpr uintptr_t kPage = 4096;
  if (bytes <= 0) return 0;
  const uintptr_t into = reinterpret_cast<uintptr_t>(data) % kPage;
  std::byte* const begin = data - into;
  const int64_t size = bytes + static_cast<int64_t>(into);
#ifdef MADV_POPULATE_WRITE
  if (madvise(begin, static_cast<size_t>(size), MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;
#endif
  for (int64_t i = 0; i < size; i += static_cast<int64_t>(kPage)) {
    std::atomic_ref<uint8_t> byte(reinterpret_cast<uint8_t&>(begin[i]));
    byte.fetch_or(0);
  }
  return 0;
}

}  // namespace stretto
