#include "stretto/parallel/step_phase.h"

namespace stretto {

absl::Status TimedWait(Communicator& comm, Stream& stream, PhaseTimer* timer, StepPhase phase,
                       Ticket ticket) {
  const int before = timer == nullptr ? -1 : timer->Begin(static_cast<int>(phase));
  absl::Status status = comm.Wait(stream, ticket);
  if (before >= 0) timer->Begin(before);
  return status;
}

}  // namespace stretto
