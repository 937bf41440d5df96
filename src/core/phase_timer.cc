#include "stretto/core/phase_timer.h"

#include <algorithm>

#include "src/core/device_runtime.h"

namespace stretto {
namespace {

// Marks that a step needs at most before memory is taken for more.
constexpr size_t kUsualMarks = 1024;
constexpr int kNoPhase = -1;

}  // namespace

PhaseTimer::PhaseTimer(Stream& stream, int phases)
    : stream_(stream), seconds_(static_cast<size_t>(phases)) {
  phases_.reserve(kUsualMarks);
  times_.resize(stream.device_queue_ == nullptr ? kUsualMarks : 0);
}

void PhaseTimer::Restart(int phase) {
  phases_.clear();
  Mark(phase);
}

int PhaseTimer::Begin(int phase) {
  const int until_now = phases_.empty() ? kNoPhase : phases_.back();
  if (phase != until_now) Mark(phase);
  return until_now;
}

void PhaseTimer::End() { Mark(kNoPhase); }

void PhaseTimer::Mark(int phase) {
  const size_t mark = phases_.size();
  phases_.push_back(phase);
  if (stream_.device_queue_ != nullptr) {
    stream_.Fail(stream_.device_queue_->MarkTime(static_cast<int>(mark)));
    return;
  }
  if (mark == times_.size()) {
    // Marks that are still to be written must not move.
    stream_.Synchronize().IgnoreError();
    times_.resize(2 * times_.size());
  }
  Clock::time_point* time = &times_[mark];
  stream_.Enqueue([time] { *time = Clock::now(); });
}

const std::vector<double>& PhaseTimer::Seconds() {
  std::fill(seconds_.begin(), seconds_.end(), 0.0);
  for (size_t i = 0; i + 1 < phases_.size(); ++i) {
    if (phases_[i] == kNoPhase) continue;
    const double seconds =
        stream_.device_queue_ != nullptr
            ? stream_.device_queue_->SecondsBetween(static_cast<int>(i), static_cast<int>(i + 1))
            : std::chrono::duration<double>(times_[i + 1] - times_[i]).count();
    if (seconds < 0) {
      std::fill(seconds_.begin(), seconds_.end(), -1.0);
      break;
    }
    seconds_[static_cast<size_t>(phases_[i])] += seconds;
  }
  return seconds_;
}

}  // namespace stretto
