#include "stretto/snapshot/keeper.h"

#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "src/snapshot/keeper_impl.h"
#include "stretto/core/log.h"

namespace stretto {

using snapshot_internal::HostPort;
using snapshot_internal::KeeperRole;
using snapshot_internal::KeeperSlots;
using snapshot_internal::ParseHostPort;

namespace {

constexpr auto kBeat = std::chrono::seconds(1);
constexpr auto kConnectTimeout = std::chrono::milliseconds(300);
constexpr auto kHelloTimeout = std::chrono::seconds(10);
constexpr auto kRequestTimeout = std::chrono::seconds(30);  // of a reader, and of its answer
constexpr uint32_t kMostHello = 4096;

bool SameToken(const std::string& a, const std::string& b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    difference |= static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(b[i]);
  }
  return difference == 0;
}

// Whether both ends of a TCP connection have one address.
bool FromThisMachine(const net::Fd& fd) {
  sockaddr_storage here = {}, there = {};
  socklen_t length = sizeof(here), other = sizeof(there);
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&here), &length) != 0 ||
      getpeername(fd.get(), reinterpret_cast<sockaddr*>(&there), &other) != 0 ||
      here.ss_family != AF_INET || there.ss_family != AF_INET) {
    return false;
  }
  return reinterpret_cast<sockaddr_in*>(&here)->sin_addr.s_addr ==
         reinterpret_cast<sockaddr_in*>(&there)->sin_addr.s_addr;
}

}  // namespace

Keeper::Impl::Impl(KeeperOptions o, ParityLayout l)
    : options(std::move(o)),
      layout(l),
      budget(options.memory_bytes, -1, -1),
      protocol(options.node, l) {}

Keeper::Impl::~Impl() {
  stop = true;
  work.reset();
  if (connector.joinable()) connector.join();
  if (spiller.joinable()) spiller.join();
  // Who reads may have stopped reading.
  for (const Server& server : servers) shutdown(server.fd->get(), SHUT_RDWR);
  for (Server& server : servers) server.thread.join();
  if (unix_socket.valid()) unlink(options.socket.c_str());
  slots.reset();  // its names are the next one's as soon as that has the lock
}

void Keeper::Impl::Post(std::function<void()> task) {
  {
    const std::lock_guard<std::mutex> guard(mutex);
    posted.push_back(std::move(task));
  }
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake.get(), &one, sizeof(one));
}

absl::Status Keeper::Impl::Loop() {
  while (!stop) {
    Poll();
    std::vector<std::function<void()>> tasks;
    {
      const std::lock_guard<std::mutex> guard(mutex);
      tasks.swap(posted);
    }
    for (const auto& task : tasks) task();
    Beat();
    PrepareFree();
    AnswerWaiting();
    for (auto c = connections.begin(); c != connections.end();) {
      const auto next = std::next(c);
      if (c->broken) Remove(c);
      c = next;
    }
    for (auto server = servers.begin(); server != servers.end();) {
      if (*server->done) {
        server->thread.join();
        server = servers.erase(server);
      } else {
        ++server;
      }
    }
  }
  return absl::OkStatus();
}

void Keeper::Impl::Poll() {
  std::vector<pollfd> polled = {
      {wake.get(), POLLIN, 0}, {tcp.get(), POLLIN, 0}, {unix_socket.get(), POLLIN, 0}};
  std::vector<Connection*> order;
  bool waits = false;
  for (Connection& c : connections) {
    const short events = c.out.empty() ? POLLIN : POLLIN | POLLOUT;
    polled.push_back({c.fd.get(), events, 0});
    order.push_back(&c);
    waits |= c.waits;
  }
  if (poll(polled.data(), polled.size(), waits ? 50 : 500) < 0 && errno != EINTR) return;
  if (polled[0].revents != 0) {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = read(wake.get(), &count, sizeof(count));
  }
  for (size_t i = 0; i < order.size(); ++i) {
    const short events = polled[i + 3].revents;
    if ((events & POLLOUT) != 0) Flush(*order[i]);
    if ((events & (POLLIN | POLLHUP | POLLERR)) != 0) Read(*order[i]);
  }
  if (polled[1].revents != 0) AcceptAll(tcp, false);
  if (polled[2].revents != 0) AcceptAll(unix_socket, true);
}

