// Non-blocking TCP sockets with deadlines.
#ifndef STRETTO_SRC_COMM_SOCKET_H_
#define STRETTO_SRC_COMM_SOCKET_H_

#include <chrono>
#include <cstddef>
#include <string>
#include <utility>

#include "stretto/core/status.h"

namespace stretto::net {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

// `timeout` from now; a timeout <= 0 means "no limit".
Deadline After(std::chrono::milliseconds timeout);
// Milliseconds until `deadline` for poll(): at least 0, at most `cap`.
int PollTimeout(Deadline deadline, int cap);

// Owns a file descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) {
      Close();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~Fd() { Close(); }
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void Close();

 private:
  int fd_ = -1;
};

// Listens on `address` (a host name or number; "0.0.0.0" for all interfaces); port 0 picks one.
absl::StatusOr<Fd> Listen(const std::string& address, int port, int* bound_port);
// The next waiting connection, or an invalid Fd when there is none.
Fd Accept(const Fd& listener);
// Whether both ends are one socket: without a listener a connection to a port from which the system
// itself hands out ports may meet itself.
bool IsToItself(const Fd& fd);
// Connects, trying again until the deadline.
absl::StatusOr<Fd> Connect(const std::string& host, int port, Deadline deadline);
// Blocking transfers of exactly `size` bytes over a non-blocking socket.
absl::Status SendAll(const Fd& fd, const void* data, std::size_t size, Deadline deadline);
absl::Status ReceiveAll(const Fd& fd, void* data, std::size_t size, Deadline deadline);

// The numeric address of this end of a connection.
std::string LocalAddress(const Fd& fd);
// The first address of this machine that is not a loopback, "127.0.0.1" if there is none.
std::string PrimaryAddress();
bool IsLoopback(const std::string& host);
// 128 random bits as hexadecimal text.
std::string RandomToken();

}  // namespace stretto::net

#endif  // STRETTO_SRC_COMM_SOCKET_H_
