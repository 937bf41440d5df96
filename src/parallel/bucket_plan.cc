#include "stretto/parallel/bucket_plan.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/parallel/parameter_storage.h"
#include "stretto/model/layer.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/stages.h"

namespace stretto {
namespace {

using internal::Aligned;
using internal::StoredElements;

// The half (Use) that an action is.
unsigned HalfOf(ActionKind kind) {
  switch (kind) {
    case ActionKind::kForward:
    case ActionKind::kRecompute:
      return kInForward;
    case ActionKind::kBackwardInput:
      return kInBackwardInput;
    case ActionKind::kBackwardWeight:
      return kInBackwardWeight;
    case ActionKind::kStartInput:
    case ActionKind::kFinishInput:
    case ActionKind::kStartWeight:
      return 0;  // exchanges know no parameters
  }
  return 0;
}

// A transformer block, or a layer outside of blocks.
int UnitOf(const Graph& graph, int layer) {
  const int block = graph.layer_block[static_cast<size_t>(layer)];
  return block >= 0 ? block : -2 - layer;
}

// Lays stays out: the largest first, each at the lowest offset that is free in all its spans.
int64_t Place(std::vector<BucketStay>* stays) {
  std::vector<BucketStay*> order;
  for (BucketStay& s : *stays) order.push_back(&s);
  std::stable_sort(order.begin(), order.end(),
                   [](const BucketStay* a, const BucketStay* b) { return a->bytes > b->bytes; });
  const auto meet = [](const BucketStay& a, const BucketStay& b) {
    for (const BucketStay::Span& x : a.spans) {
      for (const BucketStay::Span& y : b.spans) {
        if (!x.empty() && !y.empty() && x.first <= y.last && y.first <= x.last) return true;
      }
    }
    return false;
  };
  int64_t total = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    BucketStay& stay = *order[i];
    std::vector<const BucketStay*> others;  // by offset
    for (size_t k = 0; k < i; ++k) {
      if (meet(*order[k], stay)) others.push_back(order[k]);
    }
    std::sort(others.begin(), others.end(),
              [](const BucketStay* a, const BucketStay* b) { return a->offset < b->offset; });
    stay.offset = 0;
    for (const BucketStay* other : others) {
      if (stay.offset + stay.bytes <= other->offset) break;
      stay.offset = std::max(stay.offset, other->offset + other->bytes);
    }
    total = std::max(total, stay.offset + stay.bytes);
  }
  return total;
}

// Finds out when which bucket is needed.
class Planner {
 public:
  Planner(const Graph& graph, const ActionList& list, const std::vector<std::vector<int>>& buckets,
          const BucketPlanOptions& options)
      : graph_(graph), list_(list), buckets_(buckets), options_(options) {
    end_ = static_cast<int>(list.actions.size());
    cuts_ = {0, end_};
    if (options.pieces) {
      const ListParts parts = PartsOf(list);
      cuts_.push_back(static_cast<int>(parts.forward_end));
      if (options.halves) cuts_.push_back(static_cast<int>(parts.weights_begin));
      std::sort(cuts_.begin(), cuts_.end());
    }
    units_.resize(buckets.size());
    std::vector<std::set<int>> of_layer(graph.layers.size());
    for (size_t b = 0; b < buckets.size(); ++b) {
      for (const int p : buckets[b]) {
        for (const int layer : graph.parameters[static_cast<size_t>(p)].layers) {
          units_[b].insert(UnitOf(graph, layer));
          of_layer[static_cast<size_t>(layer)].insert(static_cast<int>(b));
        }
      }
    }
    buckets_of_layer_ = std::move(of_layer);
  }

