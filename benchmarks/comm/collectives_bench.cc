// Bandwidth and latency of the collectives, one line each on rank 0:
//   scripts/mpirun.sh 2 collectives_bench [megabytes]
// Times are medians of the slowest rank; compare them within one run only.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/transport.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

absl::Status Measure(Communicator& c, const std::string& name, int64_t bytes, int repeats,
                     const std::function<Ticket()>& submit) {
  std::vector<double> seconds;
  for (int i = 0; i < repeats + 1; ++i) {
    float ready = 0;
    const Tensor flag = Tensor::Of(&ready, DType::kF32, {1});
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), flag, ReduceOp::kMax, "start together")));
    const auto begin = std::chrono::steady_clock::now();
    STRETTO_RETURN_IF_ERROR(c.Wait(submit()));
    double mine = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    STRETTO_RETURN_IF_ERROR(c.Wait(
        c.AllReduce(c.all(), Tensor::Of(&mine, DType::kF64, {1}), ReduceOp::kMax, "slowest")));
    if (i > 0) seconds.push_back(mine);  // the first one warms up
  }
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  if (c.world().rank() == 0) {
    std::printf("%-7s %d ranks  %-16s %12lld bytes  %10.6f s  %7.2f GB/s\n",
                c.world().transport().name(), c.world().size(), name.c_str(),
                static_cast<long long>(bytes), median, static_cast<double>(bytes) / median * 1e-9);
    std::fflush(stdout);
  }
  return absl::OkStatus();
}

absl::Status Run(int megabytes) {
  STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<World> world, World::Create());
  Communicator c(*world);
  const int64_t n = world->size();
  const int64_t part = int64_t{megabytes} * 1000000 / 4 / n;
  std::vector<float> whole(static_cast<std::size_t>(part * n), 1.0f);
  std::vector<float> mine(static_cast<std::size_t>(part), 1.0f);
  const Tensor all = Tensor::Of(whole.data(), DType::kF32, {part * n});
  const Tensor own = Tensor::Of(mine.data(), DType::kF32, {part});
  const Group& g = c.all();
  STRETTO_RETURN_IF_ERROR(Measure(c, "reduce_scatter", all.bytes(), 5,
                                  [&] { return c.ReduceScatter(g, own, all, "bench"); }));
  STRETTO_RETURN_IF_ERROR(
      Measure(c, "all_gather", all.bytes(), 5, [&] { return c.AllGather(g, all, own, "bench"); }));
  STRETTO_RETURN_IF_ERROR(Measure(c, "all_reduce", all.bytes(), 5,
                                  [&] { return c.AllReduce(g, all, ReduceOp::kMax, "bench"); }));
  for (const int64_t elements : {int64_t{1}, int64_t{1000}, int64_t{100000}}) {
    if (elements > all.elements()) break;
    STRETTO_RETURN_IF_ERROR(Measure(c, "all_reduce", elements * 4, 200, [&] {
      return c.AllReduce(g, all.Rows(0, elements), ReduceOp::kMax, "bench");
    }));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  int megabytes = 500;
  if (argc > 1 && (!absl::SimpleAtoi(argv[1], &megabytes) || megabytes < 1)) {
    std::fprintf(stderr, "usage: collectives_bench [megabytes]\n");
    return 2;
  }
  stretto::SetLogLevel(stretto::LogLevel::kWarning);
  const absl::Status status = stretto::Run(megabytes);
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::_Exit(1);
}
