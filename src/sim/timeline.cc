#include "stretto/sim/timeline.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto {
namespace {

std::string Text(const ProgramAction& a) {
  return absl::StrCat(Name(a.work), " of item ", a.item, " on stage ", a.stage);
}

class ModelTimes final : public ActionTimes {
 public:
  ModelTimes(const Program& program, const CostModel& cost) : program_(program), cost_(cost) {}
  double Seconds(int /*rank*/, const ProgramAction& action, double /*start*/) override {
    return cost_.Seconds(program_, action);
  }
  double BoundarySeconds(const PlanItem& item) const override {
    return cost_.BoundarySeconds(item);
  }
  double woven() const override { return cost_.woven; }

 private:
  const Program& program_;
  const CostModel& cost_;
};

class Clock {
  static constexpr double kNever = -1;

 public:
  Clock(const Program& program, ActionTimes& times)
      : program_(program),
        times_(times),
        next_(program.of_rank.size(), 0),
        now_(program.of_rank.size(), 0),
        seen_(program.of_rank.size(), 0),
        finished_(2 * static_cast<size_t>(program.stages) * program.items.size(), kNever) {
    timeline_.of_rank.resize(program.of_rank.size());
    timeline_.busy.resize(program.of_rank.size());
  }

  absl::StatusOr<Timeline> Run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int rank = 0; rank < ranks(); ++rank) {
        while (!AtEnd(rank) && Start(rank)) moved = true;
      }
    }
    for (int rank = 0; rank < ranks(); ++rank) {
      if (!AtEnd(rank)) return Stuck(rank);
    }
    for (double t : now_) timeline_.seconds = std::max(timeline_.seconds, t);
    return std::move(timeline_);
  }

 private:
  int ranks() const { return static_cast<int>(next_.size()); }
  const std::vector<ProgramAction>& ActionsOf(int rank) const {
    return program_.of_rank[static_cast<size_t>(rank)];
  }
  bool AtEnd(int rank) const { return next_[static_cast<size_t>(rank)] >= ActionsOf(rank).size(); }
  size_t Place(bool forward, int stage, int item) const {
    return 2 * (static_cast<size_t>(stage) * program_.items.size() + static_cast<size_t>(item)) +
           (forward ? 1 : 0);
  }
  // The next unit of a rank: [first, end) of its actions.
  std::pair<size_t, size_t> UnitOf(int rank) const {
    const size_t first = next_[static_cast<size_t>(rank)];
    size_t end = first + 1;
    while (ActionsOf(rank)[end - 1].with_next && end < ActionsOf(rank).size()) ++end;
    return {first, end};
  }
  bool InUnit(int rank, const ProgramAction& a) const {
    if (AtEnd(rank)) return false;
    const auto [first, end] = UnitOf(rank);
    for (size_t i = first; i < end; ++i) {
      const ProgramAction& b = ActionsOf(rank)[i];
      if (b.work == a.work && b.stage == a.stage && b.item == a.item) return true;
    }
    return false;
  }

  // When what an action needs from other actions is there; negative when that is not known yet.
  double ReadyAt(const ProgramAction& a, std::string* missing = nullptr) const {
    double ready = 0;
    const auto needs = [&](bool forward, int stage) {
      const double finished = finished_[Place(forward, stage, a.item)];
      if (finished == kNever) {
        if (missing != nullptr && ready >= 0) {
          *missing = absl::StrCat("the ", forward ? "forward" : "backward input", " of item ",
                                  a.item, " on stage ", stage);
        }
        ready = -1;
      } else if (ready >= 0) {
        const bool travels = program_.place_of_stage[static_cast<size_t>(stage)] !=
                             program_.place_of_stage[static_cast<size_t>(a.stage)];
        const PlanItem& item = program_.items[static_cast<size_t>(a.item)];
        ready = std::max(ready, finished + (travels ? times_.BoundarySeconds(item) : 0));
      }
    };
    switch (a.work) {
      case StageWork::kForward:
        if (a.stage > 0) needs(true, a.stage - 1);
        break;
      case StageWork::kBackward:
      case StageWork::kBackwardInput:
        needs(true, a.stage);
        if (a.stage + 1 < program_.stages) needs(false, a.stage + 1);
        break;
      case StageWork::kBackwardWeight:
        needs(false, a.stage);
        break;
    }
    return ready;
  }

  // Starts the next unit of a rank, with those of all ranks that share an item of it, if it can.
  bool Start(int rank) {
    // Everybody who has to come, and when all of them have what they need.
    std::vector<int>& together = together_;
    together.assign(1, rank);
    ++round_;
    seen_[static_cast<size_t>(rank)] = round_;
    double start = 0;
    for (size_t i = 0; i < together.size(); ++i) {
      const int r = together[i];
      start = std::max(start, now_[static_cast<size_t>(r)]);
      const auto [first, end] = UnitOf(r);
      for (size_t k = first; k < end; ++k) {
        const ProgramAction& a = ActionsOf(r)[k];
        const double ready = ReadyAt(a);
        if (ready < 0) return false;
        start = std::max(start, ready);
        for (int p : program_.items[static_cast<size_t>(a.item)].pipelines) {
          const int other = program_.RankOf(p, a.stage);
          if (!InUnit(other, a)) return false;
          int64_t& seen = seen_[static_cast<size_t>(other)];
          if (std::exchange(seen, round_) != round_) together.push_back(other);
        }
      }
    }
    double seconds = 0;
    std::vector<double> own;
    for (int r : together) {
      const auto [first, end] = UnitOf(r);
      double sum = 0;
      for (size_t k = first; k < end; ++k) {
        sum += times_.Seconds(r, ActionsOf(r)[k], start + sum);
      }
      own.push_back(end - first > 1 ? sum * times_.woven() : sum);
      seconds = std::max(seconds, own.back());
    }
    const double finish = start + seconds;
    for (size_t i = 0; i < together.size(); ++i) {
      const auto r = static_cast<size_t>(together[i]);
      const auto [first, end] = UnitOf(together[i]);
      for (size_t k = first; k < end; ++k) {
        const ProgramAction& a = ActionsOf(together[i])[k];
        if (a.work != StageWork::kBackwardWeight) {
          finished_[Place(a.work == StageWork::kForward, a.stage, a.item)] = finish;
        }
        timeline_.of_rank[r].push_back({static_cast<int>(k), start, finish});
      }
      timeline_.busy[r] += own[i];
      now_[r] = finish;
      next_[r] = end;
    }
    return true;
  }

  absl::Status Stuck(int rank) const {
    const auto [first, end] = UnitOf(rank);
    for (size_t k = first; k < end; ++k) {
      const ProgramAction& a = ActionsOf(rank)[k];
      std::string why;
      if (ReadyAt(a, &why) >= 0) {
        for (int p : program_.items[static_cast<size_t>(a.item)].pipelines) {
          const int other = program_.RankOf(p, a.stage);
          if (InUnit(other, a)) continue;
          why = AtEnd(other) ? absl::StrCat("rank ", other, ", which is at its end")
                             : absl::StrCat("rank ", other, ", which wants to run the ",
                                            Text(ActionsOf(other)[UnitOf(other).first]));
        }
      }
      if (why.empty()) continue;
      return absl::FailedPreconditionError(absl::StrCat("the ranks wait in a circle: rank ", rank,
                                                        " wants to run the ", Text(a),
                                                        " and waits for ", why));
    }
    return absl::FailedPreconditionError(absl::StrCat("rank ", rank, " cannot go on"));
  }

  const Program& program_;
  ActionTimes& times_;
  std::vector<size_t> next_;
  std::vector<double> now_;
  std::vector<int> together_;
  std::vector<int64_t> seen_;  // by rank: the last round in which it came to `together_`
  int64_t round_ = 0;
  std::vector<double> finished_;  // by Place
  Timeline timeline_;
};

