// What the actions of a program cost: measured once, kept in a file, used by planners and by the
// simulator.
#ifndef STRETTO_PLAN_COST_H_
#define STRETTO_PLAN_COST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/program.h"

namespace stretto {

// Seconds of one half of a stage on an item: fixed + tokens * per_token + pairs * per_pair, where
// pairs are those of a query and a key it sees: length * (length + 1) / 2 for each document. An
// item of several pipelines is cut into equal shares.
struct StageCost {
  double fixed = 0, per_token = 0, per_pair = 0;
  bool operator==(const StageCost&) const = default;
};

struct CostModel {
  std::string device;  // what was measured, for the reader
  // By stage; a single entry counts for every stage.
  std::vector<StageCost> forward, backward_input, backward_weight;
  // A forward woven into a backward takes this part of the sum of both.
  double woven = 1;
  // Activations and their gradients between stages on different ranks.
  double boundary_bytes_per_token = 0;
  double link_latency = 0;           // seconds
  double link_bytes_per_second = 0;  // 0: no limit

  // Seconds of an action on one rank, and of bringing an item from one stage to the next one.
  double Seconds(const Program& program, const ProgramAction& action) const;
  double BoundarySeconds(const PlanItem& item) const;
  bool operator==(const CostModel&) const = default;
};

// The same costs for every stage and item.
CostModel UniformCost(double forward, double backward_input, double backward_weight);

// JSON with the fields above and "version": 1. ParseCostModel names the field and `source` when one
// is missing, of another type, negative, or unknown.
std::string ToJson(const CostModel& cost);
absl::StatusOr<CostModel> ParseCostModel(const std::string& text, const std::string& source);

}  // namespace stretto

#endif  // STRETTO_PLAN_COST_H_
