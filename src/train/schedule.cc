#include "stretto/train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"

namespace stretto {

absl::StatusOr<LearningRate> LearningRate::Create(const TrainConfig::Optimizer& optimizer,
                                                  int64_t steps) {
  if (steps < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("A learning rate schedule needs at least 1 step, not ", steps, "."));
  }
  LearningRate rate;
  rate.peak_ = optimizer.lr;
  rate.low_ = optimizer.lr * optimizer.final_fraction;
  rate.warmup_ = optimizer.warmup;
  rate.decay_begin_ = optimizer.warmup;
  rate.decay_end_ = std::max(steps, optimizer.warmup);
  if (optimizer.schedule == "constant") {
    rate.shape_ = Shape::kConstant;
  } else if (optimizer.schedule == "linear") {
    rate.shape_ = Shape::kLinear;
  } else if (optimizer.schedule == "cosine") {
    rate.shape_ = Shape::kCosine;
  } else if (optimizer.schedule == "wsd") {
    rate.shape_ = Shape::kWsd;
    const auto decay =
        static_cast<int64_t>(std::llround(optimizer.decay_fraction * static_cast<double>(steps)));
    rate.decay_begin_ = std::max(optimizer.warmup, steps - decay);
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("optimizer.schedule \"", optimizer.schedule,
                     "\" is unknown; choose cosine, linear, wsd or constant."));
  }
  return rate;
}

double LearningRate::At(int64_t update) const {
  if (update < warmup_) {
    return peak_ * (static_cast<double>(update) + 1) / static_cast<double>(warmup_);
  }
  if (shape_ == Shape::kConstant || update < decay_begin_) return peak_;
  if (update >= decay_end_) return low_;
  const double x =
      static_cast<double>(update - decay_begin_) / static_cast<double>(decay_end_ - decay_begin_);
  double weight = 1 - x;
  if (shape_ == Shape::kCosine) weight = (1 + std::cos(std::numbers::pi * x)) / 2;
  if (shape_ == Shape::kWsd) weight = 1 - std::sqrt(x);
  return low_ + (peak_ - low_) * weight;
}

}  // namespace stretto
