// Runs a plan's actions on one frame.
#ifndef STRETTO_PARALLEL_EXECUTOR_H_
#define STRETTO_PARALLEL_EXECUTOR_H_

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

// Enqueues the whole list in order. `frame` must have been planned for these actions. Errors are
// sticky on the run's stream.
void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame,
             ActionHooks* hooks = nullptr);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_EXECUTOR_H_
