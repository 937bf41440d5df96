// Runs a plan's actions on one frame.
#ifndef STRETTO_PARALLEL_EXECUTOR_H_
#define STRETTO_PARALLEL_EXECUTOR_H_

#include "stretto/data/batch.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"

namespace stretto {

// What else happens around a layer's actions: parameters that must have arrived, gradients that are
// complete, communication that can advance.
class ActionHooks {
 public:
  virtual ~ActionHooks() = default;
  virtual void BeforeForward(int /*layer*/) {}
  virtual void AfterBackwardWeight(int /*layer*/) {}
  virtual void BetweenActions() {}
};

// Views of a host batch for a frame on the CPU: nothing is copied, so the batch must stay as it is
// until the frame's work is done.
TokenViews ViewsOf(const PackedBatch& batch);

// Enqueues the whole list in order. `frame` must have been planned for these actions. Errors are
// sticky on the run's stream.
void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame,
             ActionHooks* hooks = nullptr);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_EXECUTOR_H_
