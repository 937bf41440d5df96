// What a document costs on a ring of ranks: time, bytes and memory, for planners of sequences.
#ifndef STRETTO_PLAN_SEQUENCE_COST_H_
#define STRETTO_PLAN_SEQUENCE_COST_H_

#include <cstdint>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/cost.h"

namespace stretto {

// Seconds of one layer on one rank, and of one step of ring attention.
//
// A ring of D ranks shares documents as plan/context_cut.h says. Its attention takes D steps, each
// of which works on 1 / D^2 of the pairs, and between two steps a rank hands the keys and values
// that it has to its neighbour. When the message travels beside the computation (`overlapped`), all
// steps but the last take the longer of the two, else their sum. Each step but the first also adds
// its part to sums, in a time for each token of a rank. A rank alone sends and adds nothing.
struct SequenceCost {
  // `per_pair` is attention's, the rest is everything else of the layer.
  StageCost forward, backward;
  int64_t layers = 1;  // of the model, all stages together

  // Keys and values of one token in one layer. Backward sends `backward_messages` times as much,
  // since their gradients travel, too.
  double ring_bytes_per_token = 0;
  double backward_messages = 2;
  // Seconds of adding to sums, for each token of a rank.
  double forward_sums = 0, backward_sums = 0;
  // A step of a ring within a machine, and of one that reaches over several.
  OperationCost machine, network;
  bool overlapped = true;
};

// From a cost model: `cost.forward` and the backward halves are one transformer block each (as
// `stretto-bench fit` measures them), or all entries together a model of that many stages, of which
// `layers` are made. Links are those of cost.parts, or the model's one.
SequenceCost SequenceCostOf(const CostModel& cost, int64_t layers, double ring_bytes_per_token);

// Activations that wait for backward. One layer of n tokens takes bytes_per_token * n +
// bytes_fixed; a rank has room for what `capacity` tokens take in all layers. Part r of each
// layer's activations may wait in host memory instead, but for those of two layers, which are in
// use (ByteScale, arXiv 2502.21231, equation 3): then more tokens fit.
struct SequenceMemory {
  double bytes_per_token = 1, bytes_fixed = 0;
  // Of a rank, for activations; 0: what `capacity` tokens take.
  int64_t device_bytes = 0;
  bool offload = false;
  // Between device and host, the slower of both directions. A copy has to be over within the
  // layer's forward, or less is copied.
  double host_bytes_per_second = 0;
};

// Times are whole nanoseconds, added up as integers, so that nobody's rounding changes a plan.
class SequenceClock {
 public:
  // INVALID_ARGUMENT names a number that is negative, not finite or too large.
  static absl::Status Check(const SequenceCost& cost);
  // `cost` has passed Check. The slowest of `stages` is what is timed: it has ceil(layers / stages)
  // layers.
  SequenceClock(const SequenceCost& cost, int stages);

  struct Load {
    int64_t tokens = 0;  // of all documents
    int64_t pairs = 0;   // of a query and a key it sees: length * (length + 1) / 2 each
  };
  static Load LoadOf(int64_t length) { return {length, PairsOf(length)}; }
  static int64_t PairsOf(int64_t length) {
    return length % 2 == 0 ? length / 2 * (length + 1) : (length + 1) / 2 * length;
  }

  // Nanoseconds of a micro-batch on each rank of its ring, in one stage.
  int64_t Forward(const Load& load, int64_t ranks, bool network) const {
    return Half(forward_, load, ranks, network);
  }
  int64_t Backward(const Load& load, int64_t ranks, bool network) const {
    return Half(backward_, load, ranks, network);
  }
  int64_t Both(const Load& load, int64_t ranks, bool network) const {
    return Forward(load, ranks, network) + Backward(load, ranks, network);
  }
  // The part of Both that does not depend on what is in the micro-batch.
  int64_t fixed() const { return Both({}, 1, false); }
  // Bytes that the ranks of a ring send, all together, in all layers, forward and backward.
  int64_t RingBytes(const Load& load, int64_t ranks) const;
  // Nanoseconds of one layer's forward, on a rank alone and without its constant part.
  int64_t LayerForward(const Load& load) const;

 private:
  // Of one layer, in 1e-18 seconds.
  struct Pass {
    int64_t fixed = 0, per_token = 0, per_pair = 0, sums_per_token = 0;
    int64_t latency[2] = {}, step_per_token[2] = {};  // of a step, by `network`
  };
  int64_t Half(const Pass& pass, const Load& load, int64_t ranks, bool network) const;

  Pass forward_, backward_;
  int64_t layers_ = 1, stage_layers_ = 1;
  double bytes_per_token_ = 0;  // forward and backward
  bool overlapped_ = true;
};

}  // namespace stretto

#endif  // STRETTO_PLAN_SEQUENCE_COST_H_
