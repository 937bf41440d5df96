// Data parallelism with ZeRO-1, 2 and 3: where parameters and gradients live, how gradients are
// summed over ranks while backward still runs, and how parameters arrive before they are needed.
#ifndef STRETTO_PARALLEL_DATA_PARALLEL_H_
#define STRETTO_PARALLEL_DATA_PARALLEL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/cut.h"
#include "stretto/core/phase_timer.h"
#include "stretto/core/state.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"
#include "stretto/parallel/executor.h"
#include "stretto/parallel/step_phase.h"

namespace stretto {

struct BucketPlan;  // parallel/bucket_plan.h
namespace internal {
class BucketBuffers;
}

struct DataParallelOptions {
  // false: one waits for gradients where they are sent, with ZeRO-1 after all of backward.
  bool overlap = true;
  // false: one waits for parameters where they are asked for: with ZeRO-1 and 2 after the update,
  // with ZeRO-3 before the layers that need them.
  bool prefetch = true;
  // A bucket is closed when its gradients reach this size. A plan has its buckets already.
  int64_t bucket_bytes = 25 << 20;
  // ZeRO-2 or 3, as PlanBuckets planned it for this group's size; null, or a plan of ZeRO-1:
  // ZeRO-1. Outlives the DataParallel.
  const BucketPlan* buckets = nullptr;
  // Gradients of ZeRO-2 and 3 are added to the shards where they arrive, on the communication
  // stream: where copy engines carry them, which leave it time for that. GPUs.
  bool add_in_transit = false;
  // Buffers that became free are filled with NaN, so that using them shows (CPU).
  bool poison = false;
  // Told when forward, backward and waits begin; null: nobody is. Outlives the DataParallel.
  PhaseTimer* timer = nullptr;
  // Host threads that draw the initial values.
  int threads = 1;
  // false: all parameters are 0 until Initialize, or until they are loaded from somewhere.
  bool initialize = true;
};

// The rows of one parameter that this rank updates: views into the storages. Rows are cut evenly,
// rank i has rows [i * p, (i + 1) * p) with p = ceil(rows / ranks); the last may have fewer or
// none.
struct ParameterShard {
  ParamId param;
  int64_t first_row = 0;
  Tensor value;  // [rows of the shard, columns], model type
  Tensor grad;   // the same rows of the summed gradient, f32 or f64
};

// Parameters by the order in which backward completes their gradients, cut into buckets.
std::vector<std::vector<int>> MakeBuckets(const Graph& graph, int64_t bucket_bytes);

// Bytes of parameter and gradient storage for `ranks` ranks, padding included. With ZeRO-2 and 3
// the buffers that rotate come on top (BucketPlan).
struct StorageBytes {
  int64_t parameters = 0, gradients = 0;
};
StorageBytes DataParallelStorage(const Graph& graph, int ranks, int zero = 1);

// One step:
//   BeginStep(run)
//   for each micro-batch: Execute(..., hooks(last micro-batch))
//   FinishGradients(run)        summed gradients are in shards()[i].grad, on all ranks
//   ... the optimizer updates shards()[i].value ...
//   GatherParameters()          returns at once; the next forward waits layer by layer
//
// With ZeRO-2 and 3 ranks exchange something in every micro-batch, so that all ranks of the group
// go through as many of them: one that has fewer calls FollowHooks in place of Execute.
class DataParallel {
 public:
  // Reserves its arenas from `budget`. Initial values are drawn from `seed`.
  static absl::StatusOr<std::unique_ptr<DataParallel>> Create(Communicator& comm,
                                                              const Group& group,
                                                              const Graph& graph, Stream& stream,
                                                              const KernelTable& kernels,
                                                              uint64_t seed, Budget& budget,
                                                              const DataParallelOptions& options);
  ~DataParallel();

  // Draws the initial values, which takes seconds for some billions. No work may be enqueued on
  // parameters.
  absl::Status Initialize();

