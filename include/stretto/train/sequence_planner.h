// Which ranks of a run work on which documents of a step.
#ifndef STRETTO_TRAIN_SEQUENCE_PLANNER_H_
#define STRETTO_TRAIN_SEQUENCE_PLANNER_H_

#include <string>

#include "stretto/core/status.h"
#include "stretto/data/plan_loader.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/train/config.h"

namespace stretto {

// Whether costs can plan a run of `config` (resolved): FAILED_PRECONDITION when they are of another
// model, of stages only, of one rank's links where there are more, or were measured on another
// device than `device` and parallel.cost_model_any_device is off. `device` is empty where none runs
// the plans. `source` names the costs.
absl::Status CheckCosts(const CostModel& costs, const std::string& source,
                        const TrainConfig& config, const std::string& device);

// What `config` says to planners: places, capacity, method, and what documents cost: `costs`, or
// when null by the file parallel.cost_model, or else by FLOPs and figures that nobody measured, of
// an H100 or of a core. `config` must be resolved, with data.documents. `places_per_machine`: of
// the data axis. FAILED_PRECONDITION as CheckCosts says, NOT_FOUND when there is no such file.
absl::StatusOr<SequencePlanOptions> SequenceOptionsOf(const TrainConfig& config,
                                                      int places_per_machine,
                                                      const CostModel* costs = nullptr);

// Plans steps as a run of `config` does: documents to items, items to a program.
absl::StatusOr<DocumentPlanner> DocumentPlannerOf(const TrainConfig& config, int places_per_machine,
                                                  const CostModel* costs = nullptr);

}  // namespace stretto

#endif  // STRETTO_TRAIN_SEQUENCE_PLANNER_H_
