// A trainer's side of in-memory snapshots: copies what this rank owns into a slot of its node's
// keeper after a step, and restores from what the keepers hold.
#ifndef STRETTO_SNAPSHOT_SNAPSHOTTER_H_
#define STRETTO_SNAPSHOT_SNAPSHOTTER_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "stretto/comm/world.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"

namespace stretto {

struct SnapshotterOptions {
  // The keeper of this node (STRETTO_KEEPER): the path of its Unix socket, with a '/', or
  // host:port.
  std::string keeper;
  std::string token;  // of the job (STRETTO_JOB_TOKEN)
  // How long the keepers may take to agree, rebuilding included.
  std::chrono::milliseconds timeout = std::chrono::seconds(600);
};

// What all ranks were told at the start.
struct RestorableSnapshot {
  int64_t epoch = 0;          // completed steps
  std::string trainer_state;  // JSON, as a rank gave it to Capture
};

class Snapshotter {
 public:
  // All ranks, each with the keeper of its node or all without one: null then. Attaches and waits
  // until the keepers have agreed on what can be restored, the same for all ranks.
  // FAILED_PRECONDITION when some ranks have a keeper and others do not.
  static absl::StatusOr<std::unique_ptr<Snapshotter>> Create(World& world,
                                                             const StateRegistry& registry,
                                                             SnapshotterOptions options);
  ~Snapshotter();  // waits for a capture under way

  // Nothing: training starts as if there were no keepers.
  const std::optional<RestorableSnapshot>& restorable() const;
  // The keepers had something, and too little of it is left to put it together.
  bool lost() const;

  // Fills every box of the registry: from this rank's own memory what lies there under the same
  // layout, else from the parts of the ranks that have it, through their keepers. What this rank
  // has is checked before anything is changed; DATA_LOSS names what is damaged.
  absl::Status Restore(const StateRegistry& registry);

  // Begins to copy the owned boxes, in a thread of its own; the registry must live and its tensors
  // must not change until Wait. Work on the tensors must have finished. When the keeper has no free
  // slot the step is passed over. A keeper that is gone ends snapshots with a warning, not
  // training. `trainer_state` is a JSON object.
  void Capture(int64_t epoch, std::string trainer_state);
  // Returns when the copy is done; at once where none is under way.
  void Wait();

  int64_t captured() const;     // sealed by this rank
  int64_t passed_over() const;  // asked for, and no slot was free
  double waited_seconds() const;

 private:
  struct Impl;
  explicit Snapshotter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The keeper's state as text, one "name value" a line (tools, tests): "ready 1", "lost 0",
// "slot 0 COMMITTED step 12 round 1".
absl::StatusOr<std::string> AskKeeper(const std::string& keeper_at, const std::string& token);

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_SNAPSHOTTER_H_
