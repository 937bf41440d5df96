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

#include "stretto/parallel/bucket_plan.h"
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
  int dp = 1, pp = 1, chunks = 1, zero = 1;
};
// How the storage of parameters and gradients may be changed.
struct Variant {
  DType dtype = DType::kF64;
  bool overlap = true, prefetch = true, poison = true;
  int64_t bucket_bytes = 1000;
  uint64_t delay_seed = 0;  // 0: no delays
  std::function<void(BucketPlan&)> sabotage;
};

struct Outcome {
  absl::Status status;
  double loss = 0;
  std::map<std::string, std::vector<double>> gradients;
};

// One step; pipeline p has the micro-batches `batches[p]`.
Outcome Step(const ModelConfig& config, const Layout& layout, Recompute recompute, int64_t chunk,
             const std::vector<std::vector<PackedBatch>>& batches, const Variant& variant = {}) {
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
    // Ranks that exchange something in each micro-batch have as many, some of them empty.
    for (const auto& of_pipeline : batches) {
      while (layout.zero > 1 && items.size() < of_pipeline.size()) {
        items.push_back({.tokens = 1, .lengths = {1}, .pipelines = {0}});
      }
    }
    STRETTO_ASSIGN_OR_RETURN(const Program program,
                             MakeProgram(layout.kind, 1, layout.pp, layout.chunks, items));
    STRETTO_ASSIGN_OR_RETURN(
        const Schedule schedule,
        MakeSchedule(layout.kind, layout.pp, layout.chunks, static_cast<int>(items.size())));
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
      BucketPlan buckets;
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
            BuildModel(config, {.dtype = variant.dtype, .loss_chunk = chunk, .part = part}));
        stage->actions = TrainingActions(stage->model.graph, recompute,
                                         /*defer_weights=*/layout.pp * layout.chunks > 1);
        STRETTO_ASSIGN_OR_RETURN(stage->frame,
                                 PlanFrame(stage->model.graph, stage->actions, capacity));
        stage->buckets =
            PlanBuckets(stage->model.graph, stage->actions, EvaluationActions(stage->model.graph),
                        {.zero = layout.zero,
                         .ranks = layout.dp,
                         .bucket_bytes = variant.bucket_bytes,
                         .pieces = layout.pp * layout.chunks > 1,
                         .halves = layout.kind == ScheduleKind::kZeroBubbleH1 ||
                                   layout.kind == ScheduleKind::kVShaped});
        if (variant.sabotage) variant.sabotage(stage->buckets);
        STRETTO_ASSIGN_OR_RETURN(
            stage->parameters,
            DataParallel::Create(comm, dp, stage->model.graph, *stream, *kernels, 5, budget,
                                 {.overlap = variant.overlap,
                                  .prefetch = variant.prefetch,
                                  .buckets = &stage->buckets,
                                  .poison = variant.poison}));
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
                                 config.hidden, variant.dtype, budget));
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
                testing::Get(shard.grad, i);
          }
        }
      }
    }
    return world.Barrier("done");
  };
  out.status = World::RunThreads(layout.dp * layout.pp, body,
                                 {.timeout = std::chrono::seconds(60),
                                  .random_delay_us = variant.delay_seed == 0 ? 0 : 300,
                                  .delay_seed = variant.delay_seed});
  return out;
}

