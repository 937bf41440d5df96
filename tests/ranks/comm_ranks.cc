// The collectives under mpirun: every result against its reference, and all bits against those of
// the same job as threads and over TCP. Prints on failure only.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "src/comm/transport_tcp.h"
#include "src/comm/world_internal.h"
#include "stretto/core/log.h"
#include "support/collective_cases.h"

namespace stretto {
namespace {

// The same ranks with messages over TCP instead of MPI.
absl::Status SwitchToTcp(World& world) {
  const std::string token = "rank test";
  STRETTO_ASSIGN_OR_RETURN(
      std::unique_ptr<TcpTransport> tcp,
      TcpTransport::Connect(world.store(), world.rank(), world.size(), "127.0.0.1", "127.0.0.1",
                            token, net::After(std::chrono::seconds(60))));
  WorldAccess::transport(world) = std::move(tcp);
  return absl::OkStatus();
}

absl::Status Compare(World& world, const std::string& what, uint64_t mine,
                     const std::vector<uint64_t>& threads) {
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather(what, absl::StrCat(mine)));
  absl::Status status;
  if (world.rank() == 0) {
    for (int r = 0; r < world.size(); ++r) {
      if (all[static_cast<std::size_t>(r)] != absl::StrCat(threads[static_cast<std::size_t>(r)])) {
        status = absl::DataLossError(
            absl::StrCat("rank ", r, " got other bits by ", what, " than by threads"));
      }
    }
  }
  return world.Agree("compare", status);
}

absl::Status Run() {
  WorldOptions options;
  options.timeout = std::chrono::seconds(120);
  STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<World> world, World::Create(options));
  const bool large = world->size() <= 4;
  std::vector<uint64_t> threads(static_cast<std::size_t>(world->size()));
  absl::Status ran;
  if (world->rank() == 0) {
    ran = World::RunThreads(world->size(), [&](World& w) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(threads[static_cast<std::size_t>(w.rank())],
                               testing::RunCollectiveCases(w, large));
      return absl::OkStatus();
    });
  }
  STRETTO_RETURN_IF_ERROR(world->Agree("threads", ran));
  STRETTO_ASSIGN_OR_RETURN(const uint64_t first, testing::RunCollectiveCases(*world, large));
  STRETTO_RETURN_IF_ERROR(Compare(*world, world->transport().name(), first, threads));
  if (std::string(world->transport().name()) == "tcp") return absl::OkStatus();
  STRETTO_RETURN_IF_ERROR(SwitchToTcp(*world));
  STRETTO_ASSIGN_OR_RETURN(const uint64_t tcp, testing::RunCollectiveCases(*world, large));
  return Compare(*world, "tcp", tcp, threads);
}

}  // namespace
}  // namespace stretto

int main() {
  stretto::SetLogLevel(stretto::LogLevel::kWarning);
  const absl::Status status = stretto::Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::_Exit(1);  // after a communication error MPI cannot be finalised
}
