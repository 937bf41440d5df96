// Writing whole records to a file descriptor.
#ifndef STRETTO_SRC_OBSERVE_FILE_H_
#define STRETTO_SRC_OBSERVE_FILE_H_

#include <string>

#include "stretto/core/status.h"

namespace stretto::observe_internal {

// INTERNAL (RESOURCE_EXHAUSTED for a full disk) with `what`, `path` and the system's reason.
absl::Status FileError(const char* what, const std::string& path, int error);
// Writes all of `data`; `path` is for messages.
absl::Status WriteAll(int fd, const std::string& path, const std::string& data);
// Writes `data` to `path` by way of a temporary file and a rename, so readers see all or nothing.
absl::Status ReplaceFile(const std::string& path, const std::string& data);
// Makes the directory and its parents.
absl::Status MakeDirectories(const std::string& path);
double UnixSeconds();

}  // namespace stretto::observe_internal

#endif  // STRETTO_SRC_OBSERVE_FILE_H_
