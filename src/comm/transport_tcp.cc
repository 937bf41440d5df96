#include "src/comm/transport_tcp.h"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr int64_t kEagerBytes = 64 << 10;
constexpr std::size_t kInputBytes = 64 << 10;
constexpr int64_t kReadRound = 4 << 20;  // bytes read from one peer before others get their turn
constexpr uint32_t kMagic = 0x4d525453;  // "STRM"

enum Kind : uint32_t { kEager = 1, kOffer, kAccept, kData };

struct Greeting {
  uint32_t magic;
  int32_t rank;
  char token[64];
};

Greeting Greet(int rank, const std::string& token) {
  Greeting g = {};
  g.magic = kMagic;
  g.rank = rank;
  std::memcpy(g.token, token.data(), std::min(token.size(), sizeof(g.token)));
  return g;
}

}  // namespace

struct TcpTransport::Header {
  uint32_t magic = kMagic;
  uint32_t kind = kEager;
  int32_t tag = 0;
  int32_t sender = -1;    // the sender's request: offer, accept
  int32_t receiver = -1;  // the receiver's request: accept, data
  int32_t unused = 0;
  int64_t bytes = 0;
};

struct TcpTransport::Slot {
  enum State : uint8_t { kFree, kPending, kDone };
  State state = kFree;
  bool receives = false;
  char* data = nullptr;
  int64_t bytes = 0;
  int peer = 0;
  int tag = 0;
};

struct TcpTransport::Peer {
  struct Outgoing {
    Header header;
    const char* payload = nullptr;
    int64_t bytes = 0;  // of the payload
    int64_t sent = 0;   // of header and payload
    Request done = -1;  // completes when all is sent
  };
  // A message without a receive so far: its data, or an offer of them.
  struct Early {
    int tag = 0;
    int64_t bytes = 0;
    int32_t sender = -1;  // >= 0: an offer
    std::vector<char> data;
  };
  int rank = 0;
  net::Fd fd;
  absl::Status error;
  std::vector<Outgoing> out;
  std::size_t out_head = 0;
  std::vector<Request> receives;  // posted and unmatched, in order
  std::vector<Early> early;

  std::vector<char> in = std::vector<char>(kInputBytes);
  std::size_t in_begin = 0;
  std::size_t in_end = 0;
  // The payload being read: into a request's buffer, or an early message's.
  char* payload = nullptr;
  int64_t payload_left = 0;
  Request payload_request = -1;
  bool payload_early = false;
  Early arriving;
};

TcpTransport::TcpTransport(int rank, int size) : rank_(rank), size_(size) {}
TcpTransport::~TcpTransport() = default;

