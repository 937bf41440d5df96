// Copies between a rank's state and its slots, for the CPU and for devices alike: part by part of
// the optimizer's update, beside the work of other streams, with checksums off its path.
#ifndef STRETTO_SRC_SNAPSHOT_SLOT_COPIES_H_
#define STRETTO_SRC_SNAPSHOT_SLOT_COPIES_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"
#include "stretto/snapshot/slot.h"

namespace stretto::snapshot_internal {

struct SlotCopyOptions {
  Device device;  // whose streams write the state
  // Of checksums and of copies within host memory, beside the one that enqueues. As if the system
  // gave none: 0.
  int threads = 1;
  int restart_threads = 1;  // of Restore
  // false: copies go through the ring also where a slot could be registered.
  bool direct = true;
  int64_t chunk_bytes =
      kSnapshotChunkBytes;       // a multiple of 4096; at most so much is copied at once
  int chunks = kSnapshotChunks;  // of the ring
  // For tests: called before the copies of a part are enqueued, by the thread that does it.
  std::function<void(int part)> before_part;
};

// How a device's bytes reach a slot. *Direct*: the slot's mapping is registered with the driver,
// and the device writes into it. Else through a *ring* of page-locked chunks, which threads empty.
// On the CPU copies are direct, by the thread of a stream.
//
// The thread of the snapshots calls Register, Capture and Restore; the thread that runs the steps
// calls Begin and WaitForPart.
class SlotCopies {
 public:
  // The registry lives and its tensors stay where they are. RESOURCE_EXHAUSTED without memory for
  // the ring.
  static absl::StatusOr<std::unique_ptr<SlotCopies>> Create(const StateRegistry& registry,
                                                            const SlotContents& planned,
                                                            const SlotCopyOptions& options);
  ~SlotCopies();

  // Whether Register would help: the slot is not registered, and no driver has refused one.
  bool WantsRegistration(const std::shared_ptr<SlotMemory>& slot) const;
  // Takes seconds for some GiB. Where the driver refuses, all later copies go through the ring.
  absl::Status Register(const std::shared_ptr<SlotMemory>& slot);

  // A capture begins: it copies what the state is at `after`, and parts wait from here on.
  void Begin(const Event& after);
  // Copies what Begin began into the payload and fills in the checksums of `contents`, which is
  // what was planned. Returns when all is there.
  absl::Status Capture(const std::shared_ptr<SlotMemory>& slot, SlotContents* contents);
  // Nothing will be captured after Begin, or it is over: nobody waits any more.
  void End();
  // Work enqueued on `stream` from now on may overwrite this part and those before it; -1: all. The
  // host waits until the copies are enqueued, the stream until they are done.
  void WaitForPart(Stream& stream, int part);
  bool under_way() const { return under_way_.load(std::memory_order_acquire); }

  // Fills all boxes of the registry that are in the slot: those for which `contents`, of the same
  // layout, has their bytes. Blocks.
  absl::Status Restore(const SlotMemory& slot, const SlotContents& contents);

  // Seconds that the last capture took until all had left the state's memory.
  double copy_seconds() const { return copy_seconds_; }

 private:
  // Bytes of one box that follow each other in the state and in the slot, in one registration.
  struct Piece {
    size_t entry = 0;
    int part = 0;
    const std::byte* from = nullptr;
    int64_t offset = 0;  // in the payload
    int64_t bytes = 0;
  };
  struct Registered {
    std::shared_ptr<SlotMemory> memory;
    std::vector<HostRegistration> pieces;
  };
  SlotCopies(const StateRegistry& registry, const SlotCopyOptions& options)
      : registry_(registry), options_(options) {}
  void CutIntoPieces(const SlotContents& planned);
  bool Direct(const SlotMemory& slot) const;
  std::byte* Chunk(size_t i) const {
    return ring_.data() + static_cast<int64_t>(i) * options_.chunk_bytes;
  }
  void Enqueue(const SlotMemory& slot, bool direct, SlotContents* contents);
  // Waits for the piece's copy, empties its chunk and completes the checksum of its entry.
  void Finish(size_t piece, const SlotMemory& slot, bool direct, SlotContents* contents);
  void Work(const SlotMemory& slot, bool direct, SlotContents* contents);

  const StateRegistry& registry_;
  const SlotCopyOptions options_;
  std::unique_ptr<Stream> side_;
  Arena ring_;
  std::vector<Piece> pieces_;          // in the order in which the next update overwrites them
  std::vector<size_t> part_end_;       // by part: behind its last piece
  std::deque<Registered> registered_;  // never assigned: pieces must go before their memory
  bool refused_ = false;
  double copy_seconds_ = 0;

  // Of a capture.
  std::atomic<bool> under_way_ = false;
  std::atomic<size_t> next_ = 0;                  // piece to be looked after
  std::atomic<int> helpers_ = 0;                  // threads that do, beside the one that enqueues
  std::vector<std::atomic<int32_t>> unfinished_;  // pieces by entry
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Event> events_;  // by piece: it has left the state's memory
  std::vector<bool> emptied_;  // by piece: its chunk of the ring is free
  size_t enqueued_ = 0;        // pieces
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_SLOT_COPIES_H_
