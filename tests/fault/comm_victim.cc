// All-reduces for ever, until something happens to a rank: the subject of comm_faults.py. Or stops
// short of that: with a third argument that rank never comes to a step of set-up where the others
// wait for it.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

absl::Status Run(int timeout_ms, const std::string& directory, int absent) {
  WorldOptions options;
  options.timeout = std::chrono::milliseconds(timeout_ms);
  STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<World> world, World::Create(options));
  if (absent >= 0) {
    std::printf("rank %d pid %d\n", world->rank(), static_cast<int>(getpid()));
    std::fflush(stdout);
    if (world->rank() == absent) sleep(1000);
    return world->Agree("loading the data", absl::OkStatus());
  }
  Communicator c(*world);
  STRETTO_RETURN_IF_ERROR(InstallFlightDumpOnSignal(c, directory));
  std::vector<float> data(300000);
  const Tensor t = Tensor::Of(data.data(), DType::kF32, {static_cast<int64_t>(data.size())});
  STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), t, ReduceOp::kMax, "warm-up")));
  std::printf("rank %d pid %d\n", world->rank(), static_cast<int>(getpid()));
  std::fflush(stdout);
  while (true) {
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), t, ReduceOp::kMax, "grad bucket")));
  }
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  int timeout_ms = 0, absent = -1;
  if (argc < 3 || !absl::SimpleAtoi(argv[1], &timeout_ms)) return 2;
  if (argc > 3 && !absl::SimpleAtoi(argv[3], &absent)) return 2;
  const absl::Status status = stretto::Run(timeout_ms, argv[2], absent);
  std::fprintf(stderr, "FAULT %s\n", status.ToString().c_str());
  std::fflush(stderr);
  std::_Exit(3);
}
