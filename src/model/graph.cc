#include "stretto/model/graph.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/model/layer.h"

namespace stretto {

Graph::Graph() = default;
Graph::~Graph() = default;
Graph::Graph(Graph&&) noexcept = default;
Graph& Graph::operator=(Graph&&) noexcept = default;

int64_t Graph::ParameterElements() const {
  int64_t n = 0;
  for (const ParameterInfo& p : parameters) n += p.elements();
  return n;
}

namespace {

// The slots that each layer writes.
std::vector<std::vector<int>> OutputsByLayer(const Graph& graph) {
  std::vector<std::vector<int>> outputs(graph.layers.size());
  for (size_t s = 0; s < graph.slots.size(); ++s) {
    const int producer = graph.slots[s].producer;
    if (producer >= 0) outputs[producer].push_back(static_cast<int>(s));
  }
  return outputs;
}

}  // namespace

std::string Graph::Describe() const {
  const std::vector<std::vector<int>> outputs = OutputsByLayer(*this);
  std::string out;
  for (size_t l = 0; l < layers.size(); ++l) {
    absl::StrAppendFormat(&out, "%4d  %-10s %s\n", static_cast<int>(l), layers[l]->kind(),
                          layer_names[l].c_str());
    for (int output : outputs[l]) {
      const SlotInfo& s = slots[output];
      absl::StrAppendFormat(&out, "          -> %s [tokens, %d] %s\n", s.name.c_str(), s.width,
                            stretto::Name(s.dtype));
    }
  }
  return out;
}

const char* Name(ActionKind kind) {
  switch (kind) {
    case ActionKind::kForward:
      return "F";
    case ActionKind::kRecompute:
      return "R";
    case ActionKind::kBackwardInput:
      return "B";
    case ActionKind::kBackwardWeight:
      return "W";
    case ActionKind::kStartInput:
      return ">B";
    case ActionKind::kFinishInput:
      return "B>";
    case ActionKind::kStartWeight:
      return ">W";
  }
  return "?";
}

const char* Name(Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return "none";
    case Recompute::kNormsAndActivations:
      return "norms";
    case Recompute::kBlock:
      return "block";
  }
  return "?";
}

namespace {

// Whether a slot's producer runs again, if at all, in the same place as `layer`.
bool SameBlock(const Graph& graph, const SlotInfo& slot, int layer) {
  return slot.producer >= 0 && graph.layer_block[slot.producer] == graph.layer_block[layer];
}

// Which values are worth dropping after forward, before asking whether backward needs them.
bool Droppable(const Graph& graph, const SlotInfo& slot, Recompute recompute) {
  if (slot.producer < 0 || graph.layer_block[slot.producer] < 0 || slot.keep_to_end) return false;
  // Blocks run again one by one, each just before its own backward: later blocks have gone by.
  for (const SlotInfo::Reader& r : slot.readers) {
    if (!SameBlock(graph, slot, r.layer) && (r.uses & (kInBackwardInput | kInBackwardWeight))) {
      return false;
    }
  }
  switch (recompute) {
    case Recompute::kNone:
      return false;
    case Recompute::kNormsAndActivations:
      return slot.cheap && slot.kind != SlotKind::kScratch;
    case Recompute::kBlock:
      return !slot.boundary && slot.kind != SlotKind::kScratch;
  }
  return false;
}

// Whether the layer that writes `outputs` reads its inputs when it runs again: not while its
// recompute source is kept.
bool RecomputeReadsInputs(const Graph& graph, const ActionList& list,
                          const std::vector<int>& outputs) {
  return std::none_of(outputs.begin(), outputs.end(),
                      [&](int s) { return graph.slots[s].recompute_source && !list.dropped[s]; });
}

unsigned BackwardUses(const SlotInfo& slot) {
  unsigned uses = slot.own_uses;
  for (const SlotInfo::Reader& r : slot.readers) uses |= r.uses;
  return uses & (kInBackwardInput | kInBackwardWeight);
}

// The backward pass; `again`: layers that run again at the end of their block.
class BackwardActions {
 public:
  BackwardActions(const Graph& graph, bool defer_weights, bool overlap, ActionList* list)
      : graph_(graph),
        layers_(static_cast<int>(graph.layers.size())),
        ahead_(overlap && !graph.exchanges.empty()),
        fill_(ahead_ && !defer_weights),
        follow_(!ahead_ && !defer_weights),
        weight_started_(list->filled_again),
        out_(list->actions) {
    for (const ExchangeInfo& e : graph.exchanges) {
      // What B sends away comes back.
      exchanges_.emplace(e.at == ActionKind::kBackwardInput ? ActionKind::kFinishInput : e.at,
                         e.layer);
    }
  }

