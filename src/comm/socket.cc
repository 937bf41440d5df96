#include "src/comm/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto::net {
namespace {

using Addresses = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::StatusOr<Addresses> Resolve(const std::string& host, int port, int flags) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const std::string service = absl::StrCat(port);
  const int error =
      getaddrinfo(host.empty() ? nullptr : host.c_str(), service.c_str(), &hints, &found);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat("cannot resolve host '", host,
                                               "': ", gai_strerror(error),
                                               "; check the address that the launcher gave"));
  }
  return Addresses(found, &freeaddrinfo);
}

void SetNoDelay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
}

std::string NumericName(const sockaddr* address, socklen_t length) {
  char host[NI_MAXHOST];
  if (getnameinfo(address, length, host, sizeof(host), nullptr, 0, NI_NUMERICHOST) != 0) return "";
  return host;
}

// One attempt; `error` receives errno.
Fd TryConnect(const addrinfo& address, Deadline deadline, int* error) {
  Fd fd(socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  *error = errno;
  if (!fd.valid()) return fd;
  if (connect(fd.get(), address.ai_addr, address.ai_addrlen) != 0) {
    *error = errno;
    if (errno != EINPROGRESS) return Fd();
    pollfd wait = {fd.get(), POLLOUT, 0};
    if (poll(&wait, 1, PollTimeout(deadline, 5000)) <= 0) {
      *error = ETIMEDOUT;
      return Fd();
    }
    socklen_t length = sizeof(*error);
    getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, error, &length);
    if (*error != 0) return Fd();
  }
  if (IsToItself(fd)) {
    const linger reset = {1, 0};  // the port is free at once
    setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
    *error = ECONNREFUSED;
    return Fd();
  }
  SetNoDelay(fd.get());
  return fd;
}

}  // namespace

bool IsToItself(const Fd& fd) {
  sockaddr_storage here = {}, there = {};
  socklen_t length = sizeof(here), other = sizeof(there);
  return getsockname(fd.get(), reinterpret_cast<sockaddr*>(&here), &length) == 0 &&
         getpeername(fd.get(), reinterpret_cast<sockaddr*>(&there), &other) == 0 &&
         length == other && std::memcmp(&here, &there, length) == 0;
}

Deadline After(std::chrono::milliseconds timeout) {
  if (timeout.count() <= 0) return Deadline::max();
  return Clock::now() + timeout;
}

int PollTimeout(Deadline deadline, int cap) {
  const Deadline now = Clock::now();
  if (deadline <= now) return 0;
  if (deadline - now > std::chrono::milliseconds(cap)) return cap;
  return static_cast<int>(
             std::chrono::duration_cast<std::chrono::milliseconds>(deadline - now).count()) +
         1;
}

void Fd::Close() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

absl::StatusOr<Fd> Listen(const std::string& address, int port, int* bound_port) {
  STRETTO_ASSIGN_OR_RETURN(Addresses found, Resolve(address, port, AI_PASSIVE));
  int error = 0;
  for (const addrinfo* a = found.get(); a != nullptr; a = a->ai_next) {
    Fd fd(socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    if (!fd.valid()) {
      error = errno;
      continue;
    }
    int one = 1;
    setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd.get(), a->ai_addr, a->ai_addrlen) != 0 || listen(fd.get(), 4096) != 0) {
      error = errno;
      continue;
    }
    sockaddr_storage bound = {};
    socklen_t length = sizeof(bound);
    getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &length);
    *bound_port =
        ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                          : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
    return fd;
  }
  return absl::UnavailableError(
      absl::StrFormat("cannot listen on %s:%d: %s; choose another port or bind address", address,
                      port, std::strerror(error)));
}

Fd Accept(const Fd& listener) {
  Fd fd(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd.valid()) SetNoDelay(fd.get());
  return fd;
}

absl::StatusOr<Fd> Connect(const std::string& host, int port, Deadline deadline) {
  int error = 0;
  absl::Status unresolved;
  constexpr std::chrono::milliseconds kLongestPause(200);
  for (std::chrono::milliseconds pause(1);; pause = std::min(pause * 2, kLongestPause)) {
    absl::StatusOr<Addresses> found = Resolve(host, port, 0);
    unresolved = found.status();
    if (found.ok()) {
      for (const addrinfo* a = found->get(); a != nullptr; a = a->ai_next) {
        Fd fd = TryConnect(*a, deadline, &error);
        if (fd.valid()) return fd;
      }
    }
    if (Clock::now() + pause >= deadline) break;
    std::this_thread::sleep_for(pause);
  }
  if (!unresolved.ok()) return unresolved;
  return absl::DeadlineExceededError(
      absl::StrFormat("cannot connect to %s:%d: %s; check that the rank that serves there runs and "
                      "that no firewall is between",
                      host, port, std::strerror(error)));
}

absl::Status SendAll(const Fd& fd, const void* data, std::size_t size, Deadline deadline) {
  const char* at = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t sent = send(fd.get(), at, size, MSG_NOSIGNAL);
    if (sent > 0) {
      at += sent;
      size -= static_cast<std::size_t>(sent);
      continue;
    }
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
      return absl::UnavailableError(
          absl::StrCat("the connection broke while sending: ", std::strerror(errno)));
    }
    if (Clock::now() >= deadline) {
      return absl::DeadlineExceededError("the other side does not read");
    }
    pollfd wait = {fd.get(), POLLOUT, 0};
    poll(&wait, 1, PollTimeout(deadline, 1000));
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(const Fd& fd, void* data, std::size_t size, Deadline deadline) {
  char* at = static_cast<char*>(data);
  while (size > 0) {
    const ssize_t got = recv(fd.get(), at, size, 0);
    if (got > 0) {
      at += got;
      size -= static_cast<std::size_t>(got);
      continue;
    }
    if (got == 0) return absl::UnavailableError("the other side closed the connection");
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) {
      return absl::UnavailableError(
          absl::StrCat("the connection broke while receiving: ", std::strerror(errno)));
    }
    if (Clock::now() >= deadline) return absl::DeadlineExceededError("no answer in time");
    pollfd wait = {fd.get(), POLLIN, 0};
    poll(&wait, 1, PollTimeout(deadline, 1000));
  }
  return absl::OkStatus();
}

std::string LocalAddress(const Fd& fd) {
  sockaddr_storage address = {};
  socklen_t length = sizeof(address);
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) return "";
  return NumericName(reinterpret_cast<sockaddr*>(&address), length);
}

std::string PrimaryAddress() {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return "127.0.0.1";
  std::string result = "127.0.0.1";
  for (const ifaddrs* i = all; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || i->ifa_addr->sa_family != AF_INET) continue;
    if ((i->ifa_flags & IFF_LOOPBACK) != 0 || (i->ifa_flags & IFF_UP) == 0) continue;
    result = NumericName(i->ifa_addr, sizeof(sockaddr_in));
    break;
  }
  freeifaddrs(all);
  return result;
}

bool IsLoopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host.compare(0, 4, "127.") == 0;
}

std::string RandomToken() {
  std::random_device random;
  std::string token;
  for (int i = 0; i < 4; ++i) token += absl::StrFormat("%08x", random());
  return token;
}

}  // namespace stretto::net
