// Models cut into stages on several ranks against the whole model on one: loss and every gradient.
#include "stretto/parallel/stages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include "stretto/plan/program.h"
#include "tests/support/harness.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(CutBlocks, BalancesWhatTheEndsCost) {
  const auto cut = [](int64_t blocks, int stages, double first, double last) {
    return CutBlocks(blocks, stages, 1, first, last).value();
  };
  EXPECT_THAT(cut(8, 4, 0, 0), ElementsAre(2, 2, 2, 2));
  EXPECT_THAT(cut(7, 3, 0, 0), ElementsAre(3, 2, 2));
  EXPECT_THAT(cut(12, 4, 0, 3), ElementsAre(4, 4, 3, 1));
  EXPECT_THAT(cut(4, 4, 0, 100), ElementsAre(1, 1, 1, 1));
  EXPECT_THAT(cut(5, 1, 1, 1), ElementsAre(5));
  for (int64_t blocks = 1; blocks < 40; ++blocks) {
    for (int stages = 1; stages <= blocks && stages <= 9; ++stages) {
      const auto counts = cut(blocks, stages, 0.5, 2.25);
      EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), int64_t{0}), blocks);
      // No other cut is better: taking a block from the most expensive stage makes another as
      // expensive.
      const auto cost = [&](size_t s, int64_t n) {
        return static_cast<double>(n) + (s == 0 ? 0.5 : 0) + (s + 1 == counts.size() ? 2.25 : 0);
      };
      double most = 0;
      size_t where = 0;
      for (size_t s = 0; s < counts.size(); ++s) {
        if (counts[s] > 1 && cost(s, counts[s]) > most) most = cost(s, counts[s]), where = s;
      }
      for (size_t s = 0; most > 0 && s < counts.size(); ++s) {
        if (s == where) continue;
        EXPECT_GE(cost(s, counts[s] + 1), most);
      }
    }
  }
  EXPECT_THAT(std::string(CutBlocks(2, 3, 1, 0, 0).status().message()),
              HasSubstr("2 blocks cannot be cut into 3 stages"));
}

TEST(ModelPart, RefusesPartsThatCannotBe) {
  ModelConfig config = testing::OddModel("qwen3", false);
  ASSERT_TRUE(config.Resolve().ok());
  for (const ModelPart& part : {ModelPart{1, 1}, ModelPart{-1, 1}, ModelPart{0, 99}}) {
    EXPECT_FALSE(BuildModel(config, {.part = part}).ok());
  }
}

struct Layout {
  ScheduleKind kind = ScheduleKind::kOneF1B;
  int dp = 1, pp = 1, chunks = 1;
};

struct Outcome {
  absl::Status status;
  double loss = 0;
  std::map<std::string, std::vector<double>> gradients;
};

