#include "src/plan/sequence_balance.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>

namespace stretto {
namespace {

using Load = SequenceClock::Load;
using Wide = __int128;
constexpr size_t Index(int64_t i) { return static_cast<size_t>(i); }
constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;

struct Document {
  int64_t index = 0, length = 0;
  Load load;
  int64_t ranks = 1;        // that it needs at least
  int64_t nanoseconds = 0;  // on these
};

// The largest of so many neighbours, for all windows, each when it is complete.
class WindowMaximum {
 public:
  explicit WindowMaximum(size_t size) : queue_(size) {}
  void Start(int width) {
    width_ = width;
    first_ = end_ = 0;
  }
  int64_t Push(int64_t value, int at) {
    while (end_ > first_ && queue_[end_ - 1].value <= value) --end_;
    queue_[end_++] = {value, at};
    if (queue_[first_].at <= at - width_) ++first_;
    return queue_[first_].value;
  }

 private:
  struct Entry {
    int64_t value = 0;
    int at = 0;
  };
  std::vector<Entry> queue_;
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

// The fewest ranks that are done within `longest`, or those that are done first; and when.
std::pair<int64_t, int64_t> RanksWithin(const Document& d, int64_t longest,
                                        const SequencePlanOptions& o, const SequenceClock& clock) {
  std::pair<int64_t, int64_t> best = {d.ranks, d.nanoseconds};
  if (d.nanoseconds <= longest) return best;
  const int64_t most = std::min<int64_t>(o.pipelines, d.length);
  // Time falls at most as ranks grow, so fewer would not do.
  int64_t ranks = std::max(d.ranks + 1, d.nanoseconds / longest * d.ranks);
  for (; ranks <= most; ++ranks) {
    const int64_t time = clock.Both(d.load, ranks, ranks > o.pipelines_per_machine);
    if (time < best.second) best = {ranks, time};
    if (time <= longest) break;
    // No use to count up where the aim is far away.
    ranks = std::max(ranks, std::min(most - 1, ranks * time / longest / 2));
  }
  return best;
}

// How one attempt at a plan goes about it. Times are nanoseconds.
struct Attempt {
  int64_t longest = kNever;  // documents get ranks until they take no longer
  // A ring goes where it leaves least time until then, as things are packed into boxes; where it
  // would end later everywhere, and with 0, to those that end first.
  int64_t full = 0;
  bool widest_first = false;  // rings of most ranks first, else those that last longest
  // A ring is given only to pipelines that have had as many micro-batches.
  bool same_level = false;
};

class Balancer {
 public:
  Balancer(const SequencePlanOptions& options, const SequenceClock& clock)
      : o_(options),
        clock_(clock),
        // What the longest micro-batch of a pipeline costs in its other stages.
        more_stages_(options.method == SequenceMethod::kBalancedPipelines ? options.stages - 1 : 0),
        pipelines_(Index(options.pipelines)),
        ends_(pipelines_.size()),
        longest_(pipelines_.size()),
        levels_(pipelines_.size()),
        minus_levels_(pipelines_.size()) {}

  // `documents`, the longest first. False: this way does not lead to a plan.
  bool Run(const std::vector<Document>& documents, const Attempt& attempt) {
    attempt_ = attempt;
    std::vector<PlacedItem> rings;
    std::vector<const Document*> short_ones;
    for (const Document& d : documents) {
      const auto [ranks, time] = RanksWithin(d, attempt.longest, o_, clock_);
      if (ranks == 1 && d.length <= o_.capacity) {
        short_ones.push_back(&d);
      } else {
        rings.push_back({.documents = {d.index},
                         .load = d.load,
                         .ranks = static_cast<int>(ranks),
                         .nanoseconds = time});
      }
    }
    std::stable_sort(rings.begin(), rings.end(), [&](const PlacedItem& a, const PlacedItem& b) {
      if (attempt.widest_first && a.ranks != b.ranks) return a.ranks > b.ranks;
      return a.nanoseconds > b.nanoseconds;
    });
    for (PlacedItem& ring : rings) {
      if (!Place(ring)) return false;
    }
    Fill(short_ones);
    std::stable_sort(items_.begin(), items_.end(), [](const PlacedItem& a, const PlacedItem& b) {
      return std::pair(a.start, a.first) < std::pair(b.start, b.first);
    });
    return true;
  }

  std::vector<PlacedItem>& items() { return items_; }

 private:
  struct Pipeline {
    int64_t end = 0, longest = 0, levels = 0;
  };

