// Attention of documents that ranks share: the layer of ContextStrategies.
#ifndef STRETTO_SRC_PARALLEL_RING_ATTENTION_H_
#define STRETTO_SRC_PARALLEL_RING_ATTENTION_H_

#include <array>
#include <cstdint>
#include <string>

#include "src/model/layers.h"
#include "stretto/parallel/context.h"

namespace stretto::internal {

// As LocalAttentionLayer where one rank has the documents, to the bit. Where D ranks share them,
// place i of the ring computes in D steps: first its own keys, then, in step s, those of place
// j = i - s, which place i - 1 has had in the step before, while those of the next step arrive. Of
// a document, whose parts are in the order 0 .. 2 D - 1, place i has part i in front and part 2 D -
// 1 - i in the back. So of a place j < i all queries see the front and none the back; for j > i the
// back's queries see all and the front's none; in neither case is there a mask, and each step has
// as much to do.
//
// In backward the keys travel again, with the final log-sum-exp and output, so that each step gives
// its share of the gradients. Those of keys follow the keys: they begin at the place behind the
// owner, gather a share at each place, in the order of the ring, and come home after D - 1 hops,
// where the owner's own share is added.
class RingAttentionLayer : public LocalAttentionLayer {
 public:
  using LocalAttentionLayer::LocalAttentionLayer;
  const char* kind() const override {
    return options_.qk_norm ? "ring_attention_qk_norm" : "ring_attention";
  }
  absl::Status Declare(Builder& b) override;
  bool Communicates(ActionKind kind, const Frame& frame) const override {
    return frame.tokens.ring_size > 1 && kind != ActionKind::kBackwardWeight;
  }

 protected:
  void Attend(Run& run, Frame& frame, const Parts& in) const override;
  void AttendBackward(Run& run, Frame& frame, const Parts& in,
                      const Parts& gradient) const override;

 private:
  // Keys and values, or gradients of them, of all tokens of a place: [tokens, kv_heads, head_dim]
  // each, and both as they travel.
  struct Keys {
    Tensor both, k, v;
  };
  Keys KeysAt(const Frame& frame, SlotId slot, const RingViews::Place& place) const;
  // What a step other than the first computes.
  struct Step {
    AttentionShape shape;
    bool any = false;  // there are queries and keys
  };
  Step StepWith(const Frame& frame, int place) const;
  // The run's axis and the frame's ring; false after having failed the stream without them.
  bool Ready(const Run& run, const Frame& frame) const;

  std::array<SlotId, 2> keys_;           // that arrive and that are used, in turn
  SlotId part_o_, part_lse_, sum_o_;     // of one step; of all steps, for bf16
  std::array<SlotId, 2> keys_again_;     // in backward
  std::array<SlotId, 2> key_gradients_;  // of the same, as they travel
  SlotId part_keys_, part_q_, sum_q_;    // gradients of one step; of all steps, for bf16
  std::string keys_label_, again_label_, gradients_label_;
};

}  // namespace stretto::internal

#endif  // STRETTO_SRC_PARALLEL_RING_ATTENTION_H_