absl::StatusOr<std::unique_ptr<TcpTransport>> TcpTransport::Connect(
    Store& store, int rank, int size, const std::string& bind_address,
    const std::string& advertised_address, const std::string& job_token, net::Deadline deadline) {
  std::unique_ptr<TcpTransport> t(new TcpTransport(rank, size));
  t->poll_ = net::Fd(epoll_create1(EPOLL_CLOEXEC));
  for (int r = 0; r < size; ++r) {
    t->peers_.push_back(std::make_unique<Peer>());
    t->peers_.back()->rank = r;
  }
  int port = 0;
  STRETTO_ASSIGN_OR_RETURN(net::Fd listener, net::Listen(bind_address, 0, &port));
  STRETTO_RETURN_IF_ERROR(
      store.Set(absl::StrCat("tcp/", rank), absl::StrCat(port, " ", advertised_address)));

  // Lower ranks are called, higher ranks call. A call completes without the other side's help (the
  // kernel's backlog takes it), so the order cannot deadlock.
  const Greeting mine = Greet(rank, job_token);
  for (int r = 0; r < rank; ++r) {
    const std::chrono::milliseconds left(net::PollTimeout(deadline, 1 << 30) + 1);
    absl::StatusOr<std::string> address = store.Get(absl::StrCat("tcp/", r), left);
    if (!address.ok()) {
      return absl::Status(
          address.status().code(),
          absl::StrCat("rank ", r, " did not publish its address for TCP messages: ",
                       std::string(address.status().message())));
    }
    const std::size_t space = address->find(' ');
    int peer_port = 0;
    if (space == std::string::npos ||
        !absl::SimpleAtoi(address->substr(0, space).c_str(), &peer_port)) {
      return absl::InternalError(absl::StrCat("rank ", r, " published a malformed address"));
    }
    Peer& peer = *t->peers_[static_cast<std::size_t>(r)];
    STRETTO_ASSIGN_OR_RETURN(peer.fd,
                             net::Connect(address->substr(space + 1), peer_port, deadline));
    STRETTO_RETURN_IF_ERROR(net::SendAll(peer.fd, &mine, sizeof(mine), deadline));
  }
  for (int missing = size - 1 - rank; missing > 0;) {
    if (net::Clock::now() >= deadline) {
      std::string ranks;
      for (int r = rank + 1; r < size; ++r) {
        if (!t->peers_[static_cast<std::size_t>(r)]->fd.valid()) absl::StrAppend(&ranks, " ", r);
      }
      return absl::DeadlineExceededError(
          absl::StrCat("no TCP connection came to rank ", rank, " from rank(s)", ranks,
                       "; check that they run and that no firewall is between"));
    }
    pollfd wait = {listener.get(), POLLIN, 0};
    poll(&wait, 1, net::PollTimeout(deadline, 500));
    net::Fd fd = net::Accept(listener);
    if (!fd.valid()) continue;
    Greeting theirs = {};
    const absl::Status got = net::ReceiveAll(
        fd, &theirs, sizeof(theirs), std::min(deadline, net::After(std::chrono::seconds(5))));
    const Greeting expected = Greet(theirs.rank, job_token);
    // Strangers are dropped without a word.
    if (!got.ok() || theirs.rank <= rank || theirs.rank >= size ||
        std::memcmp(&theirs, &expected, sizeof(theirs)) != 0) {
      continue;
    }
    Peer& peer = *t->peers_[static_cast<std::size_t>(theirs.rank)];
    if (peer.fd.valid()) continue;
    peer.fd = std::move(fd);
    --missing;
  }
  for (std::unique_ptr<Peer>& peer : t->peers_) {
    if (!peer->fd.valid()) continue;
    epoll_event event = {};
    event.events = EPOLLIN;
    event.data.ptr = peer.get();
    if (epoll_ctl(t->poll_.get(), EPOLL_CTL_ADD, peer->fd.get(), &event) != 0) {
      return absl::ResourceExhaustedError(absl::StrCat("cannot watch the connection to rank ",
                                                       peer->rank, ": ", std::strerror(errno)));
    }
  }
  return t;
}

absl::Status TcpTransport::CheckPeer(int peer) const {
  if (peer < 0 || peer >= size_) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", peer, " is outside a world of ", size_, " ranks"));
  }
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  return peers_[static_cast<std::size_t>(peer)]->error;
}

Transport::Request TcpTransport::NewSlot(char* data, int64_t bytes, int peer, int tag,
                                         bool receives) {
  if (free_.empty()) {
    free_.push_back(static_cast<Request>(slots_.size()));
    slots_.emplace_back();
  }
  const Request request = free_.back();
  free_.pop_back();
  slots_[static_cast<std::size_t>(request)] = {Slot::kPending, receives, data, bytes, peer, tag};
  return request;
}

absl::StatusOr<Transport::Request> TcpTransport::Send(const void* data, int64_t bytes, int peer,
                                                      int tag) {
  STRETTO_RETURN_IF_ERROR(CheckPeer(peer));
  bytes_sent_ += bytes;
  char* source = static_cast<char*>(const_cast<void*>(data));
  const Request request = NewSlot(source, bytes, peer, tag, false);
  if (peer == rank_) {
    LoopBack(request);
    return request;
  }
  Header header;
  header.tag = tag;
  header.bytes = bytes;
  Peer& p = *peers_[static_cast<std::size_t>(peer)];
  if (bytes <= kEagerBytes) {
    Queue(p, header, source, bytes, request);
  } else {
    header.kind = kOffer;
    header.sender = request;
    Queue(p, header, nullptr, 0, -1);
  }
  return request;
}

