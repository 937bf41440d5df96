#include "src/plan/sequence_balance.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

namespace stretto {
namespace {

using Load = SequenceClock::Load;
constexpr size_t Index(int64_t i) { return static_cast<size_t>(i); }
constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;

struct Document {
  int64_t index = 0, length = 0;
  Load load;
  int64_t ranks = 1;        // that it needs at least
  int64_t nanoseconds = 0;  // on these
};

// The largest of `width` neighbours, for all windows, each when it is complete.
class WindowMaximum {
 public:
  explicit WindowMaximum(size_t size) : queue_(size) {}
  void Start(int width) {
    width_ = width;
    first_ = end_ = 0;
  }
  int64_t Push(const std::vector<int64_t>& values, int at) {
    while (end_ > first_ && values[Index(queue_[end_ - 1])] <= values[Index(at)]) --end_;
    queue_[end_++] = at;
    if (queue_[first_] <= at - width_) ++first_;
    return values[Index(queue_[first_])];
  }

 private:
  std::vector<int> queue_;
  size_t first_ = 0, end_ = 0;
  int width_ = 1;
};

// Time of one pipeline that short documents may fill, in micro-batches.
struct Slot {
  int pipeline = 0;
  int64_t start = 0, room = 0;
  struct Bin {
    std::vector<int64_t> documents;
    int64_t left = 0;  // tokens
    Load load;
  };
  std::vector<Bin> bins;

  // The fullest micro-batch that has room; null: none has.
  Bin* Find(int64_t tokens) {
    Bin* best = nullptr;
    for (Bin& bin : bins) {
      if (bin.left >= tokens && (best == nullptr || bin.left < best->left)) best = &bin;
    }
    return best;
  }
  void Add(Bin* bin, const Document& document, int64_t capacity) {
    if (bin == nullptr) {
      bin = &bins.emplace_back();
      bin->left = capacity;
    }
    bin->documents.push_back(document.index);
    bin->left -= document.length;
    bin->load.tokens += document.load.tokens;
    bin->load.pairs += document.load.pairs;
  }
};

class Balancer {
 public:
  Balancer(const SequencePlanOptions& options, const SequenceClock& clock)
      : o_(options),
        clock_(clock),
        // What the longest micro-batch of a pipeline costs in its other stages.
        more_stages_(options.method == SequenceMethod::kBalancedPipelines ? options.stages - 1 : 0),
        ends_(Index(options.pipelines), 0),
        longest_(Index(options.pipelines), 0),
        ends_maximum_(ends_.size()),
        longest_maximum_(ends_.size()) {}

  // `documents`, the longest first. Those that would take longer than `target` get more ranks.
  void Run(const std::vector<Document>& documents, int64_t target) {
    std::vector<PlacedItem> rings;
    std::vector<const Document*> short_ones;
    for (const Document& d : documents) {
      const auto [ranks, time] = RanksWithin(d, target);
      if (ranks == 1 && d.length <= o_.capacity) {
        short_ones.push_back(&d);
      } else {
        rings.push_back({.documents = {d.index},
                         .load = d.load,
                         .ranks = static_cast<int>(ranks),
                         .nanoseconds = time});
      }
    }
    std::stable_sort(rings.begin(), rings.end(), [](const PlacedItem& a, const PlacedItem& b) {
      return a.nanoseconds > b.nanoseconds;
    });
    for (PlacedItem& ring : rings) PlaceRing(ring);
    Fill(short_ones);
    std::stable_sort(items_.begin(), items_.end(), [](const PlacedItem& a, const PlacedItem& b) {
      return std::pair(a.start, a.first) < std::pair(b.start, b.first);
    });
    for (size_t p = 0; p < ends_.size(); ++p) {
      makespan_ = std::max(makespan_, ends_[p] + more_stages_ * longest_[p]);
    }
  }

  int64_t makespan() const { return makespan_; }
  std::vector<PlacedItem>& items() { return items_; }

