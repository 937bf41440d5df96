#include "stretto/comm/store.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/socket.h"
#include "src/comm/wire.h"

namespace stretto {
namespace {

// A request that the server answers at once is given up after this: then rank 0 hangs.
constexpr std::chrono::milliseconds kAnswerTimeout = std::chrono::seconds(5);
// ... and after this when an earlier one got no answer, so that leaving a hung job is quick.
constexpr std::chrono::milliseconds kSuspectTimeout = std::chrono::milliseconds(250);

struct Answer {
  wire::Reply reply = wire::Reply::kOk;
  std::string body;
  // Not inlined: g++ 12 would warn about the short-string buffer of a body it believes empty.
  [[gnu::noinline]] wire::Reader Body() const { return wire::Reader(body.data(), body.size()); }
};

}  // namespace

// Several threads may have requests in the air (one waits for a key while another publishes). The
// first to wait reads for all; the others sleep until their answer has been read.
struct Store::State {
  net::Fd fd;
  std::string where;  // "host:port"
  std::mutex mutex;
  std::condition_variable changed;
  bool reading = false;
  bool suspect = false;  // the last request got no answer in time
  absl::Status broken;
  uint64_t next_request = 1;
  std::map<uint64_t, std::optional<Answer>> pending;
  std::string in;

  const absl::Status& Lost(const std::string& why) {
    if (broken.ok()) {
      broken = absl::UnavailableError(absl::StrCat("the control plane at ", where,
                                                   " on rank 0 is lost (", why,
                                                   "): rank 0 has left or died"));
    }
    changed.notify_all();
    return broken;
  }

  // Sends `frame` and returns the answer. `waits`: the server may
  // take its time, so a time-out is not the server's fault and the request is taken back.
  absl::StatusOr<Answer> Call(wire::Request kind, const std::function<void(wire::Writer&)>& fill,
                              net::Deadline deadline, bool waits);
  void ReadOnce(std::unique_lock<std::mutex>& lock, net::Deadline deadline);
  void Parse();
};

void Store::State::Parse() {
  std::size_t at = 0;
  while (in.size() - at >= sizeof(uint32_t)) {
    uint32_t length = 0;
    std::memcpy(&length, in.data() + at, sizeof(length));
    if (in.size() - at - sizeof(length) < length) break;
    if (length < sizeof(uint64_t) + sizeof(wire::Reply)) {
      Lost("it sent a malformed frame").IgnoreError();
      return;
    }
    uint64_t request = 0;
    std::memcpy(&request, in.data() + at + sizeof(length), sizeof(request));
    auto found = pending.find(request);
    if (found != pending.end()) {
      constexpr std::size_t kHead = sizeof(request) + sizeof(wire::Reply);
      suspect = false;
      found->second = Answer{static_cast<wire::Reply>(in[at + sizeof(length) + sizeof(request)]),
                             in.substr(at + sizeof(length) + kHead, length - kHead)};
    }
    at += sizeof(length) + length;
  }
  in.erase(0, at);
}

void Store::State::ReadOnce(std::unique_lock<std::mutex>& lock, net::Deadline deadline) {
  reading = true;
  lock.unlock();
  pollfd wait = {fd.get(), POLLIN, 0};
  poll(&wait, 1, net::PollTimeout(deadline, 1000));
  lock.lock();
  char buffer[65536];
  const ssize_t got = recv(fd.get(), buffer, sizeof(buffer), 0);
  if (got > 0) {
    in.append(buffer, static_cast<std::size_t>(got));
    Parse();
  } else if (got == 0) {
    Lost("it closed the connection").IgnoreError();
  } else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
    Lost(std::strerror(errno)).IgnoreError();
  }
  reading = false;
  changed.notify_all();
}

absl::StatusOr<Answer> Store::State::Call(wire::Request kind,
                                          const std::function<void(wire::Writer&)>& fill,
                                          net::Deadline deadline, bool waits) {
  std::unique_lock<std::mutex> lock(mutex);
  if (!broken.ok()) return broken;
  if (!waits && suspect) deadline = std::min(deadline, net::After(kSuspectTimeout));
  const uint64_t request = next_request++;
  wire::Writer frame;
  frame.Int(kind).Int(request);
  fill(frame);
  if (frame.Frame().size() > wire::kMaxFrame) {
    return absl::InvalidArgumentError(
        "a control-plane value may have 64 MiB at most; send large data through a Communicator");
  }
  const absl::Status sent =
      net::SendAll(fd, frame.Frame().data(), frame.Frame().size(), net::After(kAnswerTimeout));
  if (!sent.ok()) return Lost(std::string(sent.message()));
  pending[request] = std::nullopt;
  while (true) {
    if (pending[request].has_value()) {
      Answer answer = std::move(*pending[request]);
      pending.erase(request);
      return answer;
    }
    if (!broken.ok()) {
      pending.erase(request);
      return broken;
    }
    if (net::Clock::now() >= deadline) break;
    if (!reading) {
      ReadOnce(lock, deadline);
    } else if (deadline == net::Deadline::max()) {
      changed.wait(lock);
    } else {
      changed.wait_until(lock, deadline);
    }
  }
  pending.erase(request);
  if (!waits) {
    suspect = true;
    return absl::DeadlineExceededError(
        absl::StrFormat("the control plane at %s does not answer: rank 0 is stopped, its machine "
                        "hangs or the network to it is down",
                        where));
  }
  wire::Writer cancel;
  cancel.Int(wire::Request::kCancel).Int(uint64_t{0});
  cancel.Text("").Int(request);
  const absl::Status cancelled =
      net::SendAll(fd, cancel.Frame().data(), cancel.Frame().size(), net::After(kAnswerTimeout));
  if (!cancelled.ok()) return Lost(std::string(cancelled.message()));
  return absl::DeadlineExceededError("");
}

