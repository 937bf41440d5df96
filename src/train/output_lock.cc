#include "src/train/output_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::StatusOr<OutputLock> OutputLock::Take(const std::string& directory) {
  std::error_code made;
  std::filesystem::create_directories(directory, made);
  const std::string path = directory + "/lock";
  const int descriptor = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor < 0) {
    return absl::UnavailableError(absl::StrCat("cannot write in the output directory ", directory,
                                               ": ", strerror(errno),
                                               "; make it writable, or choose another output"));
  }
  if (flock(descriptor, LOCK_EX | LOCK_NB) == 0) return OutputLock(descriptor);
  const int error = errno;
  close(descriptor);
  if (error != EWOULDBLOCK) return OutputLock();
  return absl::UnavailableError(
      absl::StrCat("another run is using the output directory ", directory,
                   "; wait until it has ended, or choose another output"));
}

OutputLock::~OutputLock() {
  if (descriptor_ >= 0) close(descriptor_);
}

}  // namespace stretto