char Letter(StageWork work) {
  switch (work) {
    case StageWork::kForward:
      return 'F';
    case StageWork::kBackward:
      return 'D';
    case StageWork::kBackwardInput:
      return 'B';
    case StageWork::kBackwardWeight:
      return 'W';
  }
  return '?';
}

// Actions of one unit have the same times.
size_t UnitEnd(const std::vector<Span>& spans, size_t first) {
  size_t end = first + 1;
  while (end < spans.size() && spans[end].start == spans[first].start &&
         spans[end].end == spans[first].end && spans[first].end > spans[first].start) {
    ++end;
  }
  return end;
}

}  // namespace

double Timeline::IdleFraction() const {
  double worked = 0;
  for (double b : busy) worked += b;
  const double all = seconds * static_cast<double>(busy.size());
  return all > 0 ? 1 - worked / all : 0;
}

absl::StatusOr<Timeline> Simulate(const Program& program, const CostModel& cost) {
  for (const auto* costs : {&cost.forward, &cost.backward_input, &cost.backward_weight}) {
    if (costs->size() > 1 && static_cast<int>(costs->size()) != program.stages) {
      return absl::InvalidArgumentError(
          absl::StrCat("the cost model has ", costs->size(), " stages, the program ",
                       program.stages, "; fit it to this layout, or give one entry for all"));
    }
  }
  ModelTimes times(program, cost);
  return Simulate(program, times);
}

absl::StatusOr<Timeline> Simulate(const Program& program, ActionTimes& times) {
  return Clock(program, times).Run();
}

