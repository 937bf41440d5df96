// Runs a plan's actions on one frame.
#ifndef STRETTO_PARALLEL_EXECUTOR_H_
#define STRETTO_PARALLEL_EXECUTOR_H_

#include <memory>

#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/stream.h"
#include "stretto/data/batch.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"

namespace stretto {

// What else happens around a layer's actions: parameters that must have arrived, gradients that are
// complete, communication that can advance.
class ActionHooks {
 public:
  virtual ~ActionHooks() = default;
  virtual void BeforeForward(int /*layer*/) {}
  virtual void AfterBackwardWeight(int /*layer*/) {}
  virtual void BetweenActions() {}
};

// Views of a host batch for a frame on the CPU: nothing is copied, so the batch must stay as it is
// until the frame's work is done.
TokenViews ViewsOf(const PackedBatch& batch);

// Brings batches to the stream's device. On the CPU nothing is copied. On another device a batch
// passes through page-locked memory, two batches deep, so that the host prepares the next one while
// the device works.
class TokenFeeder {
 public:
  // For batches of up to `token_capacity` tokens.
  static absl::StatusOr<std::unique_ptr<TokenFeeder>> Create(Stream& stream, int64_t token_capacity,
                                                             Budget& budget);
  // Bytes of device memory that Create takes for this capacity on this kind of device.
  static int64_t DeviceBytes(DeviceKind kind, int64_t token_capacity);

  // Views that work enqueued on the stream from now on may read, until the next call's. On the CPU
  // the batch must stay as it is until then, elsewhere only during the call. INVALID_ARGUMENT when
  // the batch is larger than the capacity.
  absl::StatusOr<TokenViews> Feed(const PackedBatch& batch);

 private:
  TokenFeeder(Stream& stream, int64_t capacity) : stream_(stream), capacity_(capacity) {}
  static constexpr int kSlots = 2;

  Stream& stream_;
  int64_t capacity_;
  Arena device_;
  Arena host_;
  Event copied_[kSlots];
  int next_ = 0;
};

// Enqueues the whole list in order. `frame` must have been planned for these actions. Errors are
// sticky on the run's stream.
void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame,
             ActionHooks* hooks = nullptr);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_EXECUTOR_H_
