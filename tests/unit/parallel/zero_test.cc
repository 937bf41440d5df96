// What DataParallel does with shards outside of a step: hooks that exchange nothing, parameters in
// full, errors by name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "stretto/parallel/bucket_plan.h"
#include "stretto/parallel/data_parallel.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

// A rank with a model and storage for it.
struct Rank {
  Model model;
  ActionList training, evaluation;
  FrameLayout layout, evaluation_layout;
  BucketPlan buckets;
  std::unique_ptr<Stream> stream;
  std::unique_ptr<Communicator> comm;
  std::unique_ptr<DataParallel> dp;
  std::unique_ptr<Run> run, evaluation_run;
  double totals[4] = {};
  std::vector<std::byte> memory;

  absl::Status Create(World& world, int zero) {
    ModelConfig config = testing::OddModel("gpt2", true);
    STRETTO_RETURN_IF_ERROR(config.Resolve());
    STRETTO_ASSIGN_OR_RETURN(model, BuildModel(config, {.dtype = DType::kF64}));
    training = TrainingActions(model.graph, Recompute::kBlock);
    evaluation = EvaluationActions(model.graph);
    STRETTO_ASSIGN_OR_RETURN(layout, PlanFrame(model.graph, training, 20));
    STRETTO_ASSIGN_OR_RETURN(evaluation_layout, PlanFrame(model.graph, evaluation, 20));
    buckets = PlanBuckets(model.graph, training, evaluation,
                          {.zero = zero, .ranks = world.size(), .bucket_bytes = 2000});
    STRETTO_ASSIGN_OR_RETURN(stream, Stream::Create(Device::Cpu()));
    STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(Device::Cpu()));
    comm = std::make_unique<Communicator>(world);
    Budget budget(-1, -1, -1);
    STRETTO_ASSIGN_OR_RETURN(
        dp, DataParallel::Create(*comm, comm->all(), model.graph, *stream, *kernels, 3, budget,
                                 {.buckets = &buckets, .poison = true}));
    run = std::make_unique<Run>(ops::Context{stream.get(), kernels});
    evaluation_run = std::make_unique<Run>(ops::Context{stream.get(), kernels});
    dp->Attach(run.get(), Tensor::Of(totals, DType::kF64, {2}));
    dp->Attach(evaluation_run.get(), Tensor::Of(totals + 2, DType::kF64, {2}));
    memory.resize(static_cast<size_t>(std::max(layout.bytes(), evaluation_layout.bytes())));
    return absl::OkStatus();
  }
  void Execute(const ActionList& list, const PackedBatch& batch, ActionHooks* hooks) {
    Frame frame(&model.graph, &list, list.training ? &layout : &evaluation_layout, memory.data());
    frame.tokens = ViewsOf(batch);
    stretto::Execute(model.graph, list, list.training ? *run : *evaluation_run, frame, hooks);
  }
};

// One rank tries its kernels out while the others wait; the step that follows knows nothing of it.
TEST(LocalHooks, LeaveNothingBehind) {
  for (const int zero : {2, 3}) {
    std::vector<std::vector<double>> gradients[2];
    for (const bool before : {false, true}) {
      gradients[before].resize(2);
      const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
        Rank rank;
        STRETTO_RETURN_IF_ERROR(rank.Create(world, zero));
        const PackedBatch batch =
            testing::RandomBatch({7, 4}, 53, 5 + static_cast<uint64_t>(world.rank()));
        STRETTO_RETURN_IF_ERROR(rank.dp->GatherParameters());
        if (before && world.rank() == 1) {
          for (int i = 0; i < 2; ++i) {
            rank.run->BeginStep();
            rank.Execute(rank.training, batch, rank.dp->local_hooks(*rank.run, true));
            rank.Execute(rank.evaluation, batch, rank.dp->local_hooks(*rank.evaluation_run, false));
          }
          STRETTO_RETURN_IF_ERROR(rank.stream->Synchronize());
        } else if (before) {
          rank.dp->local_hooks(*rank.run, true);  // all ranks do the same, one after the other
        }
        for (const bool last : {false, true}) {
          if (!last) rank.dp->BeginStep(*rank.run);
          rank.Execute(rank.training, batch, &rank.dp->hooks(last));
        }
        STRETTO_RETURN_IF_ERROR(rank.dp->FinishGradients(*rank.run));
        STRETTO_RETURN_IF_ERROR(rank.stream->Synchronize());
        for (const ParameterShard& shard : rank.dp->shards()) {
          for (int64_t i = 0; i < shard.grad.elements(); ++i) {
            gradients[before][static_cast<size_t>(world.rank())].push_back(
                testing::Get(shard.grad, i));
          }
        }
        return world.Barrier("done");
      });
      ASSERT_TRUE(status.ok()) << status.message();
    }
    EXPECT_FALSE(gradients[0][0].empty());
    EXPECT_EQ(gradients[0], gradients[1]);
  }
}

TEST(CompleteParameter, IsTheInitialValueOnEveryRank) {
  for (const int zero : {1, 2, 3}) {
    const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
      Rank rank;
      STRETTO_RETURN_IF_ERROR(rank.Create(world, zero));
      for (size_t p = 0; p < rank.model.graph.parameters.size(); ++p) {
        const ParameterInfo& info = rank.model.graph.parameters[p];
        STRETTO_ASSIGN_OR_RETURN(const Tensor value,
                                 rank.dp->CompleteParameter({static_cast<int>(p)}));
        std::vector<double> expected(static_cast<size_t>(info.elements()));
        Tensor t = value;
        t.data = reinterpret_cast<std::byte*>(expected.data());
        InitialValues(info.spec, 3, 0, t);
        for (int64_t i = 0; i < value.elements(); ++i) {
          if (testing::Get(value, i) != expected[static_cast<size_t>(i)]) {
            return absl::InternalError(info.spec.name + " differs");
          }
        }
      }
      return world.Barrier("done");
    });
    EXPECT_TRUE(status.ok()) << status.message();
  }
}

TEST(DataParallelZero, NamesWhatDoesNotFit) {
  // Without hooks no layer has its parameters.
  absl::Status status = World::RunThreads(2, [](World& world) -> absl::Status {
    Rank rank;
    STRETTO_RETURN_IF_ERROR(rank.Create(world, 3));
    rank.Execute(rank.evaluation, testing::RandomBatch({5}, 53, 1), nullptr);
    return rank.stream->Synchronize();
  });
  EXPECT_THAT(std::string(status.message()), HasSubstr("table"));
  // A plan for another number of ranks.
  status = World::RunThreads(2, [](World& world) -> absl::Status {
    Rank rank;
    STRETTO_RETURN_IF_ERROR(rank.Create(world, 3));
    rank.buckets.ranks = 4;
    Budget budget(-1, -1, -1);
    STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(Device::Cpu()));
    return DataParallel::Create(*rank.comm, rank.comm->all(), rank.model.graph, *rank.stream,
                                *kernels, 3, budget, {.buckets = &rank.buckets})
        .status();
  });
  EXPECT_THAT(std::string(status.message()), HasSubstr("for 4 ranks, and group all has 2"));
}

}  // namespace
}  // namespace stretto
