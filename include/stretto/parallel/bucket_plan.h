// When buckets of gradients and parameters are there in full on a rank that keeps shards of them
// alone (ZeRO-2 and ZeRO-3; Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training
// Trillion Parameter Models", 2020, section 5): plain data from a graph and its action lists.
#ifndef STRETTO_PARALLEL_BUCKET_PLAN_H_
#define STRETTO_PARALLEL_BUCKET_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "stretto/model/graph.h"

namespace stretto {

// A time, in actions of a list, for which a bucket has a place in the buffers.
struct BucketStay {
  int bucket = 0;
  bool gradients = false;   // or parameters
  int first = 0, last = 0;  // actions that read the parameters, or write the gradients
  // Actions during which the place is taken, both included; a stay that begins at the end of a list
  // for the next micro-batch, or ends in it, has a second span.
  struct Span {
    int first = 0, last = -1;
    bool empty() const { return last < first; }
  };
  Span spans[2];
  int64_t offset = 0, bytes = 0;  // the same for every micro-batch
};

enum class BucketEventKind : uint8_t {
  kCollect,  // wait for the sums, add this rank's rows to its shard; the place is free
  kGather,   // the all-gather into the place starts
  kOpen,     // gradients may be written to the place
  kUse,      // the parameters must have arrived
  kRelease,  // the place is free
  kReduce,   // the gradients are complete: their reduce-scatter starts
};
struct BucketEvent {
  BucketEventKind kind = BucketEventKind::kUse;
  int stay = 0;
  // A gather for the next micro-batch: not after the last one.
  bool ahead = false;
  bool operator==(const BucketEvent&) const = default;
};
const char* Name(BucketEventKind kind);

// What happens around the actions of a list, in this order at each of them.
struct BucketTimeline {
  std::vector<BucketStay> stays;
  std::vector<std::vector<BucketEvent>> before, after;  // by action
  int64_t bytes = 0;                                    // of the buffers
  // Collectives of a micro-batch by bucket.
  std::vector<int> gathers, reduces;
};

struct BucketPlanOptions {
  int zero = 1;  // 2: gradients are sharded, 3: parameters, too
  int ranks = 1;
  int64_t bucket_bytes = 25 << 20;
  // The training list is run in pieces, micro-batches in turn (a pipeline): nothing stays from
  // forward to backward, and with `halves`, where the weight halves at the end of the list are a
  // piece of their own, from backward's input half to them.
  bool pieces = false, halves = false;
};

struct BucketPlan {
  int zero = 1;  // what is sharded; 1 on one rank, whatever was asked for
  int ranks = 1;
  std::vector<std::vector<int>> buckets;  // parameters of each
  BucketTimeline training, evaluation;    // empty where nothing rotates
  int64_t buffer_bytes = 0;               // for either
};

// The plan of a rank, the same on all ranks that share the parameters.
//
// A bucket's parameters are gathered when the bucket before it in the list is first used, and
// released after their last use; where two or more other buckets are used in between, by another
// block than the bucket's own, they are released and gathered again (tied embeddings). Gradients
// have a place from the first action that writes them to the last; their reduce-scatter proceeds
// until the next bucket's starts. Where a micro-batch is run as a whole, the first bucket of the
// next one is gathered under the end of backward, and the last sums are collected under its
// forward.
BucketPlan PlanBuckets(const Graph& graph, const ActionList& training, const ActionList& evaluation,
                       const BucketPlanOptions& options);
// One timeline, for buckets as MakeBuckets gives them.
BucketTimeline PlanTimeline(const Graph& graph, const ActionList& list,
                            const std::vector<std::vector<int>>& buckets,
                            const BucketPlanOptions& options);

// With ZeRO-1: the layer with whose weight half, in a step's last micro-batch, the gradients of a
// bucket are complete. Buckets leave in their order all the same.
int ReadyLayer(const Graph& graph, const std::vector<int>& params);

// Bytes that a rank sends for one gather or reduce-scatter of these parameters.
int64_t CollectiveBytes(const Graph& graph, const std::vector<int>& params, int ranks, DType dtype);

// Bytes of a bucket's place: each parameter's rows, with the padding that `ranks` equal parts and
// Builder::PadRows ask for, aligned.
int64_t PlaceBytes(const Graph& graph, const std::vector<int>& params, int ranks, DType dtype);

// Bytes that a rank sends in a step of `micro_batches` micro-batches, for its parameters and for
// its gradients; numbers too large for 64 bits end at a quarter of the largest. With ZeRO-1
// gradients are reduced once a step, and with ZeRO-1 and 2 parameters gathered once.
struct BucketBytes {
  int64_t parameters = 0, gradients = 0;
};
BucketBytes SentBytes(const Graph& graph, const BucketPlan& plan, int64_t micro_batches);

// One line for each event: when, what, which bucket, where.
std::string Describe(const Graph& graph, const ActionList& list, const BucketTimeline& timeline);

}  // namespace stretto

#endif  // STRETTO_PARALLEL_BUCKET_PLAN_H_
