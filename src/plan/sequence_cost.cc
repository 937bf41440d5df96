#include "stretto/plan/sequence_cost.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using Wide = __int128;

constexpr double kAtto = 1e18;
constexpr int64_t kAttoPerNano = 1000000000;

int64_t Atto(double seconds) { return std::llround(seconds * kAtto); }

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

SequenceCost SequenceCostOf(const CostModel& cost, int64_t layers, double ring_bytes_per_token) {
  SequenceCost result = {.layers = layers, .ring_bytes_per_token = ring_bytes_per_token};
  const auto add = [](const std::vector<StageCost>& stages, double scale, StageCost* sum) {
    for (const StageCost& s : stages) {
      sum->fixed += scale * s.fixed;
      sum->per_token += scale * s.per_token;
      sum->per_pair += scale * s.per_pair;
    }
  };
  // Entries are blocks, or the stages of a whole model.
  const auto scale = [&](const std::vector<StageCost>& stages) {
    const auto entries = static_cast<double>(std::max<size_t>(1, stages.size()));
    return cost.parts ? 1 / entries : 1 / static_cast<double>(std::max<int64_t>(1, layers));
  };
  add(cost.forward, scale(cost.forward), &result.forward);
  add(cost.backward_input, scale(cost.backward_input), &result.backward);
  add(cost.backward_weight, scale(cost.backward_weight), &result.backward);
  result.machine = {.latency = cost.link_latency, .bytes_per_second = cost.link_bytes_per_second};
  result.network = result.machine;
  if (cost.parts) {
    result.forward_sums = cost.parts->ring_per_token;
    result.backward_sums = 2 * cost.parts->ring_per_token;
    result.machine = cost.parts->machine.point_to_point;
    result.network = cost.parts->network ? cost.parts->network->point_to_point : result.machine;
  }
  return result;
}

absl::Status SequenceClock::Check(const SequenceCost& cost) {
  const auto number = [](const char* name, double value, double most) {
    if (value >= 0 && value <= most) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("the cost of a sequence has ", name, " ", value, "; give 0 to ", most));
  };
  // Within these bounds each number stays below 2^63 of 1e-18 seconds, and products below 2^127.
  for (const StageCost* half : {&cost.forward, &cost.backward}) {
    STRETTO_RETURN_IF_ERROR(number("seconds of a layer", half->fixed, 1));
    STRETTO_RETURN_IF_ERROR(number("seconds of a token", half->per_token, 1e-3));
    STRETTO_RETURN_IF_ERROR(number("seconds of a pair", half->per_pair, 1e-6));
  }
  if (cost.forward.per_token + cost.forward.per_pair + cost.backward.per_token +
          cost.backward.per_pair ==
      0) {
    return absl::InvalidArgumentError(
        "the cost of a sequence says that its tokens take no time; fit it (stretto-bench fit)");
  }
  for (const OperationCost* link : {&cost.machine, &cost.network}) {
    STRETTO_RETURN_IF_ERROR(number("a latency of", link->latency, 1));
    STRETTO_RETURN_IF_ERROR(number("bytes per second of", link->bytes_per_second, 1e18));
    if (link->bytes_per_second > 0 && link->bytes_per_second < 1e6) {
      return absl::InvalidArgumentError(
          absl::StrCat("the cost of a sequence has bytes per second of ", link->bytes_per_second,
                       "; give 0, for no limit, or at least 1e6"));
    }
  }
  STRETTO_RETURN_IF_ERROR(number("ring bytes of a token", cost.ring_bytes_per_token, 1e6));
  STRETTO_RETURN_IF_ERROR(number("backward messages of", cost.backward_messages, 8));
  // Backward takes twice as long as forward, and computes that again where it must.
  for (const double sums : {cost.forward_sums, cost.backward_sums}) {
    STRETTO_RETURN_IF_ERROR(
        number("seconds of a token in a ring's sums", sums, 3 * DeviceCost::kMostRingPerToken));
  }
  if (cost.layers < 1 || cost.layers > 10000) {
    return absl::InvalidArgumentError(
        absl::StrCat("the cost of a sequence is for ", cost.layers, " layers; give 1 to 10000"));
  }
  return absl::OkStatus();
}

SequenceClock::SequenceClock(const SequenceCost& cost, int stages)
    : layers_(cost.layers),
      stage_layers_(CeilDiv(cost.layers, stages)),
      bytes_per_token_(cost.ring_bytes_per_token * (1 + cost.backward_messages)),
      overlapped_(cost.overlapped) {
  const auto pass = [&](const StageCost& half, double sums, double messages) {
    Pass p = {.fixed = Atto(half.fixed),
              .per_token = Atto(half.per_token),
              .per_pair = Atto(half.per_pair),
              .sums_per_token = Atto(sums)};
    for (const bool network : {false, true}) {
      const OperationCost& link = network ? cost.network : cost.machine;
      p.latency[network] = Atto(link.latency);
      if (link.bytes_per_second > 0) {
        p.step_per_token[network] =
            Atto(cost.ring_bytes_per_token * messages / link.bytes_per_second);
      }
    }
    return p;
  };
  forward_ = pass(cost.forward, cost.forward_sums, 1);
  backward_ = pass(cost.backward, cost.backward_sums, cost.backward_messages);
}

int64_t SequenceClock::Half(const Pass& pass, const Load& load, int64_t ranks, bool network) const {
  const int64_t own = CeilDiv(load.tokens, ranks);
  Wide layer = pass.fixed + Wide{pass.per_token} * own;
  const Wide attention = Wide{pass.per_pair} * load.pairs;
  if (ranks == 1) {
    layer += attention;
  } else {
    const Wide step = attention / (Wide{ranks} * ranks);
    const Wide message = pass.latency[network] + Wide{pass.step_per_token[network]} * own;
    layer += overlapped_ ? (ranks - 1) * std::max(step, message) + step
                         : ranks * step + (ranks - 1) * message;
    layer += Wide{pass.sums_per_token} * own * (ranks - 1);
  }
  return static_cast<int64_t>(layer * stage_layers_ / kAttoPerNano);
}

int64_t SequenceClock::RingBytes(const Load& load, int64_t ranks) const {
  // Each token's keys and values visit every other rank.
  return static_cast<int64_t>(static_cast<double>(layers_ * (ranks - 1)) *
                              static_cast<double>(load.tokens) * bytes_per_token_);
}

int64_t SequenceClock::LayerForward(const Load& load) const {
  return static_cast<int64_t>(
      (Wide{forward_.per_token} * load.tokens + Wide{forward_.per_pair} * load.pairs) /
      kAttoPerNano);
}

}  // namespace stretto