  void Add(const std::vector<bool>& again) {
    for (int l = layers_ - 1; l >= 0; --l) {
      const bool starts = Exchanges(ActionKind::kStartInput, l);
      if (starts) {
        out_.push_back({ActionKind::kStartInput, l});
        if (fill_) AddWeights();
      }
      const int block = graph_.layer_block[l];
      if (block >= 0 && (l == layers_ - 1 || graph_.layer_block[l + 1] != block)) {
        int first = l;
        while (first > 0 && graph_.layer_block[first - 1] == block) --first;
        for (int r = first; r <= l; ++r) {
          if (again[r]) out_.push_back({ActionKind::kRecompute, r});
        }
      }
      if (fill_) {
        StartWeight(l);
        if (starts) StartWeight(NextStarter(l));
      }
      out_.push_back({ActionKind::kBackwardInput, l});
      if (Exchanges(ActionKind::kFinishInput, l)) {
        if (fill_) AddWeights();
        out_.push_back({ActionKind::kFinishInput, l});
      }
      weights_.push_back(l);
      if (follow_) AddWeights();
    }
    AddWeights();
  }

 private:
  bool Exchanges(ActionKind kind, int l) const { return exchanges_.count({kind, l}) > 0; }
  void StartWeight(int l) {
    if (l < 0 || weight_started_[l] || !Exchanges(ActionKind::kStartWeight, l)) return;
    weight_started_[l] = true;
    out_.push_back({ActionKind::kStartWeight, l});
  }
  // The next layer of the same block, before another one starts an exchange, whose W needs one: its
  // input is there, and travels under the inputs' halves up to its own.
  int NextStarter(int l) const {
    for (int c = l - 1; c >= 0 && graph_.layer_block[c] == graph_.layer_block[l]; --c) {
      if (Exchanges(ActionKind::kStartInput, c)) return -1;
      if (Exchanges(ActionKind::kStartWeight, c)) return c;
    }
    return -1;
  }
  // The weights' halves that have not been added yet.
  void AddWeights() {
    for (size_t i = 0; i < weights_.size(); ++i) {
      StartWeight(weights_[i]);
      // One exchange ahead, under this W.
      for (size_t k = i + 1; ahead_ && k < weights_.size(); ++k) {
        if (!Exchanges(ActionKind::kStartWeight, weights_[k])) continue;
        StartWeight(weights_[k]);
        break;
      }
      out_.push_back({ActionKind::kBackwardWeight, weights_[i]});
    }
    weights_.clear();
  }

  const Graph& graph_;
  int layers_;
  bool ahead_;                                      // exchanges start before what needs them
  bool fill_;                                       // W fill the time of exchanges
  bool follow_;                                     // each W follows its B
  std::set<std::pair<ActionKind, int>> exchanges_;  // actions of these kinds and layers
  std::vector<bool> weight_started_;
  std::vector<int> weights_;  // layers
  std::vector<Action>& out_;
};

}  // namespace

