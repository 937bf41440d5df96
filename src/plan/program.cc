#include "stretto/plan/program.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <map>
#include <set>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace stretto {
namespace {

absl::Status CheckItem(int pipelines, size_t index, const PlanItem& item) {
  std::set<int> seen;
  for (int p : item.pipelines) {
    if (p < 0 || p >= pipelines) {
      return absl::InvalidArgumentError(absl::StrCat("item ", index, " is meant for pipeline ", p,
                                                     ", but there are ", pipelines));
    }
    if (!seen.insert(p).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("item ", index, " names pipeline ", p, " twice"));
    }
  }
  if (seen.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("item ", index, " is given to no pipeline"));
  }
  return absl::OkStatus();
}

using Key = std::tuple<StageWork, int, int>;  // of a schedule's action
Key KeyOf(const StageAction& a) { return {a.work, a.stage, a.micro_batch}; }

std::map<Key, int64_t> PlacesOf(const Schedule& schedule) {
  std::map<Key, int64_t> places;
  for (const StageAction& a : OneOrder(schedule)) {
    const auto place = static_cast<int64_t>(places.size());
    places.emplace(KeyOf(a), place);
  }
  return places;
}

Program Empty(const Schedule& schedule, int pipelines, std::vector<PlanItem> items) {
  Program program = {.kind = schedule.kind,
                     .pipelines = pipelines,
                     .pipeline_ranks = schedule.ranks,
                     .stages = schedule.stages,
                     .place_of_stage = schedule.rank_of_stage,
                     .items = std::move(items)};
  program.of_rank.resize(static_cast<size_t>(program.ranks()));
  return program;
}

// Adds one pipeline's actions: `item_at[m]` is its item in the place of micro-batch m, or -1.
void Fill(const Schedule& schedule, const std::map<Key, int64_t>& places, int pipeline,
          const std::vector<int>& item_at, Program* program) {
  for (int place = 0; place < schedule.ranks; ++place) {
    std::vector<ProgramAction>& out =
        program->of_rank[static_cast<size_t>(pipeline * schedule.ranks + place)];
    for (const StageAction& a : schedule.of_rank[static_cast<size_t>(place)]) {
      const int item = item_at[static_cast<size_t>(a.micro_batch)];
      if (item < 0) {
        if (!out.empty()) out.back().with_next = false;
        continue;
      }
      // Those who share an item get one number: that of its first pipeline.
      const PlanItem& shared = program->items[static_cast<size_t>(item)];
      out.push_back({.work = a.work,
                     .with_next = a.with_next,
                     .stage = a.stage,
                     .item = item,
                     .order = places.at(KeyOf(a)) * program->pipelines + shared.pipelines.front()});
    }
    if (!out.empty()) out.back().with_next = false;
  }
}

}  // namespace

absl::Status AssignLevels(int pipelines, std::vector<PlanItem>* items) {
  std::vector<int> next(static_cast<size_t>(std::max(pipelines, 0)), 0);
  for (size_t i = 0; i < items->size(); ++i) {
    PlanItem& item = (*items)[i];
    STRETTO_RETURN_IF_ERROR(CheckItem(pipelines, i, item));
    item.level = 0;
    for (int p : item.pipelines) item.level = std::max(item.level, next[static_cast<size_t>(p)]);
    for (int p : item.pipelines) next[static_cast<size_t>(p)] = item.level + 1;
  }
  return absl::OkStatus();
}

TraceTags TagsOf(const ProgramAction& action) {
  return {.stage = action.stage, .item = action.item, .order = action.order};
}

absl::StatusOr<Program> MakeProgram(ScheduleKind kind, int pipelines, int pipeline_ranks,
                                    int chunks, std::vector<PlanItem> items) {
  STRETTO_RETURN_IF_ERROR(AssignLevels(pipelines, &items));
  int levels = 0;
  for (const PlanItem& item : items) levels = std::max(levels, item.level + 1);
  STRETTO_ASSIGN_OR_RETURN(const Schedule schedule,
                           MakeSchedule(kind, pipeline_ranks, chunks, levels));
  const std::map<Key, int64_t> places = PlacesOf(schedule);
  Program program = Empty(schedule, pipelines, std::move(items));
  std::vector<std::vector<int>> item_at(static_cast<size_t>(pipelines),
                                        std::vector<int>(static_cast<size_t>(levels), -1));
  for (size_t i = 0; i < program.items.size(); ++i) {
    const PlanItem& item = program.items[i];
    for (const int p : item.pipelines) {
      item_at[static_cast<size_t>(p)][static_cast<size_t>(item.level)] = static_cast<int>(i);
    }
  }
  for (int p = 0; p < pipelines; ++p) {
    Fill(schedule, places, p, item_at[static_cast<size_t>(p)], &program);
  }
  return program;
}

void FindHalves(const std::vector<ProgramAction>& actions, int stage, size_t items,
                std::vector<uint8_t>* apart) {
  apart->assign(items, 0);
  for (const ProgramAction& a : actions) {
    if (a.stage == stage && a.work == StageWork::kBackwardWeight) {
      (*apart)[static_cast<size_t>(a.item)] = 1;
    }
  }
}

