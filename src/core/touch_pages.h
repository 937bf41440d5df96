// The first touch of memory.
#ifndef STRETTO_SRC_CORE_TOUCH_PAGES_H_
#define STRETTO_SRC_CORE_TOUCH_PAGES_H_

#include <cstddef>
#include <cstdint>

namespace stretto {

// Makes the pages that these bytes lie on present and writable, leaving what they hold. The kernel
// does it in one call from Linux 5.14 on, and reports an error where touching would end the
// process: 0 or an errno.
int TouchPages(std::byte* data, int64_t bytes);
// The same by several threads.
int TouchPages(std::byte* data, int64_t bytes, int threads);

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_TOUCH_PAGES_H_
