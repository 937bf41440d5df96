#include "stretto/core/memory_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/format.h"

namespace stretto {
namespace {

// A buffer that has its place, kept in order of offset.
struct Placed {
  int64_t offset;
  int64_t end;
  int first;
  int last;
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
  std::vector<Placed> placed;
  placed.reserve(buffers_.size());
  for (BufferId id : order) {
    const BufferSpec& b = buffers_[id];
    if (b.bytes == 0) break;  // sorted by size: only empty ones follow, and they stay at 0
    int64_t offset = 0;
    for (const Placed& p : placed) {
      if (p.first > b.last || p.last < b.first) continue;
      if (p.offset >= offset + b.bytes) break;
      offset = std::max(offset, (p.end + alignment_ - 1) / alignment_ * alignment_);
    }
    const Placed mine{offset, offset + b.bytes, b.first, b.last};
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), mine,
                         [](const Placed& x, const Placed& y) { return x.offset < y.offset; }),
        mine);
    plan.offsets[id] = offset;
    plan.arena_bytes = std::max(plan.arena_bytes, mine.end);
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
