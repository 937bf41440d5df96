// A trainer's side of in-memory snapshots: copies what this rank owns into a slot of its node's
// keeper after a step, and restores from what the keepers hold.
#ifndef STRETTO_SNAPSHOT_SNAPSHOTTER_H_
#define STRETTO_SNAPSHOT_SNAPSHOTTER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "stretto/comm/world.h"
#include "stretto/core/device.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

namespace stretto {

struct SnapshotterOptions {
  // The keeper of this node (STRETTO_KEEPER): the path of its Unix socket, with a '/', or
  // host:port.
  std::string keeper;
  std::string token;  // of the job (STRETTO_JOB_TOKEN)
  // How long the keepers may take to agree, rebuilding included.
  std::chrono::milliseconds timeout = std::chrono::seconds(600);
  // For ranks that were killed to be gone, whose keepers this run needs.
  std::chrono::milliseconds leaving = std::chrono::seconds(10);
  Device device;            // whose streams write the registry's tensors
  int threads = 1;          // for checksums, and for copies within host memory
  int restart_threads = 1;  // for the same before the first step, when nothing else runs
};

struct SnapshotStats {
  int64_t stride = 1;         // one of so many is taken (Adapt)
  int64_t captured = 0;       // sealed by this rank
  int64_t passed_over = 0;    // asked for, and no slot was free or an older one not yet sealed
  int64_t bytes = 0;          // of the tensors of one
  double waited_seconds = 0;  // that the host waited in WaitForPart
  // Of the last that was sealed: until its copies had left the tensors, and until it was sealed.
  double copy_seconds = 0, seal_seconds = 0;
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
  // FAILED_PRECONDITION when some ranks have a keeper and others do not; UNAVAILABLE while ranks of
  // another run have it, which this one then leaves as it is.
  static absl::StatusOr<std::unique_ptr<Snapshotter>> Create(World& world,
                                                             const StateRegistry& registry,
                                                             SnapshotterOptions options);
  ~Snapshotter();  // waits for a capture under way

  // Nothing: training starts as if there were no keepers.
  const std::optional<RestorableSnapshot>& restorable() const;
  // The keepers had something, and too little of it is left to put it together.
  bool lost() const;

  // Fills every box of the registry of Create: from this rank's own memory what lies there under
  // the same layout, else from the parts of the ranks that have it, through their keepers. What
  // this rank has is checked before anything is changed; DATA_LOSS names what is damaged.
  absl::Status Restore();
  // Restore will not be called; what it would have read is let go.
  void Forget();

  // Begins to copy the owned boxes as they are at `after` (by default now), beside whatever streams
  // do; the registry must live. Each tensor must not change until WaitForPart has returned for the
  // part of the update that it is in. When the keeper has no free slot, or an earlier snapshot is
  // not yet sealed, the step is passed over. A keeper that is gone ends snapshots with a warning,
  // not training. `trainer_state` returns a JSON object; it is called in the snapshots' thread.
  void Capture(int64_t epoch, std::function<std::string()> trainer_state, const Event& after = {});
  // Ranks that pass over different steps have no snapshot together, so all take the same ones:
  // every stride-th that Capture is called for. After each step each rank tells whether its last
  // Capture came too early, an older one being still under way (missed), and all call Adapt with
  // whether anybody's did: the stride grows at once, and shrinks again after a while without.
  bool missed() const;
  void Adapt(bool anybody_missed);
  // Work enqueued on `stream` from now on may change what this part of the optimizer's update
  // writes (StateEntry::update_part) and the parts before it; -1: everything. The host waits until
  // the copies are enqueued, the stream until they are done. At once where none are under way.
  void WaitForPart(Stream& stream, int part);
  // Whether WaitForPart could wait.
  bool copying() const;
  // Returns when what was captured is sealed or given up; at once where nothing is under way.
  void Wait();

  SnapshotStats stats() const;

 private:
  struct Impl;
  explicit Snapshotter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// The keeper's state as text, one "name value" a line (tools, tests): "ready 1", "lost 0",
// "slot 0 COMMITTED step 12 round 1".
absl::StatusOr<std::string> AskKeeper(const std::string& keeper_at, const std::string& token);
// The newest step of which such a text has a COMMITTED snapshot; -1: it has none.
int64_t CommittedStep(const std::string& keeper_state);

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_SNAPSHOTTER_H_
