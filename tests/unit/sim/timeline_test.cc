// Programs on the virtual clock: bubbles by the published formulas, no hangs with levels, hangs
// without.
#include "stretto/sim/timeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "support/random_items.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

std::vector<PlanItem> OnePipeline(int micro_batches) {
  return std::vector<PlanItem>(static_cast<size_t>(micro_batches),
                               {.tokens = 1, .lengths = {1}, .pipelines = {0}});
}

// The least idle time of a rank between the step's start and end.
double Bubble(const Timeline& t) {
  return t.seconds - *std::max_element(t.busy.begin(), t.busy.end());
}

struct Case {
  ScheduleKind kind;
  int chunks;
};

TEST(Simulate, BubblesAreThoseOfThePublishedFormulas) {
  struct Times {
    double f, b, w;
  };
  for (const Case& c :
       {Case{ScheduleKind::kGPipe, 1}, Case{ScheduleKind::kOneF1B, 1},
        Case{ScheduleKind::kInterleaved, 1}, Case{ScheduleKind::kInterleaved, 2},
        Case{ScheduleKind::kInterleaved, 4}, Case{ScheduleKind::kZeroBubbleH1, 1}}) {
    for (const Times& t : {Times{1, 1, 1}, Times{1, 1.25, 0.75}, Times{2, 2, 1}}) {
      for (int ranks = 2; ranks <= 16; ++ranks) {
        for (int micro_batches : {2 * ranks, 4 * ranks, 64 / ranks * ranks}) {
          if (micro_batches < 2 * ranks) continue;
          const double n = c.chunks;
          const auto timeline =
              Simulate(MakeProgram(c.kind, 1, ranks, c.chunks, OnePipeline(micro_batches)).value(),
                       UniformCost(t.f / n, t.b / n, t.w / n));
          ASSERT_TRUE(timeline.ok()) << timeline.status().message();
          EXPECT_NEAR(Bubble(*timeline), PublishedBubble(c.kind, ranks, c.chunks, t.f, t.b, t.w, 0),
                      1e-9)
              << Name(c.kind) << " with " << c.chunks << " chunks, " << ranks << " ranks, "
              << micro_batches << " micro-batches";
          EXPECT_NEAR(timeline->busy[0], micro_batches * (t.f + t.b + t.w), 1e-9);
        }
      }
    }
  }
}

// DualPipe's formula counts the woven pair as one unit.
TEST(Simulate, TheVShapesBubbleIsThePublishedOne) {
  for (int ranks = 1; ranks <= 16; ++ranks) {
    for (int micro_batches : {2 * ranks, 2 * ranks + 1, 64}) {
      const auto timeline = Simulate(
          MakeProgram(ScheduleKind::kVShaped, 1, ranks, 2, OnePipeline(micro_batches)).value(),
          UniformCost(0.5, 0.5, 0.5));
      ASSERT_TRUE(timeline.ok()) << timeline.status().message();
      if (micro_batches < 2 * ranks) continue;
      EXPECT_NEAR(Bubble(*timeline),
                  PublishedBubble(ScheduleKind::kVShaped, ranks, 2, 1, 1, 1, 1.5), 1e-9);
    }
  }
}

TEST(Simulate, EveryScheduleEndsForAnyNumberOfMicroBatches) {
  for (const Case& c : {Case{ScheduleKind::kGPipe, 1}, Case{ScheduleKind::kOneF1B, 1},
                        Case{ScheduleKind::kInterleaved, 3}, Case{ScheduleKind::kZeroBubbleH1, 1},
                        Case{ScheduleKind::kVShaped, 2}}) {
    for (int ranks = 2; ranks <= 16; ++ranks) {
      for (int micro_batches : {0, 1, 2, ranks - 1, ranks + 1, 64}) {
        const auto timeline =
            Simulate(MakeProgram(c.kind, 1, ranks, c.chunks, OnePipeline(micro_batches)).value(),
                     UniformCost(1, 1, 1));
        EXPECT_TRUE(timeline.ok()) << Name(c.kind) << ' ' << ranks << ' ' << micro_batches << ": "
                                   << timeline.status().message();
      }
    }
  }
}

// 500 random plans with shared and unequal items: all end with levels. Without levels many of them
// hang, and the simulator says so.
TEST(Simulate, SharedItemsNeedLevels) {
  int hung = 0, tried = 0;
  for (uint64_t seed = 0; seed < 500; ++seed) {
    const testing::RandomShape shape = testing::DrawShape(seed, 16);
    const std::vector<PlanItem> items = testing::DrawItems(shape.pipelines, seed);
    CostModel cost = UniformCost(1, 1, 1);
    cost.forward[0].per_token = 0.1;
    cost.link_latency = 0.25;
    const auto program =
        MakeProgram(shape.kind, shape.pipelines, shape.pipeline_ranks, shape.chunks, items);
    ASSERT_TRUE(program.ok());
    const auto timeline = Simulate(*program, cost);
    EXPECT_TRUE(timeline.ok()) << seed << ": " << timeline.status().message();
    if (shape.pipelines == 1 || shape.pipeline_ranks == 1) continue;
    ++tried;
    const auto alone = Simulate(MakeProgramWithoutLevels(shape.kind, shape.pipelines,
                                                         shape.pipeline_ranks, shape.chunks, items)
                                    .value(),
                                cost);
    if (alone.ok()) continue;
    ++hung;
    EXPECT_THAT(std::string(alone.status().message()), HasSubstr("wait in a circle: rank "));
  }
  EXPECT_GT(tried, 200);
  EXPECT_GT(hung, tried / 10);
}