ActionList TrainingActions(const Graph& graph, Recompute recompute, bool defer_weights,
                           bool overlap) {
  const int layers = static_cast<int>(graph.layers.size());
  ActionList list;
  list.dropped.assign(graph.slots.size(), false);

  // What each layer writes and reads in forward.
  const std::vector<std::vector<int>> outputs = OutputsByLayer(graph);
  std::vector<std::vector<int>> inputs(layers);
  // Layers that cannot run again: they change in place what is not written again before them.
  std::vector<bool> once(layers, false);
  for (size_t s = 0; s < graph.slots.size(); ++s) {
    const SlotInfo& slot = graph.slots[s];
    for (const SlotInfo::Reader& r : slot.readers) {
      if (r.uses & kInForward) inputs[r.layer].push_back(static_cast<int>(s));
      if (slot.modified_by_reader && !SameBlock(graph, slot, r.layer)) once[r.layer] = true;
    }
    list.dropped[s] = Droppable(graph, slot, recompute);
  }
  for (int l = 0; l < layers; ++l) {
    if (!once[l]) continue;
    for (int s : outputs[l]) list.dropped[s] = false;
    for (int s : inputs[l]) {
      if (graph.slots[s].modified_by_reader) list.dropped[s] = false;
    }
  }

  // From the last layer back: a layer runs again when something it dropped is needed in backward,
  // by the backward halves themselves or as an input of another layer that runs again.
  std::vector<bool> needed(graph.slots.size(), false), again(layers, false);
  for (size_t s = 0; s < graph.slots.size(); ++s) needed[s] = BackwardUses(graph.slots[s]) != 0;
  for (int l = layers - 1; l >= 0; --l) {
    bool run = false;
    for (int s : outputs[l]) run |= list.dropped[s] && needed[s];
    // A value that was changed in place after it was written has to be changed again.
    for (int s : inputs[l]) {
      run |= graph.slots[s].modified_by_reader && list.dropped[s] && needed[s];
    }
    if (!run) continue;
    again[l] = true;
    if (!RecomputeReadsInputs(graph, list, outputs[l])) continue;
    for (int s : inputs[l]) {
      needed[s] = true;
      if (!SameBlock(graph, graph.slots[s], l)) {
        list.dropped[s] = false;  // its own block has not run again yet
        continue;
      }
      // A layer that changes its input in place can only run again on a fresh input.
      if (graph.slots[s].modified_by_reader) list.dropped[s] = true;
    }
  }
  for (size_t s = 0; s < graph.slots.size(); ++s) {
    if (!needed[s]) list.dropped[s] = false;  // it dies after forward anyway
  }

  for (int l = 0; l < layers; ++l) list.actions.push_back({ActionKind::kForward, l});
  list.filled_again.assign(graph.layers.size(), false);
  // Where W comes soon. A deferred one would keep the whole of it for long.
  for (const ExchangeInfo& e : graph.exchanges) {
    const bool kept = e.unless_kept >= 0 && !list.dropped[static_cast<size_t>(e.unless_kept)];
    if (!defer_weights && e.at == ActionKind::kForward && e.for_weight && again[e.layer] && !kept) {
      list.filled_again[static_cast<size_t>(e.layer)] = true;
    }
  }
  BackwardActions(graph, defer_weights, overlap, &list).Add(again);
  return list;
}

ActionList EvaluationActions(const Graph& graph) {
  ActionList list;
  list.training = false;
  list.dropped.assign(graph.slots.size(), false);
  for (size_t l = 0; l < graph.layers.size(); ++l) {
    list.actions.push_back({ActionKind::kForward, static_cast<int>(l)});
  }
  return list;
}

std::string Describe(const Graph& graph, const ActionList& list) {
  std::string out;
  for (const Action& a : list.actions) {
    absl::StrAppend(&out, Name(a.kind), " ", graph.layer_names[a.layer].c_str(), "\n");
  }
  return out;
}

