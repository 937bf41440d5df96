#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "src/comm/wire.h"
#include "src/core/start_thread.h"
#include "stretto/comm/store.h"

namespace stretto {
namespace {

constexpr auto kHelloTimeout = std::chrono::seconds(10);
constexpr std::size_t kMaxBacklog = std::size_t{256} << 20;  // bytes that a client may leave unread

// Compares without leaving early, so that timing says nothing about the token.
bool SameToken(const std::string& a, const std::string& b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < a.size() && i < b.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

bool StartsWith(const std::string& text, const std::string& prefix) {
  return text.compare(0, prefix.size(), prefix) == 0;
}

struct Connection {
  net::Fd fd;
  uint64_t id = 0;
  int rank = -1;
  bool greeted = false;  // showed the job token
  bool goodbye = false;
  bool broken = false;
  net::Clock::time_point since;
  std::string in;
  std::string out;
};

// A request that waits for a key (count == 0) or for `count` keys with a prefix.
struct Waiter {
  uint64_t connection = 0;
  uint64_t request = 0;
  std::string key;
  uint64_t count = 0;
  uint64_t have = 0;
};

}  // namespace

struct StoreServer::State {
  std::string token;
  net::Fd listener;
  net::Fd wake;
  int port = 0;
  std::atomic<bool> stop = false;
  std::thread thread;

  std::mutex mutex;
  std::condition_variable idle;
  int clients = 0;  // guarded by mutex: connections that showed the token and are still open

  // Everything below belongs to the thread.
  std::map<std::string, std::string> values;
  std::map<uint64_t, Connection> connections;
  std::vector<Waiter> waiters;
  uint64_t next_id = 1;

  void Loop();
  void Read(Connection& c);
  void Flush(Connection& c);
  void Handle(Connection& c, wire::Reader& frame);
  bool Greet(Connection& c, uint64_t request, wire::Reader& frame);
  void Answer(Connection& c, uint64_t request, wire::Reply reply, const std::string& body = "");
  void AnswerList(Connection& c, uint64_t request, const std::string& prefix);
  void Put(const std::string& key, const std::string& value);
  int64_t AddTo(const std::string& key, int64_t amount);
  void Remove(uint64_t id);
};

void StoreServer::State::Loop() {
  std::vector<pollfd> polled;
  std::vector<uint64_t> ids;
  while (!stop) {
    polled.clear();
    ids.clear();
    polled.push_back({wake.get(), POLLIN, 0});
    polled.push_back({listener.get(), POLLIN, 0});
    for (auto& [id, c] : connections) {
      const short events = c.out.empty() ? POLLIN : POLLIN | POLLOUT;
      polled.push_back({c.fd.get(), events, 0});
      ids.push_back(id);
    }
    if (poll(polled.data(), polled.size(), 1000) < 0 && errno != EINTR) break;
    if (polled[1].revents != 0) {
      while (true) {
        net::Fd fd = net::Accept(listener);
        if (!fd.valid()) break;
        Connection c;
        c.fd = std::move(fd);
        c.id = next_id++;
        c.since = net::Clock::now();
        connections.emplace(c.id, std::move(c));
      }
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      auto found = connections.find(ids[i]);
      if (found == connections.end()) continue;
      Connection& c = found->second;
      if ((polled[i + 2].revents & POLLOUT) != 0) Flush(c);
      if ((polled[i + 2].revents & (POLLIN | POLLHUP | POLLERR)) != 0) Read(c);
      if (!c.greeted && net::Clock::now() - c.since > kHelloTimeout) c.broken = true;
    }
    // A waiter's answer may have broken a connection that was not polled, so look at all.
    ids.clear();
    for (auto& [id, c] : connections) {
      if (c.broken) ids.push_back(id);
    }
    for (uint64_t id : ids) Remove(id);
  }
}

void StoreServer::State::Remove(uint64_t id) {
  auto found = connections.find(id);
  const Connection c = std::move(found->second);
  connections.erase(found);
  std::erase_if(waiters, [id](const Waiter& w) { return w.connection == id; });
  if (!c.greeted) return;
  if (c.rank >= 0) {
    // "trouble" counts events, so that watchers read one key and look closer only when it moved.
    Put(absl::StrCat(c.goodbye ? "left/" : "dead/", c.rank), "connection closed");
    AddTo("trouble", 1);
    // Launchers end a job soon after a death: whoever waits for a meeting has to hear of it now.
    for (const Waiter& w : waiters) {
      const auto waiting = connections.find(w.connection);
      if (w.count > 0 && waiting != connections.end()) {
        AnswerList(waiting->second, w.request, w.key);
      }
    }
    std::erase_if(waiters, [](const Waiter& w) { return w.count > 0; });
  }
  const std::lock_guard<std::mutex> lock(mutex);
  --clients;
  idle.notify_all();
}

void StoreServer::State::Read(Connection& c) {
  char buffer[65536];
  const ssize_t got = recv(c.fd.get(), buffer, sizeof(buffer), 0);
  if (got < 0) {
    if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) c.broken = true;
    return;
  }
  if (got == 0) {
    c.broken = true;
    return;
  }
  c.in.append(buffer, static_cast<std::size_t>(got));
  std::size_t at = 0;
  while (!c.broken && c.in.size() - at >= sizeof(uint32_t)) {
    uint32_t length = 0;
    std::memcpy(&length, c.in.data() + at, sizeof(length));
    if (length > (c.greeted ? wire::kMaxFrame : wire::kMaxHelloFrame)) {
      c.broken = true;
      return;
    }
    if (c.in.size() - at - sizeof(length) < length) break;
    wire::Reader frame(c.in.data() + at + sizeof(length), length);
    Handle(c, frame);
    at += sizeof(length) + length;
  }
  c.in.erase(0, at);
}

void StoreServer::State::Flush(Connection& c) {
  std::size_t at = 0;
  while (at < c.out.size()) {
    const ssize_t sent = send(c.fd.get(), c.out.data() + at, c.out.size() - at, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) c.broken = true;
      break;
    }
    at += static_cast<std::size_t>(sent);
  }
  c.out.erase(0, at);
  if (c.out.size() > kMaxBacklog) c.broken = true;
}