void Keeper::Impl::AcceptAll(const net::Fd& listener, bool local) {
  while (true) {
    net::Fd fd = net::Accept(listener);
    if (!fd.valid()) return;
    Connection& c = connections.emplace_back();
    c.fd = std::move(fd);
    c.local = local;
    c.since = c.heard = net::Clock::now();
  }
}

void Keeper::Impl::Read(Connection& c) {
  char buffer[65536];
  const ssize_t got = recv(c.fd.get(), buffer, sizeof(buffer), 0);
  if (got <= 0) {
    c.broken = c.broken || got == 0 || (errno != EAGAIN && errno != EINTR);
    return;
  }
  c.heard = net::Clock::now();
  c.in.append(buffer, static_cast<size_t>(got));
  size_t at = 0;
  while (!c.broken && c.fd.valid() && c.in.size() - at >= sizeof(uint32_t)) {
    uint32_t length = 0;
    std::memcpy(&length, c.in.data() + at, sizeof(length));
    if (length > (c.role ? wire::kMaxFrame : kMostHello)) {
      c.broken = true;
      return;
    }
    if (c.in.size() - at - sizeof(length) < length) break;
    wire::Reader frame(c.in.data() + at + sizeof(length), length);
    at += sizeof(length) + length;
    Handle(c, frame);
  }
  c.in.erase(0, at);
}

void Keeper::Impl::Flush(Connection& c) {
  size_t at = 0;
  while (at < c.out.size()) {
    const ssize_t sent = send(c.fd.get(), c.out.data() + at, c.out.size() - at, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) {
      c.broken = c.broken || (errno != EAGAIN && errno != EWOULDBLOCK);
      break;
    }
    at += static_cast<size_t>(sent);
  }
  c.out.erase(0, at);
}

void Keeper::Impl::Send(Connection& c, wire::Writer& frame) {
  if (c.broken || !c.fd.valid()) return;
  c.out += frame.Frame();
  Flush(c);
}

void Keeper::Impl::Refuse(Connection& c, const absl::Status& status) {
  wire::Writer out;
  out.Int(Kind::kError);
  snapshot_internal::Put(out, status);
  Send(c, out);
}

