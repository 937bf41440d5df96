// The parts of PlanSequences: what a document needs, and where the balanced methods put it.
#ifndef STRETTO_PLAN_SEQUENCE_BALANCE_H_
#define STRETTO_PLAN_SEQUENCE_BALANCE_H_

#include <cstdint>
#include <vector>

#include "stretto/plan/sequence_plan.h"

namespace stretto {

// A micro-batch and where it runs. Times are nanoseconds.
struct PlacedItem {
  std::vector<int64_t> documents;  // indices
  SequenceClock::Load load;
  int first = 0;  // the ring is [first, first + ranks), past the last pipeline from 0 on again
  int ranks = 1;
  int offload = 0;  // of SequenceRoom::kParts
  int64_t nanoseconds = 0, start = 0;
};

// How many ranks a document needs to fit.
class SequenceRoom {
 public:
  static constexpr int kParts = 64;  // offload ratios are multiples of 1 / 64

  SequenceRoom(const SequencePlanOptions& options, const SequenceClock& clock);

  // The most tokens that a rank of a ring of so many has of a document: L / D, rounded up.
  static int64_t LargestPart(int64_t length, int64_t ranks);
  // The fewest ranks that have room, with as much in host memory as copies can be hidden; may be
  // more than there are.
  int64_t FewestRanks(int64_t length) const;
  // The least that must wait in host memory with so many ranks, or -1 when they have no room.
  int Offload(int64_t length, int64_t ranks) const;
  // Of a rank in any item.
  int64_t most_tokens() const { return most_tokens_.back(); }

 private:
  int64_t RanksFor(int64_t length, int64_t most_tokens) const;
  int HiddenOffload(int64_t length) const;
  int64_t MostTokens(int offload) const { return most_tokens_[static_cast<size_t>(offload)]; }

  const SequenceClock& clock_;
  SequenceMemory memory_;
  int64_t pipelines_;
  std::vector<int64_t> most_tokens_;  // of a rank, by offload ratio
};

// The fewest ranks that have room for the document and are done within `longest` nanoseconds in one
// stage, or those that are done first.
int64_t RanksWithin(int64_t length, int64_t longest, const SequencePlanOptions& options,
                    const SequenceClock& clock, const SequenceRoom& room);

// Whether a ring reaches over machines.
bool OverNetwork(const SequencePlanOptions& options, int first, int64_t ranks);

// Packs these documents (indices) into micro-batches of at most `capacity` tokens, the longest
// first, each into the fullest one that has room.
std::vector<std::vector<int64_t>> PackBestFit(const std::vector<int64_t>& lengths,
                                              std::vector<int64_t> which, int64_t capacity);

// Nanoseconds of items in this order, as the executor runs them: 1F1B over their levels, where a
// ring starts when all its ranks have come to it.
int64_t MakespanOf(const std::vector<PlacedItem>& items, const SequencePlanOptions& options,
                   const SequenceClock& clock);

// No plan takes less, in nanoseconds (SequencePlan::lower_bound).
int64_t BoundOfPlans(const std::vector<int64_t>& lengths, const SequencePlanOptions& options,
                     const SequenceClock& clock, const SequenceRoom& room);

// With kBalanced and kBalancedPipelines, in the order of the step. `lower_bound` in nanoseconds.
std::vector<PlacedItem> PlaceBalanced(const std::vector<int64_t>& lengths,
                                      const SequencePlanOptions& options,
                                      const SequenceClock& clock, const SequenceRoom& room,
                                      int64_t lower_bound);

}  // namespace stretto

#endif  // STRETTO_PLAN_SEQUENCE_BALANCE_H_
