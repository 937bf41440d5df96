// What keepers, trainers and readers of snapshots say to a keeper: frames of comm/wire.h that begin
// with a Kind.
#ifndef STRETTO_SRC_SNAPSHOT_KEEPER_WIRE_H_
#define STRETTO_SRC_SNAPSHOT_KEEPER_WIRE_H_

#include <chrono>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "src/comm/socket.h"
#include "src/comm/wire.h"
#include "stretto/core/status.h"
#include "stretto/snapshot/commit.h"

namespace stretto::snapshot_internal {

inline constexpr uint32_t kKeeperMagic = 0x4b525453;  // "STRK"
inline constexpr uint32_t kKeeperVersion = 4;
inline constexpr uint32_t kMostReadBytes = 8u << 20;

enum class KeeperKind : uint8_t {
  kHello = 1,  // magic, version, role, token, job (trainers learn it from the answer: job, node,
               // nodes); keepers go on with node, nodes, data, parity
  kOk,         // answers
  kError,      // code, message
  // From another keeper.
  kCommit,
  kHeartbeat,
  kSpill,    // of node 0: id; write it to disk
  kSpilled,  // id, status, files
  // From a trainer.
  kClaim,    // a number of its run -> nothing; before kAttach
  kAttach,   // rank, world size, ranks on this node, layout, capacity, attempt -> Restorable
  kBegin,    // epoch -> slot (-1: none), name of the memory, why there is none
  kSeal,     // epoch, whether it is whole, sizes and checksum -> whether it counts
  kDamaged,  // id, what: this node's memory of it -> nothing
  kStatus,   // -> text
  // From a reader.
  kRead,  // id, least state, what, offset, bytes -> the bytes; then whether they count, kOk again
          // or kError
};
enum class KeeperRole : uint8_t { kKeeper = 1, kTrainer, kReader };

// What a keeper knows of a rank's part of a snapshot.
struct RankPart {
  int32_t rank = 0, world_size = 0;
  uint64_t layout = 0;
  int64_t payload_bytes = 0, contents_bytes = 0;
  uint64_t contents_checksum = 0;
};

// A node's part. Its *shard* is what the erasure code sees: the ranks' payloads one after the
// other, each from a multiple of 64.
struct NodeManifest {
  std::vector<RankPart> ranks;
  int64_t BeginOf(size_t index) const {
    int64_t at = 0;
    for (size_t i = 0; i < index; ++i) at += (ranks[i].payload_bytes + 63) / 64 * 64;
    return at;
  }
  int64_t ShardBytes() const { return BeginOf(ranks.size()); }
};
std::string Encode(const NodeManifest& manifest);
absl::StatusOr<NodeManifest> DecodeManifest(const std::string& text);

// What trainers that start are told.
struct Restorable {
  SnapshotId id;                   // not present: nothing
  bool lost = false;               // there was something, and too little of it is left
  std::string name;                // shared memory of this rank's part; "": it is not on this node
  std::vector<std::string> peers;  // host:port of all nodes' keepers
  std::vector<std::string> manifests;  // by node
};

void Put(wire::Writer& out, const SnapshotId& id);
SnapshotId GetId(wire::Reader& in);
void Put(wire::Writer& out, const CommitMessage& message);
CommitMessage GetCommit(wire::Reader& in);
void Put(wire::Writer& out, const Restorable& restorable);
Restorable GetRestorable(wire::Reader& in);
void Put(wire::Writer& out, const absl::Status& status);
absl::Status GetStatus(wire::Reader& in);

wire::Writer Hello(KeeperRole role, const std::string& token, const std::string& job);

// Not inlined: g++ 12 would warn about the short-string buffer of a text it believes empty.
[[gnu::noinline]] wire::Reader ReaderOn(const std::string& text);

struct HostPort {
  std::string host;
  int port = 0;
};
// INVALID_ARGUMENT for anything but "host:port".
absl::StatusOr<HostPort> ParseHostPort(const std::string& text);

// Blocking, for trainers and readers. One frame each way; an answer that is kError is its status.
absl::Status SendFrame(const net::Fd& fd, wire::Writer& frame, net::Deadline deadline);
absl::StatusOr<std::string> ReceiveAnswer(const net::Fd& fd, net::Deadline deadline);

// What of a slot is read.
inline constexpr int32_t kWholeShard = -1;
// Nothing; but the keeper checks all that it has of the snapshot first. DATA_LOSS: it is damaged.
inline constexpr int32_t kSoundness = std::numeric_limits<int32_t>::min();
inline constexpr std::chrono::milliseconds kVerifying = std::chrono::minutes(2);  // most of it
inline constexpr int32_t ParityBlock(int p) { return -2 - p; }                    // else a rank

// Reads from the slots of one keeper. Not thread-safe.
class SlotReader {
 public:
  static absl::StatusOr<SlotReader> Connect(const std::string& host_port, const std::string& token,
                                            const std::string& job, net::Deadline deadline);
  // Several requests may be under way; answers come in their order.
  absl::Status Request(const SnapshotId& id, SlotState least, int32_t what, int64_t offset,
                       int64_t bytes);
  // NOT_FOUND when the keeper does not hold it (any more).
  absl::Status Answer(void* out, int64_t bytes,
                      std::chrono::milliseconds patience = std::chrono::seconds(30));
  // From any thread: Request and Answer fail from here on, also those that wait.
  void Interrupt() const;

 private:
  explicit SlotReader(net::Fd fd) : fd_(std::move(fd)) {}
  net::Fd fd_;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_WIRE_H_
