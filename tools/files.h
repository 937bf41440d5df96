// Whole files of text, as the tools read and write them.
#ifndef STRETTO_TOOLS_FILES_H_
#define STRETTO_TOOLS_FILES_H_

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/core/status.h"

namespace stretto {

inline absl::Status WriteTextFile(const std::string& path, const std::string& text) {
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
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string text;
  char part[4096];
  constexpr size_t kMost = size_t{1} << 28;
  while (file.read(part, sizeof(part)) || file.gcount() > 0) {
    text.append(part, static_cast<size_t>(file.gcount()));
    if (text.size() > kMost) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " is larger than 256 MiB; is it the right file?"));
    }
  }
  if (file.eof() && !file.bad()) return text;
  return absl::UnavailableError(absl::StrCat(path, " could not be read: ", std::strerror(errno)));
}

// To the standard output, all of it.
inline absl::Status PrintText(const std::string& text) {
  if (std::fputs(text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("the output could not be written: ", std::strerror(errno)));
}

}  // namespace stretto

#endif  // STRETTO_TOOLS_FILES_H_
