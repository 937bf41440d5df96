#include "stretto/core/memory_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/format.h"

namespace stretto {
namespace {

// Bytes that are taken, as the fewest disjoint intervals: begin to end. Buffers of different times
// may lie on the same bytes, so what is added may overlap what is there.
class Taken {
 public:
  void Add(int64_t begin, int64_t end) {
    auto it = spans_.upper_bound(begin);
    if (it != spans_.begin() && std::prev(it)->second >= begin) --it;
    while (it != spans_.end() && it->first <= end) {
      begin = std::min(begin, it->first);
      end = std::max(end, it->second);
      it = spans_.erase(it);
    }
    spans_.emplace_hint(it, begin, end);
  }
  // The first free offset >= `offset`; `*limit` becomes where the free bytes end, if that is less.
  int64_t FreeFrom(int64_t offset, int64_t* limit) const {
    auto it = spans_.upper_bound(offset);
    if (it != spans_.begin() && std::prev(it)->second > offset) offset = std::prev(it)->second;
    if (it != spans_.end()) *limit = std::min(*limit, it->first);
    return offset;
  }
  bool empty() const { return spans_.empty(); }

 private:
  std::map<int64_t, int64_t> spans_;
};

// Which bytes are taken during which times: a segment tree over the times, so that neither placing
// a buffer nor finding its place looks at all buffers that live with it (thousands in the middle of
// a step). A lifetime is cut into O(log times) nodes.
class Occupancy {
 public:
  explicit Occupancy(int times) {
    while (leaves_ < times) leaves_ *= 2;
    during_.resize(2 * static_cast<size_t>(leaves_));
    throughout_.resize(2 * static_cast<size_t>(leaves_));
  }

  // Takes [begin, end) during [first, last].
  void Add(int first, int last, int64_t begin, int64_t end) {
    Visit(first, last, [&](int node) {
      throughout_[node].Add(begin, end);
      // `during_` of a node says what is taken at some time in it. The two cuts of one lifetime
      // share their way up; adding twice is harmless.
      for (int n = node; n > 0; n /= 2) during_[n].Add(begin, end);
    });
  }

  // The lowest offset at which `bytes` are free during all of [first, last].
  int64_t LowestFree(int first, int last, int64_t bytes) {
    relevant_.clear();
    Visit(first, last, [&](int node) {
      if (!during_[node].empty()) relevant_.push_back(&during_[node]);
      for (int n = node / 2; n > 0; n /= 2) {
        if (!throughout_[n].empty()) relevant_.push_back(&throughout_[n]);
      }
    });
    std::sort(relevant_.begin(), relevant_.end());
    relevant_.erase(std::unique(relevant_.begin(), relevant_.end()), relevant_.end());
    int64_t offset = 0;
    while (true) {
      const int64_t before = offset;
      int64_t limit = std::numeric_limits<int64_t>::max();
      for (const Taken* taken : relevant_) offset = taken->FreeFrom(offset, &limit);
      // Whatever moved the offset may have moved it into bytes that an earlier set has taken.
      if (offset != before) continue;
      if (limit - offset >= bytes) return offset;
      offset = limit;
    }
  }

 private:
  // Calls `visit` for the fewest nodes that make up [first, last].
  template <class F>
  void Visit(int first, int last, F visit) {
    for (int l = first + leaves_, r = last + leaves_ + 1; l < r; l /= 2, r /= 2) {
      if (l % 2 == 1) visit(l++);
      if (r % 2 == 1) visit(--r);
    }
  }

