#include "stretto/sim/sequence_simulation.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto {
namespace {

constexpr double kKi = 1024;

// What the planner reckons with, for each item once.
class SequenceTimes final : public ActionTimes {
 public:
  explicit SequenceTimes(const SequencePlan& plan) {
    const SequencePlanOptions& o = plan.options;
    const SequenceClock clock(o.cost, o.stages);
    for (const PlanItem& item : plan.items) {
      SequenceClock::Load load;
      for (const int64_t length : item.lengths) {
        load.tokens += length;
        load.pairs += SequenceClock::PairsOf(length);
      }
      const auto ranks = static_cast<int64_t>(item.pipelines.size());
      const bool network = item.pipelines.front() / o.pipelines_per_machine !=
                           item.pipelines.back() / o.pipelines_per_machine;
      forward_.push_back(1e-9 * static_cast<double>(clock.Forward(load, ranks, network)));
      backward_.push_back(1e-9 * static_cast<double>(clock.Backward(load, ranks, network)));
    }
  }
  double Seconds(int /*rank*/, const ProgramAction& action, double /*start*/) override {
    const auto item = static_cast<size_t>(action.item);
    return action.work == StageWork::kForward ? forward_[item] : backward_[item];
  }
  double BoundarySeconds(const PlanItem& /*item*/) const override { return 0; }

 private:
  std::vector<double> forward_, backward_;
};

}  // namespace

double SequenceSimulation::mean() const {
  const double sum = std::accumulate(timeline.busy.begin(), timeline.busy.end(), 0.0);
  return timeline.busy.empty() ? 0 : sum / static_cast<double>(timeline.busy.size());
}

absl::StatusOr<SequenceSimulation> SimulateSequences(const SequencePlan& plan) {
  const SequencePlanOptions& o = plan.options;
  SequenceSimulation simulation;
  STRETTO_ASSIGN_OR_RETURN(simulation.program, MakeProgram(ScheduleKind::kOneF1B, o.pipelines,
                                                           o.stages, /*chunks=*/1, plan.items));
  SequenceTimes times(plan);
  STRETTO_ASSIGN_OR_RETURN(simulation.timeline, Simulate(simulation.program, times));
  return simulation;
}

SequenceCost ByteScaleCost(int tensor) {
  const double scale = 8.0 / tensor;
  SequenceCost cost;
  cost.forward = {.per_token = scale * 0.355e-3 / kKi,
                  .per_pair = scale * 2 * 0.00969e-3 / (kKi * kKi)};
  cost.backward = {.per_token = 2 * cost.forward.per_token, .per_pair = 2 * cost.forward.per_pair};
  cost.layers = 32;
  constexpr double kKeyHeads = 8, kHeadSize = 128, kBytes = 2;
  cost.ring_bytes_per_token = 2 * kKeyHeads * kHeadSize * kBytes / tensor;
  // The message of the figure is that of 2 tensor ranks.
  const double figure_bytes = 2 * kKeyHeads * kHeadSize * kBytes / 2;
  cost.network = {.latency = 1.43e-3, .bytes_per_second = figure_bytes * kKi / 0.0588e-3};
  cost.machine = {.latency = 20e-6, .bytes_per_second = 150e9};
  return cost;
}

SequenceMemory ByteScaleMemory(int tensor) {
  constexpr double kHidden = 4096;
  return {.bytes_per_token = 34 * kHidden / tensor, .host_bytes_per_second = 25e9};
}

std::string DrawSequences(const SequenceSimulation& simulation, const std::string& title) {
  constexpr double kWidth = 900, kHeight = 320, kLeft = 10, kTop = 30;
  constexpr int kMostRows = 64;
  const Program& program = simulation.program;
  const int rows = std::min(program.pipelines, kMostRows);
  const double row = kHeight / rows;
  const double seconds = simulation.timeline.seconds;
  const double scale = seconds > 0 ? kWidth / seconds : 0;
  const char* colours[] = {"#c6dbf5", "#8fb8e8", "#4a86c8", "#f7dcae", "#e6a857", "#c05a3c"};
  const char* names[] = {"1 rank", "2 to 3", "4 to 15", "16 to 63", "64 to 255", "256 and more"};
  const auto colour = [&](size_t ranks) {
    int c = 0;
    for (const size_t from : {2, 4, 16, 64, 256}) c += ranks >= from ? 1 : 0;
    return c;
  };
  std::string out = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"12\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n"
      "<text x=\"%.0f\" y=\"18\">%s: %.4g s, simulated</text>\n"
      "<rect x=\"%.0f\" y=\"%.0f\" width=\"%.0f\" height=\"%.0f\" fill=\"none\" "
      "stroke=\"#999\"/>\n",
      kWidth + 2 * kLeft, kTop + kHeight + 30, kLeft, title, seconds, kLeft, kTop, kWidth, kHeight);
  for (int r = 0; r < rows; ++r) {
    const int pipeline = static_cast<int>(int64_t{r} * program.pipelines / rows);
    const auto rank = static_cast<size_t>(program.RankOf(pipeline, 0));
    const std::vector<Span>& spans = simulation.timeline.of_rank[rank];
    // Neighbours of one colour without a gap are one box, so that the file stays small.
    double begin = 0, end = 0;
    int last = -1;
    const auto draw = [&] {
      if (last < 0 || (end - begin) * scale < 0.05) return;
      absl::StrAppendFormat(
          &out, "<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>\n",
          kLeft + begin * scale, kTop + r * row, (end - begin) * scale, row, colours[last]);
    };
    for (const Span& span : spans) {
      const ProgramAction& a = program.of_rank[rank][static_cast<size_t>(span.action)];
      const int c = colour(program.items[static_cast<size_t>(a.item)].pipelines.size());
      if (c != last || (span.start - end) * scale > 0.3) {
        draw();
        begin = span.start;
        last = c;
      }
      end = span.end;
    }
    draw();
  }
  for (int c = 0; c < 6; ++c) {
    const double x = kLeft + 140 * c, y = kTop + kHeight + 8;
    absl::StrAppendFormat(&out,
                          "<rect x=\"%.0f\" y=\"%.0f\" width=\"14\" height=\"14\" fill=\"%s\"/>"
                          "<text x=\"%.0f\" y=\"%.0f\">%s</text>\n",
                          x, y, colours[c], x + 20, y + 12, names[c]);
  }
  return out + "</svg>\n";
}

}  // namespace stretto
