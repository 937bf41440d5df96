// Runs a plan's actions on one frame.
#ifndef STRETTO_PARALLEL_EXECUTOR_H_
#define STRETTO_PARALLEL_EXECUTOR_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

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
  // Forward begins, or backward (recomputation counts as backward).
  virtual void BeginPass(bool /*backward*/) {}
  // Whether Before or After have something to do at the action with this index in its list now.
  // They are not called where they have not, and what lies between may be enqueued as one piece.
  virtual bool ActsBefore(size_t /*index*/, const Action& /*action*/) const { return true; }
  virtual bool ActsAfter(size_t /*index*/, const Action& /*action*/) const { return true; }
  virtual void Before(size_t /*index*/, const Action& /*action*/) {}
  virtual void After(size_t /*index*/, const Action& /*action*/) {}
  virtual void BetweenActions() {}
};

// Views of a host batch for a frame on the CPU: nothing is copied, so the batch must stay as it is
// until the frame's work is done. Without TokenViews::ring, which a TokenFeeder makes.
TokenViews ViewsOf(const PackedBatch& batch);

// The largest micro-batches that ranks share.
struct RingCapacity {
  int ranks = 1;       // in a ring
  int64_t shares = 0;  // ranks times documents of a micro-batch
};

// Brings batches to the stream's device. On the CPU tokens are not copied. On another device a
// batch passes through page-locked memory, two batches deep, so that the host prepares the next one
// while the device works.
class TokenFeeder {
 public:
  // For batches of up to `token_capacity` tokens on each rank.
  static absl::StatusOr<std::unique_ptr<TokenFeeder>> Create(Stream& stream, int64_t token_capacity,
                                                             Budget& budget,
                                                             const RingCapacity& rings = {});
  // Bytes of the device's memory that Create takes for this capacity on this kind of device.
  static int64_t DeviceBytes(DeviceKind kind, int64_t token_capacity,
                             const RingCapacity& rings = {});

  // Views that work enqueued on the stream from now on may read, until the next call's. On the CPU
  // the batch must stay as it is until then, elsewhere only during the call. INVALID_ARGUMENT when
  // the batch is larger than the capacity, or contradicts itself about who has which tokens.
  absl::StatusOr<TokenViews> Feed(const PackedBatch& batch);

 private:
  TokenFeeder(Stream& stream, int64_t capacity, const RingCapacity& rings);
  static constexpr int kSlots = 2;
  // Whether the batch fits, also the shares of the others.
  absl::Status Check(const PackedBatch& batch) const;
  // Writes where all shares lie to `host`, which work on the stream finds at `device`; returns the
  // bytes.
  int64_t DescribeRing(const PackedBatch& batch, std::byte* host, std::byte* device);

  Stream& stream_;
  int64_t capacity_;
  RingCapacity rings_;
  RingViews ring_;  // of the batch
  Arena device_;
  Arena host_;
  Event copied_[kSlots];
  int next_ = 0;
};

// Pieces of work that a device has captured (Stream::BeginCapture), to be launched again whenever
// the same actions run in the same place on as many tokens and documents: then the host enqueues
// one thing instead of hundreds. What is met for the first time runs as always, and is captured
// when it comes back; so batches that never look alike cost nothing but the look.
class ReplayCache {
 public:
  // The stream outlives the cache.
  explicit ReplayCache(Stream& stream);
  ~ReplayCache();

  // Enqueues actions [first, end) of `list`, by `enqueue` or by what that did before. `enqueue`
  // must do nothing but enqueue work on the stream.
  void Run(const ActionList& list, size_t first, size_t end, stretto::Run& run, const Frame& frame,
           const std::function<void()>& enqueue);
  // Pieces captured and launched so far.
  int64_t captured() const { return captured_; }
  int64_t launched() const { return launched_; }

 private:
  struct Piece;
  Piece* Find(std::vector<Piece>& pieces, const Piece& wanted);

  Stream& stream_;
  std::unique_ptr<Piece> wanted_;
  std::vector<Piece> seen_;    // once, the oldest is overwritten
  std::vector<Piece> pieces_;  // captured
  uint64_t clock_ = 0;
  int64_t captured_ = 0, launched_ = 0;
};

// Enqueues the whole list in order. `frame` must have been planned for these actions. Errors are
// sticky on the run's stream. `replays` belongs to the same stream.
void Execute(const Graph& graph, const ActionList& list, Run& run, Frame& frame,
             ActionHooks* hooks = nullptr, ReplayCache* replays = nullptr);
// The same for actions [first, end) of the list.
void ExecuteSome(const Graph& graph, const ActionList& list, size_t first, size_t end, Run& run,
                 Frame& frame, ActionHooks* hooks = nullptr, ReplayCache* replays = nullptr);
// Calls the hooks of actions [first, end) in the same order without running a layer: for a rank
// that has no micro-batch where others have one, and takes part in what they exchange.
void FollowHooks(const ActionList& list, size_t first, size_t end, ActionHooks& hooks);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_EXECUTOR_H_