absl::StatusOr<Transport::Request> TcpTransport::Receive(void* data, int64_t bytes, int peer,
                                                         int tag) {
  if (absl::Status broken = CheckPeer(peer); !broken.ok()) {
    // What the peer sent whole before its connection ended still counts: it may have finished.
    const bool here = !abandoned_ && peer >= 0 && peer < size_ &&
                      HasWhole(*peers_[static_cast<std::size_t>(peer)], tag);
    if (!here) return broken;
  }
  const Request request = NewSlot(static_cast<char*>(data), bytes, peer, tag, true);
  if (peer == rank_) {
    LoopBack(request);
    return request;
  }
  Peer& p = *peers_[static_cast<std::size_t>(peer)];
  for (auto i = p.early.begin(); i != p.early.end(); ++i) {
    if (i->tag != tag) continue;
    Slot& slot = slots_[static_cast<std::size_t>(request)];
    if (!SizesAgree(p, slot, i->bytes)) return request;
    if (i->sender >= 0) {
      Header header;
      header.kind = kAccept;
      header.tag = tag;
      header.sender = i->sender;
      header.receiver = request;
      header.bytes = bytes;
      Queue(p, header, nullptr, 0, -1);
    } else {
      if (bytes > 0) std::memcpy(data, i->data.data(), static_cast<std::size_t>(bytes));
      slot.state = Slot::kDone;
      idle_buffers_.push_back(std::move(i->data));
    }
    p.early.erase(i);
    return request;
  }
  p.receives.push_back(request);
  return request;
}

bool TcpTransport::HasWhole(const Peer& peer, int tag) {
  for (const Peer::Early& early : peer.early) {
    if (early.tag == tag) return early.sender < 0;  // the first that matches, and no mere offer
  }
  return false;
}

void TcpTransport::LoopBack(Request request) {
  Slot& mine = slots_[static_cast<std::size_t>(request)];
  for (auto i = self_.begin(); i != self_.end(); ++i) {
    Slot& other = slots_[static_cast<std::size_t>(*i)];
    if (other.tag != mine.tag || other.receives == mine.receives) continue;
    Peer& self = *peers_[static_cast<std::size_t>(rank_)];
    if (SizesAgree(self, mine.receives ? mine : other, mine.receives ? other.bytes : mine.bytes)) {
      if (mine.bytes > 0) {
        std::memcpy(mine.receives ? mine.data : other.data, mine.receives ? other.data : mine.data,
                    static_cast<std::size_t>(mine.bytes));
      }
      mine.state = other.state = Slot::kDone;
    }
    self_.erase(i);
    return;
  }
  self_.push_back(request);
}

bool TcpTransport::SizesAgree(Peer& peer, const Slot& slot, int64_t bytes) {
  if (slot.bytes == bytes) return true;
  Break(peer, absl::InternalError(absl::StrCat(
                  "rank ", peer.rank, " sent ", bytes, " bytes where the receive has ", slot.bytes,
                  " (tag ", slot.tag, "); the ranks disagree on the size of the operation")));
  return false;
}

void TcpTransport::Break(Peer& peer, absl::Status why) {
  if (peer.error.ok()) peer.error = std::move(why);
  if (peer.fd.valid()) epoll_ctl(poll_.get(), EPOLL_CTL_DEL, peer.fd.get(), nullptr);
  peer.fd.Close();
  peer.out.clear();
  peer.out_head = 0;
}

void TcpTransport::Queue(Peer& peer, const Header& header, const char* payload, int64_t bytes,
                         Request done) {
  peer.out.push_back({header, payload, bytes, 0, done});
  Flush(peer);
}

