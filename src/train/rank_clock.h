// One rank's step on a virtual clock: when its stream has come to what, and its collectives.
#ifndef STRETTO_SRC_TRAIN_RANK_CLOCK_H_
#define STRETTO_SRC_TRAIN_RANK_CLOCK_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "stretto/model/graph.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/stages.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/program.h"
#include "stretto/train/config.h"
#include "stretto/train/memory.h"

namespace stretto::train_internal {

// What travels between the ranks of a layout, and over which links.
struct Links {
  int dp = 1, tp = 1, world = 1;
  int64_t pieces = 1;  // of the tokens, on the tensor axis
  const LinkCost *data = nullptr, *tensor = nullptr, *pipeline = nullptr, *all = nullptr;
  double hidden = 0;
};

// Seconds of what a stage does, on a full micro-batch and on the step's last one.
struct StageSeconds {
  const StagePlan* plan = nullptr;
  // Of one list of actions.
  struct Sizes {
    std::vector<double> layer, exchange;  // by action
  };
  struct List {
    const ActionList* actions = nullptr;
    ListParts parts;
    Sizes full, rest;
    // By layer: whether its sum of inputs' gradients is waited for in an action of its own.
    std::vector<uint8_t> finishes_apart;
  };
  List list;
  std::optional<List> whole;  // StageParts::whole
  // Of one collective, by bucket.
  std::vector<double> reduce, gather;
  // Without rotating buffers (ZeRO-1 gradients, ZeRO-1 and 2 parameters).
  std::vector<int> ready_layer;                 // by bucket
  std::vector<std::vector<int>> layer_buckets;  // by layer
  double partial = 0;                           // of the sums of partial gradients
  double update = 0;                            // of the optimizer
};

// The clock of one rank: when its stream has come to what, and its collectives. The methods have
// the names of what the trainer does there (DataParallel, BucketBuffers).
class RankClock {
 public:
  RankClock(const TrainConfig& config, const Links& links, std::vector<StageSeconds> stages);

  // Before each program: `items` micro-batches from number `first` of `count`.
  void Begin(const Program& program, int rank, size_t first, size_t count, double offset);

  double Run(const ProgramAction& action, double start);

  // What is left of the step's gradients, from `start` on; returns when it is done.
  double FinishGradients(double start);

  // Without prefetching the gathers end the step, from `start` on; returns when they are done.
  double GatherAtEnd(double start);

  // What the rank's time has gone into so far.
  struct Totals {
    double compute = 0, tensor = 0, data = 0;
  };
  Totals totals() const { return {compute_, tensor_, data_}; }
  // Lets `count` micro-batches pass that are like the last one, which took `seconds` and before
  // which the totals were `before`.
  void Repeat(const Totals& before, double seconds, double count);
  // How far what is on its way reaches beyond `end`. With the same a micro-batch later the clock is
  // in a steady state: from there on all are alike.
  std::vector<double> Ahead(double end);

  double compute() const { return compute_; }
  double tensor() const { return tensor_; }
  double data() const { return data_; }
  double update() const {
    double seconds = 0;
    for (const Stage& stage : stages_) seconds += stage.seconds.update;
    return seconds;
  }

 private:
  struct Stay {
    bool submitted = false;
    double finish = 0;  // 0: nothing is on its way
  };
  struct Stage {
    StageSeconds seconds;
    std::vector<StageWork> works;
    size_t next = 0;
    std::vector<uint8_t> apart;  // by item
    int backwards_left = 0;
    std::vector<double> reduced, gathered;  // by bucket, when: 0: nothing is on its way
    // By layer: when what other ranks send is there (TrainingActions).
    std::vector<double> input, summed, weight;
    size_t submitted = 0;  // buckets whose reduce-scatter has been submitted
    std::vector<Stay> stays;
  };
  static bool EndsBackward(StageWork work) {
    return work == StageWork::kBackward || work == StageWork::kBackwardWeight;
  }

  // All points in time that are kept from one action to the next.
  template <class F>
  void ForTimes(const F& f) {
    f(channel_);
    f(tensor_channel_);
    for (Stage& stage : stages_) {
      for (auto* times :
           {&stage.reduced, &stage.gathered, &stage.input, &stage.summed, &stage.weight}) {
        for (double& t : *times) f(t);
      }
      for (Stay& stay : stage.stays) f(stay.finish);
    }
  }

  // The collectives of a rank follow each other beside its computation, which they hold up by the
  // part that is not hidden.
  double Submit(double seconds, double* held_up);
  void WaitFor(double* finish) { WaitFor(finish, &data_); }
  void WaitFor(double* finish, double* exposed);

  // An action of a layer with what it exchanges over the tensor axis, which takes `exchange`
  // seconds of its own. What starts and ends apart is held up by computation as little as other
  // collectives are; the rest is waited for, piece by piece.
  void Layer(Stage& stage, const Action& action, bool finishes_apart, double seconds,
             double exchange);

  void GatherParameters();
  void WaitParameters(Stage& stage);
  void FinishGradients(Stage& stage);
  void SubmitReduce(Stage& stage);
  void Gather(Stage& stage, int stay, double* held_up);
  void GatherFor(Stage& stage, size_t action, double* held_up);
  void Collect(Stay& stay);
  void Do(Stage& stage, const BucketEvent& event, bool last);

  void Run(Stage& stage, const ProgramAction& action);

  bool overlap_, prefetch_;
  int zero_;
  Links links_;
  std::vector<Stage> stages_;
  double offset_ = 0, now_ = 0;
  double debt_ = 0;     // by which the next action begins later
  double channel_ = 0;  // when the collectives submitted so far are done
  double tensor_channel_ = 0;
  size_t first_ = 0, count_ = 0;
  bool more_ = false;
  double compute_ = 0, tensor_ = 0, data_ = 0;
};

}  // namespace stretto::train_internal

#endif  // STRETTO_SRC_TRAIN_RANK_CLOCK_H_
