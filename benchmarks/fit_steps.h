// Whole steps of a fit: data parallelism, by which layers are scaled, and documents that all ranks
// share.
#ifndef STRETTO_BENCHMARKS_FIT_STEPS_H_
#define STRETTO_BENCHMARKS_FIT_STEPS_H_

#include <cstdint>

#include "stretto/comm/world.h"
#include "stretto/core/status.h"
#include "stretto/plan/cost.h"
#include "stretto/train/config.h"

namespace stretto::bench {

// The same model with layers whole on each rank, on samples of one length: documents are one long
// sample or, where sizes vary, many short ones.
TrainConfig OfDataParallelism(TrainConfig config);

// Scales the layers so that a step of data parallelism over these ranks takes as long as it does:
// in a whole model, and at a power limit, layers take longer than in a few blocks. `scale` is 0
// where nothing was measured.
absl::Status ScaleByStep(World& world, const TrainConfig& of, int64_t count, CostModel* cost,
                         double* scale);

// What a ring of all ranks takes besides its pairs and messages, beside the planner's clock: steps
// on documents of one length that all ranks share, and on the same ones that each rank has alone.
absl::Status FitRing(World& world, const TrainConfig& of, int64_t count, CostModel* cost);

}  // namespace stretto::bench

#endif  // STRETTO_BENCHMARKS_FIT_STEPS_H_
