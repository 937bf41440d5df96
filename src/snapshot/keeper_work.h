// What a keeper computes off its main thread: parity of other nodes' data, and what it has lost
// from theirs.
#ifndef STRETTO_SRC_SNAPSHOT_KEEPER_WORK_H_
#define STRETTO_SRC_SNAPSHOT_KEEPER_WORK_H_

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "src/snapshot/keeper_slots.h"
#include "stretto/snapshot/erasure.h"
#include "stretto/snapshot/parity.h"

namespace stretto::snapshot_internal {

// Both kinds of work read the slots of other keepers in pieces, over several lanes: threads with
// connections of their own, of which each takes the next pieces and has one on its way while it
// computes another. One at a time, from a thread of its own.
class KeeperWork {
 public:
  struct Task {
    bool rebuild = false;
    int slot = 0;
    int64_t round = 0;
    SnapshotId id;
    std::vector<NodeManifest> manifests;  // by node
  };
  struct Options {
    int node = 0;
    std::vector<std::string> peers;  // host:port
    std::string token, job;
    // Lanes to rebuild. To encode, beside which ranks train, they are half as many: the other
    // keepers' lanes have as many threads here that send.
    int threads = 1;
  };
  // `begin` and `done` are called in the work's thread, `done` unless the task was stopped. What
  // fails because a peer is away is told and tried again until it is stopped.
  KeeperWork(Options options, ParityLayout layout, ErasureCode code, KeeperSlots* slots,
             std::function<void(const Task&)> begin,
             std::function<void(const Task&, const absl::Status&)> done);
  ~KeeperWork();

  absl::Status Start();
  void Run(Task task);  // after the one under way
  void Stop();          // gives up what is under way or waits
  // Bytes of blocks that came from other keepers, to encode and to rebuild.
  int64_t encode_bytes() const { return encode_bytes_; }
  int64_t rebuild_bytes() const { return rebuild_bytes_; }

 private:
  void Loop();
  absl::Status Do(const Task& task);
  // Sleeps unless stopped; whether there is a point in trying again.
  bool Pause();
  void StopWithLock();  // mutex_ held
  void Disconnect();    // from all peers
  // What is there of a task. A rebuild that another round has stopped goes on from it, and one that
  // was complete just before has nothing left to read.
  struct Progress {
    bool rebuild = false;
    int slot = -1;
    SnapshotId id;
    std::vector<int> holders;         // Holders
    std::vector<uint8_t> done;        // pieces of the stripes that this node has rebuilt
    std::vector<uint64_t> checksums;  // of pieces of its parity
  };
  absl::Status MakeParity(const Task& task, std::byte* parity, int64_t block_bytes);
  absl::Status Rebuild(const Task& task, std::byte* parity, int64_t block_bytes);
  // Places of as many nodes of the group as the code needs, that hold what was written.
  absl::StatusOr<std::vector<int>> Holders(const Task& task);
  // A member of a stripe that this node makes from others.
  struct Source {
    int node;
    int member;
  };
  struct Stripe {
    const ErasureMap& map;
    std::vector<Source> sources;
    int member;  // what is made: a block of the node's data, or of parity
    int64_t block_bytes;
    std::byte* parity;    // where a block of parity goes
    uint8_t* done;        // by piece
    uint64_t* checksums;  // by piece, of a block of parity
  };
  absl::Status Combine(const Task& task, const Stripe& stripe);
  struct Shared;  // by the lanes of a stripe
  absl::Status RunLane(const Task& task, const Stripe& stripe, int lane, Shared& shared);
  absl::StatusOr<SlotReader*> ReaderOf(int lane, int node);
  int64_t LargestShard(const Task& task) const;

  const Options options_;
  const ParityLayout layout_;
  const ErasureCode code_;
  KeeperSlots* const slots_;
  const std::function<void(const Task&)> begin_;
  const std::function<void(const Task&, const absl::Status&)> done_;
  Progress progress_;

  std::mutex mutex_;
  // By lane and node. A lane uses its own without the lock, and changes them with it.
  std::vector<std::map<int, SlotReader>> readers_;
  std::condition_variable changed_;
  std::vector<Task> waiting_;
  bool end_ = false;
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> encode_bytes_ = 0, rebuild_bytes_ = 0;
  std::thread thread_;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_WORK_H_
