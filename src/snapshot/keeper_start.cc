// How a keeper begins: its options, the node's place, its sockets and its memory.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/snapshot/file_io.h"
#include "src/snapshot/keeper_impl.h"

namespace stretto {

using snapshot_internal::HostPort;
using snapshot_internal::IoError;
using snapshot_internal::KeeperSlots;
using snapshot_internal::KeeperWork;
using snapshot_internal::ParseHostPort;
using snapshot_internal::PlaceLock;

namespace {

absl::Status CheckOptions(const KeeperOptions& o) {
  const bool name =
      !o.job.empty() && o.job.size() <= 64 && o.job[0] != '.' &&
      std::all_of(o.job.begin(), o.job.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '_' || c == '-';
      });
  if (!name) {
    return absl::InvalidArgumentError(
        absl::StrCat("the job \"", o.job, "\" must be 1 to 64 letters, digits, '.', '_' and '-'"));
  }
  if (o.nodes < 1 || o.node < 0 || o.node >= o.nodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("node ", o.node, " is not one of ", o.nodes, " nodes"));
  }
  // A single node needs none, but may be told where to listen.
  if (static_cast<int>(o.peers.size()) != o.nodes && !(o.nodes == 1 && o.peers.empty())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "there are ", o.nodes, " nodes and ", o.peers.size(), " peers; name host:port of all"));
  }
  std::set<std::string> addresses;
  for (const std::string& peer : o.peers) {
    STRETTO_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(peer));
    if (o.nodes == 1) continue;
    if (address.port == 0 || !addresses.insert(peer).second) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the peers have ", peer, address.port == 0 ? " with a port that nobody knows" : " twice",
          "; give each node's keeper an address of its own"));
    }
  }
  if (o.token.empty()) {
    return absl::InvalidArgumentError(
        "a keeper needs a job token (STRETTO_JOB_TOKEN), so that strangers are turned away");
  }
  return absl::OkStatus();
}

// Finds out at the start, not when the first snapshot is to be written.
absl::Status CheckDirectory(const std::string& directory) {
  if (directory.empty()) return absl::OkStatus();
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  std::string probe = directory + "/.keeper-XXXXXX";
  const int fd = error ? -1 : mkstemp(probe.data());
  const std::string reason = error ? error.message() : std::strerror(errno);
  if (fd < 0) {
    return absl::InvalidArgumentError(absl::StrCat("snapshots cannot be written to ", directory,
                                                   ": ", reason,
                                                   "; give the keeper another directory, or none"));
  }
  close(fd);
  unlink(probe.c_str());
  return absl::OkStatus();
}

// Where trainers of this user connect.
absl::StatusOr<net::Fd> ListenLocally(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("the socket's path ", path, " is longer than ",
                                                   sizeof(address.sun_path) - 1,
                                                   " characters; choose a shorter one"));
  }
  std::memcpy(address.sun_path, path.c_str(), path.size());
  net::Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // Of a keeper that was killed. Anything else stays, and is in the way.
  struct stat what = {};
  if (lstat(path.c_str(), &what) == 0) {
    if (!S_ISSOCK(what.st_mode)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, " exists and is no socket; choose another place for the keeper's"));
    }
    unlink(path.c_str());
  }
  const mode_t before = umask(0177);
  const bool bound = fd.valid() &&
                     bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 &&
                     listen(fd.get(), 1024) == 0;
  const int error = errno;
  umask(before);
  if (!bound) return IoError(error, "listen at", path);
  return fd;
}

}  // namespace

// Who has it removes the file at its end, still holding the lock, so another one may have opened
// the removed file and lock that, while a third locks a new one: only the lock on the file that has
// the name counts. Who has that knows that the name is its own until it removes it.
absl::StatusOr<PlaceLock> snapshot_internal::PlaceLock::Take(const KeeperOptions& o,
                                                             const std::string& socket) {
  const std::string path = socket + ".lock";
  while (true) {
    net::Fd lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    if (!lock.valid()) {
      return absl::InvalidArgumentError(
          absl::StrCat("a keeper needs ", path, ": ", std::strerror(errno),
                       "; make that folder writable, or give another --socket"));
    }
    if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
      return absl::AlreadyExistsError(absl::StrCat("a keeper of job ", o.job, ", node ", o.node,
                                                   " runs already (", path, " is locked)"));
    }
    struct stat locked = {}, named = {};
    if (fstat(lock.get(), &locked) == 0 && stat(path.c_str(), &named) == 0 &&
        locked.st_ino == named.st_ino && locked.st_dev == named.st_dev) {
      PlaceLock taken;
      taken.fd_ = std::move(lock);
      taken.path_ = path;
      return taken;
    }
  }
}

