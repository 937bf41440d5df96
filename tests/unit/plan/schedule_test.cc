// Properties that every pipeline schedule has, over many sizes. Times are in tests/unit/sim.
#include "stretto/plan/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Kind {
  ScheduleKind kind;
  int chunks;
};
constexpr Kind kKinds[] = {{ScheduleKind::kGPipe, 1},       {ScheduleKind::kOneF1B, 1},
                           {ScheduleKind::kInterleaved, 1}, {ScheduleKind::kInterleaved, 2},
                           {ScheduleKind::kInterleaved, 3}, {ScheduleKind::kZeroBubbleH1, 1},
                           {ScheduleKind::kVShaped, 2}};

void ForAll(const std::function<void(const Schedule&)>& check) {
  for (const Kind& k : kKinds) {
    for (int ranks = 1; ranks <= 16; ++ranks) {
      for (int micro_batches :
           {0, 1, 2, 3, 5, ranks - 1, ranks, ranks + 1, 2 * ranks, 2 * ranks + 3, 33, 64}) {
        const auto schedule = MakeSchedule(k.kind, ranks, k.chunks, micro_batches);
        ASSERT_TRUE(schedule.ok()) << schedule.status().message();
        SCOPED_TRACE(::testing::Message() << Name(k.kind) << ", " << ranks << " ranks, " << k.chunks
                                          << " chunks, " << micro_batches << " micro-batches");
        check(*schedule);
        if (::testing::Test::HasFailure()) return;
      }
    }
  }
}

TEST(Schedule, EveryStageDoesEverythingOnceAndNothingWaitsForEver) {
  ForAll([](const Schedule& s) { EXPECT_EQ(CheckSchedule(s).message(), ""); });
}

TEST(Schedule, NoFrameLeaksAndNoneIsNeededTwice) {
  ForAll([](const Schedule& s) {
    std::vector<int> held(static_cast<size_t>(s.stages), 0);
    for (const auto& order : s.of_rank) {
      for (const StageAction& a : order) {
        held[static_cast<size_t>(a.stage)] += a.work == StageWork::kForward         ? 1
                                              : a.work == StageWork::kBackwardInput ? 0
                                                                                    : -1;
        EXPECT_GE(held[static_cast<size_t>(a.stage)], 0);
      }
    }
    EXPECT_THAT(held, ::testing::Each(0));
  });
}

TEST(Schedule, MemoryIsWhatTheAlgorithmPromises) {
  ForAll([](const Schedule& s) {
    const std::vector<int> frames = FramesInFlight(s);
    for (int rank = 0; rank < s.ranks; ++rank) {
      int held = 0;
      for (int stage = 0; stage < s.stages; ++stage) {
        if (s.rank_of_stage[static_cast<size_t>(stage)] == rank) {
          held += frames[static_cast<size_t>(stage)];
        }
      }
      const int m = s.micro_batches;
      switch (s.kind) {
        case ScheduleKind::kGPipe:
          EXPECT_EQ(held, m);
          break;
        case ScheduleKind::kOneF1B:
          EXPECT_EQ(held, std::min(m, s.ranks - rank));
          break;
        case ScheduleKind::kZeroBubbleH1:
          EXPECT_LE(held, s.ranks);  // no more than 1F1B's first rank
          break;
        case ScheduleKind::kVShaped:
          EXPECT_LE(held, 2 * s.ranks + 1);  // of half a rank's layers each
          break;
        default:
          break;
      }
    }
  });
}

TEST(Schedule, WovenUnitsAreAForwardAndABackwardOfDifferentMicroBatches) {
  int units = 0;
  ForAll([&](const Schedule& s) {
    for (const auto& order : s.of_rank) {
      for (size_t i = 0; i < order.size(); ++i) {
        if (!order[i].with_next) continue;
        ++units;
        ASSERT_LT(i + 1, order.size());
        EXPECT_EQ(order[i].work, StageWork::kForward);
        EXPECT_EQ(order[i + 1].work, StageWork::kBackward);
        EXPECT_FALSE(order[i + 1].with_next);
        EXPECT_FALSE(order[i].stage == order[i + 1].stage &&
                     order[i].micro_batch == order[i + 1].micro_batch);
      }
    }
  });
  EXPECT_GT(units, 1000);
}

