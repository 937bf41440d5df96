#include "stretto/parallel/executor.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "stretto/core/copy.h"
#include "stretto/plan/context_cut.h"

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
// Of each place where its documents begin and how much is in front; of this one the same of what is
// in the back. With two ranks at least there are no more documents than half the shares.
int64_t RingBytesOf(const RingCapacity& rings) {
  if (rings.ranks == 1) return 0;
  return (3 * rings.shares + rings.ranks + 1) * static_cast<int64_t>(sizeof(int32_t));
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
  views.ring_size = batch.ring.size();
  return views;
}

TokenFeeder::TokenFeeder(Stream& stream, int64_t capacity, const RingCapacity& rings)
    : stream_(stream), capacity_(capacity), rings_(rings) {
  ring_.places.reserve(static_cast<size_t>(rings.ranks));
}

int64_t TokenFeeder::DeviceBytes(DeviceKind kind, int64_t token_capacity,
                                 const RingCapacity& rings) {
  // Work of the batch before may still be under way on the CPU, which reads what the host wrote.
  return kind == DeviceKind::kCpu ? kSlots * RingBytesOf(rings)
                                  : FeederBytes(token_capacity) + RingBytesOf(rings);
}

absl::StatusOr<std::unique_ptr<TokenFeeder>> TokenFeeder::Create(Stream& stream,
                                                                 int64_t token_capacity,
                                                                 Budget& budget,
                                                                 const RingCapacity& rings) {
  auto feeder = std::unique_ptr<TokenFeeder>(new TokenFeeder(stream, token_capacity, rings));
  const Device device = stream.device();
  if (device.kind == DeviceKind::kCpu) {
    const int64_t bytes = kSlots * RingBytesOf(rings);
    if (bytes == 0) return feeder;
    STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kHostMemory, "tokens", bytes));
    STRETTO_ASSIGN_OR_RETURN(feeder->host_, Arena::CreateHost(device, "tokens", bytes));
    return feeder;
  }
  const int64_t bytes = FeederBytes(token_capacity) + RingBytesOf(rings);
  STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kDeviceMemory, "tokens", bytes));
  STRETTO_ASSIGN_OR_RETURN(feeder->device_, Arena::Create(device, "tokens", bytes));
  STRETTO_RETURN_IF_ERROR(budget.Reserve(Resource::kHostMemory, "tokens", kSlots * bytes));
  STRETTO_ASSIGN_OR_RETURN(feeder->host_, Arena::CreateHost(device, "tokens", kSlots * bytes));
  return feeder;
}

absl::Status TokenFeeder::Check(const PackedBatch& batch) const {
  const PackedBatch::Ring& ring = batch.ring;
  const int size = ring.size();
  if (batch.tokens() > capacity_) {
    return absl::InvalidArgumentError(absl::StrCat("a micro-batch has ", batch.tokens(),
                                                   " tokens, the feeder was made for ", capacity_));
  }
  if (batch.sequences() > capacity_) {
    return absl::InvalidArgumentError(absl::StrCat("a micro-batch has ", batch.sequences(),
                                                   " documents, the feeder was made for ",
                                                   capacity_, " tokens, one each"));
  }
  if (size == 1) return absl::OkStatus();
  const auto documents = static_cast<int64_t>(ring.lengths.size());
  if (size > rings_.ranks || documents * size > rings_.shares) {
    return absl::InvalidArgumentError(absl::StrCat(
        size, " ranks share ", documents, " documents of a micro-batch, the feeder was made for ",
        rings_.ranks, " ranks and ", rings_.shares,
        " shares of documents; give fewer ranks to short documents, or pack fewer of them"));
  }
  if (ring.index < 0 || ring.index >= size || documents != batch.sequences()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "place ", ring.index, " of a ring of ", size, " ranks has parts of ", batch.sequences(),
        " documents, and there are ", documents, "; see SliceForRing"));
  }
  int64_t before = 0;
  for (int64_t d = 0; d < documents; ++d) {
    const auto at = static_cast<size_t>(d);
    const int64_t tokens = ContextPartOf(ring.lengths[at], before, size, ring.index).tokens();
    before += ring.lengths[at];
    if (batch.cu_seqlens[at + 1] - batch.cu_seqlens[at] == tokens) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("place ", ring.index, " of a ring of ", size, " ranks has ",
                     batch.cu_seqlens[at + 1] - batch.cu_seqlens[at], " tokens of document ", d,
                     " of ", ring.lengths[at], ", not ", tokens, "; see SliceForRing"));
  }
  for (int place = 0; place < size; ++place) {
    const int64_t tokens = ContextTokens(ring.lengths, size, place);
    if (tokens <= capacity_) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("place ", place, " of a ring of ", size, " ranks has ", tokens,
                     " tokens of a micro-batch, the feeder was made for ", capacity_));
  }
  return absl::OkStatus();
}