void TcpTransport::Flush(Peer& peer) {
  constexpr int64_t kHeader = sizeof(Header);
  while (peer.out_head < peer.out.size() && peer.fd.valid()) {
    Peer::Outgoing& o = peer.out[peer.out_head];
    iovec parts[2];
    int count = 0;
    if (o.sent < kHeader) {
      parts[count++] = {reinterpret_cast<char*>(&o.header) + o.sent,
                        static_cast<std::size_t>(kHeader - o.sent)};
    }
    const int64_t payload_sent = std::max<int64_t>(0, o.sent - kHeader);
    if (payload_sent < o.bytes) {
      parts[count++] = {const_cast<char*>(o.payload) + payload_sent,
                        static_cast<std::size_t>(o.bytes - payload_sent)};
    }
    msghdr message = {};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<std::size_t>(count);
    const ssize_t sent = sendmsg(peer.fd.get(), &message, MSG_NOSIGNAL);
    if (sent < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        Break(peer, absl::UnavailableError(absl::StrCat("the connection to rank ", peer.rank,
                                                        " broke: ", std::strerror(errno))));
      }
      return;
    }
    o.sent += sent;
    if (o.sent < kHeader + o.bytes) return;
    if (o.done >= 0) slots_[static_cast<std::size_t>(o.done)].state = Slot::kDone;
    ++peer.out_head;
    if (peer.out_head == peer.out.size()) {
      peer.out.clear();
      peer.out_head = 0;
    } else if (peer.out_head >= 64) {
      peer.out.erase(peer.out.begin(),
                     peer.out.begin() + static_cast<std::ptrdiff_t>(peer.out_head));
      peer.out_head = 0;
    }
  }
}

void TcpTransport::OnHeader(Peer& peer, const Header& header) {
  const auto find_receive = [&]() -> Request {
    for (auto i = peer.receives.begin(); i != peer.receives.end(); ++i) {
      if (slots_[static_cast<std::size_t>(*i)].tag != header.tag) continue;
      const Request request = *i;
      peer.receives.erase(i);
      return request;
    }
    return -1;
  };
  const auto known = [&](int32_t request, bool receives) {
    return request >= 0 && request < static_cast<int32_t>(slots_.size()) &&
           slots_[static_cast<std::size_t>(request)].state == Slot::kPending &&
           slots_[static_cast<std::size_t>(request)].peer == peer.rank &&
           slots_[static_cast<std::size_t>(request)].receives == receives &&
           slots_[static_cast<std::size_t>(request)].bytes == header.bytes;
  };
  if (header.magic == kMagic && header.bytes >= 0) {
    switch (header.kind) {
      case kEager: {
        if (header.bytes > kEagerBytes) break;
        const Request request = find_receive();
        peer.payload_left = header.bytes;
        if (request >= 0) {
          Slot& slot = slots_[static_cast<std::size_t>(request)];
          if (!SizesAgree(peer, slot, header.bytes)) return;
          peer.payload_request = request;
          peer.payload_early = false;
          peer.payload = slot.data;
        } else {
          Peer::Early& early = peer.arriving;
          early.tag = header.tag;
          early.bytes = header.bytes;
          early.sender = -1;
          if (!idle_buffers_.empty()) {
            early.data = std::move(idle_buffers_.back());
            idle_buffers_.pop_back();
          } else {
            early.data.reserve(static_cast<std::size_t>(kEagerBytes));
          }
          early.data.resize(static_cast<std::size_t>(header.bytes));
          peer.payload_request = -1;
          peer.payload_early = true;
          peer.payload = early.data.data();
        }
        if (peer.payload_left == 0) OnPayload(peer);
        return;
      }
      case kOffer: {
        const Request request = find_receive();
        if (request < 0) {
          peer.early.push_back({header.tag, header.bytes, header.sender, {}});
          return;
        }
        if (!SizesAgree(peer, slots_[static_cast<std::size_t>(request)], header.bytes)) return;
        Header accept = header;
        accept.kind = kAccept;
        accept.receiver = request;
        Queue(peer, accept, nullptr, 0, -1);
        return;
      }
      case kAccept: {
        if (!known(header.sender, false)) break;
        Header data = header;
        data.kind = kData;
        Queue(peer, data, slots_[static_cast<std::size_t>(header.sender)].data, header.bytes,
              header.sender);
        return;
      }
      case kData: {
        if (!known(header.receiver, true)) break;
        peer.payload = slots_[static_cast<std::size_t>(header.receiver)].data;
        peer.payload_left = header.bytes;
        peer.payload_request = header.receiver;
        peer.payload_early = false;
        return;
      }
      default:
        break;
    }
  }
  Break(peer,
        absl::InternalError(absl::StrCat("rank ", peer.rank, " sent a malformed message header")));
}

