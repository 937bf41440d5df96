// Cost models from measurements: least squares with coefficients that are not negative.
#ifndef STRETTO_PLAN_FIT_H_
#define STRETTO_PLAN_FIT_H_

#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/cost.h"

namespace stretto {

// Seconds of a layer's half on so many tokens, and pairs as StageCost counts them.
struct StageSample {
  double tokens = 0, pairs = 0, seconds = 0;
};
// Seconds of an operation among `ranks` in which a rank sends so many bytes.
struct OperationSample {
  int ranks = 2;
  double bytes_sent = 0, seconds = 0;
};

// The coefficients, none of them negative, with the least sum of squares of relative errors, so
// that small sizes count as much as large ones. A coefficient that the samples do not tell apart
// from others is 0. INVALID_ARGUMENT without samples, or when one is negative or not finite.
absl::StatusOr<StageCost> FitStage(const std::vector<StageSample>& samples);
absl::StatusOr<OperationCost> FitOperation(const std::vector<OperationSample>& samples);

}  // namespace stretto

#endif  // STRETTO_PLAN_FIT_H_
