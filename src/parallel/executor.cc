#include "stretto/parallel/executor.h"

namespace stretto {

void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame,
             ActionHooks* hooks) {
  ActionHooks nothing;
  if (hooks == nullptr) hooks = &nothing;
  for (const Action& action : list.actions) {
    frame.Begin(action);
    const Layer& layer = *graph.layers[action.layer];
    switch (action.kind) {
      case ActionKind::kForward:
        hooks->BeforeForward(action.layer);
        layer.Forward(run, frame);
        break;
      case ActionKind::kRecompute:
        layer.Recompute(run, frame);
        break;
      case ActionKind::kBackwardInput:
        layer.BackwardInput(run, frame);
        break;
      case ActionKind::kBackwardWeight:
        layer.BackwardWeight(run, frame);
        hooks->AfterBackwardWeight(action.layer);
        break;
    }
    hooks->BetweenActions();
  }
}

}  // namespace stretto