void TcpTransport::OnPayload(Peer& peer) {
  if (!peer.payload_early) {
    slots_[static_cast<std::size_t>(peer.payload_request)].state = Slot::kDone;
    peer.payload_request = -1;
    return;
  }
  peer.payload_early = false;
  // The receive may have been posted while the data came in.
  for (auto i = peer.receives.begin(); i != peer.receives.end(); ++i) {
    Slot& slot = slots_[static_cast<std::size_t>(*i)];
    if (slot.tag != peer.arriving.tag) continue;
    if (!SizesAgree(peer, slot, peer.arriving.bytes)) return;
    if (slot.bytes > 0) {
      std::memcpy(slot.data, peer.arriving.data.data(), static_cast<std::size_t>(slot.bytes));
    }
    slot.state = Slot::kDone;
    peer.receives.erase(i);
    idle_buffers_.push_back(std::move(peer.arriving.data));
    return;
  }
  peer.early.push_back(std::move(peer.arriving));
}

void TcpTransport::ReadFrom(Peer& peer) {
  int64_t round = 0;
  while (peer.fd.valid()) {
    // What is in the input buffer first, always: nothing would wake us for it later.
    while (peer.in_begin < peer.in_end && peer.fd.valid()) {
      const std::size_t have = peer.in_end - peer.in_begin;
      if (peer.payload_left > 0) {
        const std::size_t n =
            std::min<std::size_t>(have, static_cast<std::size_t>(peer.payload_left));
        std::memcpy(peer.payload, peer.in.data() + peer.in_begin, n);
        peer.payload += n;
        peer.payload_left -= static_cast<int64_t>(n);
        peer.in_begin += n;
        if (peer.payload_left == 0) OnPayload(peer);
        continue;
      }
      if (have < sizeof(Header)) break;
      Header header;
      std::memcpy(&header, peer.in.data() + peer.in_begin, sizeof(header));
      peer.in_begin += sizeof(header);
      OnHeader(peer, header);
    }
    if (!peer.fd.valid() || round >= kReadRound) return;
    // Then more: long payloads go straight to their place.
    const bool direct =
        peer.in_begin == peer.in_end && peer.payload_left >= static_cast<int64_t>(kInputBytes);
    if (!direct && peer.in_begin > 0) {
      std::memmove(peer.in.data(), peer.in.data() + peer.in_begin, peer.in_end - peer.in_begin);
      peer.in_end -= peer.in_begin;
      peer.in_begin = 0;
    }
    char* to = direct ? peer.payload : peer.in.data() + peer.in_end;
    const std::size_t room =
        direct ? static_cast<std::size_t>(peer.payload_left) : peer.in.size() - peer.in_end;
    const ssize_t got = recv(peer.fd.get(), to, room, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (got <= 0) {
      Break(peer, absl::UnavailableError(absl::StrCat(
                      "rank ", peer.rank, " closed its connection",
                      got < 0 ? absl::StrCat(" (", std::strerror(errno), ")") : std::string())));
      return;
    }
    round += got;
    if (direct) {
      peer.payload += got;
      peer.payload_left -= got;
      if (peer.payload_left == 0) OnPayload(peer);
    } else {
      peer.in_end += static_cast<std::size_t>(got);
    }
  }
}

void TcpTransport::Progress() {
  for (std::unique_ptr<Peer>& peer : peers_) {
    if (peer->out_head < peer->out.size()) Flush(*peer);
  }
  epoll_event events[64];
  const int count = epoll_wait(poll_.get(), events, 64, 0);
  for (int i = 0; i < count; ++i) ReadFrom(*static_cast<Peer*>(events[i].data.ptr));
}

absl::StatusOr<bool> TcpTransport::Test(Request request) {
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  if (slots_[static_cast<std::size_t>(request)].state == Slot::kPending) Progress();
  Slot& slot = slots_[static_cast<std::size_t>(request)];
  if (slot.state == Slot::kDone) {
    slot.state = Slot::kFree;
    free_.push_back(request);
    return true;
  }
  STRETTO_RETURN_IF_ERROR(peers_[static_cast<std::size_t>(slot.peer)]->error);
  return false;
}

void TcpTransport::Abandon() {
  if (abandoned_) return;
  abandoned_ = true;
  for (std::unique_ptr<Peer>& peer : peers_) {
    Break(*peer, absl::FailedPreconditionError("the transport was given up after an error"));
    peer->receives.clear();
    peer->early.clear();
  }
  self_.clear();
}

}  // namespace stretto