void StoreServer::State::Answer(Connection& c, uint64_t request, wire::Reply reply,
                                const std::string& body) {
  if (c.broken) return;
  wire::Writer frame;
  frame.Int(request).Int(reply);
  c.out += frame.Text(body).Frame();
  Flush(c);
}

void StoreServer::State::AnswerList(Connection& c, uint64_t request, const std::string& prefix) {
  if (c.broken) return;
  wire::Writer frame;
  frame.Int(request).Int(wire::Reply::kOk);
  uint32_t count = 0;
  const auto begin = values.lower_bound(prefix);
  for (auto i = begin; i != values.end() && StartsWith(i->first, prefix); ++i) ++count;
  frame.Int(count);
  for (auto i = begin; i != values.end() && StartsWith(i->first, prefix); ++i) {
    frame.Text(i->first).Text(i->second);
  }
  c.out += frame.Frame();
  Flush(c);
}

void StoreServer::State::Put(const std::string& key, const std::string& value) {
  const bool added = values.insert_or_assign(key, value).second;
  if (!added) return;  // whoever waited for the key has been answered when it appeared
  for (std::size_t i = 0; i < waiters.size();) {
    Waiter& w = waiters[i];
    const bool matches = w.count == 0 ? w.key == key : StartsWith(key, w.key);
    if (!matches || ++w.have < w.count) {
      ++i;
      continue;
    }
    auto c = connections.find(w.connection);
    if (c != connections.end()) {
      if (w.count == 0) {
        Answer(c->second, w.request, wire::Reply::kOk, value);
      } else {
        AnswerList(c->second, w.request, w.key);
      }
    }
    waiters.erase(waiters.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

int64_t StoreServer::State::AddTo(const std::string& key, int64_t amount) {
  int64_t value = 0;
  auto found = values.find(key);
  if (found != values.end() && !absl::SimpleAtoi(found->second.c_str(), &value)) value = 0;
  value += amount;
  Put(key, absl::StrCat(value));
  return value;
}

bool StoreServer::State::Greet(Connection& c, uint64_t request, wire::Reader& frame) {
  const uint32_t magic = frame.Int<uint32_t>();
  const int32_t rank = frame.Int<int32_t>();
  const std::string shown = frame.Text();
  if (!frame.ok() || magic != wire::kHelloMagic) return false;
  if (!SameToken(shown, token)) {
    Answer(c, request, wire::Reply::kRefused,
           "its job token differs: another job uses this port, or the ranks were given different "
           "tokens (STRETTO_JOB_TOKEN)");
    return false;
  }
  for (const auto& [id, other] : connections) {
    // A second job on the same port would otherwise be taken for this one, and its end for a death.
    if (rank < 0 || !other.greeted || other.broken || other.rank != rank) continue;
    Answer(c, request, wire::Reply::kRefused,
           absl::StrCat("rank ", rank,
                        " of this job is connected already; if this is another job, "
                        "give it a MASTER_PORT of its own"));
    return false;
  }
  c.greeted = true;
  c.rank = rank;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    ++clients;
  }
  Answer(c, request, wire::Reply::kOk);
  return true;
}

void StoreServer::State::Handle(Connection& c, wire::Reader& frame) {
  const auto kind = frame.Int<wire::Request>();
  const uint64_t request = frame.Int<uint64_t>();
  if (!c.greeted) {
    if (kind != wire::Request::kHello || !Greet(c, request, frame)) c.broken = true;
    return;
  }
  const std::string key = frame.Text();
  switch (kind) {
    case wire::Request::kSet: {
      const std::string value = frame.Text();
      if (!frame.ok()) break;
      Put(key, value);
      Answer(c, request, wire::Reply::kOk);
      return;
    }
    case wire::Request::kTryGet:
    case wire::Request::kGet: {
      if (!frame.ok()) break;
      auto found = values.find(key);
      if (found != values.end()) {
        Answer(c, request, wire::Reply::kOk, found->second);
      } else if (kind == wire::Request::kTryGet) {
        Answer(c, request, wire::Reply::kNotFound);
      } else {
        waiters.push_back({c.id, request, key, 0, 0});
      }
      return;
    }
    case wire::Request::kAdd: {
      const int64_t amount = frame.Int<int64_t>();
      if (!frame.ok()) break;
      int64_t value = 0;
      auto found = values.find(key);
      if (found != values.end() && !absl::SimpleAtoi(found->second.c_str(), &value)) {
        Answer(c, request, wire::Reply::kInvalid);
        return;
      }
      Answer(c, request, wire::Reply::kOk, absl::StrCat(AddTo(key, amount)));
      return;
    }
    case wire::Request::kList:
    case wire::Request::kListWhen: {
      const uint64_t count = frame.Int<uint64_t>();
      if (!frame.ok()) break;
      uint64_t have = 0;
      for (auto i = values.lower_bound(key); i != values.end() && StartsWith(i->first, key); ++i) {
        ++have;
      }
      if (kind == wire::Request::kListWhen && have < count) {
        waiters.push_back({c.id, request, key, count, have});
      } else {
        AnswerList(c, request, key);
      }
      return;
    }
    case wire::Request::kErase: {
      if (!frame.ok()) break;
      auto i = values.lower_bound(key);
      while (i != values.end() && StartsWith(i->first, key)) i = values.erase(i);
      Answer(c, request, wire::Reply::kOk);
      return;
    }
    case wire::Request::kCancel: {
      const uint64_t cancelled = frame.Int<uint64_t>();
      std::erase_if(
          waiters, [&](const Waiter& w) { return w.connection == c.id && w.request == cancelled; });
      return;  // not answered
    }
    case wire::Request::kGoodbye:
      c.goodbye = true;
      Answer(c, request, wire::Reply::kOk);
      return;
    case wire::Request::kHello:
      break;
  }
  c.broken = true;  // not a request that a client of ours makes
}

StoreServer::StoreServer() : state_(std::make_unique<State>()) {}

absl::StatusOr<std::unique_ptr<StoreServer>> StoreServer::Start(const StoreOptions& options) {
  std::unique_ptr<StoreServer> server(new StoreServer());
  State& s = *server->state_;
  s.token = options.job_token;
  absl::StatusOr<net::Fd> listener = net::Listen(options.bind_address, options.port, &s.port);
  if (!listener.ok()) {
    return absl::UnavailableError(absl::StrCat(std::string(listener.status().message()),
                                               " (MASTER_PORT or STRETTO_MASTER_PORT)"));
  }
  s.listener = *std::move(listener);
  s.wake = net::Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!s.wake.valid()) {
    return absl::ResourceExhaustedError(
        "cannot create an event descriptor for the store: raise the limit of open files");
  }
  STRETTO_ASSIGN_OR_RETURN(s.thread, StartThread("the store", [&s] { s.Loop(); }));
  return server;
}

StoreServer::~StoreServer() {
  if (!state_->thread.joinable()) return;
  state_->stop = true;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(state_->wake.get(), &one, sizeof(one));
  state_->thread.join();
}

int StoreServer::port() const { return state_->port; }

bool StoreServer::WaitUntilIdle(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  return state_->idle.wait_for(lock, timeout, [this] { return state_->clients == 0; });
}

}  // namespace stretto
