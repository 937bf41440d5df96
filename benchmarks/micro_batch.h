// The configured model on one rank with made-up tokens, for timing its pieces.
#ifndef STRETTO_BENCHMARKS_MICRO_BATCH_H_
#define STRETTO_BENCHMARKS_MICRO_BATCH_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/stream.h"
#include "stretto/model/float8.h"
#include "stretto/ops/kernels.h"
#include "stretto/optim/optimizer.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/executor.h"
#include "stretto/train/config.h"
#include "stretto/train/memory.h"

namespace stretto::bench {

class MicroBatch {
 public:
  // `config` is resolved for one rank, `alone` a group of this rank only. The stream and the
  // communicator outlive this.
  static absl::StatusOr<std::unique_ptr<MicroBatch>> Create(const TrainConfig& config,
                                                            Communicator& comm, const Group& alone,
                                                            Stream& stream);

  // So many documents of `length` tokens each, at most those that the configuration has.
  absl::Status Fill(int64_t documents, int64_t length);
  // Lets libraries load and the backend choose by measuring; fills the batch as configured.
  absl::Status WarmUp();
  // Forward and backward, enqueued.
  void Step(ActionHooks* hooks = nullptr) { Execute(graph(), actions(), run(), frame(), hooks); }
  // Norm and optimizer of all parameters, enqueued.
  void Update();

  const RunPlan& plan() const { return plan_; }
  const Graph& graph() const { return plan_.stages.front().model.graph; }
  const ActionList& actions() const { return plan_.stages.front().train_actions; }
  Run& run() { return *run_; }
  Frame& frame() { return *frame_; }
  const Arena& memory() const { return memory_; }

 private:
  MicroBatch(const TrainConfig& config, Stream& stream) : config_(config), stream_(stream) {}

  TrainConfig config_;
  Stream& stream_;
  RunPlan plan_;
  const KernelTable* kernels_ = nullptr;
  Budget budget_{-1, -1, -1};
  std::unique_ptr<DataParallel> dp_;
  std::optional<Run> run_;
  std::unique_ptr<Float8State> float8_;
  std::unique_ptr<AdamW> adam_;
  Arena memory_, scalar_memory_;
  Tensor scalars_;
  std::unique_ptr<TokenFeeder> feeder_;
  PackedBatch batch_;
  std::optional<Frame> frame_;
};

}  // namespace stretto::bench

#endif  // STRETTO_BENCHMARKS_MICRO_BATCH_H_
