// Whole files of text, as the tools read and write them.
#ifndef STRETTO_TOOLS_FILES_H_
#define STRETTO_TOOLS_FILES_H_

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/core/read_file.h"
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
  return ReadRegularFile("the file", path);
}

// To the standard output, all of it.
inline absl::Status PrintText(const std::string& text) {
  if (std::fputs(text.c_str(), stdout) >= 0 && std::fflush(stdout) == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("the output could not be written: ", std::strerror(errno)));
}

}  // namespace stretto

#endif  // STRETTO_TOOLS_FILES_H_
