// A keeper: the process of a node that owns the memory of its ranks' snapshots and outlives them.
// Trainers reach it over a Unix socket, keepers reach each other over TCP; it uses neither MPI nor
// a GPU. What it agrees on with the others is commit.h, what a slot looks like slot.h.
#ifndef STRETTO_SNAPSHOT_KEEPER_H_
#define STRETTO_SNAPSHOT_KEEPER_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// Something that a keeper does. `what` is the state that a slot has from here on ("WRITING"), or:
//   "seal"             a rank says that it has written; this counts when the observer returns
//   "encode" "rebuild" the slot's parity, or all of it, is about to be made
//   "commit"           node 0 says that the slot is committed; counts when the observer returns
//   "pass"             the step is passed over by this node
//   "round"            the keepers begin a round
//   "spill" "spilled"  the slot is about to be written to disk, and is no longer
//   "damaged"          what the slot holds is not what was written; it is given up
//   "read"             trainers are told what they may restore
struct KeeperEvent {
  const char* what;
  int64_t step = -1;  // of a snapshot, where it is about one
  int64_t round = 0;  // in which that was written; of "round" its own number
};

struct KeeperOptions {
  std::string job;    // letters, digits, '.', '_' and '-', at most 64
  std::string token;  // who does not know it is turned away
  int node = 0;
  int nodes = 1;
  // host:port of all nodes' keepers, by node; port 0 of one's own picks one. May be empty for one
  // node.
  std::vector<std::string> peers;
  // Groups of nodes for the erasure code: any `parity` of data + parity nodes may be lost.
  // Negative: one node of all may be lost (none where there is only one).
  int data = -1;
  int parity = -1;
  std::string socket;  // for trainers; empty: KeeperSocketPath
  // Committed snapshots are written there in the background, as checkpoints (checkpoint.h), one at
  // a time and none sooner than `spill_interval` after the one before; the slot of one that is
  // being written is not free. All nodes share it; empty: nothing is written.
  std::string directory;
  std::chrono::milliseconds spill_interval = std::chrono::seconds(60);
  int keep = 2;               // newest of these
  int64_t memory_bytes = -1;  // budget for slots and parity; -1: no limit
  // That touch new memory and look over slots; half of them encode, for the others' keepers want as
  // much of this node.
  int threads = 2;
  // A keeper that says nothing for so long is taken for gone until it comes back.
  std::chrono::milliseconds silence = std::chrono::seconds(10);
  // Is told of all these, in the threads that do them, which wait for it. For traces, and for tests
  // that want a phase to last.
  std::function<void(const KeeperEvent&)> observer;
};

// Where a keeper of this user listens for trainers unless told otherwise:
// /tmp/stretto-<user id>/<job>-<node>.sock, which STRETTO_KEEPER tells trainers.
std::string KeeperSocketPath(const std::string& job, int node);

class Keeper {
 public:
  // Takes the node's place (one keeper of a job and node on a machine), removes what an earlier one
  // left (the only node's takes over what is whole) and listens. INVALID_ARGUMENT for options that
  // make no sense.
  static absl::StatusOr<std::unique_ptr<Keeper>> Start(KeeperOptions options);
  ~Keeper();  // unlinks its shared memory

  int port() const;
  // Serves until Stop is called, from any thread or a signal handler.
  absl::Status Run();
  void Stop();

 private:
  struct Impl;
  explicit Keeper(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_KEEPER_H_
