// Whole files of text, as the tools read and write them.
#ifndef STRETTO_TOOLS_FILES_H_
#define STRETTO_TOOLS_FILES_H_

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/core/status.h"

namespace stretto {

inline absl::Status WriteTextFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat(path, " could not be written: ", std::strerror(errno)));
}

inline absl::StatusOr<std::string> ReadTextFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  if (file && text) return text.str();
  return absl::UnavailableError(absl::StrCat(path, " could not be read: ", std::strerror(errno)));
}

}  // namespace stretto

#endif  // STRETTO_TOOLS_FILES_H_
