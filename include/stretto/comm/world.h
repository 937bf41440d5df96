// Who am I, who is there, and host-side exchange between ranks.
#ifndef STRETTO_COMM_WORLD_H_
#define STRETTO_COMM_WORLD_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/store.h"
#include "stretto/core/status.h"

namespace stretto {

class Transport;  // comm/transport.h

// What the environment says about this process, and which launcher's variables said it.
struct RankInfo {
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
  int node = 0;
  std::string source = "single process";  // "torchrun", "Open MPI", "PMI", "Slurm", ...
  std::vector<std::string> warnings;      // e.g. two launchers that disagree
};

// Reads the launcher's variables in a fixed order: torchrun (RANK, WORLD_SIZE, ...), Open MPI, PMI,
// Slurm (last, because its variables leak into mpirun inside an allocation), single process.
// `getenv` is a parameter for tests. INVALID_ARGUMENT names the variable that makes no sense (a
// rank outside the world, a size that is no number, RANK without WORLD_SIZE).
absl::StatusOr<RankInfo> ResolveRank(
    const std::function<const char*(const char*)>& getenv_function = nullptr);

struct WorldOptions {
  // Any wait for other ranks longer than this fails with a message that names the rank and the
  // operation. <= 0: no limit.
  std::chrono::milliseconds timeout = std::chrono::seconds(600);
  std::string bind_address;  // control plane; empty: loopback on one node, else all interfaces
  std::string job_token;     // empty: random, shared by the launcher's means
  // Adds a random delay of up to this many microseconds before each post (tests).
  int random_delay_us = 0;
  uint64_t delay_seed = 0;
  // Called before each message of an operation is posted, and before each meeting on the control
  // plane, with its name as error messages have it: "reduce_scatter(dp) seq 17 [grad bucket 2]",
  // "'config'" (tests end or stop a rank there).
  std::function<void(const std::string& operation)> before_message;
};

// A set of ranks that run one job. Created once by all ranks; destroyed by all ranks.
class World {
 public:
  // Under mpirun or srun: initialises MPI (MPI_THREAD_FUNNELED) unless the program has done so, and
  // finalises it in the destructor only if it did. Works without a launcher as a world of one.
  // UNIMPLEMENTED when the library was built without MPI.
  static absl::StatusOr<std::unique_ptr<World>> FromMpi(const WorldOptions& options = {});
  // From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (torchrun's variables): TCP, no MPI
  // launcher.
  static absl::StatusOr<std::unique_ptr<World>> FromEnvironment(const WorldOptions& options = {});
  // FromEnvironment when RANK, WORLD_SIZE and MASTER_ADDR are set, else FromMpi.
  static absl::StatusOr<std::unique_ptr<World>> Create(const WorldOptions& options = {});
  // Runs `body` on `ranks` threads, each with its own World; returns the first error (tests,
  // and programs that want ranks inside one process).
  static absl::Status RunThreads(int ranks, const std::function<absl::Status(World&)>& body,
                                 const WorldOptions& options = {});
  // Leaves the job. After a communication error, or when other ranks are gone, MPI is not finalised
  // (MPI_Finalize would wait for them for ever): leave the program with _exit afterwards. Rank 0
  // keeps the control plane up until the others have left, for 30 s at most, or 2 s after an error.
  ~World();

  int rank() const { return info_.rank; }
  int size() const { return info_.size; }
  const RankInfo& info() const { return info_; }
  const WorldOptions& options() const { return options_; }
  // After a communication error: this rank cannot go on, and the others know why.
  bool failed() const;
  Transport& transport() { return *transport_; }
  Store& store() { return *store_; }

  // All ranks meet here (control plane). DEADLINE_EXCEEDED names the ranks that did not come.
  absl::Status Barrier(const std::string& name);
  // Each rank gives a string and receives everybody's, by rank.
  absl::StatusOr<std::vector<std::string>> AllGather(const std::string& name,
                                                     const std::string& value);
  // Ends a set-up phase: OK on all ranks when `mine` is OK on all; otherwise every rank returns an
  // error that carries the message of the lowest failing rank and its number.
  absl::Status Agree(const std::string& phase, const absl::Status& mine);
  // Ranks known to have died or left without a goodbye (control plane), ascending.
  std::vector<int> DeadRanks();

 private:
  friend struct WorldAccess;
  World();
  RankInfo info_;
  WorldOptions options_;
  std::unique_ptr<StoreServer> server_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Transport> transport_;
  struct Phase;
  std::unique_ptr<Phase> phase_;
};

// True for an error that World::Agree returned: all ranks hold the same one, so one may speak for
// all.
bool IsAgreed(const absl::Status& status);

}  // namespace stretto

#endif  // STRETTO_COMM_WORLD_H_