int64_t TokenFeeder::DescribeRing(const PackedBatch& batch, std::byte* host, std::byte* device) {
  const PackedBatch::Ring& ring = batch.ring;
  const int size = ring.size();
  const size_t documents = ring.lengths.size();
  auto* const numbers = reinterpret_cast<int32_t*>(host);
  int64_t used = 0;
  const auto take = [&](size_t count) {
    Tensor t = Tensor::Of(device + used * static_cast<int64_t>(sizeof(int32_t)), DType::kI32,
                          {static_cast<int64_t>(count)}, stream_.device());
    used += static_cast<int64_t>(count);
    return t;
  };
  ring_.index = ring.index;
  ring_.places.clear();
  for (int p = 0; p < size; ++p) {
    RingViews::Place& place = ring_.places.emplace_back();
    place.rank = ring.ranks[static_cast<size_t>(p)];
    int32_t* const cu = numbers + used;
    place.cu = take(documents + 1);
    int32_t* const front = numbers + used;
    place.front = take(documents);
    cu[0] = 0;
    int64_t before = 0;
    for (size_t d = 0; d < documents; ++d) {
      const ContextPart part = ContextPartOf(ring.lengths[d], before, size, p);
      before += ring.lengths[d];
      cu[d + 1] = cu[d] + static_cast<int32_t>(part.tokens());
      front[d] = static_cast<int32_t>(part.front.count);
      place.longest = std::max(place.longest, part.tokens());
      place.longest_front = std::max(place.longest_front, part.front.count);
    }
    place.tokens = cu[documents];
  }
  int32_t* const back = numbers + used;
  ring_.back_cu = take(documents + 1);
  int32_t* const lengths = numbers + used;
  ring_.back_lengths = take(documents);
  ring_.longest_back = 0;
  int64_t before = 0;
  for (size_t d = 0; d < documents; ++d) {
    const ContextPart part = ContextPartOf(ring.lengths[d], before, size, ring.index);
    before += ring.lengths[d];
    back[d] = batch.cu_seqlens[d] + static_cast<int32_t>(part.front.count);
    lengths[d] = static_cast<int32_t>(part.back.count);
    ring_.longest_back = std::max(ring_.longest_back, part.back.count);
  }
  back[documents] = batch.cu_seqlens[documents];
  return used * static_cast<int64_t>(sizeof(int32_t));
}

absl::StatusOr<TokenViews> TokenFeeder::Feed(const PackedBatch& batch) {
  STRETTO_RETURN_IF_ERROR(Check(batch));
  TokenViews views = ViewsOf(batch);
  const bool shared = views.ring_size > 1;
  if (shared) views.ring = &ring_;
  const bool on_cpu = stream_.device().kind == DeviceKind::kCpu;
  if (on_cpu && !shared) return views;

  const int slot = next_;
  next_ = (next_ + 1) % kSlots;
  if (on_cpu) {
    // What was enqueued until now reads the other slot, or this one two batches ago.
    copied_[next_] = stream_.Record();
    while (!copied_[slot].Done()) std::this_thread::yield();
    std::byte* const at = host_.data() + slot * RingBytesOf(rings_);
    DescribeRing(batch, at, at);
    return views;
  }
  while (!copied_[slot].Done()) std::this_thread::yield();  // two batches ago
  std::byte* const host = host_.data() + slot * (FeederBytes(capacity_) + RingBytesOf(rings_));
  int64_t used = 0;
  for (Tensor* t :
       {&views.ids, &views.targets, &views.positions, &views.weights, &views.cu_seqlens}) {
    std::memcpy(host + used, t->data, static_cast<size_t>(t->bytes()));
    t->data = device_.data() + used;
    t->device = stream_.device();
    used += t->bytes();
  }
  if (shared) used += DescribeRing(batch, host + used, device_.data() + used);
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
  const auto communicates = [&](size_t i) {
    return graph.layers[static_cast<size_t>(actions[i].layer)]->Communicates(actions[i].kind,
                                                                             frame);
  };
  for (size_t first = begin, end = begin; first < stop; first = end) {
    if (first == begin || forward(first) != forward(first - 1)) hooks->BeginPass(!forward(first));
    if (hooks->ActsBefore(first, actions[first])) hooks->Before(first, actions[first]);
    // As far as nobody else has something to do, and one action at a time where nothing is
    // replayed.
    const bool alone = communicates(first);
    for (end = first + 1; replays != nullptr && !alone && end < stop; ++end) {
      if (forward(end) != forward(first) || hooks->ActsAfter(end - 1, actions[end - 1])) break;
      if (communicates(end)) break;
      if (hooks->ActsBefore(end, actions[end])) break;
    }
    const auto enqueue = [&] {
      for (size_t i = first; i < end; ++i) {
        frame.Begin(actions[i]);
        Enqueue(*graph.layers[actions[i].layer], actions[i].kind, run, frame);
      }
    };
    if (replays != nullptr && !alone) {
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