void Keeper::Impl::Greet(Connection& c, wire::Reader& frame) {
  const bool ours = frame.Int<uint32_t>() == snapshot_internal::kKeeperMagic;
  const uint32_t version = frame.Int<uint32_t>();
  const auto role = frame.Int<KeeperRole>();
  const std::string token = frame.Text(), job = frame.Text();
  absl::Status refused;
  if (!ours || !frame.ok() || role < KeeperRole::kKeeper || role > KeeperRole::kReader) {
    c.broken = true;  // not one of us
    return;
  }
  if (!SameToken(token, options.token)) {
    refused = absl::PermissionDeniedError(
        "the keeper has another job token (STRETTO_JOB_TOKEN); another job may use this port");
  } else if (version != snapshot_internal::kKeeperVersion ||
             (job != options.job && role != KeeperRole::kTrainer)) {
    refused = absl::FailedPreconditionError(
        absl::StrCat("this is a keeper of job ", options.job, ", version ",
                     snapshot_internal::kKeeperVersion, ", not of ", job, ", version ", version));
  } else if (role == KeeperRole::kKeeper) {
    c.node = frame.Int<int32_t>();
    const int nodes = frame.Int<int32_t>(), data = frame.Int<int32_t>(),
              parity = frame.Int<int32_t>();
    if (c.node < 1 || c.node >= layout.nodes() || options.node != 0 || nodes != layout.nodes() ||
        data != layout.data() || parity != layout.parity()) {
      refused = absl::FailedPreconditionError(
          absl::StrCat("the keeper of node ", c.node, " was started for ", nodes, " nodes with ",
                       data, " + ", parity, ", that of node ", options.node, " for ",
                       layout.nodes(), " with ", layout.data(), " + ", layout.parity()));
    }
  } else if (role == KeeperRole::kTrainer && !c.local && !FromThisMachine(c.fd)) {
    refused = absl::PermissionDeniedError(
        "trainers share memory with their keeper, so they connect from its machine");
  }
  if (!refused.ok()) {
    if (role == KeeperRole::kKeeper) LogWarning(std::string(refused.message()));
    Refuse(c, refused);
    c.broken = true;
    return;
  }
  wire::Writer ok;
  ok.Int(Kind::kOk);
  if (role == KeeperRole::kReader) {
    const auto done = std::make_shared<std::atomic<bool>>(false);
    Send(c, ok);
    auto fd = std::make_shared<net::Fd>(std::move(c.fd));
    c.broken = true;
    absl::StatusOr<std::thread> thread = StartThread("a reader of snapshots", [this, fd, done] {
      Serve(*fd);
      shutdown(fd->get(), SHUT_RDWR);  // the descriptor is closed where the thread is joined
      *done = true;
    });
    if (thread.ok()) servers.push_back({*std::move(thread), fd, done});
    return;
  }
  if (role == KeeperRole::kKeeper) {
    // The old one's end is told before the new one's beginning.
    if (Connection* const old = PeerOf(c.node); old != nullptr) {
      old->broken = true;
      old->role.reset();
      protocol.Disconnected(c.node);
      ForgetSpiller(c.node);
    }
  }
  c.role = role;
  if (role == KeeperRole::kTrainer) {
    ok.Text(options.job).Int(static_cast<int32_t>(options.node));
    ok.Int(static_cast<int32_t>(layout.nodes()));
  }
  Send(c, ok);
  if (role == KeeperRole::kKeeper) {
    LogInfo(absl::StrCat("the keeper of node ", c.node, " has come"));
    protocol.Connected(c.node);
    Act();
  }
}

void Keeper::Impl::Handle(Connection& c, wire::Reader& frame) {
  const auto kind = frame.Int<Kind>();
  if (!c.role) {
    if (kind != Kind::kHello) {
      c.broken = true;
    } else {
      Greet(c, frame);
    }
    return;
  }
  if (*c.role == KeeperRole::kTrainer) {
    HandleTrainer(c, kind, frame);
    return;
  }
  switch (kind) {
    case Kind::kHeartbeat:
      return;
    case Kind::kCommit: {
      const CommitMessage message = snapshot_internal::GetCommit(frame);
      if (!frame.ok()) {
        c.broken = true;
        return;
      }
      if (message.kind == CommitMessage::Kind::kCommitted) Tell("commit", message.slots[0].id);
      protocol.Receive(c.node, message);
      Act();
      return;
    }
    case Kind::kSpill: {
      const SnapshotId id = snapshot_internal::GetId(frame);
      if (frame.ok()) SpillMine(id);
      return;
    }
    case Kind::kSpilled:
      Spilled(c.node, frame);
      return;
    default:
      c.broken = true;
  }
}

