#include "stretto/comm/clock.h"

#include <algorithm>

namespace stretto {

ClockOffset OffsetOf(const std::vector<ClockReading>& readings) {
  const auto shortest = std::min_element(
      readings.begin(), readings.end(), [](const ClockReading& a, const ClockReading& b) {
        return a.answered_ns - a.asked_ns < b.answered_ns - b.asked_ns;
      });
  if (shortest == readings.end()) return {};
  const int64_t half = (shortest->answered_ns - shortest->asked_ns + 1) / 2;
  return {.offset_ns = shortest->theirs_ns - (shortest->asked_ns + half), .error_ns = half};
}

absl::StatusOr<ClockOffset> AlignClocks(Communicator& comm, const std::function<int64_t()>& now) {
  constexpr int kRounds = 16;
  const Group& all = comm.all();
  int64_t word = 0;
  const Tensor message = Tensor::Of(&word, DType::kI64, {1});
  const auto send = [&](int to) { return comm.Wait(comm.Send(all, message, to, "clock")); };
  const auto receive = [&](int from) {
    return comm.Wait(comm.Receive(all, message, from, "clock"));
  };
  if (all.index != 0) {
    std::vector<ClockReading> readings;
    for (int i = 0; i < kRounds; ++i) {
      ClockReading& reading = readings.emplace_back();
      reading.asked_ns = now();
      STRETTO_RETURN_IF_ERROR(send(0));
      STRETTO_RETURN_IF_ERROR(receive(0));
      reading.answered_ns = now();
      reading.theirs_ns = word;
    }
    return OffsetOf(readings);
  }
  for (int rank = 1; rank < all.size(); ++rank) {
    for (int i = 0; i < kRounds; ++i) {
      STRETTO_RETURN_IF_ERROR(receive(rank));
      word = now();
      STRETTO_RETURN_IF_ERROR(send(rank));
    }
  }
  return ClockOffset();
}

}  // namespace stretto
