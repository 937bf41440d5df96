#include "stretto/parallel/executor.h"

#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/core/copy.h"

namespace stretto {
namespace {

// The length that all sequences have, or 0.
int64_t UniformLength(const PackedBatch& batch) {
  const auto& cu = batch.cu_seqlens;
  if (cu.size() < 2 || cu[1] <= 0) return 0;
  for (size_t i = 1; i < cu.size(); ++i) {
    if (cu[i] - cu[i - 1] != cu[1]) return 0;
  }
  return cu[1];
}

// Where the parts of a batch lie in the feeder's memory: four numbers a token, then the boundaries.
constexpr int kPerToken = 4;
int64_t FeederBytes(int64_t capacity) {
  return (kPerToken * capacity + capacity + 1) * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace

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
  views.uniform = UniformLength(batch);
  return views;
}

int64_t TokenFeeder::DeviceBytes(DeviceKind kind, int64_t token_capacity) {
  return kind == DeviceKind::kCpu ? 0 : FeederBytes(token_capacity);
}

absl::StatusOr<std::unique_ptr<TokenFeeder>> TokenFeeder::Create(Stream& stream,
                                                                 int64_t token_capacity,
                                                                 Budget& budget) {
  auto feeder = std::unique_ptr<TokenFeeder>(new TokenFeeder(stream, token_capacity));
  const Device device = stream.device();
  if (device.kind == DeviceKind::kCpu) return feeder;
  const int64_t bytes = FeederBytes(token_capacity);
  STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kDeviceMemory, "tokens", bytes));
  STRETTO_ASSIGN_OR_RETURN(feeder->device_, Arena::Create(device, "tokens", bytes));
  STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kHostMemory, "tokens", kSlots * bytes));
  STRETTO_ASSIGN_OR_RETURN(feeder->host_, Arena::CreateHost(device, "tokens", kSlots * bytes));
  return feeder;
}

absl::StatusOr<TokenViews> TokenFeeder::Feed(const PackedBatch& batch) {
  if (batch.tokens() > capacity_) {
    return absl::InvalidArgumentError(absl::StrCat("a micro-batch has ", batch.tokens(),
                                                   " tokens, the feeder was made for ", capacity_));
  }
  TokenViews views = ViewsOf(batch);
  if (stream_.device().kind == DeviceKind::kCpu) return views;

  const int slot = next_;
  next_ = (next_ + 1) % kSlots;
  while (!copied_[slot].Done()) std::this_thread::yield();  // two batches ago
  std::byte* const host = host_.data() + slot * FeederBytes(capacity_);
  int64_t used = 0;
  for (Tensor* t :
       {&views.ids, &views.targets, &views.positions, &views.weights, &views.cu_seqlens}) {
    std::memcpy(host + used, t->data, static_cast<size_t>(t->bytes()));
    t->data = device_.data() + used;
    t->device = stream_.device();
    used += t->bytes();
  }
  CopyBytes(stream_, device_.data(), host, used);
  copied_[slot] = stream_.Record();
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
