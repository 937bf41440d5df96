// Update rules over parameter shards.
#ifndef STRETTO_OPTIM_OPTIMIZER_H_
#define STRETTO_OPTIM_OPTIMIZER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/state.h"
#include "stretto/ops/optimizer_table.h"
#include "stretto/parallel/data_parallel.h"

namespace stretto {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // for parameters that decay (ParameterSpec::weight_decay)
  // Moments in bf16, rounded stochastically, instead of f32; not for f64 parameters.
  bool bf16_moments = false;
  // An f32 copy of bf16 parameters, which is what is updated. Without it the parameters are, and
  // rounded stochastically. No matter for parameters of another type.
  bool masters = true;
  // The state lies in page-locked host memory, which the device's kernels read and write where it
  // is. No matter on the CPU.
  bool offload = false;
  uint64_t seed = 0;  // of stochastic rounding
  // A part of the update (Step) is closed when what it writes reaches this size.
  int64_t part_bytes = int64_t{64} << 20;
  ParamId without;  // a parameter that somebody else updates; invalid: none
};

// AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) on this rank's shards.
// State lives in one arena; all shards are updated by one launch.
class AdamW {
 public:
  static absl::StatusOr<std::unique_ptr<AdamW>> Create(const Graph& graph,
                                                       const DataParallel& parameters,
                                                       ops::Context ops, Budget& budget,
                                                       const AdamWOptions& options);

  // Adds the sum of squares of all gradient shards to scalars[kSumSquares] (this rank's part of
  // it), but for what another rank of a tensor axis has as well and counts (ParameterInfo::owned).
  void AddSumSquares(Tensor scalars) const;
  // Updates all shards; `scalars` as PrepareStep left them. `step` counts from 1. With `before` the
  // update goes part by part, and before(i) is called before part i is enqueued: for who reads the
  // state still. The bits are the same.
  void Step(Tensor scalars, double lr, int64_t step,
            const std::function<void(int part)>& before = nullptr) const;
  static constexpr int kMostParts = 128;
  int parts() const { return static_cast<int>(part_ends_.size()); }
  // Master weights start as copies of the parameters; call again after parameters were loaded
  // without optimizer state.
  void ResetMasters() const;

  // Adds "optim.exp_avg.<name>", "optim.exp_avg_sq.<name>" and, with masters,
  // "optim.master.<name>"; notes for these and for the parameters that are registered already which
  // part of the update writes them, where parts of others come first.
  absl::Status Register(StateRegistry* registry, int first_part = 0) const;
  int64_t bytes() const { return state_.bytes(); }

  // What Create takes on a rank, for planners.
  struct Bytes {
    int64_t state = 0;  // on the device, or with `offload` in host memory
    int64_t table = 0;  // on the device
  };
  static Bytes BytesOf(const Graph& graph, int ranks, int index, const AdamWOptions& options);

 private:
  AdamW(const Graph& graph, ops::Context ops, const AdamWOptions& options)
      : graph_(graph), ops_(ops), options_(options) {}

  const Graph& graph_;
  ops::Context ops_;
  AdamWOptions options_;
  Arena state_;
  std::vector<ParameterShard> shards_;
  std::vector<OptimizerItem> items_;  // of the shards, in their order
  std::vector<int> parts_;            // by shard: which part of the update it is in
  std::vector<int64_t> part_ends_;    // by part: behind its last item of the table
  OptimizerTable table_;
  // Of what this rank counts in the global norm, where that is not all.
  std::optional<OptimizerTable> counted_;
};

}  // namespace stretto

#endif  // STRETTO_OPTIM_OPTIMIZER_H_
