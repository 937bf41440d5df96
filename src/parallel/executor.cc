#include "stretto/parallel/executor.h"

#include <algorithm>
#include <cstring>
#include <functional>
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

// The numbers and addresses that a piece of work is enqueued with, as far as they can change, and
// what it does to the run. Layers read nothing else.
struct ReplayCache::Piece {
  const ActionList* list = nullptr;
  size_t first = 0, end = 0;
  const stretto::Run* run = nullptr;
  const std::byte* memory = nullptr;
  TokenViews tokens;
  Frame::Boundary boundary;
  stretto::Run::Touched before, after;
  StreamGraph graph;
  uint64_t used = 0;  // 0: never

  bool Matches(const Piece& o) const {
    const TokenViews &a = tokens, &b = o.tokens;
    return list == o.list && first == o.first && end == o.end && run == o.run &&
           memory == o.memory && boundary.in.data == o.boundary.in.data &&
           boundary.out.data == o.boundary.out.data && a.tokens == b.tokens &&
           a.max_length == b.max_length && a.uniform == b.uniform &&
           a.cu_seqlens.rows() == b.cu_seqlens.rows() && a.cu_seqlens.data == b.cu_seqlens.data &&
           a.ids.data == b.ids.data && a.targets.data == b.targets.data &&
           a.positions.data == b.positions.data && a.weights.data == b.weights.data &&
           before == o.before;
  }
  // Everything but the graph and what it does.
  void CopyKey(const Piece& o) {
    list = o.list;
    first = o.first;
    end = o.end;
    run = o.run;
    memory = o.memory;
    tokens = o.tokens;
    boundary = o.boundary;
    before = o.before;
  }
};

ReplayCache::ReplayCache(Stream& stream)
    : stream_(stream), wanted_(std::make_unique<Piece>()), seen_(32), pieces_(64) {}
ReplayCache::~ReplayCache() { stream_.Synchronize().IgnoreError(); }

ReplayCache::Piece* ReplayCache::Find(std::vector<Piece>& pieces, const Piece& wanted) {
  for (Piece& piece : pieces) {
    if (piece.used != 0 && piece.Matches(wanted)) return &piece;
  }
  return nullptr;
}

void ReplayCache::Run(const ActionList& list, size_t first, size_t end, stretto::Run& run,
                      const Frame& frame, const std::function<void()>& enqueue) {
  Piece& wanted = *wanted_;
  wanted.list = &list;
  wanted.first = first;
  wanted.end = end;
  wanted.run = &run;
  wanted.memory = frame.memory();
  wanted.tokens = frame.tokens;
  wanted.boundary = frame.boundary;
  wanted.before = run.touched();
  ++clock_;
  if (Piece* piece = Find(pieces_, wanted)) {
    stream_.Launch(piece->graph);
    run.SetTouched(piece->after);
    piece->used = clock_;
    ++launched_;
    return;
  }
  const auto oldest = [](std::vector<Piece>& pieces) -> Piece& {
    return *std::min_element(pieces.begin(), pieces.end(),
                             [](const Piece& a, const Piece& b) { return a.used < b.used; });
  };
  Piece* once = Find(seen_, wanted);
  if (once == nullptr || !stream_.status().ok()) {
    Piece& slot = oldest(seen_);
    slot.CopyKey(wanted);
    slot.used = clock_;
    enqueue();
    return;
  }
  once->used = 0;
  Piece& slot = oldest(pieces_);
  if (slot.used != 0) stream_.Synchronize().IgnoreError();  // it may still be running
  slot.used = 0;
  if (const absl::Status begun = stream_.BeginCapture(); !begun.ok()) {
    stream_.Fail(begun);
    return;
  }
  enqueue();
  absl::StatusOr<StreamGraph> graph = stream_.EndCapture();
  if (!graph.ok()) {
    stream_.Fail(graph.status());
    return;
  }
  slot.CopyKey(wanted);
  slot.graph = *std::move(graph);
  slot.after = run.touched();
  slot.used = clock_;
  ++captured_;
  stream_.Launch(slot.graph);
  ++launched_;
}

namespace {

void Enqueue(const Layer& layer, ActionKind kind, Run& run, Frame& frame) {
  switch (kind) {
    case ActionKind::kForward:
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
      break;
    case ActionKind::kStartInput:
    case ActionKind::kFinishInput:
    case ActionKind::kStartWeight:
      layer.Exchange(kind, run, frame);
      break;
  }
}

class NoHooks final : public ActionHooks {
  bool ActsBefore(size_t /*index*/, const Action& /*action*/) const override { return false; }
  bool ActsAfter(size_t /*index*/, const Action& /*action*/) const override { return false; }
};

}  // namespace

void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame, ActionHooks* hooks,
             ReplayCache* replays) {
  ExecuteSome(graph, list, 0, list.actions.size(), run, frame, hooks, replays);
}

void ExecuteSome(const Graph& graph, const ActionList& list, size_t begin, size_t stop, Run& run,
                 Frame& frame, ActionHooks* hooks, ReplayCache* replays) {
  NoHooks nothing;
  if (hooks == nullptr) hooks = &nothing;
  if (replays != nullptr && !run.ops().stream->CanCapture()) replays = nullptr;
  const std::vector<Action>& actions = list.actions;
  const auto forward = [&](size_t i) { return actions[i].kind == ActionKind::kForward; };
  for (size_t first = begin, end = begin; first < stop; first = end) {
    if (first == begin || forward(first) != forward(first - 1)) hooks->BeginPass(!forward(first));
    if (hooks->ActsBefore(first, actions[first])) hooks->Before(first, actions[first]);
    // As far as nobody else has something to do, and one action at a time where nothing is
    // replayed.
    for (end = first + 1; replays != nullptr && end < stop; ++end) {
      if (forward(end) != forward(first) || hooks->ActsAfter(end - 1, actions[end - 1])) break;
      if (hooks->ActsBefore(end, actions[end])) break;
    }
    const auto enqueue = [&] {
      for (size_t i = first; i < end; ++i) {
        frame.Begin(actions[i]);
        Enqueue(*graph.layers[actions[i].layer], actions[i].kind, run, frame);
      }
    };
    if (replays != nullptr) {
      replays->Run(list, first, end, run, frame, std::ref(enqueue));  // a reference takes no memory
    } else {
      enqueue();
    }
    if (hooks->ActsAfter(end - 1, actions[end - 1])) hooks->After(end - 1, actions[end - 1]);
    hooks->BetweenActions();
  }
}

void FollowHooks(const ActionList& list, size_t first, size_t end, ActionHooks& hooks) {
  const std::vector<Action>& actions = list.actions;
  const auto forward = [&](size_t i) { return actions[i].kind == ActionKind::kForward; };
  for (size_t i = first; i < end; ++i) {
    if (i == first || forward(i) != forward(i - 1)) hooks.BeginPass(!forward(i));
    if (hooks.ActsBefore(i, actions[i])) hooks.Before(i, actions[i]);
    if (hooks.ActsAfter(i, actions[i])) hooks.After(i, actions[i]);
    hooks.BetweenActions();
  }
}

}  // namespace stretto
