// What the clocks of the ranks have to do with each other.
#ifndef STRETTO_COMM_CLOCK_H_
#define STRETTO_COMM_CLOCK_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "stretto/comm/communicator.h"

namespace stretto {

struct ClockOffset {
  int64_t offset_ns = 0;  // rank 0's clock minus this rank's
  int64_t error_ns = 0;   // how far off that may be at most, either way
};

// One question to rank 0 and its answer: this rank's clock before and after, rank 0's in between.
struct ClockReading {
  int64_t asked_ns = 0, theirs_ns = 0, answered_ns = 0;
};
// From the reading with the shortest round trip (Cristian, "Probabilistic clock synchronization",
// 1989): rank 0 read its clock somewhere within it. Of no reading: zeros.
ClockOffset OffsetOf(const std::vector<ClockReading>& readings);

// All ranks call this together, while nothing else is going on between them: each in turn asks rank
// 0 a few times, over the connections between hosts. `now` is the rank's clock.
absl::StatusOr<ClockOffset> AlignClocks(Communicator& comm, const std::function<int64_t()>& now);

}  // namespace stretto

#endif  // STRETTO_COMM_CLOCK_H_
