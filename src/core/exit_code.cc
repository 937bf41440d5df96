#include "stretto/core/exit_code.h"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::Status PrintText(const std::string& text) {
  errno = 0;
  std::fputs(text.c_str(), stdout);
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("standard output could not be written: ",
                   errno != 0 ? std::strerror(errno) : "an earlier part of it was lost"));
}

int EndProgram(const absl::StatusOr<int>& result) {
  absl::Status status = result.status();
  status.Update(PrintText(""));
  if (status.ok()) return *result;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return ExitCodeOf(status);
}

int EndProgram(const absl::Status& result) {
  return EndProgram(result.ok() ? absl::StatusOr<int>(kExitDone) : result);
}

}  // namespace stretto