// Weight halves are run apart where that fills a bubble, at a step's ends: backward as a whole is
// faster (docs/parallelism.md).
TEST(Schedule, ZeroBubbleRunsBackwardAsAWholeInTheMiddle) {
  ForAll([](const Schedule& s) {
    if (s.kind != ScheduleKind::kZeroBubbleH1) return;
    for (int rank = 0; rank < s.ranks; ++rank) {
      int whole = 0;
      for (const StageAction& a : s.of_rank[static_cast<size_t>(rank)]) {
        whole += a.work == StageWork::kBackward ? 1 : 0;
      }
      const int apart = rank == 0 ? 0 : rank + s.ranks - 1;
      EXPECT_EQ(whole, std::max(0, s.micro_batches - apart)) << "rank " << rank;
    }
  });
}

TEST(Schedule, AnExample) {
  const Schedule s = MakeSchedule(ScheduleKind::kOneF1B, 2, 1, 3).value();
  using W = StageWork;
  EXPECT_THAT(s.of_rank[0],
              ElementsAre(StageAction{W::kForward, 0, 0}, StageAction{W::kForward, 0, 1},
                          StageAction{W::kBackward, 0, 0}, StageAction{W::kForward, 0, 2},
                          StageAction{W::kBackward, 0, 1}, StageAction{W::kBackward, 0, 2}));
  EXPECT_THAT(s.of_rank[1],
              ElementsAre(StageAction{W::kForward, 1, 0}, StageAction{W::kBackward, 1, 0},
                          StageAction{W::kForward, 1, 1}, StageAction{W::kBackward, 1, 1},
                          StageAction{W::kForward, 1, 2}, StageAction{W::kBackward, 1, 2}));
  EXPECT_THAT(
      MakeSchedule(ScheduleKind::kZeroBubbleH1, 2, 1, 3)->of_rank[1],
      ElementsAre(StageAction{W::kForward, 1, 0}, StageAction{W::kBackwardInput, 1, 0},
                  StageAction{W::kForward, 1, 1}, StageAction{W::kBackward, 1, 1},
                  StageAction{W::kForward, 1, 2}, StageAction{W::kBackwardInput, 1, 2},
                  StageAction{W::kBackwardWeight, 1, 0}, StageAction{W::kBackwardWeight, 1, 2}));
  EXPECT_THAT(MakeSchedule(ScheduleKind::kVShaped, 3, 2, 1)->rank_of_stage,
              ElementsAre(0, 1, 2, 2, 1, 0));
  EXPECT_THAT(MakeSchedule(ScheduleKind::kInterleaved, 3, 2, 1)->rank_of_stage,
              ElementsAre(0, 1, 2, 0, 1, 2));
}

TEST(Schedule, NamesGoThereAndBack) {
  for (const Kind& k : kKinds) EXPECT_EQ(ParseScheduleKind(Name(k.kind)).value(), k.kind);
  EXPECT_THAT(std::string(ParseScheduleKind("2f2b").status().message()), HasSubstr("2f2b"));
}

TEST(Schedule, RefusesWhatDoesNotFit) {
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kOneF1B, 0, 1, 1).ok());
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kOneF1B, 2, 2, 1).ok());
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kVShaped, 2, 1, 1).ok());
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kInterleaved, 2, 0, 1).ok());
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kInterleaved, 1 << 20, 1 << 20, 1).ok());
  EXPECT_FALSE(MakeSchedule(ScheduleKind::kGPipe, 2, 1, -1).ok());
}

// CheckSchedule must see what is wrong with a schedule.
TEST(CheckSchedule, NamesEachKindOfError) {
  const Schedule good = MakeSchedule(ScheduleKind::kZeroBubbleH1, 3, 1, 4).value();
  const auto broken = [&](const std::function<void(Schedule&)>& change) {
    Schedule s = good;
    change(s);
    return std::string(CheckSchedule(s).message());
  };
  EXPECT_THAT(broken([](Schedule& s) { s.of_rank[1].pop_back(); }),
              HasSubstr("stage 1 does not finish micro-batch 3"));
  EXPECT_THAT(broken([](Schedule& s) { s.of_rank[1].push_back(s.of_rank[1].front()); }),
              HasSubstr("a second time"));
  EXPECT_THAT(broken([](Schedule& s) { s.of_rank[1].push_back(s.of_rank[0].front()); }),
              HasSubstr("another rank's"));
  EXPECT_THAT(broken([](Schedule& s) {
                s.of_rank[2].push_back({StageWork::kForward, 2, 4});
              }),
              HasSubstr("outside the schedule"));
  EXPECT_THAT(broken([](Schedule& s) { std::swap(s.of_rank[2][0], s.of_rank[2][1]); }),
              HasSubstr("waits for ever"));
  EXPECT_THAT(broken([](Schedule& s) { s.of_rank.pop_back(); }), HasSubstr("3 ranks"));
}

}  // namespace
}  // namespace stretto