// Reads of other keepers and of trainers elsewhere, until they leave.
void Keeper::Impl::Serve(const net::Fd& fd) {
  std::string frame;
  while (!stop) {
    pollfd wait = {fd.get(), POLLIN, 0};
    if (poll(&wait, 1, 200) == 0) continue;
    uint32_t length = 0;
    const net::Deadline deadline = net::After(kRequestTimeout);
    if (!net::ReceiveAll(fd, &length, sizeof(length), deadline).ok() || length > kMostHello) return;
    frame.resize(length);
    if (!net::ReceiveAll(fd, frame.data(), length, deadline).ok()) return;
    wire::Reader in(frame.data(), frame.size());
    if (in.Int<Kind>() != Kind::kRead) return;
    const SnapshotId id = snapshot_internal::GetId(in);
    const auto least = in.Int<SlotState>();
    const auto what = in.Int<int32_t>();
    const auto offset = in.Int<int64_t>(), size = in.Int<int64_t>();
    if (!in.ok() || size < 0 || size > snapshot_internal::kMostReadBytes) return;
    if (!Answer(fd, id, least, what, offset, size).ok()) return;
  }
}

// Sent from where it lies; whether it counts is said behind it.
absl::Status Keeper::Impl::Answer(const net::Fd& fd, const SnapshotId& id, SlotState least,
                                  int32_t what, int64_t offset, int64_t size) {
  const auto verdict = [&](const absl::Status& read, net::Deadline deadline) {
    if (absl::IsDataLoss(read)) {
      Post([this, id, told = Told(read)] { Damaged(id, told.message); });
    }
    wire::Writer out;
    out.Int(read.ok() ? Kind::kOk : Kind::kError);
    if (!read.ok()) snapshot_internal::Put(out, read);
    return snapshot_internal::SendFrame(fd, out, deadline);
  };
  absl::StatusOr<KeeperSlots::View> view;
  absl::Status sound;
  const bool soundness = what == snapshot_internal::kSoundness;
  if (soundness) {
    sound = slots->VerifyHeld(id);
  } else {
    view = slots->Look(id, least, what, offset, size);
    sound = view.status();
  }
  // Checking all may have taken longer than a request may.
  const net::Deadline deadline = net::After(kRequestTimeout);
  if (!sound.ok()) return verdict(sound, deadline);
  const auto total = static_cast<uint32_t>(sizeof(Kind) + (soundness ? 0 : size));
  char head[sizeof(total) + sizeof(Kind)];
  std::memcpy(head, &total, sizeof(total));
  head[sizeof(total)] = static_cast<char>(Kind::kOk);
  STRETTO_RETURN_IF_ERROR(net::SendAll(fd, head, sizeof(head), deadline));
  if (soundness) return verdict(sound, deadline);
  static const std::vector<std::byte> zeros(65536);
  for (KeeperSlots::Span span : view->spans) {
    while (span.bytes > 0) {
      const int64_t bytes = span.data != nullptr
                                ? span.bytes
                                : std::min(span.bytes, static_cast<int64_t>(zeros.size()));
      const absl::Status sent = net::SendAll(fd, span.data != nullptr ? span.data : zeros.data(),
                                             static_cast<size_t>(bytes), deadline);
      if (!sent.ok()) {
        // Memory that was cut short just now cannot be sent.
        if (const absl::Status held = slots->StillHeld(*view); absl::IsDataLoss(held)) {
          Post([this, id, told = Told(held)] { Damaged(id, told.message); });
        }
        return sent;
      }
      span.bytes -= bytes;
    }
  }
  return verdict(slots->StillHeld(*view), deadline);
}

Keeper::Impl::Connection* Keeper::Impl::PeerOf(int node) {
  for (Connection& c : connections) {
    if (c.role == KeeperRole::kKeeper && c.node == node && !c.broken) return &c;
  }
  return nullptr;
}

void Keeper::Impl::Remove(std::list<Connection>::iterator c) {
  const std::optional<KeeperRole> role = c->role;
  const int node = c->node, rank = c->rank;
  const bool current = role == KeeperRole::kTrainer && c->attempt == attempt && rank >= 0;
  connections.erase(c);
  if (role == KeeperRole::kKeeper) {
    LogWarning(absl::StrCat("the keeper of node ", node, " is gone"));
    protocol.Disconnected(node);
    ForgetSpiller(node);
  }
  if (role == KeeperRole::kTrainer && rank >= 0) {
    LetGo(rank, /*sealed=*/false);
    if (current) attached.erase(rank);
  }
  Act();
}