bool EndsTogether(const Program& program, int pipeline) {
  const auto last_of = [&](int p) {
    for (size_t i = program.items.size(); i-- > 0;) {
      const std::vector<int>& on = program.items[i].pipelines;
      if (std::find(on.begin(), on.end(), p) != on.end()) return static_cast<int>(i);
    }
    return -1;
  };
  const int last = last_of(pipeline);
  if (last < 0) return true;
  const std::vector<int>& on = program.items[static_cast<size_t>(last)].pipelines;
  return std::all_of(on.begin(), on.end(), [&](int p) { return last_of(p) == last; });
}

Program PipelineOf(const Program& program, int pipeline) {
  Program part = {.kind = program.kind,
                  .pipelines = 1,
                  .pipeline_ranks = program.pipeline_ranks,
                  .stages = program.stages,
                  .place_of_stage = program.place_of_stage};
  std::vector<int> number(program.items.size(), -1);
  for (size_t i = 0; i < program.items.size(); ++i) {
    const std::vector<int>& on = program.items[i].pipelines;
    if (std::find(on.begin(), on.end(), pipeline) == on.end()) continue;
    number[i] = static_cast<int>(part.items.size());
    part.items.push_back(program.items[i]);
    part.items.back().pipelines = {0};
  }
  const auto first = program.of_rank.begin() +
                     static_cast<std::ptrdiff_t>(program.RankOf(pipeline, 0)) -
                     program.place_of_stage[0];
  part.of_rank.assign(first, first + program.pipeline_ranks);
  for (std::vector<ProgramAction>& actions : part.of_rank) {
    for (ProgramAction& a : actions) a.item = number[static_cast<size_t>(a.item)];
  }
  return part;
}

absl::StatusOr<Program> MakeProgramWithoutLevels(ScheduleKind kind, int pipelines,
                                                 int pipeline_ranks, int chunks,
                                                 std::vector<PlanItem> items) {
  STRETTO_RETURN_IF_ERROR(AssignLevels(pipelines, &items));
  STRETTO_ASSIGN_OR_RETURN(const Schedule none, MakeSchedule(kind, pipeline_ranks, chunks, 0));
  Program program = Empty(none, pipelines, std::move(items));
  for (int p = 0; p < pipelines; ++p) {
    std::vector<int> own;
    for (size_t i = 0; i < program.items.size(); ++i) {
      const PlanItem& item = program.items[i];
      if (std::find(item.pipelines.begin(), item.pipelines.end(), p) != item.pipelines.end()) {
        own.push_back(static_cast<int>(i));
      }
    }
    STRETTO_ASSIGN_OR_RETURN(const Schedule schedule, MakeSchedule(kind, pipeline_ranks, chunks,
                                                                   static_cast<int>(own.size())));
    Fill(schedule, PlacesOf(schedule), p, own, &program);
  }
  return program;
}

uint64_t Program::Hash() const {
  std::vector<int64_t> words = {static_cast<int64_t>(kind), pipelines, pipeline_ranks, stages};
  const auto list = [&](const auto& values) {
    words.push_back(static_cast<int64_t>(values.size()));
    words.insert(words.end(), values.begin(), values.end());
  };
  list(place_of_stage);
  words.push_back(static_cast<int64_t>(items.size()));
  for (const PlanItem& item : items) {
    words.push_back(item.tokens);
    words.push_back(item.level);
    list(item.lengths);
    list(item.pipelines);
    list(item.documents);
    words.push_back(std::bit_cast<int64_t>(item.offload));
  }
  for (const std::vector<ProgramAction>& actions : of_rank) {
    words.push_back(static_cast<int64_t>(actions.size()));
    for (const ProgramAction& a : actions) {
      words.insert(words.end(),
                   {static_cast<int64_t>(a.work), a.with_next ? 1 : 0, a.stage, a.item, a.order});
    }
  }
  return XXH64(words.data(), words.size() * sizeof(words[0]), 0);
}

std::string Program::Describe() const {
  std::string out = absl::StrFormat(
      "%s, %d %s of %d %s and %d %s, %d %s, program %016x\n", Name(kind), pipelines,
      pipelines == 1 ? "pipeline" : "pipelines", pipeline_ranks,
      pipeline_ranks == 1 ? "rank" : "ranks", stages, stages == 1 ? "stage" : "stages",
      items.size(), items.size() == 1 ? "item" : "items", Hash());
  for (size_t r = 0; r < of_rank.size(); ++r) {
    absl::StrAppend(&out, "rank ", r, ":");
    for (const ProgramAction& a : of_rank[r]) {
      const char* work = a.work == StageWork::kForward         ? "F"
                         : a.work == StageWork::kBackward      ? "BW"
                         : a.work == StageWork::kBackwardInput ? "B"
                                                               : "W";
      absl::StrAppend(&out, " ", work, a.item);
      if (stages > pipeline_ranks) absl::StrAppend(&out, "@", a.stage);
      if (a.with_next) absl::StrAppend(&out, "+");
    }
    absl::StrAppend(&out, "\n");
  }
  return out;
}

}  // namespace stretto
