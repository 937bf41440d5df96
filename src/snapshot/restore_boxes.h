// Filling boxes of tensors from a snapshot that other ranks, perhaps of another layout, have left
// with their keepers.
#ifndef STRETTO_SRC_SNAPSHOT_RESTORE_BOXES_H_
#define STRETTO_SRC_SNAPSHOT_RESTORE_BOXES_H_

#include <map>
#include <string>
#include <vector>

#include "src/snapshot/keeper_wire.h"
#include "stretto/core/state.h"
#include "stretto/snapshot/slot.h"

namespace stretto::snapshot_internal {

class BoxSource {
 public:
  BoxSource(Restorable restorable, std::string token, std::string job);

  // Reads the tables of contents of all ranks' parts. Whose is damaged (DATA_LOSS) has checked all
  // that it holds then, and given it up.
  absl::Status Open();
  // The trainer's state of the first part.
  const std::string& trainer_state() const { return trainer_state_; }
  // NOT_FOUND for a tensor, or a part of it, that nobody left; FAILED_PRECONDITION for another
  // shape or type; DATA_LOSS for bytes that are not those that were written, told as by Open.
  absl::Status Fill(const StateEntry& entry);

 private:
  struct Part {
    int node = 0;
    int rank = 0;
    SlotEntry entry;
  };
  absl::StatusOr<SlotReader*> ReaderOf(int node);
  absl::Status OpenNode(int node);
  // Its keeper looks for damage, and knows of it when this returns.
  void LetCheck(int node);
  absl::Status Fetch(int node, int rank, int64_t offset, int64_t bytes, void* out);

  const Restorable restorable_;
  const std::string token_, job_;
  std::map<int, SlotReader> readers_;
  std::map<std::string, std::vector<Part>> parts_;  // by tensor
  std::string trainer_state_;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_RESTORE_BOXES_H_
