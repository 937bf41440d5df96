#include "stretto/plan/sequence_plan.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/plan/sequence_balance.h"
#include "stretto/plan/context_cut.h"

namespace stretto {
namespace {

constexpr double kNano = 1e-9;
constexpr size_t Index(int64_t i) { return static_cast<size_t>(i); }

absl::Status CheckOptions(const SequencePlanOptions& o) {
  const auto error = [](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(parts...));
  };
  constexpr int kMostPipelines = 1 << 15, kMostStages = 1 << 10;
  if (o.pipelines < 1 || o.pipelines > kMostPipelines) {
    return error("a plan of sequences is for 1 to ", kMostPipelines, " pipelines, not ",
                 o.pipelines);
  }
  if (o.stages < 1 || o.stages > kMostStages) {
    return error("a plan of sequences is for pipelines of 1 to ", kMostStages, " stages, not ",
                 o.stages);
  }
  if (o.pipelines_per_machine < 1) {
    return error("a machine has at least 1 pipeline, not ", o.pipelines_per_machine);
  }
  constexpr int64_t kMostTokens = int64_t{1} << 31;
  if (o.capacity < 1 || o.capacity > kMostTokens) {
    return error("the capacity of a rank is 1 to ", kMostTokens, " tokens, not ", o.capacity);
  }
  if (o.method == SequenceMethod::kStatic && (o.context < 1 || o.pipelines % o.context != 0)) {
    return error("rings of ", o.context, " do not divide ", o.pipelines,
                 " pipelines; choose a divisor");
  }
  const SequenceMemory& m = o.memory;
  constexpr double kMostBytes = 1e12;
  if (!(m.bytes_per_token > 0 && m.bytes_per_token <= kMostBytes && m.bytes_fixed >= 0 &&
        m.bytes_fixed <= kMostBytes && m.device_bytes >= 0)) {
    return error("activations of a layer take ", m.bytes_per_token, " bytes a token and ",
                 m.bytes_fixed, " besides, a rank has ", m.device_bytes,
                 "; give a positive number first, none below 0 or above 1e12");
  }
  if (m.offload && !(m.host_bytes_per_second > 0 && std::isfinite(m.host_bytes_per_second))) {
    return error("activations in host memory need the bytes per second to it, not ",
                 m.host_bytes_per_second);
  }
  STRETTO_RETURN_IF_ERROR(SequenceClock::Check(o.cost));
  const double layers = static_cast<double>(o.cost.layers);
  const double needed =
      layers * (m.bytes_per_token * static_cast<double>(o.capacity) + m.bytes_fixed);
  if (m.device_bytes > 0 && needed > static_cast<double>(m.device_bytes)) {
    const double tokens =
        (static_cast<double>(m.device_bytes) / layers - m.bytes_fixed) / m.bytes_per_token;
    return absl::InvalidArgumentError(absl::StrFormat(
        "activations of %d tokens take %.0f bytes, a rank has %d for them; lower the capacity to "
        "%.0f",
        o.capacity, needed, m.device_bytes, std::max(0.0, std::floor(tokens))));
  }
  return absl::OkStatus();
}

// Sums of nanoseconds must stay below 2^63, whoever adds them up.
absl::Status CheckTimes(const std::vector<int64_t>& lengths, const SequencePlanOptions& o) {
  double tokens = 0, pairs = 0;
  for (const int64_t length : lengths) {
    const auto n = static_cast<double>(length);
    tokens += n;
    pairs += 0.5 * n * (n + 1);
  }
  const auto documents = static_cast<double>(lengths.size());
  double seconds = 0;
  for (const StageCost* half : {&o.cost.forward, &o.cost.backward}) {
    seconds += documents * half->fixed + tokens * half->per_token + pairs * half->per_pair;
  }
  for (const OperationCost* link : {&o.cost.machine, &o.cost.network}) {
    if (o.pipelines == 1) break;
    const double bytes = o.cost.ring_bytes_per_token * tokens * (1 + o.cost.backward_messages);
    seconds += 2 * documents * o.pipelines * link->latency;
    if (link->bytes_per_second > 0) seconds += bytes / link->bytes_per_second;
  }
  if (o.pipelines > 1) {
    // Each other rank may have a token more than its share.
    const double added = tokens + documents * o.pipelines;
    seconds += added * (o.cost.forward_sums + o.cost.backward_sums);
  }
  seconds *= static_cast<double>(o.cost.layers);
  constexpr double kMost = 4e6, kMostPairs = 4e18;
  if (pairs > kMostPairs) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "the documents have %.3g pairs of a query and a key, more than %.0g; plan fewer at a time",
        pairs, kMostPairs));
  }
  if (seconds <= kMost) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrFormat(
      "by these costs the documents could take %.3g seconds one after the other, more "
      "than %.0g; plan fewer at a time or check the costs",
      seconds, kMost));
}

