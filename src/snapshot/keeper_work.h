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

// Both kinds of work read the slots of other keepers in pieces; the next piece travels while this
// one is computed. One at a time, in a thread of its own.
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
  absl::Status MakeParity(const Task& task, std::byte* parity, int64_t block_bytes);
  absl::Status Rebuild(const Task& task, std::byte* parity, int64_t block_bytes);
  // Sums what `map` makes of the sources' blocks of a stripe, piece by piece; `write` receives it.
  struct Source {
    int node;
    int member;
  };
  absl::Status Combine(const Task& task, const ErasureMap& map, const std::vector<Source>& sources,
                       SlotState least, int64_t block_bytes,
                       const std::function<void(int64_t at, const std::byte*, int64_t)>& write);
  absl::StatusOr<SlotReader*> ReaderOf(int node);
  int64_t LargestShard(const Task& task) const;

  const Options options_;
  const ParityLayout layout_;
  const ErasureCode code_;
  KeeperSlots* const slots_;
  const std::function<void(const Task&)> begin_;
  const std::function<void(const Task&, const absl::Status&)> done_;
  std::map<int, SlotReader> readers_;  // by node; of the thread

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Task> waiting_;
  bool end_ = false;
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> encode_bytes_ = 0, rebuild_bytes_ = 0;
  std::thread thread_;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_WORK_H_
