#include "src/snapshot/keeper_wire.h"

#include <sys/socket.h>

#include <cstring>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace stretto::snapshot_internal {
namespace {

// How long one answer of a keeper may take.
constexpr auto kPatience = std::chrono::seconds(30);
constexpr uint32_t kMostManifests = 1 << 16;

void PutTexts(wire::Writer& out, const std::vector<std::string>& texts) {
  out.Int(static_cast<uint32_t>(texts.size()));
  for (const std::string& text : texts) out.Text(text);
}
std::vector<std::string> GetTexts(wire::Reader& in) {
  std::vector<std::string> texts;
  const uint32_t count = in.Int<uint32_t>();
  for (uint32_t i = 0; i < count && i < kMostManifests && in.ok(); ++i) texts.push_back(in.Text());
  return texts;
}

}  // namespace

std::string Encode(const NodeManifest& manifest) {
  wire::Writer out;
  out.Int(static_cast<uint32_t>(manifest.ranks.size()));
  for (const RankPart& part : manifest.ranks) {
    out.Int(part.rank).Int(part.world_size).Int(part.layout).Int(part.payload_bytes);
    out.Int(part.contents_bytes).Int(part.contents_checksum);
  }
  return out.Frame().substr(sizeof(uint32_t));
}

absl::StatusOr<NodeManifest> DecodeManifest(const std::string& text) {
  wire::Reader in(text.data(), text.size());
  NodeManifest manifest;
  int64_t left = int64_t{1} << 50;  // so that no sum of sizes overflows
  const uint32_t count = in.Int<uint32_t>();
  bool sound = true;
  for (uint32_t i = 0; i < count && in.ok() && sound; ++i) {
    RankPart part;
    part.rank = in.Int<int32_t>();
    part.world_size = in.Int<int32_t>();
    part.layout = in.Int<uint64_t>();
    part.payload_bytes = in.Int<int64_t>();
    part.contents_bytes = in.Int<int64_t>();
    part.contents_checksum = in.Int<uint64_t>();
    sound = part.contents_bytes >= 0 && part.contents_bytes <= part.payload_bytes &&
            part.payload_bytes <= left;
    left -= part.payload_bytes + 64;
    manifest.ranks.push_back(part);
  }
  if (!in.ok() || !sound) return absl::DataLossError("a keeper sent a malformed manifest");
  return manifest;
}

void Put(wire::Writer& out, const SnapshotId& id) { out.Int(id.round).Int(id.epoch); }
SnapshotId GetId(wire::Reader& in) {
  SnapshotId id;
  id.round = in.Int<int64_t>();
  id.epoch = in.Int<int64_t>();
  return id;
}

void Put(wire::Writer& out, const CommitMessage& message) {
  out.Int(message.kind).Int(message.round.number).Int(message.round.attempt);
  out.Int(static_cast<uint8_t>(message.lost));
  for (const SlotRecord& slot : message.slots) {
    out.Int(slot.state);
    Put(out, slot.id);
    PutTexts(out, slot.manifests);
  }
}
CommitMessage GetCommit(wire::Reader& in) {
  CommitMessage message;
  message.kind = in.Int<CommitMessage::Kind>();
  message.round.number = in.Int<int64_t>();
  message.round.attempt = in.Int<uint64_t>();
  message.lost = in.Int<uint8_t>() != 0;
  for (SlotRecord& slot : message.slots) {
    slot.state = in.Int<SlotState>();
    slot.id = GetId(in);
    slot.manifests = GetTexts(in);
  }
  return message;
}

void Put(wire::Writer& out, const Restorable& restorable) {
  Put(out, restorable.id);
  out.Int(static_cast<uint8_t>(restorable.lost)).Text(restorable.name);
  PutTexts(out, restorable.peers);
  PutTexts(out, restorable.manifests);
}
Restorable GetRestorable(wire::Reader& in) {
  Restorable restorable;
  restorable.id = GetId(in);
  restorable.lost = in.Int<uint8_t>() != 0;
  restorable.name = in.Text();
  restorable.peers = GetTexts(in);
  restorable.manifests = GetTexts(in);
  return restorable;
}

void Put(wire::Writer& out, const absl::Status& status) {
  out.Int(static_cast<int32_t>(status.code())).Text(std::string(status.message()));
}
absl::Status GetStatus(wire::Reader& in) {
  const auto code = static_cast<absl::StatusCode>(in.Int<int32_t>());
  return absl::Status(code, in.Text());
}

