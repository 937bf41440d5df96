// Pipeline schedules as plain data from pure functions: which stage works on which micro-batch, in
// which order on each rank of a pipeline.
#ifndef STRETTO_PLAN_SCHEDULE_H_
#define STRETTO_PLAN_SCHEDULE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// What a stage does with a micro-batch. Backward is either whole or in its two halves (contract 1).
enum class StageWork : uint8_t {
  kForward,         // F
  kBackward,        // both halves at once
  kBackwardInput,   // B: what the stage before waits for
  kBackwardWeight,  // W: what nobody waits for
};
const char* Name(StageWork work);

struct StageAction {
  StageWork work = StageWork::kForward;
  int stage = 0;
  int micro_batch = 0;
  // Forms one unit with the action behind it: the two have no order between them and may be woven
  // into each other (DualPipe's forward with another micro-batch's backward).
  bool with_next = false;
  bool operator==(const StageAction&) const = default;
};

enum class ScheduleKind : uint8_t {
  kGPipe,         // all forwards, then all backwards (Huang et al. 2019, arXiv 1811.06965)
  kOneF1B,        // one forward, one backward (Narayanan et al. 2021, arXiv 2006.09503)
  kInterleaved,   // 1F1B with several chunks of layers a rank (Narayanan et al. 2021, 2104.04473)
  kZeroBubbleH1,  // 1F1B's memory, weight halves fill the bubbles (Qi et al. 2023, 2401.10241 §2.1)
  kVShaped,       // two chunks a rank, down and up again, weight halves postponed: DualPipeV
                  // (DeepSeek-AI 2024, 2412.19437 §3.2.1, folded)
};
// "gpipe", "1f1b", "interleaved", "zb-h1", "v-shaped".
const char* Name(ScheduleKind kind);
absl::StatusOr<ScheduleKind> ParseScheduleKind(const std::string& name);

// One pipeline's work for one step. Rank numbers count along the pipeline, stages along the model.
struct Schedule {
  ScheduleKind kind = ScheduleKind::kOneF1B;
  int ranks = 1;
  int stages = 1;  // ranks * chunks
  int micro_batches = 0;
  std::vector<int> rank_of_stage;
  std::vector<std::vector<StageAction>> of_rank;  // in the order in which the rank runs them
};

// `chunks` stages lie on each rank: 1 for GPipe, 1F1B and ZB-H1, 2 for the V shape, any number for
// the interleaved schedule. Any number of micro-batches from 0 on: where an algorithm wants a
// multiple, or more of them, the missing ones are left out of its order.
// INVALID_ARGUMENT names what does not fit.
absl::StatusOr<Schedule> MakeSchedule(ScheduleKind kind, int ranks, int chunks, int micro_batches);

// Checks any schedule, however it was made: every stage runs forward and both backward halves of
// every micro-batch once, on its own rank, and the order can be run to its end. The first violation
// is named.
absl::Status CheckSchedule(const Schedule& schedule);

// All actions of a schedule that CheckSchedule accepts in one order, in which every rank's own
// order and every dependency between ranks is ascending: that in which they run when each takes as
// long as any other, of those that run at the same time the later stage first.
std::vector<StageAction> OneOrder(const Schedule& schedule);

// The most micro-batches of one stage whose activations a rank holds at the same time, by stage:
// from the start of forward to the end of the last backward half.
std::vector<int> FramesInFlight(const Schedule& schedule);

// Bubble of one rank in the published formula, for m large enough: the time a rank is idle between
// its first and last action at best, when `forward`, `backward_input` and `backward_weight` are the
// seconds of one micro-batch on one rank (all its chunks). `pair` is what a forward woven into a
// backward takes, of one chunk each; only the V shape has them. The V shape's formula is exact when
// backward_input equals backward_weight and pair their sum with forward.
double PublishedBubble(ScheduleKind kind, int ranks, int chunks, double forward,
                       double backward_input, double backward_weight, double pair);

}  // namespace stretto

#endif  // STRETTO_PLAN_SCHEDULE_H_