std::string ChromeTrace(const Program& program, const Timeline& timeline) {
  std::string out = kChromeTraceBegin;
  for (size_t rank = 0; rank < timeline.of_rank.size(); ++rank) {
    std::vector<TraceSlice> slices;
    for (const Span& span : timeline.of_rank[rank]) {
      const ProgramAction& a = program.of_rank[rank][static_cast<size_t>(span.action)];
      slices.push_back({.row = "compute",
                        .category = Name(a.work),
                        .tags = TagsOf(a),
                        .begin_ns = std::llround(1e9 * span.start),
                        .end_ns = std::llround(1e9 * span.end)});
    }
    if (rank > 0) out += kChromeTraceSeparator;
    const auto number = static_cast<int>(rank);
    out += ChromeTraceProcess(number, absl::StrCat("rank ", number), "", slices);
  }
  return out + ChromeTraceEnd({{"source", JsonString("simulated")}});
}

std::string DrawText(const Program& program, const Timeline& timeline, int columns) {
  std::string out;
  const double scale = timeline.seconds > 0 ? static_cast<double>(columns) / timeline.seconds : 0;
  for (size_t rank = 0; rank < timeline.of_rank.size(); ++rank) {
    std::string line(static_cast<size_t>(columns), '.');
    const std::vector<Span>& spans = timeline.of_rank[rank];
    for (size_t first = 0, end = 0; first < spans.size(); first = end) {
      end = UnitEnd(spans, first);
      // Those of a unit share its time here, one after the other.
      const double part =
          (spans[first].end - spans[first].start) / static_cast<double>(end - first);
      for (size_t i = first; i < end; ++i) {
        const ProgramAction& a = program.of_rank[rank][static_cast<size_t>(spans[i].action)];
        const double start = spans[first].start + part * static_cast<double>(i - first);
        const auto from = static_cast<size_t>(start * scale + 0.5);
        const auto to = std::min(line.size(), static_cast<size_t>((start + part) * scale + 0.5));
        const std::string label = absl::StrCat(std::string(1, Letter(a.work)), a.item);
        for (size_t c = from; c < to; ++c) {
          line[c] = c - from < label.size() ? label[c - from] : '-';
        }
      }
    }
    absl::StrAppendFormat(&out, "%4d %s\n", rank, line);
  }
  return out;
}

std::string DrawSvg(const Program& program, const Timeline& timeline) {
  constexpr double kWidth = 960, kRow = 26, kLeft = 60, kTop = 8;
  const double height = kTop * 2 + kRow * static_cast<double>(timeline.of_rank.size());
  const double scale = timeline.seconds > 0 ? kWidth / timeline.seconds : 0;
  std::string out = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" "
      "font-family=\"sans-serif\" font-size=\"11\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n",
      kLeft + kWidth + kTop, height);
  const auto colour = [&](const ProgramAction& a) {
    const bool second = a.stage >= program.pipeline_ranks;
    switch (a.work) {
      case StageWork::kForward:
        return second ? "#8fb8e8" : "#c6dbf5";
      case StageWork::kBackward:
        return second ? "#a5cf9a" : "#d0e8c8";
      case StageWork::kBackwardInput:
        return second ? "#e6b877" : "#f7dcae";
      case StageWork::kBackwardWeight:
        return second ? "#c9a3d8" : "#e6d2ee";
    }
    return "#ffffff";
  };
  for (size_t rank = 0; rank < timeline.of_rank.size(); ++rank) {
    const double y = kTop + kRow * static_cast<double>(rank);
    absl::StrAppendFormat(&out, "<text x=\"4\" y=\"%.1f\">rank %d</text>\n", y + 16, rank);
    const std::vector<Span>& spans = timeline.of_rank[rank];
    for (size_t first = 0, end = 0; first < spans.size(); first = end) {
      end = UnitEnd(spans, first);  // those of a unit share its box, one above the other
      const double h = (kRow - 4) / static_cast<double>(end - first);
      for (size_t i = first; i < end; ++i) {
        const ProgramAction& a = program.of_rank[rank][static_cast<size_t>(spans[i].action)];
        const double x = kLeft + spans[i].start * scale;
        const double w = (spans[i].end - spans[i].start) * scale;
        const double top = y + h * static_cast<double>(i - first);
        absl::StrAppendFormat(&out,
                              "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" "
                              "fill=\"%s\" stroke=\"#555\" stroke-width=\"0.5\"/>",
                              x, top, w, h, colour(a));
        if (w > 10) {
          absl::StrAppendFormat(&out,
                                "<text x=\"%.2f\" y=\"%.1f\" text-anchor=\"middle\">%d</text>",
                                x + w / 2, top + h / 2 + 4, a.item);
        }
        absl::StrAppend(&out, "\n");
      }
    }
  }
  absl::StrAppend(&out, "</svg>\n");
  return out;
}

}  // namespace stretto
