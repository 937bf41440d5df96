#include "benchmarks/operations.h"

#include <utility>

#include "benchmarks/bench.h"

namespace stretto::bench {

std::vector<Operation> Operations(Communicator& comm, Tensor x, Tensor y) {
  const int n = comm.all().size(), rank = comm.all().index;
  const double share = static_cast<double>(n - 1) / n;
  Communicator& c = comm;
  const Group& g = comm.all();
  std::vector<Operation> operations = {
      {"all_reduce", 2 * share,
       [=, &c, &g](int64_t e) { return c.AllReduce(g, x.Rows(0, e), ReduceOp::kSum, "bench"); }},
      {"reduce_scatter", share,
       [=, &c, &g](int64_t e) {
         return c.ReduceScatter(g, y.Rows(0, e / n), x.Rows(0, e), "bench");
       }},
      {"all_gather", share,
       [=, &c, &g](int64_t e) { return c.AllGather(g, x.Rows(0, e), y.Rows(0, e / n), "bench"); }},
      {"broadcast", 1, [=, &c, &g](int64_t e) { return c.Broadcast(g, x.Rows(0, e), 0, "bench"); }},
      {"all_to_all", share,
       [=, &c, &g](int64_t e) {
         const std::vector<int64_t> counts(static_cast<size_t>(n), e / n);
         return c.AllToAll(g, x.Rows(0, e), counts, y.Rows(0, e), counts, "bench");
       }},
  };
  if (n > 1) {  // each rank to the next one
    operations.push_back({"send_receive", 1, [=, &c, &g](int64_t e) {
                            c.Send(g, y.Rows(0, e), (rank + 1) % n, "bench");
                            return c.Receive(g, x.Rows(0, e), (rank + n - 1) % n, "bench");
                          }});
  }
  return operations;
}

absl::StatusOr<double> LargestOfAll(Communicator& comm, double value) {
  STRETTO_RETURN_IF_ERROR(comm.WaitAll());
  STRETTO_RETURN_IF_ERROR(comm.Wait(
      comm.AllReduce(comm.all(), Tensor::Of(&value, DType::kF64, {1}), ReduceOp::kMax, "slowest")));
  return value;
}

absl::StatusOr<OperationSeconds> SecondsOf(Communicator& comm, Stream* stream,
                                           const Operation& operation, int64_t elements,
                                           int repetitions) {
  constexpr int64_t kMedium = int64_t{1} << 20;
  const int calls = elements * SizeOf(DType::kF32) <= kMedium ? 10 : 2;
  std::vector<double> all, host;
  for (int i = 0; i <= repetitions; ++i) {
    STRETTO_RETURN_IF_ERROR(LargestOfAll(comm, 0).status());
    const double begin = Now();
    for (int call = 0; call < calls; ++call) {
      const Ticket ticket = operation.submit(elements);
      // A GPU takes them one after the other by itself; an MPI or TCP rank waits for each.
      STRETTO_RETURN_IF_ERROR(stream != nullptr ? comm.Wait(*stream, ticket) : comm.WaitAll());
    }
    const double submitted = Now();
    if (stream != nullptr) STRETTO_RETURN_IF_ERROR(stream->Synchronize());
    STRETTO_ASSIGN_OR_RETURN(const double slowest, LargestOfAll(comm, (Now() - begin) / calls));
    STRETTO_ASSIGN_OR_RETURN(const double busiest, LargestOfAll(comm, (submitted - begin) / calls));
    if (i == 0) continue;  // the first one warms up
    all.push_back(slowest);
    host.push_back(busiest);
  }
  return OperationSeconds{.all = Median(std::move(all)), .host = Median(std::move(host))};
}

}  // namespace stretto::bench
