// What a step's time is spent on, for a PhaseTimer.
#ifndef STRETTO_PARALLEL_STEP_PHASE_H_
#define STRETTO_PARALLEL_STEP_PHASE_H_

#include <optional>

#include "stretto/comm/communicator.h"
#include "stretto/core/phase_timer.h"
#include "stretto/core/stream.h"
#include "stretto/core/trace_recorder.h"

namespace stretto {

// The exposed ones: the stream has nothing to do but to wait for other ranks. A wait is as long as
// the others are late and the message is on its way, together.
enum class StepPhase : int {
  kForward,
  kBackward,
  kExposedData,      // for gradients and parameters of the data axis
  kExposedTensor,    // for the ranks that share a layer
  kExposedContext,   // for the ranks that share a document
  kExposedPipeline,  // for another stage: a schedule's bubbles, and messages on their way
  kExposedWorld,     // for the step's scalars, which all ranks sum: the slowest one
  kExposedSnapshot,  // until copies have left what the update writes: for this rank's own keeper
  kUpdate,           // norm, clipping, optimizer
  kCount,
};

// The stream's time while it lives is that of `phase`, and an action of the communicator's trace.
// `timer` may be null.
class ExposedWait {
 public:
  ExposedWait(Communicator& comm, Stream& stream, PhaseTimer* timer, StepPhase phase);
  ~ExposedWait() {
    span_.reset();
    if (before_ >= 0) timer_->Begin(before_);
  }
  ExposedWait(const ExposedWait&) = delete;
  ExposedWait& operator=(const ExposedWait&) = delete;

 private:
  PhaseTimer* timer_;
  int before_;
  std::optional<TraceSpan> span_;
};

// Work enqueued on `stream` from now on sees the result of `ticket`; the stream's time until then
// is that of `phase`. `timer` may be null.
absl::Status TimedWait(Communicator& comm, Stream& stream, PhaseTimer* timer, StepPhase phase,
                       Ticket ticket);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_STEP_PHASE_H_
