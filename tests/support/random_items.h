// Random plans: shapes of pipelines, and items of which some are shared.
#ifndef STRETTO_TESTS_SUPPORT_RANDOM_ITEMS_H_
#define STRETTO_TESTS_SUPPORT_RANDOM_ITEMS_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "stretto/core/rng.h"
#include "stretto/plan/program.h"

namespace stretto::testing {

struct RandomShape {
  ScheduleKind kind = ScheduleKind::kOneF1B;
  int pipelines = 1, pipeline_ranks = 1, chunks = 1;
};

// At most `most_ranks` ranks.
inline RandomShape DrawShape(uint64_t seed, int most_ranks = 8) {
  const Rng rng(seed, "test/shape");
  RandomShape shape;
  constexpr ScheduleKind kKinds[] = {ScheduleKind::kGPipe, ScheduleKind::kOneF1B,
                                     ScheduleKind::kInterleaved, ScheduleKind::kZeroBubbleH1,
                                     ScheduleKind::kVShaped};
  shape.kind = kKinds[rng.Below(0, 5)];
  shape.pipelines = 1 + static_cast<int>(rng.Below(1, 4));
  shape.pipeline_ranks = 1 + static_cast<int>(rng.Below(2, 4));
  while (shape.pipelines * shape.pipeline_ranks > most_ranks) --shape.pipeline_ranks;
  shape.chunks = shape.kind == ScheduleKind::kVShaped       ? 2
                 : shape.kind == ScheduleKind::kInterleaved ? 1 + static_cast<int>(rng.Below(3, 3))
                                                            : 1;
  return shape;
}

// Items on one to all of the pipelines, in any ring order, of unequal lengths.
inline std::vector<PlanItem> DrawItems(int pipelines, uint64_t seed) {
  const Rng rng(seed, "test/items");
  uint64_t n = 0;
  std::vector<PlanItem> items(2 + rng.Below(n++, 12));
  for (PlanItem& item : items) {
    std::vector<int> all;
    for (int p = 0; p < pipelines; ++p) all.push_back(p);
    for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[rng.Below(n++, i)]);
    // Most items are one pipeline's.
    const size_t shared = rng.Below(n++, 3) == 0 ? 1 + rng.Below(n++, all.size()) : 1;
    item.pipelines.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(shared));
    for (uint64_t documents = 1 + rng.Below(n++, 3); documents > 0; --documents) {
      item.lengths.push_back(1 + static_cast<int64_t>(rng.Below(n++, 50)));
      item.tokens += item.lengths.back();
    }
  }
  return items;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_RANDOM_ITEMS_H_
