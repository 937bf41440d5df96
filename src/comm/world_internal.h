// What the ways to make a World share.
#ifndef STRETTO_SRC_COMM_WORLD_INTERNAL_H_
#define STRETTO_SRC_COMM_WORLD_INTERNAL_H_

#include <atomic>
#include <functional>
#include <memory>
#include <string>

#include "stretto/comm/transport.h"
#include "stretto/comm/world.h"

namespace stretto {

struct World::Phase {
  int64_t next = 0;       // meetings on the control plane so far: Barrier, AllGather, Agree
  int communicators = 0;  // made on this world
  int next_group = 0;     // group ids are unique in a world, since they make the tags
  // A communication error, maybe of the thread of a communicator: MPI cannot be finalised any more.
  std::atomic<bool> failed = false;
  bool in_process = false;  // ranks are threads
  // Ends what the transport stands on (MPI); `clean`: every rank is known to end it too.
  std::function<void(bool clean)> finalize;
};

// The door to World's private parts for the files of this folder.
struct WorldAccess {
  static std::unique_ptr<World> New(const RankInfo& info, const WorldOptions& options);
  static World::Phase& phase(World& w) { return *w.phase_; }
  static std::unique_ptr<StoreServer>& server(World& w) { return w.server_; }
  static std::unique_ptr<Store>& store(World& w) { return w.store_; }
  static std::unique_ptr<Transport>& transport(World& w) { return w.transport_; }
  static RankInfo& info(World& w) { return w.info_; }
  // A world of one without any launcher.
  static absl::StatusOr<std::unique_ptr<World>> Single(const WorldOptions& options);
  // Logs who we are and what the resolver found odd.
  static void Announce(const World& w);
};

// The time that set-up steps may take.
std::chrono::milliseconds SetupTimeout(const WorldOptions& options);

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_WORLD_INTERNAL_H_