 private:
  int64_t Time(const Load& load, int64_t ranks) const {
    return clock_.Both(load, ranks, ranks > o_.pipelines_per_machine);
  }

  // The fewest ranks that are done within the target, or those that are done first.
  std::pair<int64_t, int64_t> RanksWithin(const Document& d, int64_t target) const {
    std::pair<int64_t, int64_t> best = {d.ranks, d.nanoseconds};
    if (d.nanoseconds <= target) return best;
    int64_t ranks = std::max(d.ranks + 1, d.nanoseconds / target * d.ranks);
    for (; ranks <= std::min<int64_t>(o_.pipelines, d.length); ++ranks) {
      const int64_t time = Time(d.load, ranks);
      if (time < best.second) best = {ranks, time};
      if (time <= target) break;
      // No use to count up where the target is far away.
      ranks = std::max(ranks, std::min<int64_t>(o_.pipelines - 1, ranks * time / target / 2));
    }
    // Rounding must not give a rank more than it has room for.
    const int64_t part = SequenceRoom::LargestPart(d.length, d.ranks);
    while (best.first <= o_.pipelines && SequenceRoom::LargestPart(d.length, best.first) > part) {
      ++best.first;
    }
    if (best.first > o_.pipelines) return {d.ranks, d.nanoseconds};
    best.second = Time(d.load, best.first);
    return best;
  }

  void PlaceRing(PlacedItem& ring) {
    ends_maximum_.Start(ring.ranks);
    longest_maximum_.Start(ring.ranks);
    const int machine = o_.pipelines_per_machine;
    const int64_t near = clock_.Both(ring.load, ring.ranks, false);
    const int64_t far = clock_.Both(ring.load, ring.ranks, true);
    // Best of all windows: done first; then with least that waits; then within machines.
    struct Window {
      int64_t done = kNever, waits = 0;
      bool cut = false;
      int first = 0;
      int64_t start = 0, time = 0;
    } best;
    int64_t sum = 0;
    for (int last = 0; last < o_.pipelines; ++last) {
      const int64_t start = ends_maximum_.Push(ends_, last);
      const int64_t longest = longest_maximum_.Push(longest_, last);
      sum += ends_[Index(last)];
      const int first = last - ring.ranks + 1;
      if (first < 0) continue;
      const bool over = first / machine != last / machine;
      const int64_t time = over ? far : near;
      const int64_t done = start + time + more_stages_ * std::max(longest, time);
      const int64_t waits = start * ring.ranks - sum;
      const bool cut = ring.ranks <= machine ? over : first % machine != 0;
      if (std::tuple(done, waits, cut) < std::tuple(best.done, best.waits, best.cut)) {
        best = {done, waits, cut, first, start, time};
      }
      sum -= ends_[Index(first)];
    }
    ring.first = best.first;
    ring.start = best.start;
    for (int p = ring.first; p < ring.first + ring.ranks; ++p) {
      const int64_t gap = best.start - ends_[Index(p)];
      if (gap > 0) slots_.push_back({.pipeline = p, .start = ends_[Index(p)], .room = gap});
      ends_[Index(p)] = best.start + best.time;
      longest_[Index(p)] = std::max(longest_[Index(p)], best.time);
    }
    items_.push_back(std::move(ring));
  }

