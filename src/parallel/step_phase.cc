#include "stretto/parallel/step_phase.h"

#include <utility>

namespace stretto {
namespace {

const char* Name(StepPhase phase) {
  switch (phase) {
    case StepPhase::kExposedData:
      return "wait for data";
    case StepPhase::kExposedTensor:
      return "wait for tensor";
    case StepPhase::kExposedContext:
      return "wait for context";
    case StepPhase::kExposedPipeline:
      return "wait for pipeline";
    case StepPhase::kExposedWorld:
      return "wait for world";
    default:
      return "wait";
  }
}

}  // namespace

ExposedWait::ExposedWait(Communicator& comm, Stream& stream, PhaseTimer* timer, StepPhase phase)
    : timer_(timer),
      before_(timer == nullptr ? -1 : timer->Begin(static_cast<int>(phase))),
      span_(std::in_place, comm.trace(), "exposed", Name(phase), &stream) {}

absl::Status TimedWait(Communicator& comm, Stream& stream, PhaseTimer* timer, StepPhase phase,
                       Ticket ticket) {
  const ExposedWait wait(comm, stream, timer, phase);
  return comm.Wait(stream, ticket);
}

}  // namespace stretto
