// The work of all ranks in one step: items, the pipelines that share them, and one order of actions
// that every rank runs its own part of (contract 4).
#ifndef STRETTO_PLAN_PROGRAM_H_
#define STRETTO_PLAN_PROGRAM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/chrome_trace.h"
#include "stretto/core/status.h"
#include "stretto/plan/schedule.h"

namespace stretto {

// A micro-batch of one pipeline, or one that several pipelines work on together (a long sequence
// with context parallelism). Pipelines are numbered by their place along the data axis.
struct PlanItem {
  int64_t tokens = 0;
  std::vector<int64_t> lengths;  // of its documents; they add up to `tokens`
  std::vector<int> pipelines;    // in ring order, each once, at least one
  // Which of the step's documents they are, as many as `lengths`; empty where nobody asks.
  std::vector<int64_t> documents;
  // The part of the activations, 0 to 1, that waits for backward in host memory.
  double offload = 0;
  // 0, or 1 + the highest level of an earlier item that shares a pipeline with it: AssignLevels.
  int level = 0;
};

// Gives each item its level. Items of one level share no pipeline. INVALID_ARGUMENT names an item
// whose pipelines are missing, repeated or not below `pipelines`.
absl::Status AssignLevels(int pipelines, std::vector<PlanItem>* items);

struct ProgramAction {
  StageWork work = StageWork::kForward;
  bool with_next = false;  // as in StageAction
  int stage = 0;
  int item = 0;       // index of the item
  int64_t order = 0;  // place in the one order: equal for those who run it together, else unequal
  bool operator==(const ProgramAction&) const = default;
};

// What a timeline says about an action, simulated or real.
TraceTags TagsOf(const ProgramAction& action);

// Ranks are numbered pipeline by pipeline: rank = pipeline * pipeline_ranks + place in the
// pipeline.
struct Program {
  ScheduleKind kind = ScheduleKind::kOneF1B;
  int pipelines = 1;
  int pipeline_ranks = 1;
  int stages = 1;
  std::vector<int> place_of_stage;  // in a pipeline
  std::vector<PlanItem> items;      // with levels
  std::vector<std::vector<ProgramAction>> of_rank;

  int ranks() const { return pipelines * pipeline_ranks; }
  int RankOf(int pipeline, int stage) const {
    return pipeline * pipeline_ranks + place_of_stage[static_cast<size_t>(stage)];
  }
  // 64 bits of everything above: ranks that run the same program have the same.
  uint64_t Hash() const;
  // One line a rank.
  std::string Describe() const;
};

// Every pipeline runs the schedule of as many micro-batches as there are levels, and in the place
// of a level its item of that level, if it has one. So pipelines may have different numbers of
// items and share any of them, and nothing can wait in a circle: the order of one schedule holds
// for all. (If each pipeline ran its own items without levels, two that share two items with others
// between them could run a forward of one and a backward of the other in opposite orders, and
// hang.)
absl::StatusOr<Program> MakeProgram(ScheduleKind kind, int pipelines, int pipeline_ranks,
                                    int chunks, std::vector<PlanItem> items);

// The part of one pipeline, as a program of its own: its items, numbered anew in their order, and
// what its ranks do with them, in the same places of the one order.
Program PipelineOf(const Program& program, int pipeline);

// By item: whether `actions` run its two backward halves on `stage` apart. `apart` gets one entry
// for each of `items` items.
void FindHalves(const std::vector<ProgramAction>& actions, int stage, size_t items,
                std::vector<uint8_t>* apart);

// Whether the last item of a pipeline is the last one of all pipelines that share it (true without
// items). Only then may what all pipelines do together at the end of a step, such as adding up
// gradients, begin while that item still communicates: where operations of a rank run one after the
// other, a pipeline with more to do would wait in the item for one that waits for it in the sum.
bool EndsTogether(const Program& program, int pipeline);

// The wrong way that the comment on MakeProgram tells of: each pipeline for itself. Tests show with
// it that a hang is noticed.
absl::StatusOr<Program> MakeProgramWithoutLevels(ScheduleKind kind, int pipelines,
                                                 int pipeline_ranks, int chunks,
                                                 std::vector<PlanItem> items);

}  // namespace stretto

#endif  // STRETTO_PLAN_PROGRAM_H_