// Documents of one ring.
class Pack {
 public:
  explicit Pack(int ranks) : ranks_(ranks) {}
  // A rank has a part of every document, if an empty one, and room to describe `capacity` of them.
  bool Full(int64_t capacity) const { return std::ssize(documents_) >= capacity; }
  // Adds the document if all ranks have room.
  bool Add(int64_t document, int64_t length, int64_t capacity) {
    if (Full(capacity) || ContextTokens(total_ + length, ranks_, 0) > capacity) return false;
    total_ += length;
    documents_.push_back(document);
    return true;
  }
  std::vector<int64_t>& documents() { return documents_; }
  int64_t total() const { return total_; }

 private:
  int ranks_;
  int64_t total_ = 0;
  std::vector<int64_t> documents_;
};

SequenceClock::Load LoadOf(const std::vector<int64_t>& lengths,
                           const std::vector<int64_t>& documents) {
  SequenceClock::Load load;
  for (const int64_t d : documents) {
    load.tokens += lengths[Index(d)];
    load.pairs += SequenceClock::PairsOf(lengths[Index(d)]);
  }
  return load;
}

std::vector<PlacedItem> PlaceStatic(const std::vector<int64_t>& lengths,
                                    const SequencePlanOptions& o) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[Index(a)] > lengths[Index(b)]; });
  // Best fit by what is left, and the next emptier one where rounding leaves a rank no room.
  std::vector<Pack> packs;
  std::multimap<int64_t, size_t> left;
  const int64_t all = o.capacity * o.context;
  for (const int64_t d : order) {
    const int64_t length = lengths[Index(d)];
    auto at = left.lower_bound(length);
    while (at != left.end() && !packs[at->second].Add(d, length, o.capacity)) ++at;
    size_t pack;
    if (at != left.end()) {
      pack = at->second;
      left.erase(at);
    } else {
      pack = packs.size();
      packs.emplace_back(o.context).Add(d, length, o.capacity);
    }
    if (!packs[pack].Full(o.capacity)) left.emplace(all - packs[pack].total(), pack);
  }
  std::vector<PlacedItem> items;
  const int groups = o.pipelines / o.context;
  for (Pack& pack : packs) {
    const auto number = static_cast<int>(items.size());
    items.push_back({.documents = std::move(pack.documents()),
                     .first = number % groups * o.context,
                     .ranks = o.context});
  }
  return items;
}

std::vector<PlacedItem> PlaceUnbalanced(const std::vector<int64_t>& lengths,
                                        const SequencePlanOptions& o, const SequenceClock& clock,
                                        const SequenceRoom& room, int64_t bound) {
  const int64_t longest = std::max<int64_t>(1, bound / o.stages);
  std::vector<PlacedItem> items;
  std::vector<int64_t> short_ones;
  for (size_t d = 0; d < lengths.size(); ++d) {
    const auto document = static_cast<int64_t>(d);
    const int64_t ranks = o.ranks_from_memory ? room.FewestRanks(lengths[d])
                                              : RanksWithin(lengths[d], longest, o, clock, room);
    if (ranks == 1 && lengths[d] <= o.capacity) {
      short_ones.push_back(document);
    } else {
      items.push_back({.documents = {document},
                       .ranks = static_cast<int>(ranks),
                       .offload = std::max(0, room.Offload(lengths[d], ranks))});
    }
  }
  for (std::vector<int64_t>& pack : PackBestFit(lengths, std::move(short_ones), o.capacity)) {
    items.push_back({.documents = std::move(pack)});
  }
  // In the order in which the batch has their first documents.
  std::sort(items.begin(), items.end(), [](const PlacedItem& a, const PlacedItem& b) {
    return a.documents.front() < b.documents.front();
  });
  int next = 0;
  for (PlacedItem& item : items) {
    item.first = next;
    next = (next + item.ranks) % o.pipelines;
  }
  return items;
}

// Documents ascend, and items have their times.
void Complete(const std::vector<int64_t>& lengths, const SequencePlanOptions& options,
              const SequenceClock& clock, std::vector<PlacedItem>* placed) {
  for (PlacedItem& p : *placed) {
    std::sort(p.documents.begin(), p.documents.end());
    p.load = LoadOf(lengths, p.documents);
    p.nanoseconds = clock.Both(p.load, p.ranks, OverNetwork(options, p.first, p.ranks));
  }
}

