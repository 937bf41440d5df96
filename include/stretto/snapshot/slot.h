// A rank's place for one snapshot: shared memory that outlives the process that fills it.
//
// Layout of a slot: a page with a checked header, then the payload: the tensors' bytes, each at a
// multiple of 64, and behind them the table of contents. A keeper owns two slots for each rank.
#ifndef STRETTO_SNAPSHOT_SLOT_H_
#define STRETTO_SNAPSHOT_SLOT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/dtype.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"
#include "stretto/snapshot/commit.h"

namespace stretto {

// A box of a registered tensor as it lies in a slot. Boxes that a rank does not own are listed with
// 0 bytes, so that the contents of all ranks tell of every tensor.
struct SlotEntry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> global_shape;
  std::vector<int64_t> shape;  // of the box
  int64_t first_row = 0, first_column = 0;
  int64_t offset = 0;  // in the payload
  int64_t bytes = 0;
  uint64_t checksum = 0;  // XXH3 of the bytes
};

struct SlotContents {
  std::vector<SlotEntry> entries;  // in the registry's order
  std::string trainer_state;       // a JSON object
  int64_t data_bytes = 0;          // where the table of contents begins in the payload
};

// What a rank puts into a slot: what it owns (and so nobody else does), in the registry's order.
SlotContents PlanContents(const StateRegistry& registry);
// Names, types, shapes and boxes, in order: two ranks with the same hash lie alike in their slots.
uint64_t LayoutHash(const SlotContents& contents, int rank, int world_size);
// Bytes of a payload with these contents and some growth of the trainer's state.
int64_t PayloadCapacity(const SlotContents& contents);
// At least what that was for a payload of which so many bytes are used.
int64_t RoomyCapacity(int64_t payload_bytes);
std::string EncodeContents(const SlotContents& contents);
// DATA_LOSS for what EncodeContents did not write; `source` names it.
absl::StatusOr<SlotContents> DecodeContents(const std::string& text, const std::string& source);

// What a slot is expected to be.
struct SlotIdentity {
  std::string job;
  uint64_t layout = 0;  // 0: any
  int rank = 0;
};

// The first page of a slot.
struct SlotHeader {
  uint64_t job = 0;  // hash of its name
  uint64_t layout = 0;
  int32_t rank = 0;
  int32_t world_size = 0;
  SlotState state = SlotState::kEmpty;
  SnapshotId id;
  int64_t payload_bytes = 0;   // used: data and contents
  int64_t contents_bytes = 0;  // at the end of the payload
  uint64_t contents_checksum = 0;
};
uint64_t HashOf(const std::string& text);

namespace snapshot_internal {
class MappingGuard;
}

// A mapping of a slot. Unmapping leaves the memory; Unlink ends it when nobody maps it any more.
// Who cuts it short meanwhile ends no process: see Whole.
class SlotMemory {
 public:
  // Makes the object /dev/shm`name`, readable by this user alone, with room for `capacity` bytes of
  // payload; one of that name is replaced. RESOURCE_EXHAUSTED when the file system has less.
  static absl::StatusOr<std::shared_ptr<SlotMemory>> Create(const std::string& name,
                                                            int64_t capacity);
  // NOT_FOUND when there is none; DATA_LOSS when it has another size than its header says.
  static absl::StatusOr<std::shared_ptr<SlotMemory>> Open(const std::string& name);
  ~SlotMemory();
  SlotMemory(const SlotMemory&) = delete;
  SlotMemory& operator=(const SlotMemory&) = delete;

  const std::string& name() const { return name_; }
  int64_t capacity() const { return capacity_; }
  std::byte* payload() const { return base_ + kPayloadOffset; }
  // All of it, on whole pages.
  std::byte* mapping() const { return base_; }
  int64_t mapped_bytes() const;
  static constexpr int64_t kPayloadOffset = 4096;  // the header's page
  // Touches all pages, with `threads` of them: the first touch of shared memory is slow (0.25 GB/s
  // by one thread), and where memory is short it is better to learn it here than by SIGBUS.
  absl::Status Prefault(int threads);
  void Unlink();
  // DATA_LOSS when somebody has cut it short since it was mapped. What is gone reads as zeroes.
  absl::Status Whole() const;

  void WriteHeader(const SlotHeader& header);
  // DATA_LOSS for a header that nobody finished; FAILED_PRECONDITION for another program version.
  absl::StatusOr<SlotHeader> ReadHeader() const;
  // The header and the contents, checked: FAILED_PRECONDITION names another job or layout, or a
  // slot that is not complete; DATA_LOSS a damaged header or table of contents.
  absl::StatusOr<SlotContents> ReadContents(const SlotIdentity& expected,
                                            SlotHeader* header = nullptr) const;
  // DATA_LOSS names the first tensor whose bytes are not those that were written.
  absl::Status VerifyData(const SlotContents& contents, int threads = 1) const;
  // Of the bytes that the slot has of an entry of the contents: XXH3, 64 bits.
  uint64_t DataChecksum(const SlotEntry& entry) const;
  // What VerifyData says of an entry that does not fit its checksum.
  absl::Status Damaged(const SlotEntry& entry) const;

 private:
  SlotMemory(std::string name, std::byte* base, int64_t capacity);
  std::string name_;
  std::byte* base_;
  int64_t capacity_;
  std::unique_ptr<snapshot_internal::MappingGuard> guard_;
};

// Page-locked host memory through which a trainer's copies from and to a device go where they do
// not go into the slot itself, and on a restart: so many chunks of so many bytes.
inline constexpr int64_t kSnapshotChunkBytes = int64_t{16} << 20;
inline constexpr int kSnapshotChunks = 8;

// Writes the table of contents behind the data and fills in the header's sizes. RESOURCE_EXHAUSTED
// when the slot is too small.
absl::Status FinishSlot(const SlotContents& contents, SlotMemory& slot, SlotHeader* header);

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_SLOT_H_
