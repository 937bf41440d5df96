#include "stretto/parallel/executor.h"

namespace stretto {

TokenViews ViewsOf(const PackedBatch& batch) {
  const auto ints = [](const std::vector<int32_t>& v) {
    return Tensor::Of(const_cast<int32_t*>(v.data()), DType::kI32,
                      {static_cast<int64_t>(v.size())});
  };
  TokenViews views;
  views.tokens = batch.tokens();
  views.ids = ints(batch.ids);
  views.targets = ints(batch.targets);
  views.positions = ints(batch.positions);
  views.cu_seqlens = ints(batch.cu_seqlens);
  views.weights = Tensor::Of(const_cast<float*>(batch.weights.data()), DType::kF32,
                             {static_cast<int64_t>(batch.weights.size())});
  views.max_length = batch.max_length;
  return views;
}

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