// Node 0 is the leader; the others find it, again and again.
void Keeper::Impl::ConnectToLeader() {
  const auto connect = [this]() -> absl::StatusOr<net::Fd> {
    STRETTO_ASSIGN_OR_RETURN(const HostPort to, ParseHostPort(options.peers[0]));
    // Short, since it is tried again at once, and an end waits for it.
    STRETTO_ASSIGN_OR_RETURN(net::Fd fd,
                             net::Connect(to.host, to.port, net::After(kConnectTimeout)));
    const net::Deadline deadline = net::After(std::chrono::seconds(2));
    wire::Writer hello = snapshot_internal::Hello(KeeperRole::kKeeper, options.token, options.job);
    hello.Int(static_cast<int32_t>(options.node)).Int(static_cast<int32_t>(layout.nodes()));
    hello.Int(static_cast<int32_t>(layout.data())).Int(static_cast<int32_t>(layout.parity()));
    STRETTO_RETURN_IF_ERROR(snapshot_internal::SendFrame(fd, hello, deadline));
    STRETTO_RETURN_IF_ERROR(snapshot_internal::ReceiveAnswer(fd, deadline).status());
    return fd;
  };
  absl::StatusOr<net::Fd> fd = connect();
  if (!fd.ok()) {
    const std::string why(fd.status().message());
    Post([this, why] {
      if (trouble != why) LogWarning(absl::StrCat("node 0's keeper: ", why));
      trouble = why;
      connecting = false;
    });
    return;
  }
  const auto shared = std::make_shared<net::Fd>(*std::move(fd));
  Post([this, shared] {
    Connection c;
    c.fd = std::move(*shared);
    c.role = KeeperRole::kKeeper;
    c.node = 0;
    Adopt(std::move(c));
    connecting = false;
  });
}

void Keeper::Impl::Adopt(Connection c) {
  c.since = c.heard = net::Clock::now();
  connections.push_back(std::move(c));
  trouble.clear();
  protocol.Connected(0);
  Act();
}

// Once a second: say that this keeper lives, and notice who does not.
void Keeper::Impl::Beat() {
  const auto now = net::Clock::now();
  for (Connection& c : connections) {
    if (!c.role && now - c.since > kHelloTimeout) c.broken = true;
    if (c.role == KeeperRole::kKeeper && now - c.heard > options.silence) c.broken = true;
  }
  if (options.node != 0 && PeerOf(0) == nullptr && !connecting &&
      now - last_connect > std::chrono::milliseconds(200)) {
    if (connector.joinable()) connector.join();
    last_connect = now;
    connecting = true;
    absl::StatusOr<std::thread> thread =
        StartThread("a keeper's connection", [this] { ConnectToLeader(); });
    if (thread.ok()) connector = *std::move(thread);
    connecting = thread.ok();
  }
  if (now - last_beat < kBeat) return;
  last_beat = now;
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = protocol.slots()[static_cast<size_t>(s)];
    if (slot.state < SlotState::kSealed) continue;
    if (const absl::Status whole = slots->Whole(s); !whole.ok()) {
      Damaged(SnapshotId(slot.id), std::string(whole.message()));
    }
  }
  for (Connection& c : connections) {
    if (c.role != KeeperRole::kKeeper) continue;
    wire::Writer beat;
    beat.Int(Kind::kHeartbeat);
    Send(c, beat);
  }
}

Keeper::Keeper(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Keeper::~Keeper() = default;

int Keeper::port() const { return impl_->port; }
absl::Status Keeper::Run() { return impl_->Loop(); }
void Keeper::Stop() {
  impl_->stop = true;
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(impl_->wake.get(), &one, sizeof(one));
}

}  // namespace stretto