namespace {

// Time of the first and last action that satisfies a predicate; kNever when none does.
constexpr int kNever = -1;
struct Span {
  int first = kNever, last = kNever;
  void Add(int t) {
    if (t == kNever) return;
    if (first == kNever || t < first) first = t;
    if (last == kNever || t > last) last = t;
  }
  bool empty() const { return first == kNever; }
};

// When each layer's actions happen.
struct Times {
  explicit Times(const Graph& graph, const ActionList& list) {
    std::vector<int>* v[] = {&f, &r, &b, &w, &start_b, &finish_b, &start_w};
    for (auto* of_kind : v) of_kind->assign(graph.layers.size(), kNever);
    for (size_t t = 0; t < list.actions.size(); ++t) {
      const Action& a = list.actions[t];
      (*v[static_cast<int>(a.kind)])[a.layer] = static_cast<int>(t);
    }
    end = static_cast<int>(list.actions.size()) - 1;
  }
  // The backward uses `uses` by `layer`, from the start of their exchanges to the end.
  void AddBackward(Span* span, int layer, unsigned uses) const {
    if (uses & kInBackwardInput) {
      for (const auto* times : {&start_b, &b, &finish_b}) span->Add((*times)[layer]);
    }
    if (uses & kInBackwardWeight) {
      for (const auto* times : {&start_w, &w}) span->Add((*times)[layer]);
    }
  }
  std::vector<int> f, r, b, w, start_b, finish_b, start_w;
  int end = 0;
};

// Whether the gradient of `slot` may lie where the gradient of its share_with slot lies: from the
// sharing layer's B on both hold the same values until one of them is changed, so every later
// change of one must come after the last read of the other. `sharers` are the slots that share with
// the same slot.
bool MayShareGradient(const Graph& graph, const Times& times, int slot,
                      const std::vector<int>& sharers) {
  const SlotInfo& a = graph.slots[slot];
  if (a.share_with < 0) return false;
  if (times.b[a.share_layer] == kNever) return false;
  // All inputs of the sharing layer that share with the same output form one group.
  for (int other : sharers) {
    const SlotInfo& o = graph.slots[other];
    if (other == slot || o.share_layer != a.share_layer) continue;
    const auto first_change = [&](const SlotInfo& s) {
      int t = times.end + 1;
      for (const SlotInfo::Reader& r : s.readers) {
        if (r.writes_grad && r.layer != s.share_layer &&
            times.b[r.layer] > times.b[s.share_layer]) {
          t = std::min(t, times.b[r.layer]);
        }
      }
      if (s.grad_changed_by_producer) t = std::min(t, times.b[s.producer]);
      return t;
    };
    const auto last_read = [&](const SlotInfo& s) {
      Span span;
      // The gradient of an input is for whoever filled the input.
      if (s.producer < 0) return times.end;
      times.AddBackward(&span, s.producer, s.grad_uses);
      return span.last;
    };
    if (last_read(o) >= first_change(a) || last_read(a) >= first_change(o)) return false;
  }
  // The sharing layer must be the first to write this gradient, else another reader's contribution
  // would be overwritten by, or leak into, the shared values.
  for (const SlotInfo::Reader& r : a.readers) {
    if (r.writes_grad && r.layer > a.share_layer) return false;
  }
  return true;
}

}  // namespace

int PiecesOf(const TokenCut& cut, int64_t tokens) {
  return static_cast<int>(std::min<int64_t>(cut.pieces, CutRows(tokens, cut.ranks, 0).part));
}

TokenPiece PieceOf(const TokenCut& cut, int64_t tokens, int piece) {
  TokenPiece p;
  p.part = CutEvenly(CutRows(tokens, cut.ranks, 0).part, PiecesOf(cut, tokens), piece);
  p.whole = {p.part.first * cut.ranks, p.part.count * cut.ranks};
  p.mine = {p.whole.first + p.part.count * cut.index, p.part.count};
  p.all = std::clamp<int64_t>(tokens - p.whole.first, 0, p.whole.count);
  p.own = std::clamp<int64_t>(tokens - p.mine.first, 0, p.mine.count);
  return p;
}

TokenPart PartOf(const TokenCut& cut, int64_t tokens) {
  const int64_t rows = CutRows(tokens, cut.ranks, 0).part;
  if (rows == 0) return {};
  // There are fewer rows of padding than ranks, so that they lie in the last piece, at its end.
  const TokenPiece last = PieceOf(cut, tokens, PiecesOf(cut, tokens) - 1);
  return {rows, rows - last.part.count + last.own};
}