// A fixed mesh, where one is better than `placed`: several short documents may share a ring there,
// which pays on few ranks, and when documents are alike. With many ranks none ever was, and packing
// takes its time.
void ConsiderFixed(const std::vector<int64_t>& lengths, const SequencePlanOptions& options,
                   const SequenceClock& clock, std::vector<PlacedItem>* placed) {
  constexpr int kFew = 64;
  if (options.pipelines > kFew || lengths.empty()) return;
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  int64_t best = MakespanOf(*placed, options, clock);
  SequencePlanOptions fixed = options;
  for (fixed.context = 1; fixed.context <= options.pipelines; ++fixed.context) {
    if (options.pipelines % fixed.context != 0) continue;
    if (SequenceRoom::LargestPart(longest, fixed.context) > options.capacity) continue;
    std::vector<PlacedItem> other = PlaceStatic(lengths, fixed);
    const bool described = std::all_of(other.begin(), other.end(), [&](const PlacedItem& item) {
      return item.documents.size() * Index(item.ranks) <= Index(options.most_shares);
    });
    if (!described) continue;
    Complete(lengths, options, clock, &other);
    const int64_t makespan = MakespanOf(other, options, clock);
    if (makespan >= best) continue;
    best = makespan;
    *placed = std::move(other);
  }
}

void AddTimes(const std::vector<PlacedItem>& placed, SequencePlan* plan) {
  std::vector<int64_t> busy(Index(plan->options.pipelines), 0);
  for (size_t i = 0; i < placed.size(); ++i) {
    for (const int p : plan->items[i].pipelines) busy[Index(p)] += placed[i].nanoseconds;
  }
  int64_t sum = 0;
  for (const int64_t time : busy) {
    sum += time;
    plan->pipeline_seconds.push_back(kNano * static_cast<double>(time));
  }
  plan->mean = kNano * static_cast<double>(sum) / static_cast<double>(busy.size());
}

int MostPeers(const SequencePlan& plan) {
  std::vector<std::vector<int>> peers(Index(plan.options.pipelines));
  for (const PlanItem& item : plan.items) {
    const size_t ranks = item.pipelines.size();
    for (size_t i = 0; ranks > 1 && i < ranks; ++i) {
      peers[Index(item.pipelines[i])].push_back(item.pipelines[(i + 1) % ranks]);
    }
  }
  size_t most = 0;
  for (std::vector<int>& p : peers) {
    std::sort(p.begin(), p.end());
    most = std::max(most, static_cast<size_t>(std::unique(p.begin(), p.end()) - p.begin()));
  }
  return static_cast<int>(most);
}

}  // namespace

const char* Name(SequenceMethod method) {
  switch (method) {
    case SequenceMethod::kStatic:
      return "static";
    case SequenceMethod::kUnbalanced:
      return "unbalanced";
    case SequenceMethod::kBalanced:
      return "balanced";
    case SequenceMethod::kBalancedPipelines:
      return "balanced-pipelines";
  }
  return "?";
}

absl::StatusOr<SequenceMethod> ParseSequenceMethod(const std::string& name) {
  for (const auto method : {SequenceMethod::kStatic, SequenceMethod::kUnbalanced,
                            SequenceMethod::kBalanced, SequenceMethod::kBalancedPipelines}) {
    if (name == Name(method)) return method;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("there is no method '", name,
                   "' for sequences; choose static, unbalanced, balanced or "
                   "balanced-pipelines"));
}

int64_t SequencePlan::TokensOf(const PlanItem& item, int place) {
  return ContextTokens(item.lengths, static_cast<int>(item.pipelines.size()), place);
}

uint64_t SequencePlan::Hash() const {
  std::vector<int64_t> words;
  const auto list = [&](const auto& values) {
    words.push_back(static_cast<int64_t>(values.size()));
    words.insert(words.end(), values.begin(), values.end());
  };
  for (const PlanItem& item : items) {
    list(item.lengths);
    list(item.pipelines);
    list(item.documents);
    words.push_back(item.level);
    words.push_back(std::bit_cast<int64_t>(item.offload));
  }
  return XXH64(words.data(), words.size() * sizeof(words[0]), 0);
}