  // Gives a ring to neighbours.
  bool Place(PlacedItem& ring) {
    for (WindowMaximum* window : {&ends_, &longest_, &levels_, &minus_levels_}) {
      window->Start(ring.ranks);
    }
    const int machine = o_.pipelines_per_machine;
    const int64_t near = clock_.Both(ring.load, ring.ranks, false);
    const int64_t far = clock_.Both(ring.load, ring.ranks, true);
    // The least wins: first whether it is late; then how it fills time, or when it ends; last
    // whether it lies across machines without need.
    using Order = std::tuple<bool, int64_t, int64_t, bool>;
    Order least = {true, kNever, 0, false};
    Wide sum = 0;
    int64_t best_time = 0;
    for (int last = 0; last < o_.pipelines; ++last) {
      const Pipeline& newest = pipelines_[Index(last)];
      const int64_t start = ends_.Push(newest.end, last);
      const int64_t longest = longest_.Push(newest.longest, last);
      sum += newest.end;
      const int first = last - ring.ranks + 1;
      if (attempt_.same_level) {
        const int64_t most = levels_.Push(newest.levels, last);
        const int64_t minus_least = minus_levels_.Push(-newest.levels, last);
        if (first >= 0 && most != -minus_least) {
          sum -= pipelines_[Index(first)].end;
          continue;
        }
      }
      if (first < 0) continue;
      const auto waits =
          static_cast<int64_t>(std::min<Wide>(Wide{start} * ring.ranks - sum, kNever));
      sum -= pipelines_[Index(first)].end;
      const bool over = first / machine != last / machine;
      const int64_t time = over ? far : near;
      const int64_t done = start + time + more_stages_ * std::max(longest, time);
      const bool cut = ring.ranks <= machine ? over : first % machine != 0;
      const Order order =
          done <= attempt_.full ? Order(false, waits, -done, cut) : Order(true, done, waits, cut);
      if (order < least) {
        least = order;
        ring.first = first;
        ring.start = start;
        best_time = time;
      }
    }
    if (std::get<1>(least) == kNever) return false;
    for (int p = ring.first; p < ring.first + ring.ranks; ++p) {
      Pipeline& own = pipelines_[Index(p)];
      const int64_t gap = ring.start - own.end;
      // What is put into a gap is a level more.
      if (gap > 0 && !attempt_.same_level) {
        slots_.push_back({.pipeline = p, .start = own.end, .room = gap});
      }
      own.end = ring.start + best_time;
      own.longest = std::max(own.longest, best_time);
      ++own.levels;
    }
    items_.push_back(std::move(ring));
    return true;
  }

