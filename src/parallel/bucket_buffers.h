// The buffers that buckets of parameters and gradients pass through, as a BucketPlan says.
#ifndef STRETTO_SRC_PARALLEL_BUCKET_BUFFERS_H_
#define STRETTO_SRC_PARALLEL_BUCKET_BUFFERS_H_

#include <string>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/core/phase_timer.h"
#include "stretto/model/layer.h"
#include "stretto/parallel/bucket_plan.h"

namespace stretto::internal {

// Waits for a ticket of the data axis unless it is 0, which it is afterwards; see TimedWait.
absl::Status TakeTicket(Communicator& comm, Stream& stream, PhaseTimer* timer, Ticket* ticket);

class BucketBuffers {
 public:
  struct Options {
    bool overlap = true;          // sums arrive under backward
    bool prefetch = true;         // parameters arrive before they are needed
    bool add_in_transit = false;  // sums are added to the shards by the reduce-scatter
    bool poison = false;  // places that became free are filled with NaN; on the CPU, for tests
    PhaseTimer* timer = nullptr;
  };
  // What this rank keeps of each parameter, all `part` rows of its cut: absent where parameters do
  // not rotate.
  struct Shards {
    std::vector<Tensor> values, gradients;
  };
  // Who asks for the events of an action, for which run.
  struct Caller {
    Run* run = nullptr;
    bool training = true;
    bool last = false;        // no further micro-batch in this step
    bool communicate = true;  // false: places are given out, with whatever lies there
  };

  // `memory` has plan.buffer_bytes bytes on the device of `ops`. All outlive the buffers.
  BucketBuffers(Communicator& comm, const Group& group, const Graph& graph, ops::Context ops,
                const BucketPlan& plan, std::byte* memory, const Shards& shards,
                const Options& options);

  // Nothing has been added to the gradients' shards in this step.
  void BeginStep();
  bool ActsBefore(bool training, size_t action) const;
  bool ActsAfter(bool training, size_t action) const;
  absl::Status Before(const Caller& caller, size_t action);
  absl::Status After(const Caller& caller, size_t action);
  // All sums of the step are in the shards afterwards.
  absl::Status FinishGradients();
  // Starts the gathers of a training action before its turn.
  void GatherFor(size_t action);
  // Waits until the shards are read by no gather.
  absl::Status WaitGathers();
  // Forgets what was gathered ahead: somebody else is about to use the buffers.
  absl::Status Drop();

 private:
  struct Stay {
    int bucket = 0;
    bool gradients = false;
    std::vector<ParamId> params;
    std::vector<Tensor> full;     // what layers see: [rows, columns], or [rows]
    std::vector<Tensor> stored;   // `ranks` equal parts of rows
    std::vector<Tensor> parts;    // this rank's
    std::vector<Tensor> shards;   // what it keeps of them
    std::vector<Tensor> padding;  // rows that nothing writes, and that hold zeros
    Tensor place;                 // all of it, as bytes
    std::string label;
    Ticket ticket = 0;
    bool submitted = false;
  };
  struct Timeline {
    const BucketTimeline* plan = nullptr;
    std::vector<Stay> stays;
  };
  Timeline& Of(bool training) { return training ? training_ : evaluation_; }
  void MakeTimeline(const Graph& graph, const BucketPlan& plan, const BucketTimeline& from,
                    std::byte* memory, const Shards& shards, Timeline* timeline) const;
  absl::Status Do(const Caller& caller, const BucketEvent& event);
  void Gather(Stay& stay);
  absl::Status Use(const Caller& caller, Stay& stay);
  absl::Status Reduce(const Caller& caller, Stay& stay);
  absl::Status Collect(Stay& stay);
  void Poison(const Stay& stay) const;

  Communicator& comm_;
  const Group& group_;
  ops::Context ops_;
  Options options_;
  Timeline training_, evaluation_;
  std::vector<uint8_t> added_;             // by bucket: its shards hold sums of this step
  std::vector<std::vector<Tensor>> sums_;  // by bucket: its shards
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_PARALLEL_BUCKET_BUFFERS_H_
