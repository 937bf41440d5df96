// The memory of a keeper: for each of its two slots the ranks' shared memory and the parity of
// other nodes. What is read from it is checked against the state that the protocol has.
#ifndef STRETTO_SRC_SNAPSHOT_KEEPER_SLOTS_H_
#define STRETTO_SRC_SNAPSHOT_KEEPER_SLOTS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "src/snapshot/keeper_wire.h"
#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/snapshot/slot.h"

namespace stretto::snapshot_internal {

// Shared memory of a node's slots is named <prefix><slot>-<rank>-<number>; the number is new each
// time, so that who maps an older one does not take it for this.
std::string SlotNamePrefix(const std::string& job, int node);
// Removes what an earlier keeper of the node left.
void UnlinkSlots(const std::string& prefix);

class KeeperSlots {
 public:
  using Capacities = std::map<int, int64_t>;  // by rank, bytes of payload

  // Removes what an earlier keeper of the node left; see Adopt.
  KeeperSlots(std::string job, int node, Budget* budget, int threads);
  ~KeeperSlots();  // the memory goes, too

  // For the keeper of a job's only node, instead: takes over the slots of one that was killed.
  // Whole are those that all ranks have written, that were protected, and in which every checksum
  // holds; all else is refused by name and removed. `held`: what is whole, for the commit
  // protocol.
  static std::unique_ptr<KeeperSlots> Adopt(std::string job, int node, Budget* budget, int threads,
                                            NodeSlots* held);

  // Whether the slot has memory for these ranks; if not, a thread begins to make it, and that of
  // the parity if there is none. The slot must not be in use.
  bool Prepare(int slot, const Capacities& ranks, int64_t parity_bytes);
  // For the slot of `id`, whose ranks' parts this node has lost: makes memory for them, not yet
  // touched, and nobody else gets the slot until EndFill. Whether it has what an earlier one for
  // `id` filled in. CANCELLED when the slot is another snapshot's by now.
  absl::StatusOr<bool> BeginFill(int slot, const SnapshotId& id, const NodeManifest& manifest);
  void EndFill(int slot);
  // Why the last Prepare failed; "": it did not.
  std::string error() const;

  // The states of the protocol, visible to readers from here on, and in the headers of the slots.
  void Publish(const NodeSlots& slots);
  // Sets a rank's part of a slot that is being written; see Publish.
  void SetPart(int slot, const RankPart& part);
  NodeManifest ManifestOf(int slot) const;

  // Makes room for `blocks` blocks of parity and returns it, with whatever it holds.
  absl::StatusOr<std::byte*> MakeParity(int slot, int blocks, int64_t block_bytes);

  // A stretch of memory.
  struct Span {
    std::byte* data;
    int64_t bytes;  // of zeros where data is null
  };
  // What is read from a slot; the memory stays while it lives.
  struct View {
    std::vector<Span> spans;
    SnapshotId id;
    SlotState least;
    int slot;
    std::map<int, std::shared_ptr<SlotMemory>> ranks;
    std::shared_ptr<Arena> parity;
  };
  // From any thread. NOT_FOUND unless a slot holds `id` in a state of at least `least`; DATA_LOSS
  // as Whole. `what`: kWholeShard, a ParityBlock or a rank. The bytes count if StillHeld, which
  // says the same, is OK when they have been read.
  absl::StatusOr<View> Look(const SnapshotId& id, SlotState least, int32_t what, int64_t offset,
                            int64_t bytes) const;
  absl::Status StillHeld(const View& view) const;
  // Where a piece of the shard goes, touched, between BeginFill and EndFill. RESOURCE_EXHAUSTED
  // where there is no memory for it.
  absl::StatusOr<std::vector<Span>> SpansToFill(int slot, int64_t offset, int64_t bytes) const;
  // The parity is made: from here on Verify notices when it changes. XXH3 of each
  // kParityPiece of each block, block after block.
  static constexpr int64_t kParityPiece = int64_t{1} << 20;
  void SealParity(int slot, std::vector<uint64_t> checksums);
  // DATA_LOSS when somebody has cut a rank's memory short.
  absl::Status Whole(int slot) const;
  // Checksums of all ranks' parts. DATA_LOSS names what is damaged.
  absl::Status VerifyData(int slot) const;
  // The same and those of the parity, of the slot that holds `id`, before and after; NOT_FOUND
  // unless it does.
  absl::Status VerifyHeld(const SnapshotId& id) const;
  // A rank's part and its memory; null: there is none.
  std::shared_ptr<SlotMemory> MemoryOf(int slot, int rank) const;

 private:
  KeeperSlots(std::string job, int node, Budget* budget, int threads, bool adopt);
  absl::Status AdoptSlot(int slot, const std::vector<std::shared_ptr<SlotMemory>>& memory);
  struct Place {
    SlotState state = SlotState::kEmpty;
    SnapshotId id;
    NodeManifest manifest;
    std::map<int, std::shared_ptr<SlotMemory>> ranks;
    std::shared_ptr<Arena> parity;
    int64_t block_bytes = 0, blocks = 0;
    std::vector<uint64_t> parity_checksums;  // none: it is not made
    bool making = false;
    bool filling = false;
    SnapshotId filled;  // for which BeginFill was, and nothing else since
    std::string error;  // why it could not be made last; empty: it could
    std::thread maker;
  };
  absl::Status Make(int slot, const Capacities& ranks, bool touch);
  // With its parity_mutexes_ held: an arena in place of whatever is there.
  absl::Status NewParity(int slot, int64_t bytes, bool touch);
  std::shared_ptr<Arena> ParityOf(int slot) const;
  absl::Status MakeInto(int slot, const Capacities& ranks, bool touch,
                        std::map<int, std::shared_ptr<SlotMemory>>* made);
  bool Suits(const Place& place, const Capacities& ranks) const;
  // With mutex_ held, when memory was made or not: warns once.
  void Tell(const absl::Status& status);
  void WriteHeaders(Place& place);
  absl::Status VerifyParity(int slot) const;
  static bool Holds(const Place& place, const SnapshotId& id, SlotState least);
  static absl::Status WholeOf(const std::map<int, std::shared_ptr<SlotMemory>>& ranks);
  // The parts of a shard, with mutex_ held.
  static std::vector<Span> Spans(const Place& place, int64_t offset, int64_t bytes);

  const std::string job_, prefix_;
  Budget* const budget_;
  const int threads_;
  // While a slot has its arena for parity made; before mutex_.
  std::array<std::mutex, kSlots> parity_mutexes_;
  mutable std::mutex mutex_;
  std::array<Place, kSlots> places_;
  absl::StatusCode told_ = absl::StatusCode::kOk;  // why there is no memory
  std::atomic<int64_t> made_ = 0;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_SLOTS_H_