  BucketTimeline Plan() {
    timeline_.before.resize(static_cast<size_t>(end_));
    timeline_.after.resize(static_cast<size_t>(end_));
    timeline_.gathers.assign(buckets_.size(), 0);
    timeline_.reduces.assign(buckets_.size(), 0);
    std::vector<Timed> events;
    if (options_.zero >= 3) Parameters(&events);
    if (options_.zero >= 2 && list_.training) Gradients(&events);
    timeline_.bytes = Place(&timeline_.stays);
    // At one place in the order of BucketEventKind before an action; after it places become free
    // and sums leave before one waits for those that left earlier.
    std::stable_sort(events.begin(), events.end(),
                     [](const Timed& a, const Timed& b) { return Rank(a) < Rank(b); });
    for (const Timed& e : events) {
      (e.after ? timeline_.after : timeline_.before)[static_cast<size_t>(e.action)].push_back(
          e.event);
    }
    return std::move(timeline_);
  }

 private:
  struct Timed {
    int action = 0;
    bool after = false;
    BucketEvent event;
  };
  static int Rank(const Timed& e) {
    const auto kind = static_cast<int>(e.event.kind);
    const bool last = e.after && e.event.kind == BucketEventKind::kCollect;
    return last ? static_cast<int>(BucketEventKind::kReduce) + 1 : kind;
  }

  ActionKind Kind(int action) const { return list_.actions[static_cast<size_t>(action)].kind; }
  int LayerOf(int action) const { return list_.actions[static_cast<size_t>(action)].layer; }
  bool Needs(int action, bool gradients) const {
    const Layer& layer = *graph_.layers[static_cast<size_t>(LayerOf(action))];
    const unsigned half = HalfOf(Kind(action));
    // Recomputation is forward, and writes no gradients.
    return ((gradients ? layer.WritesGradients() : layer.ReadsParameters()) & half) != 0;
  }
  // The end of the piece that an action lies in.
  int EndOfPiece(int action) const { return *std::upper_bound(cuts_.begin(), cuts_.end(), action); }
  int BeginOfPiece(int action) const {
    return *std::prev(std::upper_bound(cuts_.begin(), cuts_.end(), action));
  }

  // Whether a bucket gives up its place between two uses.
  bool Splits(int bucket, int from, int to, bool gradients) const {
    if (EndOfPiece(from) <= to) return true;
    std::set<int> others;
    bool foreign = false;
    for (int a = from + 1; a < to; ++a) {
      foreign |= units_[static_cast<size_t>(bucket)].count(UnitOf(graph_, LayerOf(a))) == 0;
      if (!Needs(a, gradients)) continue;
      for (const int b : buckets_of_layer_[static_cast<size_t>(LayerOf(a))]) {
        if (b != bucket) others.insert(b);
      }
    }
    return foreign && others.size() >= 2;
  }

  // Stays of one kind, by their first use.
  std::vector<BucketStay> Stays(bool gradients) const {
    std::vector<BucketStay> stays;
    const DType dtype = gradients ? AccumulateType(graph_.dtype) : graph_.dtype;
    std::vector<int> open(buckets_.size(), -1);  // index of the bucket's newest stay
    for (int a = 0; a < end_; ++a) {
      if (!Needs(a, gradients)) continue;
      for (const int b : buckets_of_layer_[static_cast<size_t>(LayerOf(a))]) {
        int& newest = open[static_cast<size_t>(b)];
        if (newest >= 0 && !Splits(b, stays[static_cast<size_t>(newest)].last, a, gradients)) {
          stays[static_cast<size_t>(newest)].last = a;
          continue;
        }
        newest = static_cast<int>(stays.size());
        stays.push_back(
            {.bucket = b,
             .gradients = gradients,
             .first = a,
             .last = a,
             .bytes = PlaceBytes(graph_, buckets_[static_cast<size_t>(b)], options_.ranks, dtype)});
      }
    }
    return stays;
  }

