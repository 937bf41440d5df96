// Where a stream's time goes, by phase, on the stream's own clock.
#ifndef STRETTO_CORE_PHASE_TIMER_H_
#define STRETTO_CORE_PHASE_TIMER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "stretto/core/stream.h"

namespace stretto {

class TimeMarks;  // src/core/time_marks.h

// Cuts a stream's work into phases that follow each other without gaps. A device notes the times
// itself, so a phase that waits for another stream is as long as that wait holds this stream up,
// whatever the host does meanwhile. Nothing is read before the work is done.
class PhaseTimer {
 public:
  // Numbers of phases are below `phases`. The stream outlives the timer.
  PhaseTimer(Stream& stream, int phases);
  ~PhaseTimer();
  // Room for the marks of a step: one for each Restart and End, and for each Begin of another
  // phase. With fewer than a step sets, the first one takes memory. Before the first mark.
  void Reserve(int64_t marks);

  // Forgets everything and begins `phase` here.
  void Restart(int phase);
  // What is enqueued from now on belongs to `phase`. Returns the phase until now.
  int Begin(int phase);
  // The last phase ends here.
  void End();
  // Seconds of each phase between Restart and End, when the stream has been synchronized since.
  // -1 for all of them where the device did not tell.
  const std::vector<double>& Seconds();

 private:
  void Mark(int phase);

  Stream& stream_;
  std::vector<double> seconds_;
  std::vector<int> phases_;  // by mark: what begins there
  std::unique_ptr<TimeMarks> marks_;
};

}  // namespace stretto

#endif  // STRETTO_CORE_PHASE_TIMER_H_
