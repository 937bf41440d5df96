// Which layouts a number of devices can run, and which of them should be fastest.
#ifndef STRETTO_TRAIN_SUGGEST_H_
#define STRETTO_TRAIN_SUGGEST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/cost.h"
#include "stretto/train/config.h"
#include "stretto/train/prediction.h"

namespace stretto {

struct SuggestOptions {
  int ranks = 1;
  int64_t memory_bytes = 0;  // of a rank
  int machine_ranks = 8;     // of one machine: what a tensor axis may have
  // Fields whose values stay as the configuration has them. Free are otherwise parallel.dp, tp, pp,
  // schedule, chunks and zero, batch.micro and runtime.recompute.
  std::vector<std::string> fixed;
};

// A layout that fits.
struct Suggestion {
  TrainConfig config;        // resolved
  int64_t memory_bytes = 0;  // of the rank that needs most: what is planned and the overheads
  StepPrediction step;
};
// Why others do not: the first of their kind, and how many.
struct Refusal {
  std::string reason;
  int64_t count = 0;
};
struct Suggestions {
  std::vector<Suggestion> feasible;  // by predicted seconds, equal ones by memory
  std::vector<Refusal> refused;      // most frequent first
};

// UNIMPLEMENTED for documents of unequal length, whose steps are not predicted.
absl::Status CheckSuggests(const TrainConfig& config);

// Tries all layouts of the devices with every power of two for batch.micro (and the configured
// number). Of runtime.recompute the first of none, norms and block that fits is taken: each costs
// time and saves memory. GPipe is tried only when it is fixed: 1F1B has its bubble and needs no
// more memory (Narayanan et al. 2021, 2104.04473 section 2.2). Memory is that of PlanRun.
// Of pipelines those of more than 4096 micro-batches are refused; long ones are predicted from
// shorter ones, within rounding where their rounds are alike. INVALID_ARGUMENT when the
// configuration itself is wrong or too large to try (1024 blocks, 2^40 samples), or an option.
absl::StatusOr<Suggestions> Suggest(const TrainConfig& config, const CostModel& cost,
                                    const SuggestOptions& options);

// What the slower one of two loses its time with, largest first: "bubble +12.1 ms, exposed data
// +3.0 ms".
std::string WhySlower(const StepPrediction& fast, const StepPrediction& slow);

}  // namespace stretto

#endif  // STRETTO_TRAIN_SUGGEST_H_