  void Parameters(std::vector<Timed>* events) {
    std::vector<BucketStay> stays = Stays(/*gradients=*/false);
    const auto base = static_cast<int>(timeline_.stays.size());
    for (size_t k = 0; k < stays.size(); ++k) {
      BucketStay& stay = stays[k];
      const int id = base + static_cast<int>(k);
      const int piece = BeginOfPiece(stay.first);
      // When the stay before it is first used, so that one bucket travels while one is worked on.
      const int gather = k == 0 ? piece : std::max(piece, stays[k - 1].first);
      stay.spans[0] = {gather, stay.last};
      ++timeline_.gathers[static_cast<size_t>(stay.bucket)];
      events->push_back({gather, false, {BucketEventKind::kGather, id}});
      events->push_back({stay.first, false, {BucketEventKind::kUse, id}});
      events->push_back({stay.last, true, {BucketEventKind::kRelease, id}});
    }
    // In backward only: the step's last forward does not know that it is the last, and what it
    // gathered ahead would be older than the next update.
    if (!options_.pieces && list_.training && stays.size() > 1 &&
        stays.front().last < stays.back().first &&
        Kind(stays.back().first) != ActionKind::kForward) {
      stays.front().spans[1] = {stays.back().first, end_ - 1};
      events->push_back(
          {stays.back().first, false, {BucketEventKind::kGather, base, /*ahead=*/true}});
    }
    timeline_.stays.insert(timeline_.stays.end(), stays.begin(), stays.end());
  }

  void Gradients(std::vector<Timed>* events) {
    std::vector<BucketStay> stays = Stays(/*gradients=*/true);
    // In the order in which they are complete, which is that of their reduce-scatters.
    std::stable_sort(stays.begin(), stays.end(),
                     [](const BucketStay& a, const BucketStay& b) { return a.last < b.last; });
    const auto base = static_cast<int>(timeline_.stays.size());
    int first_open = end_;
    for (const BucketStay& stay : stays) first_open = std::min(first_open, stay.first);
    for (size_t k = 0; k < stays.size(); ++k) {
      BucketStay& stay = stays[k];
      const int id = base + static_cast<int>(k);
      const int piece_end = EndOfPiece(stay.last);
      ++timeline_.reduces[static_cast<size_t>(stay.bucket)];
      events->push_back({stay.first, false, {BucketEventKind::kOpen, id}});
      events->push_back({stay.last, true, {BucketEventKind::kReduce, id}});
      const bool next_in_piece = k + 1 < stays.size() && stays[k + 1].last < piece_end;
      if (next_in_piece) {
        const int collect = stays[k + 1].last;
        stay.spans[0] = {stay.first, collect};
        events->push_back({collect, true, {BucketEventKind::kCollect, id}});
      } else if (options_.pieces || first_open == 0) {
        stay.spans[0] = {stay.first, piece_end - 1};
        events->push_back({piece_end - 1, true, {BucketEventKind::kCollect, id}});
      } else {
        // Under the next micro-batch's forward.
        stay.spans[0] = {stay.first, end_ - 1};
        stay.spans[1] = {0, first_open - 1};
        events->push_back({first_open, false, {BucketEventKind::kCollect, id}});
      }
    }
    timeline_.stays.insert(timeline_.stays.end(), stays.begin(), stays.end());
  }

  const Graph& graph_;
  const ActionList& list_;
  const std::vector<std::vector<int>>& buckets_;
  const BucketPlanOptions& options_;
  int end_ = 0;
  std::vector<int> cuts_;                        // where pieces begin, and the end
  std::vector<std::set<int>> units_;             // by bucket
  std::vector<std::set<int>> buckets_of_layer_;  // by layer
  BucketTimeline timeline_;
};

}  // namespace

const char* Name(BucketEventKind kind) {
  switch (kind) {
    case BucketEventKind::kCollect:
      return "collect";
    case BucketEventKind::kGather:
      return "gather";
    case BucketEventKind::kOpen:
      return "open";
    case BucketEventKind::kUse:
      return "use";
    case BucketEventKind::kRelease:
      return "release";
    case BucketEventKind::kReduce:
      return "reduce";
  }
  return "?";
}

