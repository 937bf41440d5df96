// Documents that ranks share, in random rings, and the same documents on one rank.
#ifndef STRETTO_TESTS_SUPPORT_CONTEXT_CASES_H_
#define STRETTO_TESTS_SUPPORT_CONTEXT_CASES_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "stretto/data/ring_share.h"
#include "stretto/plan/program.h"
#include "tests/support/harness.h"
#include "tests/support/random_items.h"

namespace stretto::testing {

// Items on rings of one to `ranks` ranks in random order, several documents each, many of them
// shorter than twice the ring, none longer than `longest`; at least one ring has all ranks.
inline std::vector<PlanItem> RingItems(int ranks, int count, int64_t longest, uint64_t seed) {
  const Rng rng(seed, "test/rings");
  uint64_t n = 0;
  std::vector<PlanItem> items(static_cast<size_t>(count));
  for (PlanItem& item : items) {
    std::vector<int> all;
    for (int p = 0; p < ranks; ++p) all.push_back(p);
    for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[rng.Below(n++, i)]);
    const size_t shared = &item == &items[0] ? all.size() : 1 + rng.Below(n++, all.size());
    item.pipelines.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(shared));
    for (uint64_t documents = 1 + rng.Below(n++, 4); documents > 0; --documents) {
      const auto most = static_cast<uint64_t>(rng.Below(n++, 3) == 0 ? 3 : longest);
      item.lengths.push_back(1 + static_cast<int64_t>(rng.Below(n++, most)));
      item.tokens += item.lengths.back();
    }
  }
  return items;
}

// What each of the pipelines has of the items, level by level (StepUnder), and the whole documents.
struct DealtItems {
  std::vector<std::vector<PackedBatch>> shares;  // [pipeline][level]
  std::vector<std::vector<PackedBatch>> whole;   // [0][item]
};
inline absl::StatusOr<DealtItems> Deal(int pipelines, std::vector<PlanItem> items,
                                       int64_t vocabulary, uint64_t seed) {
  STRETTO_RETURN_IF_ERROR(AssignLevels(pipelines, &items));
  int levels = 0;
  for (const PlanItem& item : items) levels = std::max(levels, item.level + 1);
  PackedBatch nothing;
  nothing.Clear();
  DealtItems dealt;
  dealt.whole.resize(1);
  dealt.shares.assign(static_cast<size_t>(pipelines),
                      std::vector<PackedBatch>(static_cast<size_t>(levels), nothing));
  for (size_t i = 0; i < items.size(); ++i) {
    const PlanItem& item = items[i];
    const PackedBatch& whole =
        dealt.whole[0].emplace_back(RandomBatch(item.lengths, vocabulary, seed + i));
    for (size_t place = 0; place < item.pipelines.size(); ++place) {
      SliceForRing(whole, item.pipelines, static_cast<int>(place),
                   &dealt.shares[static_cast<size_t>(item.pipelines[place])]
                                [static_cast<size_t>(item.level)]);
    }
  }
  return dealt;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_CONTEXT_CASES_H_
