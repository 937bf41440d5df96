// Linear layers that multiply in FP8, and the state that lasts from step to step for them: scales,
// and FP8 copies of weights (docs/fp8.md).
#ifndef STRETTO_MODEL_FLOAT8_H_
#define STRETTO_MODEL_FLOAT8_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"
#include "stretto/core/tensor.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"
#include "stretto/ops/ops.h"

namespace stretto {

// LocalStrategies with linear layers in FP8: inputs and weights in E4M3, gradients of outputs in
// `gradients` (E4M3 or E5M2). A layer whose widths are not multiples of 16 stays in the model's
// type.
Strategies Float8Strategies(DType gradients);

// The type of gradients for runtime.fp8 "e4m3" or "hybrid"; none for "none" and anything else.
std::optional<DType> Float8GradientType(const std::string& option);

// Delayed scaling: an operand is quantised with a scale that follows from the largest magnitudes of
// the last kHistory steps, while this step's magnitude is measured in the same pass. All of a
// step's micro-batches use the same scales. Until there is a history (SetJustInTime) each tensor is
// measured first and then quantised.
//
// A layer's forward and backward of one micro-batch must not be separated by another micro-batch's
// forward while scales are just in time.
class Float8State {
 public:
  static constexpr int64_t kHistory = 16;  // steps

  // Bytes that Create takes.
  static int64_t Bytes(const Graph& graph);
  // Reserves an arena from `budget`. `graph` outlives the state. Just in time at first.
  static absl::StatusOr<std::unique_ptr<Float8State>> Create(const Graph& graph, Device device,
                                                             Budget& budget);

  // --- For layers ---
  // q and qt as in Float8Kernels::Quantize. `training`: x counts for the scales of later steps.
  void Quantize(ops::Context c, Float8OperandId id, Tensor q, Tensor qt, Tensor x, bool training);
  // The same with the scale of the last Quantize, for a tensor that has been quantised before.
  void QuantizeAgain(ops::Context c, Float8OperandId id, Tensor q, Tensor qt, Tensor x) const;
  Tensor Inverse(Float8OperandId id) const { return inverse_.Rows(id.value, 1); }
  struct Weight {
    Tensor q;   // [rows, columns]
    Tensor qt;  // [columns, rows]
  };
  Weight Codes(Float8WeightId id) const { return codes_[id.value]; }
  // Makes them; once a step (Run::TakeStaleCodes).
  void QuantizeWeight(ops::Context c, Float8WeightId id, Tensor weight);

  // --- For whoever drives the step ---
  // Between steps only.
  void SetJustInTime(bool on) { just_in_time_ = on; }
  bool just_in_time() const { return just_in_time_ && operands() > 0; }
  // The magnitudes of this step so far, i32 [operands] (the bits of f32 >= 0, ordered alike). With
  // several ranks their maximum goes here before EndStep.
  Tensor Magnitudes() const;
  // New scales from this step's magnitudes.
  void EndStep(ops::Context c);

  // Scales and history, with all rows owned when `owner`, else none.
  absl::Status Register(StateRegistry* registry, bool owner) const;
  // What Register named, as one tensor, f32 [n]: from its owner to all ranks after a checkpoint was
  // loaded.
  Tensor Registered() const;
  // Call when Registered() has been filled; waits for nothing.
  absl::Status Restored();
  // Everything but the weights, to undo what a rehearsal of steps did. The stream must be idle.
  absl::StatusOr<std::vector<std::byte>> Remember() const;
  absl::Status Recall(const std::vector<std::byte>& remembered);

  int64_t operands() const { return static_cast<int64_t>(graph_.float8_operands.size()); }
  int64_t weights() const { return static_cast<int64_t>(codes_.size()); }
  Tensor scales() const { return scale_; }     // f32 [operands]
  Tensor history() const { return history_; }  // f32 [operands, kHistory], newest first

 private:
  explicit Float8State(const Graph& graph) : graph_(graph) {}
  absl::Status SetInverse(const std::vector<float>& scales);

  const Graph& graph_;
  Arena arena_;
  int64_t scaling_bytes_ = 0;  // at the arena's beginning; codes of weights follow
  Tensor scale_, history_, inverse_, limit_;
  Tensor training_amax_, other_amax_;  // the second for evaluation just in time
  std::vector<Weight> codes_;          // by Float8WeightId
  bool just_in_time_ = true;
};

}  // namespace stretto

#endif  // STRETTO_MODEL_FLOAT8_H_
