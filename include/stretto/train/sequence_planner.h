// Which ranks of a run work on which documents of a step.
#ifndef STRETTO_TRAIN_SEQUENCE_PLANNER_H_
#define STRETTO_TRAIN_SEQUENCE_PLANNER_H_

#include "stretto/core/status.h"
#include "stretto/data/plan_loader.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/train/config.h"

namespace stretto {

// What `config` says to planners: places, capacity, method, and what documents cost: by the file
// parallel.cost_model, or else by FLOPs and figures that nobody measured, of an H100 or of a core.
// `config` must be resolved, with data.documents. `places_per_machine`: of the data axis.
// FAILED_PRECONDITION when the file is for another model, NOT_FOUND when there is none.
absl::StatusOr<SequencePlanOptions> SequenceOptionsOf(const TrainConfig& config,
                                                      int places_per_machine);

// Plans steps as a run of `config` does: documents to items, items to a program.
absl::StatusOr<DocumentPlanner> DocumentPlannerOf(const TrainConfig& config,
                                                  int places_per_machine);

}  // namespace stretto

#endif  // STRETTO_TRAIN_SEQUENCE_PLANNER_H_
