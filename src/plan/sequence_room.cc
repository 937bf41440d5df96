// How many ranks a document needs, and packs of short ones.
#include <algorithm>
#include <cmath>
#include <set>
#include <tuple>
#include <utility>

#include "src/plan/sequence_balance.h"
#include "stretto/plan/context_cut.h"

namespace stretto {
namespace {

using Wide = __int128;
constexpr size_t Index(int64_t i) { return static_cast<size_t>(i); }
constexpr double kGrain = 1024;  // of a byte

}  // namespace

SequenceRoom::SequenceRoom(const SequencePlanOptions& options, const SequenceClock& clock)
    : clock_(clock),
      memory_(options.memory),
      pipelines_(options.pipelines),
      most_tokens_(kParts + 1, options.capacity) {
  // Equation 3's numerator: two layers as a whole, of the others what does not wait in host memory.
  // Whole numbers of 1 / 1024 bytes.
  const Wide a = std::llround(kGrain * memory_.bytes_per_token);
  const Wide b = std::llround(kGrain * memory_.bytes_fixed);
  const Wide layers = options.cost.layers;
  const Wide budget = layers * (a * options.capacity + b);
  for (int r = 0; memory_.offload && layers > 2 && r <= kParts; ++r) {
    const Wide kept = 2 * kParts + (kParts - r) * (layers - 2);  // layers, times kParts
    most_tokens_[Index(r)] =
        static_cast<int64_t>((budget * kParts / kept - b) / std::max(a, Wide{1}));
  }
}

int64_t SequenceRoom::LargestPart(int64_t length, int64_t ranks) {
  return ContextTokens(length, static_cast<int>(ranks), 0);
}

int64_t SequenceRoom::RanksFor(int64_t length, int64_t most_tokens) const {
  return (length + most_tokens - 1) / most_tokens;
}

int SequenceRoom::HiddenOffload(int64_t length) const {
  if (!memory_.offload) return 0;
  // On a ring both sides are divided by its ranks, so one rank tells. Whole numbers again: bytes
  // that are copied within the layer's forward, of those that there are.
  const Wide rate = std::llround(std::min(memory_.host_bytes_per_second, 1e15));
  const Wide copied = rate * clock_.LayerForward(SequenceClock::LoadOf(length));
  const Wide bytes = Wide{std::llround(kGrain * memory_.bytes_per_token)} * length;
  constexpr Wide kNanosInSecond = 1000000000;
  return static_cast<int>(std::min<Wide>(
      kParts,
      copied * kParts / kNanosInSecond * static_cast<int>(kGrain) / std::max(bytes, Wide{1})));
}

int64_t SequenceRoom::FewestRanks(int64_t length) const {
  const int64_t capacity = MostTokens(0);
  if (length <= capacity) return 1;
  return RanksFor(length, MostTokens(HiddenOffload(length)));
}

int SequenceRoom::Offload(int64_t length, int64_t ranks) const {
  const int64_t part = LargestPart(length, ranks);
  const int most = memory_.offload ? HiddenOffload(length) : 0;
  for (int r = 0; r <= most; ++r) {
    if (part <= MostTokens(r)) return r;
  }
  return -1;
}

bool OverNetwork(const SequencePlanOptions& options, int first, int64_t ranks) {
  if (ranks == 1) return false;
  const int64_t last = first + ranks - 1;
  if (last >= options.pipelines) return options.pipelines > options.pipelines_per_machine;
  return first / options.pipelines_per_machine != last / options.pipelines_per_machine;
}

std::vector<std::vector<int64_t>> PackBestFit(const std::vector<int64_t>& lengths,
                                              std::vector<int64_t> which, int64_t capacity) {
  std::stable_sort(which.begin(), which.end(),
                   [&](int64_t a, int64_t b) { return lengths[Index(a)] > lengths[Index(b)]; });
  std::vector<std::vector<int64_t>> packs;
  std::set<std::pair<int64_t, size_t>> left;  // room, pack
  for (const int64_t d : which) {
    const int64_t length = lengths[Index(d)];
    const auto at = left.lower_bound({length, 0});
    size_t pack = packs.size();
    int64_t space = capacity;
    if (at != left.end()) {
      std::tie(space, pack) = *at;
      left.erase(at);
    } else {
      packs.emplace_back();
    }
    packs[pack].push_back(d);
    if (space > length) left.emplace(space - length, pack);
  }
  for (std::vector<int64_t>& pack : packs) std::sort(pack.begin(), pack.end());
  return packs;
}

}  // namespace stretto
