#include "stretto/core/read_file.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::Status CheckRegularFile(const std::string& what, const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0 || S_ISREG(status.st_mode)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      what, " '", path, "' is no regular file but a ",
      S_ISDIR(status.st_mode) ? "directory; name a file"
      : S_ISFIFO(status.st_mode)
          ? "pipe; write what comes out of it to a file, and name that"
          : "device or a socket; write what comes out of it to a file, and name that"));
}

absl::StatusOr<std::string> ReadRegularFile(const std::string& what, const std::string& path,
                                            int64_t most) {
  STRETTO_RETURN_IF_ERROR(CheckRegularFile(what, path));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rbe"),
                                                             &std::fclose);
  const auto unreadable = [&] {
    return absl::StrCat(what, " '", path, "' could not be read: ", std::strerror(errno));
  };
  if (file == nullptr) return absl::NotFoundError(unreadable());
  std::string text;
  char part[1 << 14];
  size_t got;
  while ((got = std::fread(part, 1, sizeof(part), file.get())) > 0) {
    text.append(part, got);
    if (static_cast<int64_t>(text.size()) > most) {
      return absl::InvalidArgumentError(absl::StrCat(what, " '", path, "' is larger than ",
                                                     most >> 20, " MiB; is it the right file?"));
    }
  }
  if (std::ferror(file.get()) != 0) return absl::UnavailableError(unreadable());
  return text;
}

}  // namespace stretto
