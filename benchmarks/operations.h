// Collectives and point to point over all ranks, to be timed.
#ifndef STRETTO_BENCHMARKS_OPERATIONS_H_
#define STRETTO_BENCHMARKS_OPERATIONS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"

namespace stretto::bench {

struct Operation {
  std::string name;
  // Bytes that a ring carries over each link, and in every case a rank's share of what is sent, for
  // each byte of the larger buffer.
  double bus_factor;
  std::function<Ticket(int64_t elements)> submit;  // of f32, a multiple of the ranks
};

// On buffers `x` and `y` of as many elements, f32. Submits the operation; the last ticket returns.
std::vector<Operation> Operations(Communicator& comm, Tensor x, Tensor y);

// All ranks go on from here together; the largest of their numbers.
absl::StatusOr<double> LargestOfAll(Communicator& comm, double value);

// Of one operation, on the slowest rank: medians.
struct OperationSeconds {
  double all = 0;
  double host = 0;  // of that, until the host may go on: on a GPU it only hands the operation over
};
// `stream`: that of a GPU, null on the CPU.
absl::StatusOr<OperationSeconds> SecondsOf(Communicator& comm, Stream* stream,
                                           const Operation& operation, int64_t elements,
                                           int repetitions);

}  // namespace stretto::bench

#endif  // STRETTO_BENCHMARKS_OPERATIONS_H_
