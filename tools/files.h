// Whole files of text, as the tools read and write them.
#ifndef STRETTO_TOOLS_FILES_H_
#define STRETTO_TOOLS_FILES_H_

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/core/read_file.h"
#include "stretto/core/status.h"

namespace stretto {

// INVALID_ARGUMENT for a named pipe, and for a link to one that nobody reads: opening it would wait
// for ever. /dev/stdout is none.
inline absl::Status CheckNoPipe(const std::string& path) {
  struct stat named = {}, meant = {};
  if (stat(path.c_str(), &meant) != 0 || !S_ISFIFO(meant.st_mode)) return absl::OkStatus();
  const int fd = lstat(path.c_str(), &named) == 0 && S_ISFIFO(named.st_mode)
                     ? -1
                     : open(path.c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  if (fd >= 0) {
    close(fd);
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(path, " is a pipe, which nobody may ever read; name a file"));
}

inline absl::Status WriteTextFile(const std::string& path, const std::string& text) {
  if (const absl::Status file = CheckNoPipe(path); !file.ok()) return file;
  errno = 0;
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(path, " could not be written: ", std::strerror(errno)));
}

// An empty file is an empty text.
inline absl::StatusOr<std::string> ReadTextFile(const std::string& path) {
  return ReadRegularFile("the file", path);
}

}  // namespace stretto

#endif  // STRETTO_TOOLS_FILES_H_