  // Short documents, the longest first: into the time that pipelines would wait for a ring, or to
  // the one that ends first.
  void Fill(const std::vector<const Document*>& documents) {
    const int64_t fixed = clock_.fixed();
    std::priority_queue<std::pair<int64_t, int64_t>> gaps;  // room, -slot
    for (size_t s = 0; s < slots_.size(); ++s) {
      gaps.emplace(slots_[s].room, -static_cast<int64_t>(s));
    }
    std::vector<Slot> last(pipelines_.size());
    // The earliest end first.
    std::priority_queue<std::pair<int64_t, int64_t>> ends;  // -end, -pipeline
    const auto key = [&](size_t p) {
      const Pipeline& own = pipelines_[p];
      return std::pair(-(own.end + more_stages_ * own.longest), -static_cast<int64_t>(p));
    };
    for (size_t p = 0; p < pipelines_.size(); ++p) {
      last[p].pipeline = static_cast<int>(p);
      last[p].start = pipelines_[p].end;
      ends.push(key(p));
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
      pipelines_[p].end += time + (bin == nullptr ? fixed : 0);
      last[p].Add(bin, *d, o_.capacity);
      ends.push(key(p));
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
  Attempt attempt_;
  std::vector<Pipeline> pipelines_;
  WindowMaximum ends_, longest_, levels_, minus_levels_;
  std::vector<Slot> slots_;
  std::vector<PlacedItem> items_;
};

Document DocumentOf(int64_t index, int64_t length, const SequencePlanOptions& options,
                    const SequenceClock& clock, const SequenceRoom& room) {
  Document d = {.index = index,
                .length = length,
                .load = SequenceClock::LoadOf(length),
                .ranks = room.FewestRanks(length)};
  d.nanoseconds = clock.Both(d.load, d.ranks, d.ranks > options.pipelines_per_machine);
  return d;
}

// The longest first.
std::vector<Document> DocumentsOf(const std::vector<int64_t>& lengths,
                                  const SequencePlanOptions& options, const SequenceClock& clock,
                                  const SequenceRoom& room) {
  std::vector<Document> documents;
  for (size_t d = 0; d < lengths.size(); ++d) {
    documents.push_back(DocumentOf(static_cast<int64_t>(d), lengths[d], options, clock, room));
  }
  std::stable_sort(documents.begin(), documents.end(),
                   [](const Document& a, const Document& b) { return a.length > b.length; });
  return documents;
}

}  // namespace

int64_t RanksWithin(int64_t length, int64_t longest, const SequencePlanOptions& options,
                    const SequenceClock& clock, const SequenceRoom& room) {
  return RanksWithin(DocumentOf(0, length, options, clock, room), longest, options, clock).first;
}

int64_t BoundOfPlans(const std::vector<int64_t>& lengths, const SequencePlanOptions& options,
                     const SequenceClock& clock, const SequenceRoom& room) {
  const std::vector<Document> documents = DocumentsOf(lengths, options, clock, room);
  if (documents.empty()) return 0;
  // Whether all documents could be done: each with the fewest ranks that come through all stages in
  // that time (more would only send more), and all of them spread evenly.
  const auto may_be = [&](int64_t time) {
    Wide sum = 0;
    int64_t short_tokens = 0;
    for (const Document& d : documents) {
      const auto [ranks, on_each] = RanksWithin(d, time / options.stages, options, clock);
      if (on_each > time / options.stages) return false;
      sum += Wide{ranks} * on_each;
      if (ranks == 1) {
        sum -= clock.fixed();
        short_tokens += d.length;
      }
    }
    // As few micro-batches as there can be.
    sum += Wide{clock.fixed()} * ((short_tokens + room.most_tokens() - 1) / room.most_tokens());
    return sum / options.pipelines <= time;
  };
  int64_t low = 0, high = options.stages;
  while (!may_be(high)) {
    low = high;
    high *= 2;
  }
  while (high - low > high / 2048) {
    const int64_t middle = low + (high - low) / 2;
    (may_be(middle) ? high : low) = middle;
  }
  return low;
}

std::vector<PlacedItem> PlaceBalanced(const std::vector<int64_t>& lengths,
                                      const SequencePlanOptions& options,
                                      const SequenceClock& clock, const SequenceRoom& room,
                                      int64_t lower_bound) {
  const std::vector<Document> documents = DocumentsOf(lengths, options, clock, room);
  std::vector<PlacedItem> best;
  int64_t shortest = kNever;
  // How long documents may be and what counts as full, in percent of the bound.
  const auto attempt = [&](int64_t longest, int64_t full, bool widest_first, bool same_level) {
    const auto part = [&](int64_t percent) {
      return lower_bound / 100 * percent + lower_bound % 100 * percent / 100;
    };
    Balancer balancer(options, clock);
    if (!balancer.Run(documents, {.longest = std::max<int64_t>(1, part(longest) / options.stages),
                                  .full = part(full),
                                  .widest_first = widest_first,
                                  .same_level = same_level})) {
      return;
    }
    const int64_t makespan = MakespanOf(balancer.items(), options, clock);
    if (makespan >= shortest) return;
    shortest = makespan;
    best = std::move(balancer.items());
  };
  const auto good = [&] { return shortest <= lower_bound + lower_bound / 200; };
  // Shorter documents are easier to spread, but their rings send more; wide rings first leave no
  // holes between them, long ones first leave little at the end. Nothing is best for all batches:
  // these few come within a percent of a hundred and more.
  struct Way {
    int64_t longest, full;
    bool widest_first, same_level;
  };
  constexpr Way kOneStage[] = {{100, 100, true, false},
                               {100, 0, false, false},
                               {100, 100, false, false},
                               {25, 100, true, false},
                               {6, 100, false, false}};
  constexpr Way kStages[] = {{76, 102, true, true},  {65, 130, true, false}, {75, 100, false, true},
                             {15, 120, true, false}, {65, 130, true, true},  {35, 100, true, true},
                             {70, 140, false, true}, {38, 110, true, true},  {70, 140, true, false},
                             {75, 100, true, false}, {100, 0, false, false}};
  if (options.stages > 1 && options.method == SequenceMethod::kBalancedPipelines) {
    for (const Way& w : kStages) {
      if (!good()) attempt(w.longest, w.full, w.widest_first, w.same_level);
    }
  } else {
    for (const Way& w : kOneStage) {
      if (!good()) attempt(w.longest, w.full, w.widest_first, w.same_level);
    }
    // What is full only a little later may hold what did not fit.
    const int64_t base = std::max<int64_t>(1, lower_bound / 100);
    int64_t low = 100, high = shortest / base;
    while (!good() && high - low > 1) {
      const int64_t middle = (low + high) / 2;
      const int64_t before = shortest;
      // So many of the longest after each other.
      for (const int in_turn : {1, 2, 4}) attempt(middle / in_turn, middle, true, false);
      attempt(middle, middle, false, false);
      (shortest < before ? high : low) = middle;
    }
  }
  for (PlacedItem& item : best) {
    if (item.documents.size() > 1) continue;  // packs fit as they are
    item.offload = std::max(0, room.Offload(lengths[Index(item.documents.front())], item.ranks));
  }
  return best;
}

}  // namespace stretto
