// The learning rate as a function of the step.
#ifndef STRETTO_TRAIN_SCHEDULE_H_
#define STRETTO_TRAIN_SCHEDULE_H_

#include <cstdint>

#include "stretto/core/status.h"
#include "stretto/train/config.h"

namespace stretto {

// Pure: a run that resumes at step s continues exactly where one that never stopped would be.
//
// Updates are counted from 0. The warm-up gives update s the rate peak * (s + 1) / warmup, so the
// first update already moves and update warmup - 1 has the peak. With x running from 0 at update
// `warmup` to 1 at update `steps` (the one after the last), and low = final_fraction * peak:
//   constant  peak
//   linear    low + (peak - low) * (1 - x)
//   cosine    low + (peak - low) * (1 + cos(pi x)) / 2
//   wsd       peak, then over the last decay_fraction * steps updates, with x running over those
//             only, low + (peak - low) * (1 - sqrt(x))   (Hägele et al. 2024, arXiv 2405.18392, §3)
// After the end the rate stays at `low` (the peak for constant).
class LearningRate {
 public:
  // `optimizer` as checked by TrainConfig::Resolve; INVALID_ARGUMENT for an unknown schedule or
  // steps < 1.
  static absl::StatusOr<LearningRate> Create(const TrainConfig::Optimizer& optimizer,
                                             int64_t steps);

  double At(int64_t update) const;

 private:
  enum class Shape : uint8_t { kConstant, kLinear, kCosine, kWsd };
  LearningRate() = default;

  Shape shape_ = Shape::kConstant;
  double peak_ = 0, low_ = 0;
  int64_t warmup_ = 0;
  int64_t decay_begin_ = 0;  // first update with x > 0 is the one after this
  int64_t decay_end_ = 0;
};

}  // namespace stretto

#endif  // STRETTO_TRAIN_SCHEDULE_H_