// One step; pipeline p has the micro-batches `batches[p]`.
Outcome Step(const ModelConfig& config, const Layout& layout, Recompute recompute, int64_t chunk,
             const std::vector<std::vector<PackedBatch>>& batches) {
  Outcome out;
  std::mutex mutex;
  const auto body = [&](World& world) -> absl::Status {
    const int pipeline = world.rank() / layout.pp, place = world.rank() % layout.pp;
    STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(Device::Cpu()));
    STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(Device::Cpu()));
    Communicator comm(world);
    RankList along, across;
    for (int i = 0; i < layout.pp; ++i) along.push_back(pipeline * layout.pp + i);
    for (int i = 0; i < layout.dp; ++i) across.push_back(i * layout.pp + place);
    STRETTO_ASSIGN_OR_RETURN(const Group pp, comm.MakeGroup("pp", along));
    STRETTO_ASSIGN_OR_RETURN(const Group dp, comm.MakeGroup("dp", across));
    const std::vector<PackedBatch>& mine = batches[static_cast<size_t>(pipeline)];
    std::vector<PlanItem> items;
    int64_t capacity = 1;
    for (const PackedBatch& b : mine) {
      items.push_back({.tokens = b.tokens(), .lengths = {b.tokens()}, .pipelines = {0}});
      capacity = std::max(capacity, b.tokens());
    }
    STRETTO_ASSIGN_OR_RETURN(const Program program,
                             MakeProgram(layout.kind, 1, layout.pp, layout.chunks, items));
    STRETTO_ASSIGN_OR_RETURN(
        const Schedule schedule,
        MakeSchedule(layout.kind, layout.pp, layout.chunks, static_cast<int>(mine.size())));
    const std::vector<int> in_flight = FramesInFlight(schedule);
    STRETTO_ASSIGN_OR_RETURN(const std::vector<int64_t> blocks,
                             CutBlocks(config.layers, program.stages, 1, 0, 0));

    Budget budget(-1, -1, -1);
    double totals[2] = {};
    const Tensor total = Tensor::Of(totals, DType::kF64, {2});
    struct Stage {
      Model model;
      ActionList actions;
      FrameLayout frame;
      Arena memory;
      std::unique_ptr<DataParallel> parameters;
      std::unique_ptr<Run> run;
    };
    std::vector<std::unique_ptr<Stage>> stages;
    std::vector<StageParts> parts;
    std::vector<StageMemory> memory;
    ModelPart part;
    for (int s = 0; s < program.stages; ++s) {
      part.end_block = part.first_block + blocks[static_cast<size_t>(s)];
      if (program.place_of_stage[static_cast<size_t>(s)] == place) {
        auto stage = std::make_unique<Stage>();
        STRETTO_ASSIGN_OR_RETURN(
            stage->model,
            BuildModel(config, {.dtype = DType::kF64, .loss_chunk = chunk, .part = part}));
        stage->actions = TrainingActions(stage->model.graph, recompute, /*defer_weights=*/true);
        STRETTO_ASSIGN_OR_RETURN(stage->frame,
                                 PlanFrame(stage->model.graph, stage->actions, capacity));
        STRETTO_ASSIGN_OR_RETURN(
            stage->parameters, DataParallel::Create(comm, dp, stage->model.graph, *stream, *kernels,
                                                    5, budget, {.bucket_bytes = 1000}));
        stage->run = std::make_unique<Run>(ops::Context{stream.get(), kernels});
        stage->parameters->Attach(stage->run.get(), total);
        stage->parameters->BeginStep(*stage->run);
        parts.push_back({&stage->model.graph, &stage->actions, &stage->frame, stage->run.get(),
                         stage->parameters.get()});
        const int frames = std::max(1, in_flight[static_cast<size_t>(s)]);
        STRETTO_ASSIGN_OR_RETURN(
            stage->memory, Arena::Create(Device::Cpu(), "frames", frames * stage->frame.bytes()));
        memory.push_back({s, stage->memory.data(), stage->frame.bytes(), frames});
        stages.push_back(std::move(stage));
      }
      part.first_block = part.end_block;
    }
    STRETTO_ASSIGN_OR_RETURN(const auto worker,
                             ModelStages::Create(*stream, memory, capacity, budget));
    STRETTO_RETURN_IF_ERROR(worker->Use(parts));
    STRETTO_ASSIGN_OR_RETURN(
        const auto executor,
        PipelineExecutor::Create(comm, pp, *stream, BuffersOf(program, pp.index), capacity,
                                 config.hidden, DType::kF64, budget));
    const RankProgram rank_program(program, pp.index);
    worker->SetBatches(rank_program, mine);
    STRETTO_RETURN_IF_ERROR(executor->Run(rank_program, *worker));
    for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) {
      STRETTO_RETURN_IF_ERROR((*stage)->parameters->FinishGradients(*(*stage)->run));
    }
    STRETTO_RETURN_IF_ERROR(executor->Finish());
    STRETTO_RETURN_IF_ERROR(stream->Synchronize());
    {
      const std::lock_guard<std::mutex> lock(mutex);
      out.loss += totals[0];
      for (const auto& stage : stages) {
        for (const ParameterShard& shard : stage->parameters->shards()) {
          const ParameterInfo& info =
              stage->model.graph.parameters[static_cast<size_t>(shard.param.value)];
          std::vector<double>& sum = out.gradients[info.spec.name];
          sum.resize(static_cast<size_t>(info.elements()));
          // A tied table's two copies add up.
          for (int64_t i = 0; i < shard.grad.elements(); ++i) {
            sum[static_cast<size_t>(shard.first_row * info.columns() + i)] +=
                shard.grad.as<double>()[i];
          }
        }
      }
    }
    return world.Barrier("done");
  };
  out.status =
      World::RunThreads(layout.dp * layout.pp, body, {.timeout = std::chrono::seconds(60)});
  return out;
}

double LargestError(const Outcome& a, const Outcome& b) {
  double worst = std::abs(a.loss / b.loss - 1);
  EXPECT_EQ(a.gradients.size(), b.gradients.size());
  for (const auto& [name, expected] : b.gradients) {
    const auto found = a.gradients.find(name);
    if (found == a.gradients.end() || found->second.size() != expected.size()) {
      ADD_FAILURE() << name << " is missing, or of another size";
      continue;
    }
    double scale = 1e-6, error = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      scale = std::max(scale, std::abs(expected[i]));
      error = std::max(error, std::abs(expected[i] - found->second[i]));
    }
    worst = std::max(worst, error / scale);
  }
  return worst;
}