double LargestError(const Outcome& a, const Outcome& b) {
  double worst = std::isnan(a.loss) ? HUGE_VAL : std::abs(a.loss / b.loss - 1);
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
      const double difference = std::abs(expected[i] - found->second[i]);
      error = std::isnan(difference) ? HUGE_VAL : std::max(error, difference);
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

// ZeRO-2 and 3 without a pipeline: a micro-batch runs as a whole, buckets stay from forward to
// backward, and ranks have unequal numbers of micro-batches.
class Sharded : public Stages {
 protected:
  static std::vector<std::vector<PackedBatch>> OnRanks(const ModelConfig& config, int ranks) {
    return Batches(config.vocabulary, ranks);
  }
};

TEST_P(Sharded, GiveTheGradientsOfOneRank) {
  const Layout& layout = GetParam();
  for (const bool tied : {true, false}) {
    SCOPED_TRACE(tied ? "tied" : "untied");
    const ModelConfig config = Config(tied ? "gpt2" : "qwen3", tied);
    const auto one_rank = OnRanks(config, 1), ranks = OnRanks(config, layout.dp);
    const Outcome one = Step(config, {}, Recompute::kNone, 0, one_rank);
    ASSERT_TRUE(one.status.ok()) << one.status.message();
    for (const Recompute recompute :
         {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
      for (const int64_t bucket_bytes : {1, 3000, 1 << 30}) {
        for (const int64_t chunk : {0, 64}) {
          SCOPED_TRACE(::testing::Message() << Name(recompute) << ", buckets of " << bucket_bytes
                                            << ", chunk " << chunk);
          Variant variant;
          variant.bucket_bytes = bucket_bytes;
          const Outcome many = Step(config, layout, recompute, chunk, ranks, variant);
          ASSERT_TRUE(many.status.ok()) << many.status.message();
          EXPECT_LT(LargestError(many, one), 1e-9);
        }
      }
    }
    Variant single;
    single.dtype = DType::kF32;
    EXPECT_LT(LargestError(Step(config, layout, Recompute::kBlock, 0, ranks, single),
                           Step(config, {}, Recompute::kNone, 0, one_rank, single)),
              1e-5);
  }
}

TEST_P(Sharded, GivesTheSameBitsWithoutOverlapAndUnderDelays) {
  const ModelConfig config = Config("gpt2", true);
  const auto ranks = OnRanks(config, GetParam().dp);
  const auto run = [&](const Variant& variant) {
    const Outcome out = Step(config, GetParam(), Recompute::kBlock, 0, ranks, variant);
    EXPECT_TRUE(out.status.ok()) << out.status.message();
    return out.gradients;
  };
  const auto plain = run({});
  EXPECT_EQ(run({.poison = false}), plain);
  EXPECT_EQ(run({.overlap = false}), plain);
  EXPECT_EQ(run({.prefetch = false}), plain);
  EXPECT_EQ(run({.overlap = false, .prefetch = false, .delay_seed = 3}), plain);
  for (const uint64_t seed : {1, 2}) EXPECT_EQ(run({.delay_seed = seed}), plain);
}

INSTANTIATE_TEST_SUITE_P(Layouts, Sharded,
                         ::testing::Values(Layout{.dp = 2, .zero = 2}, Layout{.dp = 3, .zero = 2},
                                           Layout{.dp = 4, .zero = 2}, Layout{.dp = 2, .zero = 3},
                                           Layout{.dp = 3, .zero = 3}, Layout{.dp = 4, .zero = 3}),
                         [](const auto& info) {
                           return "Dp" + std::to_string(info.param.dp) + "Zero" +
                                  std::to_string(info.param.zero);
                         });

// Negative controls: a plan that gives a bucket up too early, or two buckets the same place, is
// found out, by the poison or by another gradient.
TEST(ShardedComparison, SeesAPlanThatIsWrong) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "messages under way read places that are written: the races are what is wrong";
#endif
  ModelConfig config = testing::OddModel("qwen3", false);
  config.layers = 3;
  ASSERT_TRUE(config.Resolve().ok());
  std::vector<std::vector<PackedBatch>> one(1), two(2);
  for (int i = 0; i < 4; ++i) {
    const PackedBatch batch = testing::RandomBatch({7 - i, 2}, config.vocabulary, 1 + i);
    one[0].push_back(batch);
    two[i % 2].push_back(batch);
  }
  const Outcome expected = Step(config, {}, Recompute::kNone, 0, one);
  const auto wrong = [&](const std::function<void(BucketPlan&)>& sabotage) {
    Variant variant;
    variant.sabotage = sabotage;
    const Outcome out = Step(config, {.dp = 2, .zero = 3}, Recompute::kNone, 0, two, variant);
    return !out.status.ok() || LargestError(out, expected) > 1e-3;
  };
  EXPECT_FALSE(wrong([](BucketPlan&) {}));
  const auto move = [](std::vector<std::vector<BucketEvent>>& events, BucketEventKind kind,
                       int by) {
    // The first event of this kind in the second half of the list.
    for (size_t a = events.size() / 2; a < events.size(); ++a) {
      for (size_t i = 0; i < events[a].size(); ++i) {
        if (events[a][i].kind != kind) continue;
        const BucketEvent event = events[a][i];
        events[a].erase(events[a].begin() + static_cast<std::ptrdiff_t>(i));
        if (by != 0) events[a - static_cast<size_t>(by)].push_back(event);
        return;
      }
    }
    ADD_FAILURE() << "the plan has no event to move";
  };
  // The parameters are gone, or their place is, before the layer runs.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kRelease, 2); }));
  // The gradients leave before they are complete.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kReduce, 2); }));
  // The sums of a bucket are never added up.
  EXPECT_TRUE(wrong([&](BucketPlan& p) { move(p.training.after, BucketEventKind::kCollect, 0); }));
  EXPECT_TRUE(wrong([](BucketPlan& p) {
    for (BucketStay& s : p.training.stays) s.offset = 0;
  }));
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
        Layout{ScheduleKind::kVShaped, 1, 1, 2}, Layout{ScheduleKind::kOneF1B, 3, 1},
        Layout{ScheduleKind::kGPipe, 2, 2, 1, 2}, Layout{ScheduleKind::kGPipe, 2, 2, 1, 3},
        Layout{ScheduleKind::kOneF1B, 2, 2, 1, 2}, Layout{ScheduleKind::kOneF1B, 2, 3, 1, 3},
        Layout{ScheduleKind::kInterleaved, 2, 2, 2, 2},
        Layout{ScheduleKind::kInterleaved, 2, 2, 3, 3},
        Layout{ScheduleKind::kZeroBubbleH1, 2, 3, 1, 2},
        Layout{ScheduleKind::kZeroBubbleH1, 2, 2, 1, 3}, Layout{ScheduleKind::kVShaped, 2, 2, 2, 2},
        Layout{ScheduleKind::kVShaped, 2, 2, 2, 3}),
    [](const auto& info) {
      std::string name = Name(info.param.kind);
      std::erase_if(name, [](char c) { return c == '-'; });
      return name + "Dp" + std::to_string(info.param.dp) + "Pp" + std::to_string(info.param.pp) +
             "Chunks" + std::to_string(info.param.chunks) + "Zero" +
             std::to_string(info.param.zero);
    });

}  // namespace
}  // namespace stretto
