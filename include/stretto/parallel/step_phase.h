// What a step's time is spent on, for a PhaseTimer.
#ifndef STRETTO_PARALLEL_STEP_PHASE_H_
#define STRETTO_PARALLEL_STEP_PHASE_H_

namespace stretto {

enum class StepPhase : int {
  kForward,
  kBackward,
  kExposed,       // waiting for gradients and parameters that nothing overlapped
  kPipelineWait,  // waiting for another stage: a schedule's bubbles, and messages on their way
  kUpdate,        // norm, clipping, optimizer
  kCount,
};

}  // namespace stretto

#endif  // STRETTO_PARALLEL_STEP_PHASE_H_
