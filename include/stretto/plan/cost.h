// What the actions of a program cost: measured once, kept in a file, used by planners and by the
// simulator.
#ifndef STRETTO_PLAN_COST_H_
#define STRETTO_PLAN_COST_H_

#include <cstdint>
#include <optional>
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
  double Seconds(double tokens, double pairs) const {
    return fixed + tokens * per_token + pairs * per_pair;
  }
  bool operator==(const StageCost&) const = default;
};

// The halves of a kind of layer, by its name without the block's number ("attn.qkv"), when it is on
// one rank as a whole. Recomputation costs what forward does.
struct LayerCost {
  std::string name;
  StageCost forward, backward_input, backward_weight;
  bool operator==(const LayerCost&) const = default;
};

// Seconds of an operation between ranks: latency for each other rank, and the bytes that a rank
// sends, over all others together.
struct OperationCost {
  double latency = 0;
  double bytes_per_second = 0;  // 0: no limit
  double Seconds(int ranks, int64_t bytes_sent) const;
  bool operator==(const OperationCost&) const = default;
};
struct LinkCost {
  OperationCost all_gather, reduce_scatter, all_reduce, point_to_point;
  bool operator==(const LinkCost&) const = default;
};

// What a device and the links between ranks cost whatever the layout, for one model: from this a
// whole step can be predicted (train/prediction.h).
struct DeviceCost {
  bool assumed = false;  // constants that nobody measured
  std::string model;     // widths and types that the layers were measured with (ModelKey)
  std::string measured;  // ranks, transport, threads, versions: for the reader
  int64_t ranks = 0;
  std::vector<LayerCost> layers;
  // The part of a collective that computation beside it hides, 0 to 1.
  double hidden = 0;
  // The optimizer's update with the norm, for each element of which a rank has the state; and what
  // a step takes besides its micro-batches.
  double update_per_element = 0, step_fixed = 0;
  // What a step of ring attention but the first takes in a layer's forward besides its pairs, for
  // each token of a rank: parts of sums are written and added up. Backward takes twice as long.
  double ring_per_token = 0;
  static constexpr double kMostRingPerToken = 1e-3;
  LinkCost machine;                 // between ranks of one machine
  std::optional<LinkCost> network;  // between machines; absent: was not measured

  const LayerCost* Find(const std::string& name) const;  // null: there is none
  bool operator==(const DeviceCost&) const = default;
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
  // What `stretto-bench fit` measured; the stages above are then one transformer block each.
  std::optional<DeviceCost> parts;

  // Seconds of an action on one rank, and of bringing an item from one stage to the next one.
  double Seconds(const Program& program, const ProgramAction& action) const;
  double BoundarySeconds(const PlanItem& item) const;
  bool operator==(const CostModel&) const = default;
};

// Multiplies what layers cost, and the stages made of them, by `scale`; links and updates stay.
void ScaleLayers(double scale, CostModel* cost);

// The same costs for every stage and item.
CostModel UniformCost(double forward, double backward_input, double backward_weight);

// JSON with the fields above and "version": 1; "parts" may be missing. ParseCostModel names the
// field and `source` when one is missing, of another type, unknown, or out of bounds:
// numbers are 0 to 1e9, bytes per second 0 or at least 1.
std::string ToJson(const CostModel& cost);
absl::StatusOr<CostModel> ParseCostModel(const std::string& text, const std::string& source);
// The file `path`, as stretto-bench fit writes it. NOT_FOUND when it cannot be read,
// INVALID_ARGUMENT when it is no regular file.
absl::StatusOr<CostModel> ReadCostModel(const std::string& path);

}  // namespace stretto

#endif  // STRETTO_PLAN_COST_H_
