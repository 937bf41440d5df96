// Built instead of world_mpi.cc where there is no MPI.
#include "stretto/comm/world.h"

namespace stretto {

absl::StatusOr<std::unique_ptr<World>> World::FromMpi(const WorldOptions& options) {
  return absl::UnimplementedError(
      "this build has no MPI; set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each rank, or "
      "configure with STRETTO_MPI=ON");
}

}  // namespace stretto
