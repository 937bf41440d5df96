// What is known about one optimizer step.
#ifndef STRETTO_OBSERVE_STEP_STATS_H_
#define STRETTO_OBSERVE_STEP_STATS_H_

#include <cstdint>
#include <optional>

namespace stretto {

struct StepStats {
  int64_t step = 0;              // optimizer steps done, this one included: the first is 1
  double loss = 0;               // nats per token, mean over the valid tokens of the global batch
  double grad_norm = 0;          // of the whole gradient, before clipping
  double lr = 0;                 // learning rate applied
  int64_t tokens = 0;            // of this step, all ranks
  double tokens_per_second = 0;  // all ranks
  double step_ms = 0;            // wall time
  double mfu_causal = 0;         // fractions of the peak, see train/flops.h; 0: the peak is unknown
  double mfu_palm = 0;
  int64_t memory_bytes = 0;         // peak so far of this process, or of its device
  bool skipped = false;             // the update was not applied (loss or gradient out of bounds)
  int64_t skipped_total = 0;        // so far
  std::optional<double> eval_loss;  // nats per token, when evaluated after this step
  // Where the time went, on this rank: the host's until the batch was there, then the device's own,
  // which follow each other without gaps.
  double data_ms = 0;  // waiting for the batch
  double forward_ms = 0;
  double backward_ms = 0;  // recomputation included
  double update_ms = 0;    // norm of the gradient, clipping, optimizer
  // Waiting for other ranks with nothing else to do: as long as they are late and the message is on
  // its way, together.
  double exposed_data_ms = 0;      // for gradients and parameters
  double exposed_tensor_ms = 0;    // for the ranks that share a layer
  double exposed_context_ms = 0;   // for the ranks that share a document
  double exposed_pipeline_ms = 0;  // for another stage: bubbles, and messages on their way
  double exposed_world_ms = 0;     // for the step's scalars, which all ranks sum
  double comm_exposed_ms = 0;      // the sum of the five
  // Before parts of the update: for copies of a snapshot that were still reading what it writes.
  double exposed_snapshot_ms = 0;
};

}  // namespace stretto

#endif  // STRETTO_OBSERVE_STEP_STATS_H_