std::string SequencePlan::Describe() const {
  int64_t documents = 0, tokens = 0, rings = 0, most_ranks = 0;
  for (const PlanItem& item : items) {
    documents += static_cast<int64_t>(item.documents.size());
    tokens += item.tokens;
    rings += item.pipelines.size() > 1 ? 1 : 0;
    most_ranks = std::max(most_ranks, static_cast<int64_t>(item.pipelines.size()));
  }
  std::string out = absl::StrFormat(
      "%s: %d documents of %d tokens in %d items on %d pipelines, %d of them rings of up to %d, "
      "%d levels, plan %016x\n",
      Name(options.method), documents, tokens, items.size(), options.pipelines, rings, most_ranks,
      levels, Hash());
  absl::StrAppendFormat(
      &out,
      "%.4g s, %.4g s of it work on average; at least %.4g s (%.3f times)\n"
      "a rank has at most %d tokens, sends to at most %d others; rings send %.4g bytes\n",
      makespan, mean, lower_bound, lower_bound > 0 ? makespan / lower_bound : 1.0, max_tokens,
      max_peers, static_cast<double>(ring_bytes));
  return out;
}

absl::StatusOr<SequencePlan> PlanSequences(const std::vector<int64_t>& lengths,
                                           const SequencePlanOptions& options) {
  STRETTO_RETURN_IF_ERROR(CheckOptions(options));
  constexpr int64_t kMostLength = int64_t{1} << 31;
  for (size_t d = 0; d < lengths.size(); ++d) {
    if (lengths[d] < 1 || lengths[d] > kMostLength) {
      return absl::InvalidArgumentError(absl::StrCat("document ", d, " has ", lengths[d],
                                                     " tokens; lengths are 1 to ", kMostLength));
    }
  }
  STRETTO_RETURN_IF_ERROR(CheckTimes(lengths, options));
  const SequenceClock clock(options.cost, options.stages);
  const SequenceRoom room(options, clock);
  for (size_t d = 0; d < lengths.size(); ++d) {
    const bool fixed = options.method == SequenceMethod::kStatic;
    const int64_t ranks = fixed ? options.context : options.pipelines;
    const bool fits = fixed ? SequenceRoom::LargestPart(lengths[d], ranks) <= options.capacity
                            : room.FewestRanks(lengths[d]) <= ranks;
    if (!fits) {
      return absl::InvalidArgumentError(absl::StrCat(
          "document ", d, " has ", lengths[d], " tokens, ", ranks, " ranks",
          fixed ? " of a ring" : "", " with room for ", options.capacity,
          " each cannot hold it; raise the capacity, take more ranks, or cut the document"));
    }
  }
  SequencePlan plan = {.options = options};
  const int64_t bound = BoundOfPlans(lengths, options, clock, room);
  plan.lower_bound = kNano * static_cast<double>(bound);
  std::vector<PlacedItem> placed;
  switch (options.method) {
    case SequenceMethod::kStatic:
      placed = PlaceStatic(lengths, options);
      break;
    case SequenceMethod::kUnbalanced:
      placed = PlaceUnbalanced(lengths, options, clock, room, bound);
      break;
    case SequenceMethod::kBalanced:
    case SequenceMethod::kBalancedPipelines:
      placed = PlaceBalanced(lengths, options, clock, room, bound);
      break;
  }
  Complete(lengths, options, clock, &placed);
  const bool balanced = options.method == SequenceMethod::kBalanced ||
                        options.method == SequenceMethod::kBalancedPipelines;
  if (balanced) ConsiderFixed(lengths, options, clock, &placed);
  for (PlacedItem& p : placed) {
    PlanItem& item = plan.items.emplace_back();
    item.tokens = p.load.tokens;
    for (const int64_t d : p.documents) item.lengths.push_back(lengths[Index(d)]);
    for (int i = 0; i < p.ranks; ++i) {
      item.pipelines.push_back((p.first + i) % options.pipelines);
    }
    std::sort(item.pipelines.begin(), item.pipelines.end());
    item.documents = std::move(p.documents);
    item.offload = static_cast<double>(p.offload) / SequenceRoom::kParts;
    plan.item_seconds.push_back(kNano * static_cast<double>(p.nanoseconds));
    plan.ring_bytes += clock.RingBytes(p.load, p.ranks);
    for (int i = 0; i < p.ranks; ++i) {
      plan.max_tokens = std::max(plan.max_tokens, SequencePlan::TokensOf(item, i));
    }
  }
  STRETTO_RETURN_IF_ERROR(AssignLevels(options.pipelines, &plan.items));
  for (const PlanItem& item : plan.items) plan.levels = std::max(plan.levels, item.level + 1);
  AddTimes(placed, &plan);
  plan.makespan = kNano * static_cast<double>(MakespanOf(placed, options, clock));
  plan.max_peers = MostPeers(plan);
  return plan;
}

}  // namespace stretto