class Stages : public ::testing::TestWithParam<Layout> {
 protected:
  static ModelConfig Config(const std::string& family, bool tied) {
    ModelConfig config = testing::OddModel(family, tied);
    config.layers = 7;
    EXPECT_TRUE(config.Resolve().ok());
    return config;
  }
  // Unequal numbers of micro-batches, of unequal lengths.
  static std::vector<std::vector<PackedBatch>> Batches(int64_t vocabulary, int pipelines) {
    std::vector<PackedBatch> all;
    const std::vector<std::vector<int>> documents = {{7, 1, 5}, {12},   {3, 4}, {9, 2},
                                                     {1},       {6, 6}, {11}};
    for (size_t i = 0; i < documents.size(); ++i) {
      all.push_back(testing::RandomBatch({documents[i].begin(), documents[i].end()}, vocabulary,
                                         10 + static_cast<uint64_t>(i)));
    }
    std::vector<std::vector<PackedBatch>> of_pipeline(static_cast<size_t>(pipelines));
    for (size_t i = 0; i < all.size(); ++i) {
      of_pipeline[i * i % static_cast<size_t>(pipelines)].push_back(all[i]);
    }
    return of_pipeline;
  }
};

TEST_P(Stages, GiveTheGradientsOfOneRank) {
  const Layout& layout = GetParam();
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ModelConfig config = Config(family, tied);
    const Outcome one = Step(config, {}, Recompute::kNone, 0, Batches(config.vocabulary, 1));
    const Outcome many =
        Step(config, layout, Recompute::kNone, 0, Batches(config.vocabulary, layout.dp));
    ASSERT_TRUE(one.status.ok()) << one.status.message();
    ASSERT_TRUE(many.status.ok()) << many.status.message();
    EXPECT_LT(LargestError(many, one), 1e-9);
    const Outcome again =
        Step(config, layout, Recompute::kBlock, 64, Batches(config.vocabulary, layout.dp));
    ASSERT_TRUE(again.status.ok()) << again.status.message();
    EXPECT_LT(LargestError(again, one), 1e-9);
    // The same bits again, in another run.
    EXPECT_EQ(
        Step(config, layout, Recompute::kNone, 0, Batches(config.vocabulary, layout.dp)).gradients,
        many.gradients);
  }
}

// The comparison sees a micro-batch that is left out.
TEST(StagesComparison, SeesAMissingMicroBatch) {
  ModelConfig config = testing::OddModel("qwen3", false);
  ASSERT_TRUE(config.Resolve().ok());
  const std::vector<PackedBatch> both = {testing::RandomBatch({7, 2}, config.vocabulary, 1),
                                         testing::RandomBatch({4}, config.vocabulary, 2)};
  const Outcome whole = Step(config, {}, Recompute::kNone, 0, {both});
  const Outcome part = Step(config, {}, Recompute::kNone, 0, {{both[0]}});
  EXPECT_GT(LargestError(part, whole), 1e-3);
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, Stages,
    ::testing::Values(
        Layout{ScheduleKind::kGPipe, 1, 2}, Layout{ScheduleKind::kOneF1B, 1, 3},
        Layout{ScheduleKind::kOneF1B, 2, 2}, Layout{ScheduleKind::kOneF1B, 1, 7},
        Layout{ScheduleKind::kInterleaved, 1, 2, 3}, Layout{ScheduleKind::kInterleaved, 2, 3, 2},
        Layout{ScheduleKind::kZeroBubbleH1, 1, 4}, Layout{ScheduleKind::kZeroBubbleH1, 2, 3},
        Layout{ScheduleKind::kVShaped, 1, 3, 2}, Layout{ScheduleKind::kVShaped, 2, 2, 2},
        Layout{ScheduleKind::kVShaped, 1, 1, 2}, Layout{ScheduleKind::kOneF1B, 3, 1}),
    [](const auto& info) {
      std::string name = Name(info.param.kind);
      std::erase_if(name, [](char c) { return c == '-'; });
      return name + "Dp" + std::to_string(info.param.dp) + "Pp" + std::to_string(info.param.pp) +
             "Chunks" + std::to_string(info.param.chunks);
    });

}  // namespace
}  // namespace stretto
