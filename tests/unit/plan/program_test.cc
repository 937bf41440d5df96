// Items, levels and the one order of actions.
#include "stretto/plan/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <tuple>

#include "support/random_items.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<int> Levels(int pipelines, const std::vector<std::vector<int>>& items) {
  std::vector<PlanItem> list;
  for (const auto& on : items) list.push_back({.tokens = 1, .lengths = {1}, .pipelines = on});
  EXPECT_TRUE(AssignLevels(pipelines, &list).ok());
  std::vector<int> levels;
  for (const PlanItem& item : list) levels.push_back(item.level);
  return levels;
}

TEST(AssignLevels, CountsEarlierItemsThatShareAPipeline) {
  EXPECT_THAT(Levels(2, {{0}, {1}, {0}, {1}}), ElementsAre(0, 0, 1, 1));
  EXPECT_THAT(Levels(3, {{0}, {0}, {1}, {0, 1}, {2}, {1, 2}}), ElementsAre(0, 1, 0, 2, 0, 3));
  EXPECT_THAT(Levels(4, {}), ElementsAre());
}

TEST(AssignLevels, NamesItemsThatCannotBe) {
  const auto error = [](std::vector<int> on) {
    std::vector<PlanItem> items = {{.tokens = 1, .pipelines = {0}}, {.tokens = 1, .pipelines = on}};
    return std::string(AssignLevels(2, &items).message());
  };
  EXPECT_THAT(error({}), HasSubstr("item 1 is given to no pipeline"));
  EXPECT_THAT(error({2}), HasSubstr("pipeline 2, but there are 2"));
  EXPECT_THAT(error({-1}), HasSubstr("pipeline -1"));
  EXPECT_THAT(error({1, 1}), HasSubstr("twice"));
}

// Each rank's own part ascends in the one order; whoever shares an action has one number for it and
// nobody else has it; what an action needs comes before it.
TEST(Program, EveryRankRunsItsPartOfOneOrder) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(seed);
    const testing::RandomShape shape = testing::DrawShape(seed);
    const auto program = MakeProgram(shape.kind, shape.pipelines, shape.pipeline_ranks,
                                     shape.chunks, testing::DrawItems(shape.pipelines, seed));
    ASSERT_TRUE(program.ok()) << program.status().message();
    std::map<int64_t, std::tuple<StageWork, int, int>> meaning;
    std::map<std::tuple<StageWork, int, int>, int64_t> place;
    for (const auto& actions : program->of_rank) {
      int64_t before = -1;
      for (const ProgramAction& a : actions) {
        EXPECT_GT(a.order, before);
        before = a.order;
        const std::tuple what(a.work, a.stage, a.item);
        EXPECT_EQ(meaning.emplace(a.order, what).first->second, what);
        EXPECT_EQ(place.emplace(what, a.order).first->second, a.order);
      }
    }
    for (const auto& [what, order] : place) {
      const auto [work, stage, item] = what;
      if (work == StageWork::kForward && stage > 0) {
        EXPECT_LT(place.at({StageWork::kForward, stage - 1, item}), order);
      }
      if (work == StageWork::kBackward || work == StageWork::kBackwardInput) {
        EXPECT_LT(place.at({StageWork::kForward, stage, item}), order);
      }
    }
    for (int p = 0; p < program->pipelines; ++p) {
      for (int stage = 0; stage < program->stages; ++stage) {
        size_t expected = 0, found = 0;
        for (const PlanItem& item : program->items) {
          expected +=
              static_cast<size_t>(std::count(item.pipelines.begin(), item.pipelines.end(), p));
        }
        for (const ProgramAction& a :
             program->of_rank[static_cast<size_t>(program->RankOf(p, stage))]) {
          found += a.stage == stage && a.work == StageWork::kForward ? 1 : 0;
        }
        EXPECT_EQ(found, expected);
      }
    }
  }
}

TEST(Program, APipelineHasItsOwnPart) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(seed);
    const testing::RandomShape shape = testing::DrawShape(seed);
    const Program program = MakeProgram(shape.kind, shape.pipelines, shape.pipeline_ranks,
                                        shape.chunks, testing::DrawItems(shape.pipelines, seed))
                                .value();
    for (int p = 0; p < program.pipelines; ++p) {
      const Program part = PipelineOf(program, p);
      ASSERT_EQ(part.ranks(), program.pipeline_ranks);
      std::vector<int> items;  // of the pipeline, in order
      for (size_t i = 0; i < program.items.size(); ++i) {
        const std::vector<int>& on = program.items[i].pipelines;
        if (std::count(on.begin(), on.end(), p) > 0) items.push_back(static_cast<int>(i));
      }
      ASSERT_EQ(part.items.size(), items.size());
      for (size_t i = 0; i < items.size(); ++i) {
        const PlanItem& item = program.items[static_cast<size_t>(items[i])];
        EXPECT_EQ(part.items[i].lengths, item.lengths);
        EXPECT_EQ(part.items[i].level, item.level);
        EXPECT_THAT(part.items[i].pipelines, ElementsAre(0));
      }
      for (int place = 0; place < part.pipeline_ranks; ++place) {
        const auto& actions = part.of_rank[static_cast<size_t>(place)];
        const auto& all = program.of_rank[static_cast<size_t>(p * part.pipeline_ranks + place)];
        ASSERT_EQ(actions.size(), all.size());
        for (size_t i = 0; i < actions.size(); ++i) {
          ProgramAction expected = all[i];
          EXPECT_EQ(items[static_cast<size_t>(actions[i].item)], expected.item);
          expected.item = actions[i].item;
          EXPECT_EQ(actions[i], expected);
        }
      }
    }
  }
}