snapshot_internal::PlaceLock::~PlaceLock() {
  if (fd_.valid()) unlink(path_.c_str());
}

std::string KeeperSocketPath(const std::string& job, int node) {
  return absl::StrCat("/tmp/stretto-", getuid(), "/", job, "-", node, ".sock");
}

absl::Status Keeper::Impl::Start(const ErasureCode& code) {
  STRETTO_RETURN_IF_ERROR(CheckDirectory(options.directory));
  // Of the node's memory, wherever the socket is.
  const std::string usual = KeeperSocketPath(options.job, options.node);
  const std::string directory = std::filesystem::path(usual).parent_path().string();
  struct stat info = {};
  mkdir(directory.c_str(), 0700);
  if (lstat(directory.c_str(), &info) != 0 || !S_ISDIR(info.st_mode) || info.st_uid != getuid() ||
      (info.st_mode & 0077) != 0) {
    return absl::PermissionDeniedError(
        absl::StrCat(directory, " must be a directory that only this user can enter; remove it"));
  }
  STRETTO_ASSIGN_OR_RETURN(lock, PlaceLock::Take(options, usual));
  if (options.socket.empty()) options.socket = usual;
  if (options.socket != usual) {
    STRETTO_ASSIGN_OR_RETURN(socket_lock, PlaceLock::Take(options, options.socket));
  }
  HostPort mine{"127.0.0.1", 0};
  if (!options.peers.empty()) {
    STRETTO_ASSIGN_OR_RETURN(mine, ParseHostPort(options.peers[options.node]));
  }
  // A node may be known to others under an address that it cannot bind.
  const std::string bind = net::IsLoopback(mine.host) ? mine.host : "0.0.0.0";
  STRETTO_ASSIGN_OR_RETURN(tcp, net::Listen(bind, mine.port, &port));
  if (options.peers.empty()) options.peers = {absl::StrCat(mine.host, ":", port)};
  options.peers[options.node] = absl::StrCat(mine.host, ":", port);
  STRETTO_ASSIGN_OR_RETURN(unix_socket, ListenLocally(options.socket));
  wake = net::Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!wake.valid()) return absl::ResourceExhaustedError("cannot create an event descriptor");
  if (options.nodes == 1) {
    // Nobody else has what a killed one has left.
    NodeSlots held;
    slots = KeeperSlots::Adopt(options.job, options.node, &budget, options.threads, &held);
    protocol = CommitProtocol(options.node, layout, std::move(held));
  } else {
    slots = std::make_unique<KeeperSlots>(options.job, options.node, &budget, options.threads);
  }
  work = std::make_unique<KeeperWork>(
      KeeperWork::Options{options.node, options.peers, options.token, options.job, options.threads},
      layout, code, slots.get(),
      [this](const KeeperWork::Task& task) { Tell(task.rebuild ? "rebuild" : "encode", task.id); },
      [this](const KeeperWork::Task& task, const absl::Status& status) {
        Post([this, task, ended = Told(status)] { Done(task, ended.status()); });
      });
  STRETTO_RETURN_IF_ERROR(work->Start());
  protocol.Start();
  Act();
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Keeper>> Keeper::Start(KeeperOptions options) {
  STRETTO_RETURN_IF_ERROR(CheckOptions(options));
  if (options.parity < 0) options.parity = options.nodes > 1 ? 1 : 0;
  if (options.data < 0) options.data = options.parity == 0 ? 1 : options.nodes - options.parity;
  STRETTO_ASSIGN_OR_RETURN(const ParityLayout layout,
                           ParityLayout::Create(options.nodes, options.data, options.parity));
  STRETTO_ASSIGN_OR_RETURN(const ErasureCode code,
                           ErasureCode::Create(options.data, options.parity));
  auto impl = std::make_unique<Impl>(std::move(options), layout);
  STRETTO_RETURN_IF_ERROR(impl->Start(code));
  return std::unique_ptr<Keeper>(new Keeper(std::move(impl)));
}

}  // namespace stretto
