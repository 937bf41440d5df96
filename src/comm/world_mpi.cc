// A world made by mpirun or srun. Built where MPI was found, otherwise world_no_mpi.cc is.
#include <unistd.h>

#include <cstring>
#include <map>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "src/comm/transport_mpi.h"
#include "src/comm/world_internal.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

absl::Status MpiStatus(int code, const char* what) {
  if (code == MPI_SUCCESS) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat(what, " failed: ", MpiErrorText(code)));
}

// Waits for a request with a deadline: a blocking MPI call could not be left any more.
absl::Status Await(MPI_Request* request, net::Deadline deadline, const char* what) {
  for (int spin = 0;; ++spin) {
    int done = 0;
    STRETTO_RETURN_IF_ERROR(MpiStatus(MPI_Test(request, &done, MPI_STATUS_IGNORE), what));
    if (done != 0) return absl::OkStatus();
    if (net::Clock::now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat(what, " did not finish in time; a rank hangs before creating its World"));
    }
    if (spin < 1000) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
}

struct Host {
  char name[64];
};

struct ControlPlane {
  char host[128];
  char token[64];
  int32_t port;  // 0: rank 0 could not serve
};

// MPI knows the truth about who shares a machine: the host names.
void Place(const std::vector<Host>& hosts, RankInfo* info) {
  std::map<std::string, int> nodes;
  info->local_rank = 0;
  info->local_size = 0;
  for (int r = 0; r < info->size; ++r) {
    const std::string name = hosts[static_cast<std::size_t>(r)].name;
    const int node = nodes.emplace(name, static_cast<int>(nodes.size())).first->second;
    if (r == info->rank) info->node = node;
    if (name == hosts[static_cast<std::size_t>(info->rank)].name) {
      if (r < info->rank) ++info->local_rank;
      ++info->local_size;
    }
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<World>> World::FromMpi(const WorldOptions& options) {
  int initialized = 0;
  MPI_Initialized(&initialized);
  absl::StatusOr<RankInfo> resolved = ResolveRank();
  if (initialized == 0) {
    STRETTO_RETURN_IF_ERROR(resolved.status());
    if (resolved->source == "single process") return WorldAccess::Single(options);
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (finalized != 0) {
      return absl::FailedPreconditionError(
          "MPI was finalised in this process and cannot start again; create one World only");
    }
    int provided = 0;
    STRETTO_RETURN_IF_ERROR(
        MpiStatus(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init"));
  }
  const net::Deadline deadline = net::After(SetupTimeout(options));
  RankInfo info;
  if (resolved.ok()) info = *resolved;
  const int resolved_size = info.size;
  MPI_Comm_rank(MPI_COMM_WORLD, &info.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &info.size);
  if (info.size == 1 && resolved_size > 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        info.source, " started ", resolved_size,
        " ranks, but MPI sees one: start with 'srun --mpi=pmix' or mpirun, or set MASTER_ADDR and "
        "MASTER_PORT"));
  }
  std::unique_ptr<World> world = WorldAccess::New(info, options);

  // A communicator of our own: no message of the program's can match ours, and errors return.
  MPI_Comm communicator = MPI_COMM_NULL;
  MPI_Request request = MPI_REQUEST_NULL;
  STRETTO_RETURN_IF_ERROR(
      MpiStatus(MPI_Comm_idup(MPI_COMM_WORLD, &communicator, &request), "MPI_Comm_idup"));
  STRETTO_RETURN_IF_ERROR(Await(&request, deadline, "MPI_Comm_idup"));
  MPI_Comm_set_errhandler(communicator, MPI_ERRORS_RETURN);
  MPI_Comm_set_errhandler(MPI_COMM_SELF, MPI_ERRORS_RETURN);
  void* limit = nullptr;
  int has_limit = 0;
  MPI_Comm_get_attr(communicator, MPI_TAG_UB, &limit, &has_limit);
  if (has_limit == 0 || *static_cast<int*>(limit) < (1 << 30)) {
    return absl::UnimplementedError(
        "this MPI's tags end below 2^30, and the library needs them; use Open MPI, or TCP through "
        "MASTER_ADDR and MASTER_PORT");
  }

  Host mine = {};
  gethostname(mine.name, sizeof(mine.name) - 1);
  std::vector<Host> hosts(static_cast<std::size_t>(info.size));
  STRETTO_RETURN_IF_ERROR(MpiStatus(MPI_Iallgather(&mine, sizeof(mine), MPI_BYTE, hosts.data(),
                                                   sizeof(mine), MPI_BYTE, communicator, &request),
                                    "MPI_Iallgather"));
  STRETTO_RETURN_IF_ERROR(Await(&request, deadline, "the exchange of host names"));
  Place(hosts, &info);
  WorldAccess::info(*world) = info;
  const bool one_node = info.local_size == info.size;

  // Rank 0 serves the control plane on a free port and tells everybody through MPI.
  StoreOptions store;
  ControlPlane plane = {};
  absl::Status served;
  if (info.rank == 0) {
    const bool named = !options.bind_address.empty() && options.bind_address != "0.0.0.0";
    store.bind_address = named ? options.bind_address : one_node ? "127.0.0.1" : "0.0.0.0";
    store.host = named ? options.bind_address : one_node ? "127.0.0.1" : net::PrimaryAddress();
    store.job_token = options.job_token.empty() ? net::RandomToken() : options.job_token;
    absl::StatusOr<std::unique_ptr<StoreServer>> server = StoreServer::Start(store);
    served = server.status();
    if (server.ok()) {
      WorldAccess::server(*world) = std::move(*server);
      plane.port = WorldAccess::server(*world)->port();
      std::strncpy(plane.host, store.host.c_str(), sizeof(plane.host) - 1);
      // A token of the user's is known to all ranks and may have any length.
      if (options.job_token.empty()) {
        std::strncpy(plane.token, store.job_token.c_str(), sizeof(plane.token) - 1);
      }
    }
  }
  STRETTO_RETURN_IF_ERROR(MpiStatus(
      MPI_Ibcast(&plane, sizeof(plane), MPI_BYTE, 0, communicator, &request), "MPI_Ibcast"));
  STRETTO_RETURN_IF_ERROR(
      Await(&request, deadline, "the broadcast of the control plane's address"));
  STRETTO_RETURN_IF_ERROR(served);
  if (plane.port == 0) {
    return absl::UnavailableError("rank 0 could not start the control plane; see its message");
  }
  store.host = plane.host;
  store.port = plane.port;
  store.job_token = options.job_token.empty() ? std::string(plane.token) : options.job_token;
  store.connect_timeout = SetupTimeout(options);
  STRETTO_ASSIGN_OR_RETURN(WorldAccess::store(*world), Store::Connect(store, info.rank));

  WorldAccess::transport(*world) =
      std::make_unique<MpiTransport>(communicator, info.rank, info.size);
  const bool ours = initialized == 0;
  WorldAccess::phase(*world).finalize = [communicator, ours](bool clean) mutable {
    // After an error other ranks may be gone, and MPI_Finalize would wait for them for ever.
    if (!clean) return;
    MPI_Comm_free(&communicator);
    if (ours) MPI_Finalize();
  };
  WorldAccess::Announce(*world);
  return world;
}

}  // namespace stretto