// Operations of a rank one after the other, as on a GPU: passes of items, which their pipelines
// make together, and two sums of all pipelines, which come at the end, or, where `early` says so,
// between the two halves of the last item's backward pass. True when all end.
bool Ends(const Program& program, const std::function<bool(int pipeline)>& early) {
  using Operation = std::pair<int, int>;  // item and pass; item -1: a sum
  std::vector<std::vector<Operation>> queues(static_cast<size_t>(program.pipelines));
  for (int p = 0; p < program.pipelines; ++p) {
    auto& queue = queues[static_cast<size_t>(p)];
    int last = -1;
    for (size_t i = 0; i < program.items.size(); ++i) {
      const std::vector<int>& on = program.items[i].pipelines;
      if (std::count(on.begin(), on.end(), p) == 0) continue;
      last = static_cast<int>(i);
      for (int pass = 0; pass < 3; ++pass) queue.emplace_back(last, pass);
    }
    const bool now = last >= 0 && early(p);
    queue.insert(now ? queue.end() - 1 : queue.end(), {-1, 0});
    queue.emplace_back(-1, 1);
  }
  std::vector<size_t> next(queues.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t p = 0; p < queues.size(); ++p) {
      if (next[p] == queues[p].size()) continue;
      const Operation o = queues[p][next[p]];
      std::vector<int> who;
      for (int q = 0; q < program.pipelines; ++q) who.push_back(q);
      if (o.first >= 0) who = program.items[static_cast<size_t>(o.first)].pipelines;
      const bool all = std::all_of(who.begin(), who.end(), [&](int q) {
        const auto& queue = queues[static_cast<size_t>(q)];
        const size_t at = next[static_cast<size_t>(q)];
        return at < queue.size() && queue[at] == o;
      });
      if (!all) continue;
      for (const int q : who) ++next[static_cast<size_t>(q)];
      moved = true;
    }
  }
  for (size_t p = 0; p < queues.size(); ++p) {
    if (next[p] < queues[p].size()) return false;
  }
  return true;
}

TEST(Program, SumsBeginEarlyOnlyWherePipelinesEndTogether) {
  int stuck = 0, together = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    const int pipelines = 2 + static_cast<int>(seed % 4);
    const Program program =
        MakeProgram(ScheduleKind::kOneF1B, pipelines, 1, 1, testing::DrawItems(pipelines, seed))
            .value();
    EXPECT_TRUE(Ends(program, [&](int p) { return EndsTogether(program, p); }));
    if (!Ends(program, [](int) { return true; })) ++stuck;
    for (int p = 0; p < pipelines; ++p) together += EndsTogether(program, p) ? 1 : 0;
  }
  EXPECT_GT(stuck, 20);  // what the rule is for
  EXPECT_GT(together, 300);
}

TEST(Program, TheHashSeesEveryPart) {
  const auto make = [](std::vector<PlanItem> items, ScheduleKind kind = ScheduleKind::kOneF1B) {
    return MakeProgram(kind, 2, 2, 1, std::move(items)).value();
  };
  const std::vector<PlanItem> items = {{.tokens = 5, .lengths = {5}, .pipelines = {0, 1}},
                                       {.tokens = 3, .lengths = {2, 1}, .pipelines = {1}}};
  const Program program = make(items);
  EXPECT_EQ(program.Hash(), make(items).Hash());
  std::vector<PlanItem> other = items;
  other[0].pipelines = {1, 0};  // another ring
  EXPECT_NE(make(other).Hash(), program.Hash());
  other = items;
  other[1].lengths = {1, 2};
  EXPECT_NE(make(other).Hash(), program.Hash());
  other = items;
  other[1].documents = {7, 8};
  EXPECT_NE(make(other).Hash(), program.Hash());
  other = items;
  other[0].offload = 0.5;
  EXPECT_NE(make(other).Hash(), program.Hash());
  EXPECT_NE(make(items, ScheduleKind::kGPipe).Hash(), program.Hash());
  Program changed = program;
  std::swap(changed.of_rank[0][0].order, changed.of_rank[0][1].order);
  EXPECT_NE(changed.Hash(), program.Hash());
}

TEST(Program, Describes) {
  const Program program = MakeProgram(ScheduleKind::kOneF1B, 2, 2, 1,
                                      {{.tokens = 4, .lengths = {4}, .pipelines = {0}},
                                       {.tokens = 8, .lengths = {8}, .pipelines = {0, 1}}})
                              .value();
  const std::string text = program.Describe();
  EXPECT_THAT(text, HasSubstr("1f1b, 2 pipelines of 2 ranks and 2 stages, 2 items"));
  EXPECT_THAT(text, HasSubstr("rank 0: F0 F1 BW0 BW1\n"));
  EXPECT_THAT(text, HasSubstr("rank 3: F1 BW1\n"));
}

}  // namespace
}  // namespace stretto
