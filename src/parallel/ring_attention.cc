#include "src/parallel/ring_attention.h"

#include <utility>

namespace stretto::internal {

absl::Status RingAttentionLayer::Declare(Builder& b) {
  STRETTO_RETURN_IF_ERROR(LocalAttentionLayer::Declare(b));
  const int64_t q = options_.heads * options_.head_dim;
  const int64_t keys = 2 * options_.kv_heads * options_.head_dim;
  const DType type = b.dtype(), wide = b.accumulate_type();
  keys_ = {b.Scratch("ring.keys_a", keys, type, kInForward),
           b.Scratch("ring.keys_b", keys, type, kInForward)};
  part_o_ = b.Scratch("ring.o", q, type, kInForward);
  part_lse_ = b.Scratch("ring.lse", options_.heads, wide, kInForward);
  keys_again_ = {b.Scratch("ring.keys_again_a", keys, type, kInBackwardInput),
                 b.Scratch("ring.keys_again_b", keys, type, kInBackwardInput)};
  key_gradients_ = {b.Scratch("ring.d_keys_a", keys, wide, kInBackwardInput),
                    b.Scratch("ring.d_keys_b", keys, wide, kInBackwardInput)};
  part_keys_ = b.Scratch("ring.d_keys", keys, type, kInBackwardInput);
  part_q_ = b.Scratch("ring.dq", q, type, kInBackwardInput);
  if (type != wide) {
    sum_o_ = b.Scratch("ring.o_sum", q, wide, kInForward);
    sum_q_ = b.Scratch("ring.dq_sum", q, wide, kInBackwardInput);
  }
  b.Circulates(keys, type);
  keys_label_ = b.layer_name() + " keys";
  again_label_ = b.layer_name() + " keys again";
  gradients_label_ = b.layer_name() + " key gradients";
  return absl::OkStatus();
}

RingAttentionLayer::Keys RingAttentionLayer::KeysAt(const Frame& frame, SlotId slot,
                                                    const RingViews::Place& place) const {
  // The slot has room for as many tokens as any place may have (TokenFeeder sees to it).
  Keys keys = {.both = PaddedRows(frame.Value(slot), place.tokens)};
  const int64_t width = keys.both.dims[1] / 2;
  keys.k = keys.both.Columns(0, width).Heads(options_.kv_heads);
  keys.v = keys.both.Columns(width, width).Heads(options_.kv_heads);
  return keys;
}

RingAttentionLayer::Step RingAttentionLayer::StepWith(const Frame& frame, int place) const {
  const RingViews& ring = *frame.tokens.ring;
  const RingViews::Place& there = ring.places[static_cast<size_t>(place)];
  Step step = {.shape = Shape(frame)};
  step.shape.causal = false;
  step.shape.uniform = 0;
  step.shape.cu_k = there.cu;
  if (place < ring.index) {
    step.shape.len_k = there.front;
    step.shape.max_k = there.longest_front;
  } else {
    step.shape.cu_q = ring.back_cu;
    step.shape.len_q = ring.back_lengths;
    step.shape.max_q = ring.longest_back;
    step.shape.max_k = there.longest;
  }
  step.any = step.shape.max_q > 0 && step.shape.max_k > 0;
  return step;
}

bool RingAttentionLayer::Ready(const Run& run, const Frame& frame) const {
  if (run.context_axis() != nullptr && frame.tokens.ring != nullptr) return true;
  run.ops().stream->Fail(absl::FailedPreconditionError(
      run.context_axis() == nullptr
          ? "ranks share the documents of a micro-batch, but the run has nothing to reach them "
            "with; give it a ContextAxis (Run::SetContextAxis)"
          : "ranks share the documents of a micro-batch, but the frame does not say where their "
            "tokens lie; let a TokenFeeder make its views"));
  return false;
}

void RingAttentionLayer::Attend(Run& run, Frame& frame, const Parts& in) const {
  if (frame.tokens.ring_size == 1) return LocalAttentionLayer::Attend(run, frame, in);
  if (!Ready(run, frame)) return;
  const RingViews& ring = *frame.tokens.ring;
  ContextAxis& axis = *run.context_axis();
  Stream& stream = *run.ops().stream;
  const int size = ring.size();
  const auto place = [&](int step) -> const RingViews::Place& {
    return ring.places[static_cast<size_t>(ring.Before(step))];
  };
  const int next = place(size - 1).rank, previous = place(1).rank;
  // Where the keys of a step are, in turn.
  const auto keys_of = [&](int step) {
    return KeysAt(frame, keys_[static_cast<size_t>(step % 2)], place(step));
  };
  const Tensor o = frame.Value(o_).Heads(options_.heads), lse = frame.Value(lse_);
  const Tensor sum = sum_o_.valid() ? frame.Value(sum_o_).Heads(options_.heads) : o;
  const Tensor part = frame.Value(part_o_).Heads(options_.heads);

  const Keys own = keys_of(0);
  ops::Copy(run.ops(), own.k, in.k);
  ops::Copy(run.ops(), own.v, in.v);
  Ticket sent = 0, received = 0;
  for (int step = 0; step < size; ++step) {
    const Keys keys = keys_of(step);
    axis.Wait(stream, received);
    axis.Wait(stream, sent);  // from where the next ones arrive
    if (step + 1 < size) {
      sent = axis.Send(stream, keys.both, next, keys_label_);
      received = axis.Receive(stream, keys_of(step + 1).both, previous, keys_label_);
    }
    if (step == 0) {
      ops::Attention(run.ops(), o, lse, in.q, in.k, in.v, Shape(frame));
      if (sum_o_.valid()) ops::Copy(run.ops(), sum, o);
      continue;
    }
    const Step work = StepWith(frame, ring.Before(step));
    if (!work.any) continue;
    ops::Attention(run.ops(), part, frame.Value(part_lse_), in.q, keys.k, keys.v, work.shape);
    ops::AttentionMerge(run.ops(), sum, lse, part, frame.Value(part_lse_), work.shape.cu_q,
                        work.shape.len_q);
  }
  if (sum_o_.valid()) ops::Copy(run.ops(), o, sum);
}

void RingAttentionLayer::AttendBackward(Run& run, Frame& frame, const Parts& in,
                                        const Parts& gradient) const {
  if (frame.tokens.ring_size == 1) {
    return LocalAttentionLayer::AttendBackward(run, frame, in, gradient);
  }
  if (!Ready(run, frame)) return;
  const RingViews& ring = *frame.tokens.ring;
  ContextAxis& axis = *run.context_axis();
  Stream& stream = *run.ops().stream;
  const int size = ring.size();
  const auto place = [&](int step) -> const RingViews::Place& {
    return ring.places[static_cast<size_t>(ring.Before(step))];
  };
  const int next = place(size - 1).rank, previous = place(1).rank;
  const auto keys_of = [&](int step) {
    return KeysAt(frame, keys_again_[static_cast<size_t>(step % 2)], place(step));
  };
  // Gradients of those keys; of step `size`, which is this place again, when they come home.
  const auto gradients_of = [&](int step) {
    return KeysAt(frame, key_gradients_[static_cast<size_t>(step % 2)], place(step));
  };
  const Tensor o = frame.Value(o_).Heads(options_.heads), lse = frame.Value(lse_);
  const Tensor d_o = frame.Grad(o_).Heads(options_.heads), delta = frame.Value(delta_);
  const Tensor sum_q = sum_q_.valid() ? frame.Value(sum_q_).Heads(options_.heads) : gradient.q;
  const Tensor part_q = frame.Value(part_q_).Heads(options_.heads);

  const Keys own = keys_of(0);
  ops::Copy(run.ops(), own.k, in.k);
  ops::Copy(run.ops(), own.v, in.v);
  Ticket keys_sent = 0, keys_received = 0, gradients_sent = 0, gradients_received = 0;
  for (int step = 0; step < size; ++step) {
    const Keys keys = keys_of(step);
    axis.Wait(stream, keys_received);
    axis.Wait(stream, keys_sent);
    axis.Wait(stream, gradients_sent);
    if (step + 1 < size) {
      keys_sent = axis.Send(stream, keys.both, next, again_label_);
      keys_received = axis.Receive(stream, keys_of(step + 1).both, previous, again_label_);
    }
    if (step >= 2) {  // what the step before has added to, and what this one will add to
      gradients_sent = axis.Send(stream, gradients_of(step - 1).both, next, gradients_label_);
      gradients_received =
          axis.Receive(stream, gradients_of(step).both, previous, gradients_label_);
    }
    if (step == 0) {
      ops::AttentionBackward(run.ops(), gradient.q, gradient.k, gradient.v, delta, d_o, o, lse,
                             in.q, in.k, in.v, Shape(frame));
      if (sum_q_.valid()) ops::Copy(run.ops(), sum_q, gradient.q);
      continue;
    }
    const Step work = StepWith(frame, ring.Before(step));
    const Keys part = KeysAt(frame, part_keys_, place(step));
    if (work.any) {
      ops::AttentionBackward(run.ops(), part_q, part.k, part.v, delta, d_o, o, lse, in.q, keys.k,
                             keys.v, work.shape);
      ops::AddRows(run.ops(), sum_q, part_q, work.shape.cu_q, work.shape.len_q);
    }
    const Keys sum = gradients_of(step);
    if (step == 1) {
      ops::Zero(run.ops(), sum.both);
    } else {
      axis.Wait(stream, gradients_received);
    }
    if (work.any) {
      ops::AddRows(run.ops(), sum.both, part.both, work.shape.cu_k, work.shape.len_k);
    }
  }
  axis.Wait(stream, gradients_sent);
  const Keys home = gradients_of(size);
  gradients_sent = axis.Send(stream, gradients_of(size - 1).both, next, gradients_label_);
  gradients_received = axis.Receive(stream, home.both, previous, gradients_label_);
  if (sum_q_.valid()) ops::Copy(run.ops(), gradient.q, sum_q);
  axis.Wait(stream, gradients_received);
  ops::Add(run.ops(), gradient.k, home.k);
  ops::Add(run.ops(), gradient.v, home.v);
  axis.Wait(stream, gradients_sent);
}

}  // namespace stretto::internal