TEST(Simulate, WhoSharesAnItemRunsItAtOneTime) {
  const Program program = MakeProgram(ScheduleKind::kOneF1B, 2, 2, 1,
                                      {{.tokens = 10, .lengths = {10}, .pipelines = {0}},
                                       {.tokens = 40, .lengths = {40}, .pipelines = {1, 0}},
                                       {.tokens = 10, .lengths = {10}, .pipelines = {1}}})
                              .value();
  CostModel cost = UniformCost(0, 0, 0);
  cost.forward[0].per_token = 1;
  cost.backward_input[0].per_token = 2;
  const Timeline timeline = Simulate(program, cost).value();
  const auto span = [&](int rank, StageWork work, int item) {
    for (const Span& s : timeline.of_rank[static_cast<size_t>(rank)]) {
      const ProgramAction& a =
          program.of_rank[static_cast<size_t>(rank)][static_cast<size_t>(s.action)];
      if (a.item == item && (a.work == StageWork::kForward) == (work == StageWork::kForward)) {
        return s;
      }
    }
    ADD_FAILURE() << "rank " << rank << " does not run item " << item;
    return Span();
  };
  for (const StageWork work : {StageWork::kForward, StageWork::kBackward}) {
    EXPECT_EQ(span(0, work, 1).start, span(2, work, 1).start);
    EXPECT_EQ(span(1, work, 1).end, span(3, work, 1).end);
  }
  EXPECT_EQ(span(0, StageWork::kForward, 1).end - span(0, StageWork::kForward, 1).start, 20);
  EXPECT_EQ(timeline.busy[0], 3 * 10 + 3 * 20);
}

TEST(Simulate, BoundariesTakeTime) {
  const Program program = MakeProgram(ScheduleKind::kGPipe, 1, 3, 1, OnePipeline(1)).value();
  CostModel cost = UniformCost(1, 1, 1);
  cost.link_latency = 0.5;
  EXPECT_DOUBLE_EQ(Simulate(program, cost)->seconds, 3 * 1 + 2 * 0.5 + 3 * 2 - 2 * 0.0 + 2 * 0.5);
}

// Times that depend on when an action begins: each is asked once, in a rank's order.
TEST(Simulate, ActionsMayTakeWhatTheTimeSays) {
  class Growing final : public ActionTimes {
   public:
    double Seconds(int rank, const ProgramAction& /*action*/, double start) override {
      if (rank == 0) starts.push_back(start);
      return 1 + start;
    }
    double BoundarySeconds(const PlanItem& /*item*/) const override { return 0.5; }
    std::vector<double> starts;
  } times;
  const Program program = MakeProgram(ScheduleKind::kGPipe, 1, 2, 1, OnePipeline(2)).value();
  const Timeline timeline = Simulate(program, times).value();
  // Rank 0 runs F0 from 0 to 1 and F1 from 1 to 3; F0's result is at the other one at 1.5, which
  // ends F0 at 4 and F1 at 9, then both backwards at 19 and 39.
  EXPECT_EQ(times.starts, (std::vector<double>{0, 1, 19.5, 40}));
  EXPECT_DOUBLE_EQ(timeline.seconds, 81);
}

TEST(Simulate, RefusesCostsOfAnotherLayout) {
  CostModel cost = UniformCost(1, 1, 1);
  cost.forward.resize(3);
  const Program program = MakeProgram(ScheduleKind::kOneF1B, 1, 2, 1, OnePipeline(2)).value();
  EXPECT_THAT(std::string(Simulate(program, cost).status().message()), HasSubstr("3 stages"));
}

TEST(Timeline, TracesAndPicturesShowEveryAction) {
  const Program program = MakeProgram(ScheduleKind::kVShaped, 2, 2, 2,
                                      {{.tokens = 1, .lengths = {1}, .pipelines = {0}},
                                       {.tokens = 1, .lengths = {1}, .pipelines = {0, 1}}})
                              .value();
  const Timeline timeline = Simulate(program, UniformCost(1, 1, 1)).value();
  size_t actions = 0;
  for (const auto& a : program.of_rank) actions += a.size();
  const auto trace = nlohmann::json::parse(ChromeTrace(program, timeline));
  size_t shown = 0;
  std::set<int> processes;
  for (const auto& event : trace["traceEvents"]) {
    processes.insert(event["pid"].get<int>());
    shown += event["ph"] == "X" ? 1 : 0;
  }
  EXPECT_EQ(shown, actions);
  EXPECT_EQ(processes.size(), program.of_rank.size());
  EXPECT_EQ(trace["otherData"]["source"], "simulated");
  const std::string svg = DrawSvg(program, timeline);
  size_t boxes = 0;
  for (size_t at = svg.find("<rect x="); at != std::string::npos;
       at = svg.find("<rect x=", at + 1)) {
    ++boxes;
  }
  EXPECT_EQ(boxes, actions);
  const std::string text = DrawText(program, timeline, 60);
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4);
  EXPECT_THAT(text, HasSubstr("F0"));
}

}  // namespace
}  // namespace stretto
