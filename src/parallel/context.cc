#include "stretto/parallel/context.h"

#include <utility>

#include "src/parallel/ring_attention.h"
#include "stretto/parallel/step_phase.h"
#include "stretto/plan/context_cut.h"

namespace stretto {

Ticket ContextAxis::Send(Stream& stream, const Tensor& data, int to, const std::string& label) {
  if (data.elements() == 0) return 0;
  return comm_.Send(group_, data, to, label, stream.Record());
}

Ticket ContextAxis::Receive(Stream& stream, const Tensor& data, int from,
                            const std::string& label) {
  if (data.elements() == 0) return 0;
  return comm_.Receive(group_, data, from, label, stream.Record());
}

void ContextAxis::Wait(Stream& stream, Ticket ticket) {
  if (ticket == 0) return;
  absl::Status status = TimedWait(comm_, stream, timer_, StepPhase::kExposedContext, ticket);
  if (!status.ok()) stream.Fail(std::move(status));
}

Strategies ContextStrategies(int ranks, Strategies with) {
  if (ranks == 1) return with;
  with.attention = [](SlotId qkv, const AttentionOptions& options, SlotId* o) {
    return std::make_unique<internal::RingAttentionLayer>(qkv, options, o);
  };
  return with;
}

int64_t RingBytes(const Graph& graph, const ActionList& list, const PackedBatch::Ring& ring) {
  const int ranks = ring.size();
  if (ranks == 1) return 0;
  int64_t all = 0;
  for (const int64_t length : ring.lengths) all += length;
  const int64_t keys = all - ContextTokens(ring.lengths, ranks, (ring.index + 1) % ranks);
  const int64_t gradients = all - ContextTokens(ring.lengths, ranks, ring.index);
  int64_t bytes = 0;
  for (const Action& action : list.actions) {
    for (const RingInfo& info : graph.rings) {
      if (info.layer != action.layer) continue;
      const bool backward = action.kind == ActionKind::kBackwardInput;
      if (backward || action.kind == ActionKind::kForward ||
          action.kind == ActionKind::kRecompute) {
        bytes += keys * info.width * SizeOf(info.dtype);
      }
      if (backward) bytes += gradients * info.width * SizeOf(AccumulateType(info.dtype));
    }
  }
  return bytes;
}

int64_t RingWaits(const Graph& graph, const ActionList& list, int ranks) {
  int64_t waits = 0;
  for (const Action& action : list.actions) {
    for (const RingInfo& info : graph.rings) {
      if (info.layer != action.layer) continue;
      // Each message is waited for on both sides.
      if (action.kind == ActionKind::kBackwardInput) waits += 4 * (ranks - 1);
      if (action.kind == ActionKind::kForward || action.kind == ActionKind::kRecompute) {
        waits += 2 * (ranks - 1);
      }
    }
  }
  return waits;
}

}  // namespace stretto
