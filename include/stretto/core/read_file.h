// Whole files of text, from regular files only: a pipe or a device may never begin, or never end.
#ifndef STRETTO_CORE_READ_FILE_H_
#define STRETTO_CORE_READ_FILE_H_

#include <cstdint>
#include <string>

#include "stretto/core/status.h"

namespace stretto {

// INVALID_ARGUMENT when there is something else of this name than a regular file; OK also when
// there is nothing. `what` begins the message: "the cost model".
absl::Status CheckRegularFile(const std::string& what, const std::string& path);

// The bytes of the file; an empty one is an empty text. INVALID_ARGUMENT when it is no regular file
// or has more than `most` bytes, NOT_FOUND when it cannot be opened, UNAVAILABLE when reading
// fails.
absl::StatusOr<std::string> ReadRegularFile(const std::string& what, const std::string& path,
                                            int64_t most = int64_t{256} << 20);

}  // namespace stretto

#endif  // STRETTO_CORE_READ_FILE_H_
