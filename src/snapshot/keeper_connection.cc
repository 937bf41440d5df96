#include "src/snapshot/keeper_connection.h"

#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "src/snapshot/keeper_wire.h"
#include "stretto/snapshot/snapshotter.h"

namespace stretto {
namespace snapshot_internal {
namespace {

// host:port, which has a colon and no slash; or a path on this machine.
absl::StatusOr<net::Fd> OpenKeeper(const std::string& where) {
  if (where.find('/') == std::string::npos && where.find(':') != std::string::npos) {
    STRETTO_ASSIGN_OR_RETURN(const HostPort to, ParseHostPort(where));
    return net::Connect(to.host, to.port, net::After(std::chrono::seconds(5)));
  }
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (where.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError("its path is too long for a socket");
  }
  std::memcpy(address.sun_path, where.c_str(), where.size());
  net::Fd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid() ||
      connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
    return absl::UnavailableError(std::strerror(errno));
  }
  return fd;
}

// Of what a keeper answers on the first message, only its refusals have other codes than these.
absl::Status Explain(const absl::Status& status, const std::string& where,
                     std::chrono::milliseconds patience) {
  const std::string what = absl::StrCat("what listens at ", where);
  switch (status.code()) {
    case absl::StatusCode::kDeadlineExceeded:
      return absl::DeadlineExceededError(
          absl::StrCat(what, " has not answered within ", patience.count() / 1000,
                       " s; is it a keeper of snapshots, and does it run?"));
    case absl::StatusCode::kUnavailable:
      return absl::UnavailableError(
          absl::StrCat(what, " hung up: ", std::string(status.message()),
                       "; name a keeper of snapshots that runs (STRETTO_KEEPER, snapshot.keeper)"));
    case absl::StatusCode::kDataLoss:
      return absl::FailedPreconditionError(absl::StrCat(
          what, " is no keeper of snapshots, for it answers something else; name the socket or ",
          "host:port of one (STRETTO_KEEPER, snapshot.keeper)"));
    default:
      return status;
  }
}

}  // namespace

absl::StatusOr<KeeperConnection> ConnectToKeeper(const std::string& where, const std::string& token,
                                                 std::chrono::milliseconds patience) {
  KeeperConnection keeper;
  absl::StatusOr<net::Fd> fd = OpenKeeper(where);
  if (!fd.ok()) {
    return absl::Status(
        fd.status().code(),
        absl::StrCat("no keeper at ", where, ": ", std::string(fd.status().message()),
                     "; start stretto-keeper, or see snapshot.keeper"));
  }
  keeper.fd = *std::move(fd);
  wire::Writer hello = Hello(KeeperRole::kTrainer, token, "");
  const absl::Status sent = SendFrame(keeper.fd, hello, net::After(patience));
  if (!sent.ok()) return Explain(sent, where, patience);
  const absl::StatusOr<std::string> answer = ReceiveAnswer(keeper.fd, net::After(patience));
  if (!answer.ok()) return Explain(answer.status(), where, patience);
  wire::Reader in = ReaderOn(*answer);
  keeper.job = in.Text();
  keeper.node = in.Int<int32_t>();
  keeper.nodes = in.Int<int32_t>();
  if (!in.ok()) return Explain(absl::DataLossError(""), where, patience);
  return keeper;
}

}  // namespace snapshot_internal

absl::StatusOr<std::string> AskKeeper(const std::string& keeper_at, const std::string& token) {
  using snapshot_internal::KeeperConnection, snapshot_internal::KeeperKind;
  constexpr std::chrono::seconds kPatience(3);  // somebody waits at a terminal
  STRETTO_ASSIGN_OR_RETURN(const KeeperConnection keeper,
                           snapshot_internal::ConnectToKeeper(keeper_at, token, kPatience));
  wire::Writer out;
  out.Int(KeeperKind::kStatus);
  STRETTO_RETURN_IF_ERROR(snapshot_internal::SendFrame(keeper.fd, out, net::After(kPatience)));
  const absl::StatusOr<std::string> answer =
      snapshot_internal::ReceiveAnswer(keeper.fd, net::After(kPatience));
  if (!answer.ok()) return snapshot_internal::Explain(answer.status(), keeper_at, kPatience);
  wire::Reader in = snapshot_internal::ReaderOn(*answer);
  std::string text = in.Text();
  if (!in.ok()) return snapshot_internal::Explain(absl::DataLossError(""), keeper_at, kPatience);
  return text;
}

int64_t CommittedStep(const std::string& keeper_state) {
  int64_t newest = -1;
  for (const absl::string_view line : absl::StrSplit(keeper_state, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, ' ');
    int64_t step = -1;
    if (words.size() > 4 && words[0] == "slot" && words[2] == Name(SlotState::kCommitted) &&
        absl::SimpleAtoi(words[4], &step)) {
      newest = std::max(newest, step);
    }
  }
  return newest;
}

}  // namespace stretto