  const std::vector<ParameterShard>& shards() const { return shards_; }
  // All parameters that this rank holds, as bytes; laid out alike on all ranks of the group.
  Tensor parameter_memory() const;
  const Group& group() const { return group_; }
  int zero() const { return zero_; }
  // Full parameter and gradient of this rank: [rows, columns] or [rows]. Absent where this rank
  // keeps its shard alone: gradients with ZeRO-2, both with ZeRO-3.
  Tensor Parameter(ParamId id) const { return parameters_[id.value]; }
  Tensor Gradient(ParamId id) const { return gradients_[id.value]; }

  // Gives `run` its parameters, gradients and constants. `loss_total` is f64 [2].
  void Attach(Run* run, Tensor loss_total) const;

  void BeginStep(Run& run);
  // Hooks for one micro-batch of the step. After the last one gradients of finished layers leave.
  ActionHooks& hooks(bool last_micro_batch);
  // With ZeRO-3, starts the gather that the hooks of training action `action` would start: for
  // whoever knows what this rank runs next and has to wait for something else before. All ranks of
  // the group call it in the same place.
  void GatherFor(size_t action);
  // Hooks for a list of evaluation that `run` goes through, by all ranks alike; null where
  // parameters are complete anyway.
  ActionHooks* evaluation_hooks(Run& run);
  // Hooks that exchange nothing: buffers are given out as they lie there, for work whose results do
  // not matter; gathers under way end first. Null where there are none.
  ActionHooks* local_hooks(Run& run, bool training);
  // Sends what has not left yet (all of it on a rank without micro-batches) and waits for the sums.
  absl::Status FinishGradients(Run& run);
  absl::Status GatherParameters();
  // Waits until all parameters are complete on this rank (before evaluation, export, sampling), or
  // with ZeRO-3 until no gather is under way.
  absl::Status WaitParameters();
  // A parameter in full, until the next call. With ZeRO-3 all ranks of the group call it together,
  // and it takes memory.
  absl::StatusOr<Tensor> CompleteParameter(ParamId id);

  // Adds the parameters, each rank owning its shard, under their names; all but `without`.
  absl::Status Register(StateRegistry* registry, ParamId without = {}) const;
  int64_t bytes() const;

 private:
  class Hooks;
  class BufferHooks;
  absl::Status TakeTicket(Ticket* ticket);
  // Returns the phase until now, -1 when there was none.
  int Enter(StepPhase phase);
  struct Bucket {
    std::vector<int> params;
    int ready_layer = 0;  // complete after this layer's BackwardWeight
    std::vector<Tensor> grad_inputs, grad_outputs, value_inputs, value_outputs;
    std::string reduce_label, gather_label;
    Ticket reduce = 0, gather = 0;
    bool submitted = false;
  };
  DataParallel(Communicator& comm, const Group& group, const Graph& graph, Stream& stream,
               const KernelTable& kernels, uint64_t seed, const DataParallelOptions& options);
  void SubmitReduce(Run& run, Bucket& bucket);
  int64_t NumberOf(const Bucket& bucket) const { return &bucket - buckets_.data(); }
  absl::Status WaitLayer(int layer);

  Communicator& comm_;
  Group group_;
  const Graph& graph_;
  Stream& stream_;
  ops::Context ops_;
  DataParallelOptions options_;
  uint64_t seed_;
  int zero_ = 1;
  Arena parameter_arena_, gradient_arena_, constant_arena_, buffer_arena_, complete_arena_;
  std::vector<Tensor> parameters_, gradients_, constants_;
  std::vector<Tensor> value_parts_;  // all rows of the shards, with padding (ZeRO-3)
  std::vector<ParameterShard> shards_;
  std::vector<Bucket> buckets_;
  std::vector<std::vector<int>> layer_buckets_;  // whose parameters a layer's forward needs
  std::unique_ptr<Hooks> plain_hooks_, last_hooks_;
  std::unique_ptr<internal::BucketBuffers> buffers_;  // null with ZeRO-1
  std::unique_ptr<BufferHooks> evaluation_hooks_, local_hooks_;
  Run* run_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_PARALLEL_DATA_PARALLEL_H_
