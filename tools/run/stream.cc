#include "tools/run/stream.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/observe/file.h"

namespace stretto {

Stream::Stream(int from, int to, std::string prefix, size_t kept)
    : from_(from), to_(to), prefix_(std::move(prefix)), kept_(kept) {
  if (from_ >= 0) fcntl(from_, F_SETFL, O_NONBLOCK);
}

Stream::~Stream() {
  if (from_ >= 0) close(from_);
}

bool Stream::Pump(size_t most) {
  std::array<char, 65536> buffer;
  for (size_t done = 0; from_ >= 0 && done < most;) {
    const ssize_t n = read(from_, buffer.data(), std::min(buffer.size(), most - done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return true;
    if (n <= 0) {
      Flush();
      close(from_);
      from_ = -1;
      break;
    }
    Take(std::string(buffer.data(), static_cast<size_t>(n)));
    done += static_cast<size_t>(n);
  }
  return from_ >= 0;
}

void Stream::Flush() {
  if (!line_.empty()) Write(prefix_ + line_);
  line_.clear();
}

void Stream::EndLine() {
  if (within_line_) (void)WriteUnlessStuck(to_, "\n", 0);
  within_line_ = false;
}

void Stream::Take(const std::string& text) {
  said_ += text;
  if (said_.size() > kept_) said_.erase(0, said_.size() - kept_);
  if (prefix_.empty()) return Write(text);
  line_ += text;
  size_t begin = 0;
  std::string out;
  for (size_t end; (end = line_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    absl::StrAppend(&out, prefix_, line_.substr(begin, end - begin), "\n");
  }
  line_.erase(0, begin);
  Write(out);
}

// Whoever reads may be gone; the program need not end for that.
void Stream::Write(const std::string& text) {
  if (!text.empty()) within_line_ = text.back() != '\n';
  (void)observe_internal::WriteAll(to_, "output", text).ok();
}

bool IsReady(int descriptor, short events, double seconds) {
  struct pollfd watched = {.fd = descriptor, .events = events, .revents = 0};
  int ready = 0;
  while ((ready = poll(&watched, 1, static_cast<int>(1e3 * seconds))) < 0 && errno == EINTR) {
  }
  return ready > 0;
}

bool WriteUnlessStuck(int to, const std::string& text, double seconds) {
  for (size_t done = 0; done < text.size(); done += kPiece) {
    if (!IsReady(to, POLLOUT, seconds) ||
        !observe_internal::WriteAll(to, "output", text.substr(done, kPiece)).ok()) {
      return false;
    }
  }
  return true;
}

}  // namespace stretto
