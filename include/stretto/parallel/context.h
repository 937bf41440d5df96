// Context parallelism: ranks of the data axis share the documents of a micro-batch, any number of
// them, others for each micro-batch, and attention passes keys and values around their ring (Liu et
// al., "Ring attention with blockwise transformers for near-infinite context", arXiv 2310.01889; Ge
// et al., "ByteScale", arXiv 2502.21231, for rings that differ from one micro-batch to the next).
// docs/parallelism.md tells it by its order of events.
#ifndef STRETTO_PARALLEL_CONTEXT_H_
#define STRETTO_PARALLEL_CONTEXT_H_

#include <cstdint>
#include <string>

#include "stretto/comm/communicator.h"
#include "stretto/core/phase_timer.h"
#include "stretto/data/batch.h"
#include "stretto/model/graph.h"
#include "stretto/model/layer.h"

namespace stretto {

// Where attention finds the ranks that share documents: a run is given one (Run::SetContextAxis).
// Which of them are in a ring is the micro-batch's to say (RingViews). An error fails the stream.
class ContextAxis {
 public:
  // The members of `group` by index are the places along the data axis, as PackedBatch::Ring counts
  // them; bytes are counted under the group's name. `timer` is told of waits for other ranks
  // (StepPhase::kExposedContext); null: nobody is. All outlive the axis.
  ContextAxis(Communicator& comm, const Group& group, PhaseTimer* timer = nullptr)
      : comm_(comm), group_(group), timer_(timer) {}
  const Group& group() const { return group_; }

  // What work enqueued until now leaves in `data` goes to a member of the group, or `data` receives
  // what one sends. What is started one after the other travels together; until it is waited for,
  // `data` is the axis's. Nothing travels, on either side, where there are no elements.
  Ticket Send(Stream& stream, const Tensor& data, int to, const std::string& label);
  Ticket Receive(Stream& stream, const Tensor& data, int from, const std::string& label);
  // What is enqueued from now on sees the result, or may overwrite what was sent.
  void Wait(Stream& stream, Ticket ticket);

 private:
  Communicator& comm_;
  Group group_;
  PhaseTimer* timer_;
};

// `with` (LocalStrategies, those of FP8) whose attention also takes micro-batches that up to
// `ranks` ranks share; with one rank, `with` itself. For layers that are cut over a tensor axis,
// too, hand the result to TensorStrategies. Frames are larger by what travels (Graph::slots),
// whether or not a micro-batch is shared.
Strategies ContextStrategies(int ranks, Strategies with = LocalStrategies());

// Payload bytes that a rank sends around the ring when the actions run on its share of documents.
//
// With T the tokens of all documents, T(p) those of place p, i this rank's place of D, and E the
// bytes of a token's keys and values on this rank (2 * kv_heads * head_dim elements): each forward
// pass of an attention layer, recomputed ones included, sends (T - T(i + 1)) * E, which is every
// place's keys but the next one's. The backward pass sends that again, and gradients of
// the other places' keys, (T - T(i)) * G, with G as E in the accumulate type. Over the ring these
// are (D - 1) * T * E and (D - 1) * T * (E + G).
int64_t RingBytes(const Graph& graph, const ActionList& list, const PackedBatch::Ring& ring);
// Waits of a rank for others in that (StepPhase::kExposedContext), for a ring of `ranks` ranks.
int64_t RingWaits(const Graph& graph, const ActionList& list, int ranks);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_CONTEXT_H_
