#include "src/core/time_marks.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace stretto {

int64_t SteadyNanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

TimeMarks::TimeMarks(Stream& stream, size_t count) {
  const Device device = stream.device();
  if (stream.device_queue_ == nullptr) {
    times_.resize(count);
    return;
  }
  absl::StatusOr<std::unique_ptr<DeviceMarks>> made =
      RuntimeOf(device.kind)->CreateMarks(device.index, count);
  if (made.ok()) {
    device_ = *std::move(made);
  } else {
    stream.Fail(made.status());
  }
}

TimeMarks::~TimeMarks() = default;

void TimeMarks::Mark(Stream& stream, size_t mark) {
  if (stream.device_queue_ != nullptr) {
    if (device_ != nullptr) stream.Fail(device_->Mark(*stream.device_queue_, mark));
    return;
  }
  if (mark >= times_.size()) {
    // Marks that are still to be written must not move.
    stream.Synchronize().IgnoreError();
    times_.resize(std::max(mark + 1, 2 * times_.size()));
  }
  int64_t* const time = &times_[mark];
  stream.Enqueue([time] { *time = SteadyNanoseconds(); });
}

double TimeMarks::SecondsBetween(size_t from, size_t to) const {
  if (device_ != nullptr) return device_->SecondsBetween(from, to);
  return times_.empty() ? -1 : 1e-9 * static_cast<double>(times_[to] - times_[from]);
}

int64_t TimeMarks::Tie(Stream& stream, size_t mark) {
  if (stream.device_queue_ == nullptr) return 0;
  stream.Synchronize().IgnoreError();
  // Each try sets the mark anew, so the last one counts: it goes on until a wait is about as short
  // as the shortest of the first few.
  constexpr int kTries = 8, kMost = 32;
  int64_t shortest = INT64_MAX, waited = 0;
  for (int i = 0; i < kMost && (i < kTries || waited > shortest + shortest / 4); ++i) {
    const int64_t before = SteadyNanoseconds();
    Mark(stream, mark);
    stream.Synchronize().IgnoreError();
    waited = SteadyNanoseconds() - before;
    shortest = std::min(shortest, waited);
    tie_time_ = before + waited / 2;
  }
  tie_mark_ = mark;
  return waited / 2;
}

int64_t TimeMarks::HostTime(size_t mark) const {
  if (device_ == nullptr) return times_.empty() ? -1 : times_[mark];
  if (tie_time_ < 0) return -1;
  const double seconds = device_->SecondsBetween(tie_mark_, mark);
  return seconds < 0 ? -1 : tie_time_ + std::llround(1e9 * seconds);
}

}  // namespace stretto
