// Update rules over parameter shards.
#ifndef STRETTO_OPTIM_OPTIMIZER_H_
#define STRETTO_OPTIM_OPTIMIZER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/state.h"
#include "stretto/parallel/data_parallel.h"

namespace stretto {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;
  double weight_decay = 0.1;  // for parameters that decay (ParameterSpec::weight_decay)
};

// AdamW (Loshchilov & Hutter, "Decoupled weight decay regularization", 2019) on this rank's shards,
// with f32 master weights for bf16 parameters. State lives in one arena.
class AdamW {
 public:
  static absl::StatusOr<std::unique_ptr<AdamW>> Create(const Graph& graph,
                                                       const DataParallel& parameters,
                                                       ops::Context ops, Budget& budget,
                                                       const AdamWOptions& options);

  // Adds the sum of squares of all gradient shards to scalars[kSumSquares] (this rank's part of
  // it).
  void AddSumSquares(Tensor scalars) const;
  // Updates all shards; `scalars` as PrepareStep left them. `step` counts from 1.
  void Step(Tensor scalars, double lr, int64_t step) const;
  // Master weights start as copies of the parameters; call again after parameters were loaded
  // without optimizer state.
  void ResetMasters() const;

  // Adds "optim.exp_avg.<name>", "optim.exp_avg_sq.<name>" and, for bf16, "optim.master.<name>".
  absl::Status Register(StateRegistry* registry) const;
  int64_t bytes() const { return arena_.bytes(); }
  // Bytes of state for shards of `rows` rows in total; pure, for planners.
  static int64_t StateBytes(const Graph& graph, int ranks, int index);

 private:
  struct Item {
    ParameterShard shard;
    Tensor m, v, master;
    bool decay = false;
  };
  AdamW(const Graph& graph, ops::Context ops, const AdamWOptions& options)
      : graph_(graph), ops_(ops), options_(options) {}

  const Graph& graph_;
  ops::Context ops_;
  AdamWOptions options_;
  Arena arena_;
  std::vector<Item> items_;
};

}  // namespace stretto

#endif  // STRETTO_OPTIM_OPTIMIZER_H_