  // Short documents, the longest first: into the time that pipelines would wait for a ring, or to
  // the one that ends first.
  void Fill(const std::vector<const Document*>& documents) {
    const int64_t fixed = clock_.fixed();
    std::priority_queue<std::pair<int64_t, int64_t>> gaps;  // room, -slot
    for (size_t s = 0; s < slots_.size(); ++s) {
      gaps.emplace(slots_[s].room, -static_cast<int64_t>(s));
    }
    std::vector<Slot> last(ends_.size());
    // The earliest end first.
    std::priority_queue<std::pair<int64_t, int64_t>> ends;  // -end, -pipeline
    for (size_t p = 0; p < ends_.size(); ++p) {
      last[p].pipeline = static_cast<int>(p);
      last[p].start = ends_[p];
      ends.emplace(-(ends_[p] + more_stages_ * longest_[p]), -static_cast<int64_t>(p));
    }
    for (const Document* d : documents) {
      const int64_t time = d->nanoseconds - fixed;
      if (!gaps.empty() && gaps.top().first >= time + fixed) {
        const int64_t s = -gaps.top().second;
        gaps.pop();
        Slot& slot = slots_[Index(s)];
        Slot::Bin* bin = slot.Find(d->length);
        slot.room -= time + (bin == nullptr ? fixed : 0);
        slot.Add(bin, *d, o_.capacity);
        gaps.emplace(slot.room, -s);
        continue;
      }
      const auto p = Index(-ends.top().second);
      ends.pop();
      Slot::Bin* bin = last[p].Find(d->length);
      ends_[p] += time + (bin == nullptr ? fixed : 0);
      last[p].Add(bin, *d, o_.capacity);
      ends.emplace(-(ends_[p] + more_stages_ * longest_[p]), -static_cast<int64_t>(p));
    }
    for (Slot& slot : slots_) Close(slot);
    for (Slot& slot : last) Close(slot);
  }

  // The micro-batches of a slot, the longest first.
  void Close(Slot& slot) {
    std::vector<PlacedItem> items;
    for (Slot::Bin& bin : slot.bins) {
      items.push_back({.documents = std::move(bin.documents),
                       .load = bin.load,
                       .first = slot.pipeline,
                       .nanoseconds = clock_.Both(bin.load, 1, false)});
    }
    std::stable_sort(items.begin(), items.end(), [](const PlacedItem& a, const PlacedItem& b) {
      return a.nanoseconds > b.nanoseconds;
    });
    int64_t start = slot.start;
    for (PlacedItem& item : items) {
      item.start = start;
      start += item.nanoseconds;
      items_.push_back(std::move(item));
    }
  }

  const SequencePlanOptions& o_;
  const SequenceClock& clock_;
  const int64_t more_stages_;
  std::vector<int64_t> ends_, longest_;  // by pipeline
  WindowMaximum ends_maximum_, longest_maximum_;
  std::vector<Slot> slots_;
  std::vector<PlacedItem> items_;
  int64_t makespan_ = 0;
};

}  // namespace

std::vector<PlacedItem> PlaceBalanced(const std::vector<int64_t>& lengths,
                                      const SequencePlanOptions& options,
                                      const SequenceClock& clock, const SequenceRoom& room,
                                      int64_t lower_bound) {
  std::vector<Document> documents;
  for (size_t d = 0; d < lengths.size(); ++d) {
    Document document = {.index = static_cast<int64_t>(d),
                         .length = lengths[d],
                         .load = SequenceClock::LoadOf(lengths[d]),
                         .ranks = room.FewestRanks(lengths[d])};
    document.nanoseconds =
        clock.Both(document.load, document.ranks, document.ranks > options.pipelines_per_machine);
    documents.push_back(document);
  }
  std::stable_sort(documents.begin(), documents.end(),
                   [](const Document& a, const Document& b) { return a.length > b.length; });
  // No document should take longer than a part of the step. Smaller parts are easier to spread, but
  // rings of more ranks send more: the shortest step tells.
  std::vector<PlacedItem> best;
  int64_t best_makespan = kNever;
  for (const int part : {1, 2, 4, 8}) {
    const int64_t target =
        std::max<int64_t>(1, lower_bound / part / (part == 1 ? 1 : options.stages));
    Balancer balancer(options, clock);
    balancer.Run(documents, target);
    if (balancer.makespan() < best_makespan) {
      best_makespan = balancer.makespan();
      best = std::move(balancer.items());
    }
  }
  for (PlacedItem& item : best) {
    if (item.documents.size() > 1) continue;  // packs fit as they are
    item.offload = std::max(0, room.Offload(lengths[Index(item.documents.front())], item.ranks));
  }
  return best;
}

}  // namespace stretto
