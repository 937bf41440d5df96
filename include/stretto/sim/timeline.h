// Runs programs on a virtual clock. What comes out is simulated: say so, with the costs that were
// used, wherever it is shown.
#ifndef STRETTO_SIM_TIMELINE_H_
#define STRETTO_SIM_TIMELINE_H_

#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/program.h"

namespace stretto {

struct Span {
  int action = 0;  // index in program.of_rank[rank]
  double start = 0, end = 0;
};

struct Timeline {
  std::vector<std::vector<Span>> of_rank;  // in order
  double seconds = 0;                      // when the last action ends
  std::vector<double> busy;                // seconds of work, by rank

  // The part of ranks * seconds in which a rank has nothing to do.
  double IdleFraction() const;
};

// How long things take, where that depends on more than the action: what it waits for itself, say.
class ActionTimes {
 public:
  virtual ~ActionTimes() = default;
  // Seconds of an action that begins at `start`. Asked once for each action, on each rank in its
  // order, with times that never go back.
  virtual double Seconds(int rank, const ProgramAction& action, double start) = 0;
  // Of bringing an item from one stage to the next one, on another rank.
  virtual double BoundarySeconds(const PlanItem& item) const = 0;
  // A unit of several woven actions takes this part of their sum.
  virtual double woven() const { return 1; }
};

// Each rank runs its actions in order, one at a time (a unit of woven ones together). An action
// starts when what it needs is there and all ranks that share its item have come to it; they end it
// together. Sends are not waited for. FAILED_PRECONDITION when ranks wait in a circle: it names one
// rank, what it wants to do and what for.
// INVALID_ARGUMENT when the costs are for another number of stages.
absl::StatusOr<Timeline> Simulate(const Program& program, const CostModel& cost);
absl::StatusOr<Timeline> Simulate(const Program& program, ActionTimes& times);

// For chrome://tracing and Perfetto: one process for each rank, as in the trace of a real run
// (observe/step_trace.h). Those of a unit lie side by side.
std::string ChromeTrace(const Program& program, const Timeline& timeline);

// One line a rank, `columns` characters long: a letter (F forward, D backward, B and W its halves)
// and the item's number where an action begins, dashes while it lasts, dots while the rank is idle.
// For a terminal.
std::string DrawText(const Program& program, const Timeline& timeline, int columns);

// A picture for a page: one row a rank, boxes with item numbers, forward, backward, and the two
// halves in four colours, stages of one rank in two shades.
std::string DrawSvg(const Program& program, const Timeline& timeline);

}  // namespace stretto

#endif  // STRETTO_SIM_TIMELINE_H_