int ReadyLayer(const Graph& graph, const std::vector<int>& params) {
  auto layer = static_cast<int>(graph.layers.size());
  for (const int p : params) {
    layer = std::min(layer, graph.parameters[static_cast<size_t>(p)].layers.front());
  }
  return layer;
}

int64_t CollectiveBytes(const Graph& graph, const std::vector<int>& params, int ranks,
                        DType dtype) {
  int64_t part = 0;  // elements that a rank sends each other one
  for (const int p : params) {
    const ParameterInfo& info = graph.parameters[static_cast<size_t>(p)];
    part += CutRows(info.rows(), ranks, 0).part * info.columns();
  }
  return part * (ranks - 1) * SizeOf(dtype);
}

int64_t PlaceBytes(const Graph& graph, const std::vector<int>& params, int ranks, DType dtype) {
  int64_t bytes = 0;
  for (const int p : params) {
    bytes +=
        Aligned(StoredElements(graph.parameters[static_cast<size_t>(p)], ranks) * SizeOf(dtype));
  }
  return bytes;
}

BucketTimeline PlanTimeline(const Graph& graph, const ActionList& list,
                            const std::vector<std::vector<int>>& buckets,
                            const BucketPlanOptions& options) {
  return Planner(graph, list, buckets, options).Plan();
}

BucketPlan PlanBuckets(const Graph& graph, const ActionList& training, const ActionList& evaluation,
                       const BucketPlanOptions& options) {
  BucketPlan plan;
  plan.zero = options.ranks > 1 ? options.zero : 1;
  plan.ranks = options.ranks;
  plan.buckets = MakeBuckets(graph, options.bucket_bytes);
  if (plan.zero == 1) return plan;
  plan.training = PlanTimeline(graph, training, plan.buckets, options);
  plan.evaluation = PlanTimeline(graph, evaluation, plan.buckets, options);
  plan.buffer_bytes = std::max(plan.training.bytes, plan.evaluation.bytes);
  return plan;
}

BucketBytes SentBytes(const Graph& graph, const BucketPlan& plan, int64_t micro_batches) {
  BucketBytes once, often;  // a step, and a micro-batch
  for (size_t b = 0; b < plan.buckets.size(); ++b) {
    const int64_t gradients =
        CollectiveBytes(graph, plan.buckets[b], plan.ranks, AccumulateType(graph.dtype));
    const int64_t parameters = CollectiveBytes(graph, plan.buckets[b], plan.ranks, graph.dtype);
    plan.zero >= 2 ? often.gradients += plan.training.reduces[b]* gradients
                   : once.gradients += gradients;
    plan.zero >= 3 ? often.parameters += plan.training.gathers[b]* parameters
                   : once.parameters += parameters;
  }
  const auto times = [&](int64_t bytes) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 4;
    int64_t product = 0;
    return __builtin_mul_overflow(micro_batches, bytes, &product) ? kMost
                                                                  : std::min(product, kMost);
  };
  return {.parameters = once.parameters + times(often.parameters),
          .gradients = once.gradients + times(often.gradients)};
}

std::string Describe(const Graph& graph, const ActionList& list, const BucketTimeline& timeline) {
  std::string out;
  for (size_t a = 0; a < list.actions.size(); ++a) {
    const Action& action = list.actions[a];
    const auto print = [&](const char* when, const std::vector<BucketEvent>& events) {
      for (const BucketEvent& e : events) {
        const BucketStay& s = timeline.stays[static_cast<size_t>(e.stay)];
        absl::StrAppend(&out, when, " ", Name(action.kind), " ",
                        graph.layer_names[static_cast<size_t>(action.layer)], ": ", Name(e.kind),
                        e.ahead ? " ahead" : "", s.gradients ? " gradients " : " parameters ",
                        s.bucket, " at ", s.offset, "\n");
      }
    };
    print("before", timeline.before[a]);
    print("after", timeline.after[a]);
  }
  return out;
}

}  // namespace stretto
