// The stages of a model that lie on one rank, as a program's actions run them.
#ifndef STRETTO_PARALLEL_STAGES_H_
#define STRETTO_PARALLEL_STAGES_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/data/batch.h"
#include "stretto/model/model.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/executor.h"
#include "stretto/parallel/pipeline.h"

namespace stretto {

// Transformer blocks of each stage: contiguous, at least one each, in the order of the model. The
// most expensive stage is as cheap as can be when a block costs `block`, and the first and the last
// stage `first` and `last` on top (embedding; head and loss). INVALID_ARGUMENT when there are more
// stages than blocks.
absl::StatusOr<std::vector<int64_t>> CutBlocks(int64_t blocks, int stages, double block,
                                               double first, double last);

// Where the parts of an action list begin that a program runs apart: forward, then backward, whose
// weight halves may come last.
struct ListParts {
  size_t forward_end = 0, weights_begin = 0, end = 0;
  // [first, end) of what a stage does.
  std::pair<size_t, size_t> Of(StageWork work) const;
};
ListParts PartsOf(const ActionList& list);

// Room for the micro-batches in flight on one stage: `frames` frames (FramesInFlight) of
// `frame_bytes` bytes each, one behind the other, on the stream's device.
struct StageMemory {
  int stage = 0;  // in the program
  std::byte* memory = nullptr;
  int64_t frame_bytes = 0;
  int frames = 1;
};

// Forward first, then backward (TrainingActions, EvaluationActions), and a frame for them.
struct StageList {
  const ActionList* actions = nullptr;
  const FrameLayout* layout = nullptr;
};

// What one stage runs with. The objects outlive the worker.
struct StageParts {
  const Graph* graph = nullptr;  // of this part of the model
  StageList list;                // weight halves last where the program runs them apart
  // Optional: for micro-batches whose backward the program runs as a whole, each W close to its B.
  // They have frames of their own in the same memory: where W come last, their scratch may lie
  // where a value lay that B has read by then. With ZeRO-1 alone: the buckets of ZeRO-2 and 3 come
  // and go by the actions of one list.
  StageList whole;
  Run* run = nullptr;
  DataParallel* parameters = nullptr;  // null: no hooks
  bool local = false;                  // hooks that exchange nothing (DataParallel::local_hooks)
};

// Keeps the activations of the micro-batches in flight, each in a frame of its own.
class ModelStages : public StageWorker {
 public:
  static absl::StatusOr<std::unique_ptr<ModelStages>> Create(Stream& stream,
                                                             const std::vector<StageMemory>& stages,
                                                             int64_t token_capacity, Budget& budget,
                                                             const RingCapacity& rings = {});
  ~ModelStages() override;

  // What the stages run from now on, in their order; between programs only. INVALID_ARGUMENT when a
  // frame does not fit its memory, or when a stage has two lists with ZeRO-2 or 3.
  absl::Status Use(const std::vector<StageParts>& parts);
  // What the items of the next program are: batches[first + i] is this rank's share of item i. They
  // stay as they are until the work is done. Items behind the last batch, and those whose batch has
  // no documents, are empty: other ranks have something there, and the stages follow their hooks.
  // (A share of documents of which this rank has no token is not empty: it is in their ring.) With
  // `more` the step goes on with another program, so gradients do not leave yet.
  void SetBatches(const RankProgram& program, std::span<const PackedBatch> batches,
                  size_t first = 0, bool more = false);
  // One of the feeders, for whoever runs a frame of the first stage by hand between programs.
  TokenFeeder& feeder();
  // Optional, for the stream that the worker was made with.
  void SetReplays(ReplayCache* replays) { replays_ = replays; }

  int64_t Tokens(int item) const override;
  bool Empty(int item) const override {
    return first_ + static_cast<size_t>(item) >= batches_.size() || BatchOf(item).sequences() == 0;
  }
  int64_t MicroBatch(int item) const override { return static_cast<int64_t>(first_) + item; }
  absl::Status Run(const ProgramAction& action, Tensor in, Tensor out) override;

 private:
  struct Slot;
  struct Stage;
  explicit ModelStages(Stream& stream);
  absl::StatusOr<Slot*> SlotOf(Stage& stage, int item);

  Stream& stream_;
  std::vector<Stage> stages_;
  const PackedBatch& BatchOf(int item) const {
    return batches_[first_ + static_cast<size_t>(item)];
  }
  std::span<const PackedBatch> batches_;
  size_t first_ = 0;
  bool more_ = false;
  ReplayCache* replays_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_PARALLEL_STAGES_H_