Store::Store() : state_(std::make_unique<State>()) {}

absl::StatusOr<std::unique_ptr<Store>> Store::Connect(const StoreOptions& options, int rank) {
  std::unique_ptr<Store> store(new Store());
  State& s = *store->state_;
  s.where = absl::StrCat(options.host, ":", options.port);
  const net::Deadline deadline = net::After(options.connect_timeout);
  absl::StatusOr<net::Fd> fd = net::Connect(options.host, options.port, deadline);
  if (!fd.ok()) {
    return absl::Status(fd.status().code(),
                        absl::StrCat("rank ", rank, " cannot reach the control plane of rank 0: ",
                                     std::string(fd.status().message())));
  }
  s.fd = std::move(*fd);
  absl::StatusOr<Answer> answer = s.Call(
      wire::Request::kHello,
      [&](wire::Writer& w) {
        w.Int(wire::kHelloMagic).Int(static_cast<int32_t>(rank)).Text(options.job_token);
      },
      std::min(deadline, net::After(std::chrono::seconds(30))), false);
  STRETTO_RETURN_IF_ERROR(answer.status());
  if (answer->reply != wire::Reply::kOk) {
    // Nothing to say goodbye to.
    s.broken = absl::PermissionDeniedError("refused");
    return absl::PermissionDeniedError(absl::StrCat(
        "the control plane at ", s.where, " turned rank ", rank, " away: ", answer->Body().Text()));
  }
  return store;
}

Store::~Store() {
  if (!state_->fd.valid()) return;
  // The answer is awaited: closing a socket with unread bytes in it would reset the connection, and
  // the server might never see the goodbye.
  state_
      ->Call(
          wire::Request::kGoodbye, [](wire::Writer& w) { w.Text(""); },
          net::After(std::chrono::seconds(2)), false)
      .status()
      .IgnoreError();
}

absl::Status Store::Set(const std::string& key, const std::string& value) {
  return state_
      ->Call(
          wire::Request::kSet, [&](wire::Writer& w) { w.Text(key).Text(value); },
          net::After(kAnswerTimeout), false)
      .status();
}

absl::StatusOr<std::string> Store::Get(const std::string& key, std::chrono::milliseconds timeout) {
  absl::StatusOr<Answer> answer = state_->Call(
      wire::Request::kGet, [&](wire::Writer& w) { w.Text(key); }, net::After(timeout), true);
  if (absl::IsDeadlineExceeded(answer.status())) {
    return absl::DeadlineExceededError(absl::StrFormat(
        "nobody set the control-plane key '%s' within %.1f s", key, timeout.count() / 1000.0));
  }
  STRETTO_RETURN_IF_ERROR(answer.status());
  return answer->Body().Text();
}

absl::StatusOr<std::string> Store::TryGet(const std::string& key) {
  STRETTO_ASSIGN_OR_RETURN(const Answer answer,
                           state_->Call(
                               wire::Request::kTryGet, [&](wire::Writer& w) { w.Text(key); },
                               net::After(kAnswerTimeout), false));
  if (answer.reply == wire::Reply::kNotFound) {
    return absl::NotFoundError(absl::StrCat("the control plane has no key '", key, "'"));
  }
  return answer.Body().Text();
}

absl::StatusOr<int64_t> Store::Add(const std::string& key, int64_t amount) {
  STRETTO_ASSIGN_OR_RETURN(
      const Answer answer,
      state_->Call(
          wire::Request::kAdd, [&](wire::Writer& w) { w.Text(key).Int(amount); },
          net::After(kAnswerTimeout), false));
  if (answer.reply != wire::Reply::kOk) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the control-plane key '", key, "' holds text, so nothing can be added to it"));
  }
  int64_t value = 0;
  if (!absl::SimpleAtoi(answer.Body().Text().c_str(), &value)) {
    return absl::InternalError(absl::StrCat("the control plane gave no number for '", key, "'"));
  }
  return value;
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Store::List(
    const std::string& prefix) {
  return ListWhen(prefix, 0, kAnswerTimeout);
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> Store::ListWhen(
    const std::string& prefix, int64_t count, std::chrono::milliseconds timeout) {
  const bool waits = count > 0;
  absl::StatusOr<Answer> answer = state_->Call(
      waits ? wire::Request::kListWhen : wire::Request::kList,
      [&](wire::Writer& w) { w.Text(prefix).Int(static_cast<uint64_t>(count)); },
      net::After(timeout), waits);
  if (waits && absl::IsDeadlineExceeded(answer.status())) {
    return absl::DeadlineExceededError(
        absl::StrFormat("fewer than %d control-plane keys start with '%s' after %.1f s", count,
                        prefix, timeout.count() / 1000.0));
  }
  STRETTO_RETURN_IF_ERROR(answer.status());
  wire::Reader reply = answer->Body();
  std::vector<std::pair<std::string, std::string>> result;
  for (uint32_t n = reply.Int<uint32_t>(); n > 0 && reply.ok(); --n) {
    std::string key = reply.Text();
    std::string value = reply.Text();
    result.emplace_back(std::move(key), std::move(value));
  }
  if (!reply.ok()) return absl::InternalError("the control plane sent a malformed list");
  return result;
}

absl::Status Store::Erase(const std::string& prefix) {
  return state_
      ->Call(
          wire::Request::kErase, [&](wire::Writer& w) { w.Text(prefix); },
          net::After(kAnswerTimeout), false)
      .status();
}

std::string Store::local_address() const { return net::LocalAddress(state_->fd); }

}  // namespace stretto
