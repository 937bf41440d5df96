// Which ranks work on which documents of a batch: hybrid data parallelism (ByteScale, arXiv
// 2502.21231). Data and context parallelism are one axis of ranks; each document gets as many of
// them as it needs, and all get as much to do.
#ifndef STRETTO_PLAN_SEQUENCE_PLAN_H_
#define STRETTO_PLAN_SEQUENCE_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"
#include "stretto/plan/program.h"
#include "stretto/plan/sequence_cost.h"

namespace stretto {

enum class SequenceMethod : uint8_t {
  // What a fixed mesh does: the pipelines form groups of `context` neighbours. Documents are packed
  // up to context * capacity tokens, every pack is shared by one group, and the groups take packs
  // in turn.
  kStatic,
  // Each document has the fewest ranks that have room for it and are done within the step, short
  // ones are packed for one rank; pipelines take them in the order of the batch (ByteScale,
  // algorithm 1).
  kUnbalanced,
  // The longest ones first, each to the ranks that end first, with as many ranks as make the step
  // short; then short documents fill up what ranks have left.
  //
  // On few pipelines a fixed mesh is taken where that is better.
  kBalanced,
  // The same where each pipeline has several stages: as a micro-batch that lasts longer than its
  // neighbours makes all stages wait, long and short ones go to different pipelines.
  kBalancedPipelines,
};
// "static", "unbalanced", "balanced", "balanced-pipelines".
const char* Name(SequenceMethod method);
absl::StatusOr<SequenceMethod> ParseSequenceMethod(const std::string& name);

struct SequencePlanOptions {
  int pipelines = 1;     // places along the data axis
  int stages = 1;        // of each pipeline
  int64_t capacity = 0;  // tokens of a rank in a micro-batch
  SequenceMethod method = SequenceMethod::kBalanced;
  int context = 1;  // ranks of each ring with kStatic; divides `pipelines`
  // kUnbalanced: ranks from memory alone, as ByteScale's equation 3 has it, even where a document
  // then takes longer than all others together.
  bool ranks_from_memory = false;
  // With the balanced methods: ranks times documents of an item that several of both share, at
  // most.
  int64_t most_shares = int64_t{1} << 16;
  // Pipelines with neighbouring numbers whose ranks lie on one machine.
  int pipelines_per_machine = 1;
  SequenceCost cost;
  SequenceMemory memory;
};

struct SequencePlan {
  SequencePlanOptions options;
  // In the one order of the step (contract 4), with levels. Every document of the batch is in one
  // item; `documents` are its indices.
  std::vector<PlanItem> items;
  std::vector<double> item_seconds;  // of forward and backward in one stage, on each rank of it

  // By pipeline: what its items take in one stage, without waiting.
  std::vector<double> pipeline_seconds;
  // Until the last rank is done, when they run as the executor does: 1F1B over levels. Of the
  // program's actions, without what comes once a step.
  double makespan = 0;
  // Of pipeline_seconds.
  double mean = 0;
  // No plan of this batch in which each document of several ranks has a ring of its own is shorter:
  // each document has to come through all stages, on as many ranks as that takes, and all of them
  // together have no more than all ranks' time.
  double lower_bound = 0;

  int levels = 0;
  int64_t max_tokens = 0;  // that a rank has in an item; above `capacity` only where some wait in
                           // host memory
  int64_t ring_bytes = 0;  // that all ranks send in rings
  int max_peers = 0;       // most pipelines that one pipeline sends to

  // The tokens of an item that the rank with this place in the ring has.
  static int64_t TokensOf(const PlanItem& item, int place);
  // 64 bits of `items`.
  uint64_t Hash() const;
  // A few lines: sizes, times, and how they compare with the bound.
  std::string Describe() const;
};

// The plan of a batch of documents with these lengths. Pure: the same on every machine. Documents
// and pipelines of an item ascend.
// INVALID_ARGUMENT when an option or a length is out of bounds, or a document is too long for all
// ranks together: names it and what to do.
absl::StatusOr<SequencePlan> PlanSequences(const std::vector<int64_t>& lengths,
                                           const SequencePlanOptions& options);

}  // namespace stretto

#endif  // STRETTO_PLAN_SEQUENCE_PLAN_H_
