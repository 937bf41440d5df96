// stretto-bench comm: collectives and point to point over all ranks.
//
// Bandwidths as nccl-tests defines them (its doc/PERFORMANCE.md): the size is that of the larger of
// a rank's two buffers, the algorithm's bandwidth is size over time, and the bus bandwidth is that
// times what a ring has to carry for each byte, so that it can be held against the links' speed.
// The host's share of the time is until it may go on: a GPU works on while the host submits more.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "benchmarks/operations.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/transport.h"
#include "stretto/core/arena.h"
#include "tools/arguments.h"

namespace stretto::bench {
namespace {

struct Options {
  std::string device = "auto", json, only;
  int64_t min_bytes = 1024, max_bytes = int64_t{256} << 20, factor = 4, repetitions = 11;
  bool copy_engines = false;
};

class Bench {
 public:
  Bench(World& world, Device device, Communicator* comm, Stream* stream)
      : world_(world), device_(device), comm_(*comm), stream_(stream) {}

  absl::Status Run(const Options& o, Results* results) {
    const int64_t n = world_.size();
    const int64_t most = std::max<int64_t>(o.max_bytes / 4 / n, 1) * n;
    STRETTO_ASSIGN_OR_RETURN(const Arena a, Arena::Create(device_, "bench", most * 4));
    STRETTO_ASSIGN_OR_RETURN(const Arena b, Arena::Create(device_, "bench", most * 4));
    std::vector<Operation> operations =
        Operations(comm_, Tensor::Of(a.data(), DType::kF32, {most}, device_),
                   Tensor::Of(b.data(), DType::kF32, {most}, device_));
    std::erase_if(operations, [&](const Operation& operation) {
      return operation.name.find(o.only) == std::string::npos;
    });
    if (operations.empty()) {
      return absl::NotFoundError(absl::StrCat("no operation has '", o.only,
                                              "' in its name; leave --only out to see them all"));
    }
    for (const Operation& operation : operations) {
      int64_t before = 0;
      for (int64_t bytes = o.min_bytes; bytes <= o.max_bytes; bytes *= o.factor) {
        const int64_t elements = std::max<int64_t>(bytes / 4 / n, 1) * n;
        if (elements == before || elements > most) continue;
        before = elements;
        STRETTO_ASSIGN_OR_RETURN(
            const OperationSeconds seconds,
            SecondsOf(comm_, stream_, operation, elements, static_cast<int>(o.repetitions)));
        Show(operation, elements * 4, seconds, results);
      }
    }
    return absl::OkStatus();
  }

 private:
  void Show(const Operation& operation, int64_t bytes, OperationSeconds seconds, Results* results) {
    const double algorithm = static_cast<double>(bytes) / seconds.all;
    results->results.push_back({{"name", absl::StrCat(operation.name, " ", bytes)},
                                {"operation", operation.name},
                                {"bytes", bytes},
                                {"seconds", seconds.all},
                                {"host_seconds", seconds.host},
                                {"algorithm_bytes_per_second", algorithm},
                                {"bus_bytes_per_second", algorithm * operation.bus_factor}});
    if (world_.rank() != 0) return;
    std::printf("%-16s %12lld %12.1f %12.1f %12.3f %12.3f\n", operation.name.c_str(),
                static_cast<long long>(bytes), 1e6 * seconds.all, 1e6 * seconds.host,
                algorithm / 1e9, algorithm * operation.bus_factor / 1e9);
    std::fflush(stdout);
  }

  World& world_;
  Device device_;
  Communicator& comm_;
  Stream* stream_;  // null on the CPU
};

absl::Status Run(World& world, const Options& o) {
  const absl::StatusOr<Device> chosen = ChooseDevice(o.device, world.info().local_rank);
  STRETTO_RETURN_IF_ERROR(world.Agree("choosing the device", chosen.status()));
  const Device device = *chosen;
  std::unique_ptr<Stream> stream;  // outlives the communicator, which waits on it
  if (device.kind != DeviceKind::kCpu) {
    STRETTO_ASSIGN_OR_RETURN(stream, Stream::Create(device, {}));
  }
  Communicator comm(world);
  STRETTO_RETURN_IF_ERROR(comm.UseDevice(device));
  if (o.copy_engines) {
    STRETTO_ASSIGN_OR_RETURN(const std::string why, comm.UseCopyEngines(comm.all()));
    if (!why.empty()) {
      return absl::UnavailableError(absl::StrCat("the copy engines cannot be used: ", why));
    }
  }
  Results results = {.command = "comm", .device = DeviceName(device), .ranks = world.size()};
  if (world.rank() == 0) {
    std::printf("%s, %d ranks, %s\n%-16s %12s %12s %12s %12s %12s\n", results.device.c_str(),
                world.size(), stream != nullptr ? "nccl" : world.transport().name(), "operation",
                "bytes", "us", "us of host", "algorithm", "bus GB/s");
  }
  STRETTO_RETURN_IF_ERROR(Bench(world, device, &comm, stream.get()).Run(o, &results));
  absl::Status written;
  if (world.rank() == 0) written = results.Write(o.json);
  return world.Agree("writing the results", written);
}

}  // namespace

int Comm(int argc, const char* const* argv) {
  Options o;
  Arguments arguments("stretto-bench comm",
                      "Times collectives and point to point between all ranks (mpirun -np N "
                      "stretto-bench comm).\nBandwidths are those of nccl-tests.",
                      "");
  arguments.AddChoice("device", {"auto", "cuda", "cpu"}, "where the buffers are", &o.device);
  arguments.Add("min-bytes", "N", "smallest buffer", &o.min_bytes);
  arguments.Add("max-bytes", "N", "largest buffer", &o.max_bytes);
  arguments.Add("factor", "N", "between sizes", &o.factor);
  arguments.Add("repetitions", "N", "the median counts", &o.repetitions);
  arguments.AddFlag("copy-engines", "all-gathers and reduce-scatters by the GPUs' copy engines",
                    &o.copy_engines);
  arguments.Add("only", "TEXT", "operations with this in their name", &o.only);
  arguments.Add("json", "FILE", "also write the results there", &o.json);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (o.min_bytes < 4 || o.max_bytes < o.min_bytes ||
                      o.max_bytes > (int64_t{1} << 40) || o.factor < 2 || o.repetitions < 1)) {
    parsed = absl::InvalidArgumentError(
        "stretto-bench comm needs 4 <= --min-bytes <= --max-bytes, --factor of 2 or more and "
        "--repetitions of 1 or more");
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  return RunInWorld([&](World& world) { return Run(world, o); });
}

}  // namespace stretto::bench