int64_t StoredRows(const Graph& graph, const SlotInfo& slot, int64_t tokens) {
  const int64_t part = CutRows(tokens, graph.tokens.ranks, 0).part;
  return slot.shard ? part : part * graph.tokens.ranks;
}

std::vector<PlannedExchange> ExchangesOf(const Graph& graph, const ActionList& list,
                                         int64_t tokens) {
  std::vector<std::vector<const ExchangeInfo*>> of_layer(graph.layers.size());
  for (const ExchangeInfo& e : graph.exchanges) {
    of_layer[static_cast<size_t>(e.layer)].push_back(&e);
  }
  std::vector<PlannedExchange> planned;
  for (size_t i = 0; i < list.actions.size(); ++i) {
    const Action& a = list.actions[i];
    const bool again = a.kind == ActionKind::kRecompute;
    for (const ExchangeInfo* e : of_layer[static_cast<size_t>(a.layer)]) {
      const bool kept = e->unless_kept >= 0 && !list.dropped[static_cast<size_t>(e->unless_kept)];
      if (e->at != (again ? ActionKind::kForward : a.kind) || (again && kept)) continue;
      if (e->every_token) {
        planned.push_back({e, tokens, i});
        continue;
      }
      for (int piece = 0; piece < PiecesOf(graph.tokens, tokens); ++piece) {
        planned.push_back({e, PieceOf(graph.tokens, tokens, piece).part.count, i});
      }
    }
  }
  return planned;
}

int64_t ExchangedBytes(const Graph& graph, const ActionList& list, int64_t tokens) {
  int64_t bytes = 0;
  for (const PlannedExchange& e : ExchangesOf(graph, list, tokens)) {
    bytes += e.rows * e.info->width * SizeOf(e.info->dtype) * (graph.tokens.ranks - 1);
  }
  return bytes;
}

