#include "stretto/core/phase_timer.h"

#include <algorithm>

#include "src/core/time_marks.h"

namespace stretto {
namespace {

// Room for marks of those who reserve none, and the most that is made in advance.
constexpr size_t kUsualMarks = 1024, kMostMarks = size_t{1} << 16;
constexpr int kNoPhase = -1;

}  // namespace

PhaseTimer::PhaseTimer(Stream& stream, int phases)
    : stream_(stream),
      seconds_(static_cast<size_t>(phases)),
      marks_(std::make_unique<TimeMarks>(stream, kUsualMarks)) {
  phases_.reserve(kUsualMarks);
}
PhaseTimer::~PhaseTimer() = default;

void PhaseTimer::Reserve(int64_t marks) {
  const size_t room = std::min(kMostMarks, static_cast<size_t>(std::max<int64_t>(marks, 0)));
  if (room <= kUsualMarks) return;
  phases_.reserve(room);
  marks_ = std::make_unique<TimeMarks>(stream_, room);
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
  marks_->Mark(stream_, mark);
}

const std::vector<double>& PhaseTimer::Seconds() {
  std::fill(seconds_.begin(), seconds_.end(), 0.0);
  for (size_t i = 0; i + 1 < phases_.size(); ++i) {
    if (phases_[i] == kNoPhase) continue;
    const double seconds = marks_->SecondsBetween(i, i + 1);
    if (seconds < 0) {
      std::fill(seconds_.begin(), seconds_.end(), -1.0);
      break;
    }
    seconds_[static_cast<size_t>(phases_[i])] += seconds;
  }
  return seconds_;
}

}  // namespace stretto
