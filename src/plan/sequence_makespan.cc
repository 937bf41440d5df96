// How long a plan's items take in the executor's order.
#include <algorithm>
#include <cstddef>

#include "src/plan/sequence_balance.h"
#include "stretto/plan/schedule.h"

namespace stretto {
namespace {

constexpr size_t Index(int64_t i) { return static_cast<size_t>(i); }

int PipelineOf(const PlacedItem& item, int place, int pipelines) {
  return (item.first + place) % pipelines;
}

}  // namespace

int64_t MakespanOf(const std::vector<PlacedItem>& items, const SequencePlanOptions& options,
                   const SequenceClock& clock) {
  const int pipelines = options.pipelines, stages = options.stages;
  // As AssignLevels does.
  std::vector<int> next(Index(pipelines), 0);
  std::vector<std::vector<size_t>> of_level;
  for (size_t i = 0; i < items.size(); ++i) {
    int level = 0;
    for (int k = 0; k < items[i].ranks; ++k) {
      level = std::max(level, next[Index(PipelineOf(items[i], k, pipelines))]);
    }
    for (int k = 0; k < items[i].ranks; ++k) {
      next[Index(PipelineOf(items[i], k, pipelines))] = level + 1;
    }
    if (level >= static_cast<int>(of_level.size())) of_level.resize(Index(level) + 1);
    of_level[Index(level)].push_back(i);
  }
  struct Times {
    int64_t forward = 0, backward = 0;
  };
  std::vector<Times> times;
  for (const PlacedItem& item : items) {
    const bool network = OverNetwork(options, item.first, item.ranks);
    times.push_back({clock.Forward(item.load, item.ranks, network),
                     clock.Backward(item.load, item.ranks, network)});
  }
  const auto schedule =
      MakeSchedule(ScheduleKind::kOneF1B, stages, /*chunks=*/1, static_cast<int>(of_level.size()));
  if (!schedule.ok()) return 0;  // cannot be: any number of stages and levels has a schedule
  // One order holds for all ranks, so one pass over it finds everything that an action waits for.
  std::vector<int64_t> now(Index(int64_t{pipelines} * stages), 0);
  std::vector<int64_t> forward_end(Index(stages) * items.size(), 0), backward_end = forward_end;
  int64_t makespan = 0;
  for (const StageAction& a : OneOrder(*schedule)) {
    const bool forward = a.work == StageWork::kForward;
    for (const size_t i : of_level[Index(a.micro_batch)]) {
      const PlacedItem& item = items[i];
      const auto at = [&](int stage) { return Index(stage) * items.size() + i; };
      int64_t start = 0;
      if (forward && a.stage > 0) start = forward_end[at(a.stage - 1)];
      if (!forward && a.stage + 1 < stages) start = backward_end[at(a.stage + 1)];
      int64_t* const own = &now[Index(int64_t{a.stage} * pipelines)];
      for (int k = 0; k < item.ranks; ++k) {
        start = std::max(start, own[PipelineOf(item, k, pipelines)]);
      }
      const int64_t end = start + (forward ? times[i].forward : times[i].backward);
      for (int k = 0; k < item.ranks; ++k) own[PipelineOf(item, k, pipelines)] = end;
      (forward ? forward_end : backward_end)[at(a.stage)] = end;
      makespan = std::max(makespan, end);
    }
  }
  return makespan;
}

}  // namespace stretto
