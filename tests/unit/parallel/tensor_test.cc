// Layers that ranks share: loss and every gradient against one rank's.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "stretto/parallel/tensor_parallel.h"
#include "tests/support/layout_step.h"

namespace stretto {
namespace {

using testing::CompareSteps;
using ::testing::HasSubstr;
using testing::Layout;
using testing::StepError;
using testing::StepOnThreads;
using testing::StepOptions;
using testing::UnevenBatches;

ModelConfig Config(const std::string& family, bool tied, int64_t kv_heads = 4) {
  ModelConfig config = testing::OddModel(family, tied);
  config.heads = family == "gpt2" ? 5 : 2 * kv_heads;
  config.kv_heads = family == "gpt2" ? 5 : kv_heads;
  config.layers = 3;
  EXPECT_TRUE(config.Resolve().ok());
  return config;
}

void ExpectLikeOneRank(const ModelConfig& config, const Layout& layout,
                       const StepOptions& options = {}) {
  const auto batches = [&](int pipelines) { return UnevenBatches(config.vocabulary, pipelines); };
  const auto one = StepOnThreads(config, {}, {.dtype = options.dtype}, batches(1));
  ASSERT_TRUE(one.ok()) << one.status().message();
  const auto many = StepOnThreads(config, layout, options, batches(layout.dp));
  ASSERT_TRUE(many.ok()) << many.status().message();
  const StepError error = CompareSteps(*many, *one);
  EXPECT_LT(error.worst, options.dtype == DType::kF64 ? 1e-9 : 1e-5) << error.where;
}

class TensorParallel : public ::testing::TestWithParam<int> {};

// Also with tokens in pieces: of 1 to 13 tokens, some of which have fewer rows than pieces.
TEST_P(TensorParallel, GivesTheGradientsOfOneRank) {
  for (const char* family : {"gpt2", "llama", "qwen2", "qwen3"}) {
    for (const int pieces : {1, 2, 3}) {
      const bool tied = pieces != 2;
      SCOPED_TRACE(absl::StrCat(family, tied ? " tied " : " untied ", pieces));
      ExpectLikeOneRank(Config(family, tied), {.tp = GetParam(), .pieces = pieces});
      ExpectLikeOneRank(Config(family, !tied), {.tp = GetParam(), .pieces = pieces},
                        {.overlap = false});
    }
  }
}

// What runs while an exchange is under way changes no bits.
TEST_P(TensorParallel, HasTheSameBitsWithoutOverlap) {
  for (const char* family : {"gpt2", "qwen3"}) {
    for (const int pieces : {1, 3}) {
      for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
        const ModelConfig config = Config(family, true);
        const Layout layout = {.tp = GetParam(), .pieces = pieces};
        const auto batches = UnevenBatches(config.vocabulary, 1);
        const auto apart = StepOnThreads(config, layout, {.recompute = recompute}, batches,
                                         {.random_delay_us = 50, .delay_seed = 2});
        const auto waiting =
            StepOnThreads(config, layout, {.recompute = recompute, .overlap = false}, batches);
        ASSERT_TRUE(apart.ok() && waiting.ok()) << apart.status() << waiting.status();
        EXPECT_EQ(apart->loss, waiting->loss);
        EXPECT_EQ(apart->gradients, waiting->gradients);
        EXPECT_EQ(apart->tensor_bytes, waiting->tensor_bytes);
      }
    }
  }
}

TEST_P(TensorParallel, InSinglePrecision) {
  ExpectLikeOneRank(Config("gpt2", true), {.tp = GetParam()}, {.dtype = DType::kF32});
  ExpectLikeOneRank(Config("qwen3", false), {.tp = GetParam()}, {.dtype = DType::kF32});
}

TEST_P(TensorParallel, RecomputesAndCutsTheVocabularyIntoChunks) {
  for (const Recompute recompute : {Recompute::kNormsAndActivations, Recompute::kBlock}) {
    for (const char* family : {"gpt2", "qwen3"}) {
      ModelConfig config = Config(family, true);
      config.vocabulary = 531;
      for (const int pieces : {1, 2}) {
        ExpectLikeOneRank(config, {.tp = GetParam(), .pieces = pieces},
                          {.recompute = recompute, .loss_chunk = 64});
      }
    }
  }
}

// What a second reader of the same tokens adds to a gradient that is there comes out of a sum, too.
TEST_P(TensorParallel, TwoColumnLayersAddUpTheGradientOfOneInput) {
  const auto build = [](const Strategies& strategies) {
    Builder b(DType::kF64, strategies);
    const SlotId n = b.Norm("norm", b.Embedding("embed", 13, 6, 0, 1.0));
    const auto branch = [&](const std::string& name) {
      const SlotId inner = b.Linear(name + ".in", Role::kColumn, n, 6, 10);
      return b.Linear(name + ".out", Role::kRow, inner, 10, 6);
    };
    const SlotId one = branch("one"), two = branch("two");
    b.LossHead("head", b.AddNorm("sum", one, two).second, 13, 0, {}, 1.0);
    return b.Finish().value();
  };
  for (const int64_t tokens : {1, 2, 7}) {
    const PackedBatch batch = testing::RandomBatch({tokens}, 13, 3);
    const Graph whole = build(LocalStrategies());
    testing::Harness one(whole, 5);
    one.run().BeginStep();
    ASSERT_TRUE(one.RunBatch(TrainingActions(whole, Recompute::kNone), batch).ok());
    for (const int pieces : {1, 2}) {
      for (const bool overlap : {false, true}) {
        const absl::Status ran = World::RunThreads(GetParam(), [&](World& world) -> absl::Status {
          Communicator comm(world);
          TensorAxis axis(comm, comm.all());
          const Graph part = build(TensorStrategies(world.size(), world.rank(), pieces));
          testing::Harness mine(part, 5);
          mine.run().SetTensorAxis(&axis);
          mine.run().BeginStep();
          STRETTO_RETURN_IF_ERROR(
              mine.RunBatch(TrainingActions(part, Recompute::kNone, false, overlap), batch));
          const ParameterSpec& table = part.parameters[0].spec;
          EXPECT_EQ(table.name, "embed.weight");
          const Range rows = table.part.rows[0];
          for (int64_t i = 0; i < rows.count * 6; ++i) {
            EXPECT_NEAR(testing::Get(mine.gradients[0], i),
                        testing::Get(one.gradients[0], rows.first * 6 + i), 1e-9)
                << tokens << " tokens, " << pieces << " pieces, element " << i;
          }
          return world.Barrier("done");
        });
        EXPECT_TRUE(ran.ok()) << ran;
      }
    }
  }
}

TEST_P(TensorParallel, RunsOnQueuedStreams) {
  for (const int pieces : {1, 3}) {
    ExpectLikeOneRank(Config("qwen3", true), {.tp = GetParam(), .pieces = pieces},
                      {.stream = StreamMode::kFifo});
  }
}

TEST_P(TensorParallel, HasTheSameBitsAgainWhateverTheDelays) {
  const ModelConfig config = Config("qwen3", true);
  const Layout layout = {.dp = 2, .tp = GetParam(), .pieces = 2};
  const auto batches = UnevenBatches(config.vocabulary, 2);
  const auto first = StepOnThreads(config, layout, {}, batches);
  const auto again = StepOnThreads(config, layout, {.stream = StreamMode::kFifo}, batches,
                                   {.random_delay_us = 100, .delay_seed = 7});
  ASSERT_TRUE(first.ok() && again.ok()) << first.status() << again.status();
  EXPECT_EQ(first->loss, again->loss);
  EXPECT_EQ(first->gradients, again->gradients);
}

INSTANTIATE_TEST_SUITE_P(Ranks, TensorParallel, ::testing::Values(2, 3, 4),
                         [](const auto& info) { return absl::StrCat("Tp", info.param); });

// With data-parallel ranks and pipelines: every pair, and the product on 8 ranks.
class ThreeAxes : public ::testing::TestWithParam<Layout> {};

TEST_P(ThreeAxes, GiveTheGradientsOfOneRank) {
  for (const bool tied : {true, false}) {
    ModelConfig config = Config(tied ? "gpt2" : "qwen3", tied, 3);
    config.layers = 7;
    ExpectLikeOneRank(config, GetParam());
    ExpectLikeOneRank(config, GetParam(),
                      {.recompute = Recompute::kBlock, .stream = StreamMode::kFifo});
    ExpectLikeOneRank(config, GetParam(), {.dtype = DType::kF32});
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, ThreeAxes,
                         ::testing::Values(Layout{.dp = 2, .tp = 2}, Layout{.dp = 3, .tp = 2},
                                           Layout{.dp = 2, .tp = 3}, Layout{.pp = 2, .tp = 2},
                                           Layout{.pp = 3, .tp = 2}, Layout{.pp = 2, .tp = 3},
                                           Layout{.dp = 2, .pp = 2},
                                           Layout{.dp = 2, .pp = 2, .tp = 2},
                                           Layout{1, 2, 2, ScheduleKind::kGPipe},
                                           Layout{1, 2, 2, ScheduleKind::kZeroBubbleH1},
                                           Layout{2, 2, 2, ScheduleKind::kZeroBubbleH1},
                                           Layout{2, 2, 2, ScheduleKind::kVShaped, 2},
                                           Layout{1, 2, 3, ScheduleKind::kInterleaved, 3},
                                           Layout{.dp = 3, .tp = 2, .pieces = 2},
                                           Layout{.dp = 2, .pp = 2, .tp = 2, .pieces = 3},
                                           Layout{1, 2, 2, ScheduleKind::kZeroBubbleH1, 1, 2},
                                           Layout{1, 2, 3, ScheduleKind::kInterleaved, 3, 2}),
                         [](const auto& info) { return info.param.Name(); });

TEST(TensorParallelSizes, ThreeKeyHeadsOnTwoRanks) {
  ExpectLikeOneRank(Config("qwen3", false, 3), {.tp = 2});
  ExpectLikeOneRank(Config("llama", true, 3), {.tp = 2});
}

// Fewer key heads than ranks: several ranks have the same one, and share its query heads.
TEST(TensorParallelSizes, RanksThatShareAKeyHead) {
  struct Case {
    int64_t heads, kv_heads;
    Layout layout;
  };
  const std::vector<Case> cases = {{4, 1, {.tp = 2}},          {4, 1, {.tp = 3}},
                                   {4, 1, {.tp = 4}},          {6, 2, {.tp = 3}},
                                   {6, 2, {.tp = 5}},          {6, 2, {.tp = 6}},
                                   {15, 3, {.tp = 4}},         {6, 2, {.dp = 2, .tp = 3}},
                                   {6, 2, {.pp = 2, .tp = 4}}, {6, 2, {.dp = 2, .pp = 1, .tp = 4}}};
  for (const Case& c : cases) {
    for (const char* family : {"llama", "qwen2", "qwen3"}) {
      SCOPED_TRACE(absl::StrCat(family, " ", c.heads, "/", c.kv_heads, " ", c.layout.Name()));
      ModelConfig config = Config(family, true, c.kv_heads);
      config.heads = c.heads;
      ExpectLikeOneRank(config, c.layout);
    }
  }
}

TEST(TensorParallelSizes, TheVocabularyOfGpt2OnFourRanks) {
  ModelConfig config = Config("gpt2", true);
  config.vocabulary = 50257;
  config.hidden = 8;
  config.layers = 1;
  ExpectLikeOneRank(config, {.tp = 4});
  ExpectLikeOneRank(config, {.tp = 4}, {.loss_chunk = 4096});
}

TEST(TensorParallelSizes, AsManyRanksAsThereAreHeads) {
  ModelConfig config = Config("qwen3", true, 7);
  ExpectLikeOneRank(config, {.tp = 7});
}

// What is there less often than there are ranks is refused by the layer that it belongs to.
TEST(TensorParallelSizes, RefusesWhatIsTooFew) {
  const auto error = [](auto change, int ranks) {
    ModelConfig config = Config("gpt2", false);
    change(config);
    return std::string(
        BuildModel(config, {.strategies = TensorStrategies(ranks, ranks - 1)}).status().message());
  };
  EXPECT_THAT(
      error([](ModelConfig&) {}, 6),
      HasSubstr("layer blocks.0.attn.qkv: it has fewer groups of features than the 6 ranks"));
  EXPECT_THAT(error([](ModelConfig& c) { c.vocabulary = 3; }, 4),
              HasSubstr("layer embed: its 3 entries are fewer than the 4 ranks"));
  EXPECT_THAT(error([](ModelConfig& c) { c.max_positions = 3; }, 4),
              HasSubstr("layer embed: its 3 positions are fewer"));
  EXPECT_THAT(error([](ModelConfig& c) { c.ffn = 2; }, 3), HasSubstr("mlp.up: it has fewer"));
  // Two query heads for each of two key heads.
  ModelConfig config = Config("qwen3", true, 2);
  for (int rank = 0; rank < 5; ++rank) {
    const auto model = BuildModel(config, {.strategies = TensorStrategies(5, rank)});
    EXPECT_EQ(model.ok(), rank != 2) << rank;
  }
}

TEST(TensorParallelSizes, TheIdOutsideTheVocabularyIsNamed) {
  const ModelConfig config = Config("qwen3", true);
  auto batches = UnevenBatches(config.vocabulary, 1);
  batches[0][1].ids[3] = 53;
  const auto outcome = StepOnThreads(config, {.tp = 2}, {}, batches);
  EXPECT_THAT(std::string(outcome.status().message()),
              HasSubstr("id 53 in row 3 is outside the table of 53 rows"));
}

// Where the actions of one block with a tensor axis lie, as docs/parallelism.md has them.
TEST(TensorOverlap, PutsWeightsUnderTheExchangesOfInputs) {
  ModelConfig config = Config("gpt2", true);
  config.layers = 1;
  const Model model = BuildModel(config, {.strategies = TensorStrategies(2, 0)}).value();
  const std::string list = Describe(model.graph, TrainingActions(model.graph, Recompute::kNone));
  EXPECT_THAT(list, HasSubstr("F head\n"
                              "B head\nB> head\n"
                              "B norm\n"
                              ">B blocks.0.mlp.down\n"
                              "W head\nW norm\n"
                              ">W blocks.0.mlp.up\n"
                              "B blocks.0.mlp.down\n"
                              "B blocks.0.mlp.up\n"
                              "W blocks.0.mlp.down\n"
                              "B> blocks.0.mlp.up\n"
                              "B blocks.0.mlp_norm\n"
                              ">B blocks.0.attn.out\n"
                              "W blocks.0.mlp.up\nW blocks.0.mlp_norm\n"
                              ">W blocks.0.attn.qkv\n"
                              "B blocks.0.attn.out\n"
                              "B blocks.0.attn\n"
                              "B blocks.0.attn.qkv\n"
                              "W blocks.0.attn.out\nW blocks.0.attn\n"
                              "B> blocks.0.attn.qkv\n"
                              "B blocks.0.attn_norm\n"
                              ">W embed\n"
                              "B embed\n"
                              "W blocks.0.attn.qkv\nW blocks.0.attn_norm\nW embed\n"));
  const std::string waiting = Describe(
      model.graph, TrainingActions(model.graph, Recompute::kNone, /*defer_weights=*/false, false));
  EXPECT_THAT(waiting, HasSubstr(">B blocks.0.mlp.down\nB blocks.0.mlp.down\n"
                                 "W blocks.0.mlp.down\n"
                                 "B blocks.0.mlp.up\nB> blocks.0.mlp.up\n"
                                 ">W blocks.0.mlp.up\nW blocks.0.mlp.up\n"));
}

// What a block gathers again lives no longer than its own backward pass: with recomputation of
// blocks one more block adds a rank's part of the tokens, not all of them.
TEST(TensorOverlap, KeepsNoGatheredTokensFromBlockToBlock) {
  constexpr int64_t kTokens = 4096;
  const auto bytes = [](int64_t layers, bool overlap) {
    ModelConfig config = Config("gpt2", true);
    config.layers = layers;
    const Model model = BuildModel(config, {.strategies = TensorStrategies(2, 0, 2)}).value();
    const ActionList list =
        TrainingActions(model.graph, Recompute::kBlock, /*defer_weights=*/false, overlap);
    return PlanFrame(model.graph, list, kTokens).value().bytes();
  };
  const int64_t whole = kTokens * Config("gpt2", true).hidden * SizeOf(DType::kF32);
  for (const bool overlap : {false, true}) {
    EXPECT_LT(bytes(8, overlap) - bytes(7, overlap), whole);
    EXPECT_GE(bytes(8, overlap) - bytes(7, overlap), whole / 2);
  }
}

// Whatever is overlapped, the same actions run, weights' halves in the same order: gradients are
// complete, and leave, in an order that does not depend on it.
TEST(TensorOverlap, KeepsTheOrderOfWeights) {
  for (const char* family : {"gpt2", "qwen3"}) {
    const Model model =
        BuildModel(Config(family, true), {.strategies = TensorStrategies(3, 1)}).value();
    for (const Recompute r :
         {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
      for (const bool defer : {false, true}) {
        std::vector<std::vector<Action>> of_kind[2];
        for (const bool overlap : {false, true}) {
          of_kind[overlap].resize(7);
          for (const Action& a : TrainingActions(model.graph, r, defer, overlap).actions) {
            of_kind[overlap][static_cast<size_t>(a.kind)].push_back(a);
          }
        }
        EXPECT_EQ(of_kind[0], of_kind[1]) << family << " " << Name(r) << defer;
      }
    }
  }
}

// What would go wrong if an exchange were not waited for, or not where the plan has it.
TEST(TensorParallelControl, SeesExchangesThatAreNotWaitedFor) {
  const ModelConfig config = Config("qwen3", true);
  const auto batches = UnevenBatches(config.vocabulary, 1);
  const auto one = StepOnThreads(config, {}, {}, batches);
  ASSERT_TRUE(one.ok()) << one.status();
  const auto without = [&](ActionKind kind, int pieces) {
    return StepOnThreads(config, {.tp = 2, .pieces = pieces},
                         {.change =
                              [kind](ActionList& l) {
                                std::erase_if(l.actions,
                                              [kind](const Action& a) { return a.kind == kind; });
                              }},
                         batches, {.random_delay_us = 200});
  };
  for (const int pieces : {1, 2}) {
    for (const ActionKind kind : {ActionKind::kStartInput, ActionKind::kStartWeight}) {
      EXPECT_THAT(std::string(without(kind, pieces).status().message()),
                  HasSubstr("is waited for, but 0 have been started"));
    }
    EXPECT_THAT(std::string(without(ActionKind::kFinishInput, pieces).status().message()),
                HasSubstr("starts out of turn"));
  }
  // A sum that is waited for only after what reads it.
  const auto late = StepOnThreads(config, {.tp = 2},
                                  {.change =
                                       [](ActionList& l) {
                                         for (size_t i = 0; i + 1 < l.actions.size(); ++i) {
                                           if (l.actions[i].kind == ActionKind::kFinishInput) {
                                             std::swap(l.actions[i], l.actions[i + 1]);
                                             ++i;
                                           }
                                         }
                                       }},
                                  batches, {.random_delay_us = 200});
  EXPECT_FALSE(late.ok() && CompareSteps(*late, *one).worst < 1e-3);
}

// The actions of one rank in another order than those of the others: caught by who compares what
// was recorded with the plan, before it is looked at whether the numbers are right.
TEST(TensorParallelControl, SeesAnotherOrderThanThePlan) {
  const absl::Status ran = World::RunThreads(1, [](World& world) -> absl::Status {
    Communicator comm(world);
    ExchangeInfo gather = {.width = 1, .label = "a"}, sum = {.sum = true, .width = 1, .label = "b"};
    float x[2] = {};
    const Tensor t = Tensor::Of(x, DType::kF32, {2});
    STRETTO_RETURN_IF_ERROR(comm.Wait(comm.AllGather(comm.all(), t, t, "a")));
    STRETTO_RETURN_IF_ERROR(comm.Wait(comm.ReduceScatter(comm.all(), t, t, "b")));
    const auto order = [&](std::vector<PlannedExchange> planned) {
      return testing::SameOrder(comm.recorder(), comm.all(), planned);
    };
    EXPECT_TRUE(order({{&gather, 2}, {&sum, 2}}).ok());
    EXPECT_FALSE(order({{&sum, 2}, {&gather, 2}}).ok());
    EXPECT_FALSE(order({{&gather, 2}, {&sum, 1}}).ok());
    return absl::OkStatus();
  });
  EXPECT_TRUE(ran.ok()) << ran;
}

// Every token is in one rank's part, pieces follow each other, and the padding lies at the end.
TEST(TokenPieces, AreAllTokensOnce) {
  for (const int ranks : {1, 2, 3, 8}) {
    for (const int pieces : {1, 2, 3, 16}) {
      for (int64_t tokens = 1; tokens < 70; ++tokens) {
        SCOPED_TRACE(absl::StrCat(ranks, " ranks ", pieces, " pieces ", tokens, " tokens"));
        std::vector<int> owner(static_cast<size_t>(tokens + ranks), -1);
        const int64_t rows = (tokens + ranks - 1) / ranks;
        int64_t owned = 0;
        for (int r = 0; r < ranks; ++r) {
          const TokenCut cut = {ranks, r, pieces};
          ASSERT_EQ(PiecesOf(cut, tokens), std::min<int64_t>(pieces, rows));
          int64_t next = 0, next_whole = 0, own = 0;
          for (int i = 0; i < PiecesOf(cut, tokens); ++i) {
            const TokenPiece p = PieceOf(cut, tokens, i);
            ASSERT_EQ(p.part.first, next);
            ASSERT_EQ(p.whole.first, next_whole);
            ASSERT_GT(p.part.count, 0);
            ASSERT_LE(p.all, p.whole.count);
            // Only the last piece has padding.
            ASSERT_TRUE(p.own == p.part.count || i + 1 == PiecesOf(cut, tokens));
            next += p.part.count;
            next_whole += p.whole.count;
            own += p.own;
            for (int64_t k = 0; k < p.own; ++k) {
              int& o = owner[static_cast<size_t>(p.mine.first + k)];
              ASSERT_EQ(o, -1);
              o = r;
            }
          }
          ASSERT_EQ(next, rows);
          ASSERT_EQ(next_whole, rows * ranks);
          ASSERT_EQ(PartOf(cut, tokens).rows, rows);
          ASSERT_EQ(PartOf(cut, tokens).count, own);
          owned += own;
        }
        ASSERT_EQ(owned, tokens);
        for (int64_t k = 0; k < tokens; ++k) ASSERT_GE(owner[static_cast<size_t>(k)], 0);
      }
    }
  }
}

// The control: sums that are left out, or made twice, are seen.
TEST(TensorParallelControl, SeesTheGradientsOfOneRankAlone) {
  const ModelConfig config = Config("qwen3", true);
  const auto one = StepOnThreads(config, {}, {}, UnevenBatches(config.vocabulary, 1));
  ASSERT_TRUE(one.ok()) << one.status();
  testing::StepOutcome wrong = *one;
  for (double& v : wrong.gradients["blocks.1.mlp_norm.weight"]) v *= 2;
  EXPECT_GT(CompareSteps(wrong, *one).worst, 0.9);
  EXPECT_EQ(CompareSteps(wrong, *one).where, "blocks.1.mlp_norm.weight");
  wrong = *one;
  wrong.loss *= 2;
  EXPECT_GT(CompareSteps(wrong, *one).worst, 0.9);
}

// Rows and columns of a part begin as those of the whole do.
TEST(TensorParallelParameters, BeginAsOnOneRank) {
  const ModelConfig config = Config("gpt2", true);
  const Model whole = BuildModel(config, {}).value();
  for (int rank = 0; rank < 3; ++rank) {
    const Model part = BuildModel(config, {.strategies = TensorStrategies(3, rank)}).value();
    ASSERT_EQ(part.graph.parameters.size(), whole.graph.parameters.size());
    for (size_t p = 0; p < whole.graph.parameters.size(); ++p) {
      const ParameterInfo &all = whole.graph.parameters[p], &mine = part.graph.parameters[p];
      ASSERT_EQ(all.spec.name, mine.spec.name);
      ASSERT_EQ(mine.spec.whole_shape(), all.spec.shape);
      EXPECT_EQ(mine.spec.weight_decay, all.spec.weight_decay);
      std::vector<float> a(static_cast<size_t>(all.elements())), b(a.size());
      InitialValues(all.spec, 3, 0, Tensor::Of(a.data(), DType::kF32, {all.rows(), all.columns()}));
      InitialValues(mine.spec, 3, 0,
                    Tensor::Of(b.data(), DType::kF32, {mine.rows(), mine.columns()}));
      for (const ParameterBox& box : BoxesOf(mine.spec, 0, mine.rows())) {
        for (int64_t r = 0; r < box.rows.count; ++r) {
          for (int64_t c = 0; c < mine.columns(); ++c) {
            ASSERT_EQ(b[static_cast<size_t>((box.rows.first + r) * mine.columns() + c)],
                      a[static_cast<size_t>((box.whole + r) * all.columns() +
                                            mine.spec.part.first_column + c)])
                << all.spec.name;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace stretto