  int leaves_ = 1;
  std::vector<Taken> during_, throughout_;
  std::vector<const Taken*> relevant_;
};

// The largest sum of bytes that are live at one action.
int64_t PeakLiveBytes(const std::vector<BufferSpec>& buffers) {
  // At one action, what starts is counted before what ends: `last` is included.
  std::vector<std::pair<int64_t, int64_t>> changes;  // (2 * action + is_end, bytes)
  changes.reserve(2 * buffers.size());
  for (const BufferSpec& b : buffers) {
    changes.emplace_back(int64_t{2} * b.first, b.bytes);
    changes.emplace_back(int64_t{2} * b.last + 1, -b.bytes);
  }
  std::sort(changes.begin(), changes.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  int64_t live = 0;
  int64_t peak = 0;
  for (const auto& [when, bytes] : changes) {
    live += bytes;
    peak = std::max(peak, live);
  }
  return peak;
}

}  // namespace

BufferId MemoryPlanner::Add(BufferSpec spec) {
  buffers_.push_back(std::move(spec));
  return static_cast<BufferId>(buffers_.size()) - 1;
}

absl::StatusOr<MemoryPlan> MemoryPlanner::Solve() const {
  if (alignment_ <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the memory plan has the alignment ", alignment_, "; it must be positive"));
  }
  int64_t total = 0;
  for (const BufferSpec& b : buffers_) {
    if (b.bytes < 0) {
      return absl::InvalidArgumentError(absl::StrCat("the buffer \"", b.name, "\" has ", b.bytes,
                                                     " bytes; sizes are zero or more"));
    }
    if (b.last < b.first) {
      return absl::InvalidArgumentError(
          absl::StrCat("the buffer \"", b.name, "\" lives from action ", b.first, " to action ",
                       b.last, "; a lifetime cannot end before it starts"));
    }
    // Half of the range leaves room for rounding up to the alignment.
    if (b.bytes > std::numeric_limits<int64_t>::max() / 2 - alignment_ - total) {
      return absl::InvalidArgumentError(absl::StrCat("the buffers up to \"", b.name,
                                                     "\" sum to more than 2^62 bytes; check the "
                                                     "sizes that it was computed from"));
    }
    total += (b.bytes + alignment_ - 1) / alignment_ * alignment_;
  }

  std::vector<BufferId> order(buffers_.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](BufferId a, BufferId b) {
    const BufferSpec& x = buffers_[a];
    const BufferSpec& y = buffers_[b];
    if (x.bytes != y.bytes) return x.bytes > y.bytes;
    if (x.first != y.first) return x.first < y.first;
    return a < b;
  });

  MemoryPlan plan;
  plan.buffers = buffers_;
  plan.offsets.assign(buffers_.size(), 0);
  plan.peak_live_bytes = PeakLiveBytes(buffers_);
  // Two lifetimes meet when the later start is no later than the earlier end, so only the starts
  // count as times.
  std::vector<int> starts;
  starts.reserve(buffers_.size());
  for (const BufferSpec& b : buffers_) starts.push_back(b.first);
  std::sort(starts.begin(), starts.end());
  starts.erase(std::unique(starts.begin(), starts.end()), starts.end());
  const auto time = [&](int action) {
    return static_cast<int>(std::upper_bound(starts.begin(), starts.end(), action) -
                            starts.begin()) -
           1;
  };
  Occupancy occupancy(static_cast<int>(starts.size()));
  for (BufferId id : order) {
    const BufferSpec& b = buffers_[id];
    if (b.bytes == 0) break;  // sorted by size: only empty ones follow, and they stay at 0
    const int first = time(b.first), last = time(b.last);
    const int64_t offset = occupancy.LowestFree(first, last, b.bytes);
    const int64_t aligned = (b.bytes + alignment_ - 1) / alignment_ * alignment_;
    occupancy.Add(first, last, offset, offset + aligned);
    plan.offsets[id] = offset;
    plan.arena_bytes = std::max(plan.arena_bytes, offset + b.bytes);
  }
  return plan;
}

std::string MemoryPlan::Report(int most) const {
  std::vector<BufferId> order(buffers.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](BufferId a, BufferId b) { return buffers[a].bytes > buffers[b].bytes; });
  const size_t shown = std::min(order.size(), static_cast<size_t>(std::max(most, 0)));
  size_t width = 6;
  for (size_t i = 0; i < shown; ++i) width = std::max(width, buffers[order[i]].name.size());
  std::string out = absl::StrFormat("%-*s %12s %15s %12s\n", static_cast<int>(width), "buffer",
                                    "size", "actions", "offset");
  for (size_t i = 0; i < shown; ++i) {
    const BufferSpec& b = buffers[order[i]];
    absl::StrAppend(&out, absl::StrFormat("%-*s %12s %15s %12s\n", static_cast<int>(width), b.name,
                                          HumanBytes(b.bytes), absl::StrCat(b.first, "..", b.last),
                                          HumanBytes(offsets[order[i]])));
  }
  if (shown < order.size()) {
    int64_t rest = 0;
    for (size_t i = shown; i < order.size(); ++i) rest += buffers[order[i]].bytes;
    absl::StrAppend(&out, "and ", order.size() - shown, " smaller ones of ", HumanBytes(rest),
                    " in all\n");
  }
  int64_t total = 0;
  for (const BufferSpec& b : buffers) total += b.bytes;
  absl::StrAppend(
      &out, "arena ", HumanBytes(arena_bytes), " (", arena_bytes, " bytes), at most ",
      HumanBytes(peak_live_bytes), " live at once",
      peak_live_bytes > 0
          ? absl::StrFormat(" (%.1f %% above it)", 100.0 * static_cast<double>(arena_bytes) /
                                                           static_cast<double>(peak_live_bytes) -
                                                       100.0)
          : std::string(),
      ", ", buffers.size(), " buffers of ", HumanBytes(total), "\n");
  return out;
}

}  // namespace stretto