absl::StatusOr<FrameLayout> PlanFrame(const Graph& graph, const ActionList& actions,
                                      int64_t token_capacity) {
  if (token_capacity <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("a frame of ", token_capacity, " tokens cannot be planned; give at least 1"));
  }
  const Times times(graph, actions);
  const int slots = static_cast<int>(graph.slots.size());
  FrameLayout layout;
  layout.token_capacity = token_capacity;
  layout.forward_offset.assign(slots, -1);
  layout.backward_offset.assign(slots, -1);
  layout.grad_offset.assign(slots, -1);
  layout.grad_shared.assign(slots, 0);

  MemoryPlanner planner(64);
  std::vector<BufferId> forward(slots, -1), backward(slots, -1), grad(slots, -1);
  const auto bytes_of = [&](const SlotInfo& s) {
    return StoredRows(graph, s, token_capacity) * s.width * SizeOf(s.dtype) + s.fixed_bytes;
  };

  const std::vector<std::vector<int>> outputs = OutputsByLayer(graph);
  std::vector<bool> reads_inputs_again(graph.layers.size());
  for (size_t l = 0; l < graph.layers.size(); ++l) {
    reads_inputs_again[l] = RecomputeReadsInputs(graph, actions, outputs[l]);
  }
  for (int i = 0; i < slots; ++i) {
    const SlotInfo& s = graph.slots[i];
    Span f, b;
    if (s.producer >= 0) {
      if (s.kind != SlotKind::kScratch || (s.own_uses & kInForward)) f.Add(times.f[s.producer]);
      times.AddBackward(&b, s.producer, s.own_uses);
      const bool filled = static_cast<size_t>(s.producer) < actions.filled_again.size() &&
                          actions.filled_again[s.producer];
      if (s.kind == SlotKind::kScratch && (s.own_uses & (filled ? kInRecompute : kInForward))) {
        b.Add(times.r[s.producer]);
      }
    } else {
      f.Add(0);
    }
    for (const SlotInfo::Reader& r : s.readers) {
      if (r.uses & kInForward) {
        f.Add(times.f[r.layer]);
        if (reads_inputs_again[r.layer]) b.Add(times.r[r.layer]);
      }
      times.AddBackward(&b, r.layer, r.uses);
    }
    if (s.keep_to_end) f.Add(times.end);
    const bool apart = actions.dropped[i] || s.kind == SlotKind::kScratch;
    if (apart && !b.empty()) {
      if (s.producer >= 0 && s.kind != SlotKind::kScratch) b.Add(times.r[s.producer]);
      if (!f.empty()) forward[i] = planner.Add({s.name, bytes_of(s), f.first, f.last});
      backward[i] = planner.Add({s.name + " (backward)", bytes_of(s), b.first, b.last});
    } else {
      if (!b.empty()) f.Add(b.first), f.Add(b.last);
      if (f.empty()) continue;
      // A layer that runs again writes all its outputs, also those nobody reads any more, but for
      // those it said it would not.
      if (s.producer >= 0 && s.kind != SlotKind::kScratch && !s.recomputed_if_dropped) {
        f.Add(times.r[s.producer]);
      }
      forward[i] = backward[i] = planner.Add({s.name, bytes_of(s), f.first, f.last});
    }
  }

  if (actions.training) {
    // Gradients that share memory are one buffer that lives as long as all of them.
    std::vector<int> root(slots);
    std::vector<Span> span(slots);
    for (int i = 0; i < slots; ++i) {
      const SlotInfo& s = graph.slots[i];
      root[i] = i;
      if (s.kind != SlotKind::kActivation && s.kind != SlotKind::kInput) continue;
      for (const SlotInfo::Reader& r : s.readers) {
        if (r.writes_grad) times.AddBackward(&span[i], r.layer, kInBackwardInput);
      }
      if (span[i].empty()) continue;  // nobody sends a gradient back
      if (s.producer >= 0) {
        span[i].Add(times.b[s.producer]);
        times.AddBackward(&span[i], s.producer, s.grad_uses);
      } else {
        span[i].Add(times.end);
      }
    }
    const auto find = [&](int i) {
      while (root[i] != i) i = root[i] = root[root[i]];
      return i;
    };
    std::vector<std::vector<int>> sharers(slots);  // by the slot that they share with
    for (int i = 0; i < slots; ++i) {
      if (graph.slots[i].share_with >= 0) sharers[graph.slots[i].share_with].push_back(i);
    }
    for (int i = slots - 1; i >= 0; --i) {
      const SlotInfo& s = graph.slots[i];
      if (s.share_with < 0 || span[i].empty() || span[s.share_with].empty()) continue;
      if (!MayShareGradient(graph, times, i, sharers[s.share_with])) continue;
      layout.grad_shared[i] = 1;
      root[find(i)] = find(s.share_with);
    }
    std::vector<Span> merged(slots);
    for (int i = 0; i < slots; ++i) {
      if (span[i].empty()) continue;
      merged[find(i)].Add(span[i].first);
      merged[find(i)].Add(span[i].last);
    }
    for (int i = 0; i < slots; ++i) {
      if (merged[i].empty()) continue;
      grad[i] = planner.Add(
          {"d " + graph.slots[i].name, bytes_of(graph.slots[i]), merged[i].first, merged[i].last});
    }
    for (int i = 0; i < slots; ++i) {
      if (!span[i].empty()) grad[i] = grad[find(i)];
    }
  }

  auto plan = planner.Solve();
  if (!plan.ok()) return plan.status();
  layout.plan = std::move(plan).value();
  for (int i = 0; i < slots; ++i) {
    if (forward[i] >= 0) layout.forward_offset[i] = layout.plan.offsets[forward[i]];
    if (backward[i] >= 0) layout.backward_offset[i] = layout.plan.offsets[backward[i]];
    if (grad[i] >= 0) layout.grad_offset[i] = layout.plan.offsets[grad[i]];
  }
  return layout;
}

}  // namespace stretto
