// How long a step will take, from a configuration and a cost model alone: the programs, action
// lists and bucket plans that the trainer runs, on a virtual clock. What comes out is simulated:
// say so, with the costs that were used, wherever it is shown.
#ifndef STRETTO_TRAIN_PREDICTION_H_
#define STRETTO_TRAIN_PREDICTION_H_

#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/model/graph.h"
#include "stretto/plan/cost.h"
#include "stretto/train/config.h"
#include "stretto/train/memory.h"

namespace stretto {

// Seconds of a step and what they go into, which adds up to them: the mean of the ranks of a
// pipeline.
struct StepPrediction {
  double seconds = 0;
  double compute = 0;   // layers
  double update = 0;    // norm, optimizer, the step's scalars
  double bubble = 0;    // idle even if nothing took time between stages: also uneven stages
  double data = 0;      // exposed communication of the data axis: gradients and parameters,
  double tensor = 0;    // of the tensor axis,
  double pipeline = 0;  // and between stages
  double exposed() const { return data + tensor + pipeline; }
};

// The kind of a layer in a cost model: its name without the number of its block.
std::string LayerKind(const std::string& name);
// What the costs of layers depend on besides tokens: widths, vocabulary, types, loss chunk, kind of
// device. Costs that were fitted for one key do not hold for another. `config` must be resolved.
std::string ModelKey(const TrainConfig& config);

// Sets the model's stages to the sum of a block's layers in `parts`, and its boundary and links.
void AddBlockCosts(const Graph& graph, CostModel* cost);
void SetBoundary(const TrainConfig& config, CostModel* cost);

// Constants of an H100 SXM with NVLink and a 400 Gbit/s network for each GPU, applied to the
// layers' FLOPs and bytes: nothing that was measured. `config` must be resolved.
absl::StatusOr<CostModel> AssumedH100(const TrainConfig& config);

// The plan of a data-parallel rank that has the largest share, at a place of a pipeline and of a
// tensor axis; and those of all places of a pipeline.
absl::StatusOr<RunPlan> PlanPlace(const TrainConfig& config, int ranks, int64_t place,
                                  int64_t tensor = 0);
absl::StatusOr<std::vector<RunPlan>> PlanPlaces(const TrainConfig& config, int ranks);

// `plans`: those of PlanPlaces for this configuration, resolved. With more than `machine_ranks`
// ranks (0: all are on one machine) what leaves a machine counts as the cost's network, or as
// links of a machine where the cost has none.
//
// Data-parallel ranks are taken to be alike, all samples to be full, and layers that a tensor axis
// cuts to take 1/t of their time. Of the tensor axis, `hidden` of what starts and ends apart
// travels under other actions, and forward hides all pieces but one; pieces of inputs' halves are
// not told apart. FAILED_PRECONDITION when the cost model has no parts, is for another model, lacks
// a layer, or makes the step's seconds no positive number.
absl::StatusOr<StepPrediction> PredictStep(const TrainConfig& config,
                                           const std::vector<RunPlan>& plans, const CostModel& cost,
                                           int machine_ranks = 0);
absl::StatusOr<StepPrediction> PredictStep(const TrainConfig& config, int ranks,
                                           const CostModel& cost, int machine_ranks = 0);

}  // namespace stretto

#endif  // STRETTO_TRAIN_PREDICTION_H_