wire::Writer Hello(KeeperRole role, const std::string& token, const std::string& job) {
  wire::Writer out;
  out.Int(KeeperKind::kHello).Int(kKeeperMagic).Int(kKeeperVersion).Int(role);
  out.Text(token).Text(job);
  return out;
}

wire::Reader ReaderOn(const std::string& text) { return wire::Reader(text.data(), text.size()); }

absl::StatusOr<HostPort> ParseHostPort(const std::string& text) {
  const size_t colon = text.rfind(':');
  HostPort result;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(text.substr(colon + 1).c_str(), &result.port) || result.port < 0 ||
      result.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not host:port of a keeper; see --peers"));
  }
  result.host = text.substr(0, colon);
  return result;
}

absl::Status SendFrame(const net::Fd& fd, wire::Writer& frame, net::Deadline deadline) {
  const std::string& bytes = frame.Frame();
  return net::SendAll(fd, bytes.data(), bytes.size(), deadline);
}

absl::StatusOr<std::string> ReceiveAnswer(const net::Fd& fd, net::Deadline deadline) {
  uint32_t length = 0;
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd, &length, sizeof(length), deadline));
  if (length < 1 || length > wire::kMaxFrame) {
    return absl::DataLossError("a keeper sent a malformed answer");
  }
  std::string body(length, '\0');
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd, body.data(), length, deadline));
  wire::Reader in(body.data(), body.size());
  const auto kind = in.Int<KeeperKind>();
  if (kind == KeeperKind::kOk) return body.substr(1);
  absl::Status error = absl::DataLossError("a keeper sent a malformed answer");
  if (kind == KeeperKind::kError) {
    const absl::Status told = GetStatus(in);
    if (in.ok() && !told.ok()) error = told;
  }
  return error;
}

absl::StatusOr<SlotReader> SlotReader::Connect(const std::string& host_port,
                                               const std::string& token, const std::string& job,
                                               net::Deadline deadline) {
  STRETTO_ASSIGN_OR_RETURN(const HostPort to, ParseHostPort(host_port));
  STRETTO_ASSIGN_OR_RETURN(net::Fd fd, net::Connect(to.host, to.port, deadline));
  wire::Writer hello = Hello(KeeperRole::kReader, token, job);
  STRETTO_RETURN_IF_ERROR(SendFrame(fd, hello, deadline));
  STRETTO_RETURN_IF_ERROR(ReceiveAnswer(fd, deadline).status());
  return SlotReader(std::move(fd));
}

absl::Status SlotReader::Request(const SnapshotId& id, SlotState least, int32_t what,
                                 int64_t offset, int64_t bytes) {
  wire::Writer out;
  out.Int(KeeperKind::kRead);
  Put(out, id);
  out.Int(least).Int(what).Int(offset).Int(bytes);
  return SendFrame(fd_, out, net::After(kPatience));
}

absl::Status SlotReader::Answer(void* out, int64_t bytes, std::chrono::milliseconds patience) {
  uint32_t length = 0;
  KeeperKind kind{};
  const net::Deadline deadline = net::After(patience);
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd_, &length, sizeof(length), deadline));
  if (length < sizeof(kind) || length > wire::kMaxFrame) {
    return absl::DataLossError("a keeper sent a malformed answer");
  }
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd_, &kind, sizeof(kind), deadline));
  if (kind == KeeperKind::kOk && length == sizeof(kind) + static_cast<uint64_t>(bytes)) {
    STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd_, out, static_cast<size_t>(bytes), deadline));
    return ReceiveAnswer(fd_, deadline).status();
  }
  std::string body(length - sizeof(kind), '\0');
  STRETTO_RETURN_IF_ERROR(net::ReceiveAll(fd_, body.data(), body.size(), deadline));
  wire::Reader in(body.data(), body.size());
  const absl::Status told = GetStatus(in);
  if (kind == KeeperKind::kError && in.ok() && !told.ok()) return told;
  return absl::DataLossError("a keeper sent a malformed answer");
}

void SlotReader::Interrupt() const { shutdown(fd_.get(), SHUT_RDWR); }

}  // namespace stretto::snapshot_internal
