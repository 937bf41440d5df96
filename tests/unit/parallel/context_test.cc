// Documents that ranks share: loss and every gradient against one rank that has them whole.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "src/parallel/ring_attention.h"
#include "tests/support/context_cases.h"
#include "tests/support/layout_step.h"

namespace stretto {
namespace {

using testing::CompareSteps;
using testing::Deal;
using testing::DealtItems;
using ::testing::HasSubstr;
using testing::Layout;
using testing::RingItems;
using testing::StepError;
using testing::StepOnThreads;
using testing::StepOptions;

// One key head for several query heads, and heads that are not hidden / heads wide.
ModelConfig Config(const std::string& family, int64_t kv_heads = 1) {
  ModelConfig config = testing::OddModel(family);
  config.heads = family == "gpt2" ? 3 : 3 * kv_heads;
  config.kv_heads = family == "gpt2" ? 3 : kv_heads;
  config.max_positions = 64;
  EXPECT_TRUE(config.Resolve().ok());
  return config;
}

double ErrorOf(const ModelConfig& config, const Layout& layout, const StepOptions& options,
               const DealtItems& dealt, WorldOptions world = {}) {
  const auto one = StepOnThreads(config, {}, {.dtype = options.dtype}, dealt.whole);
  EXPECT_TRUE(one.ok()) << one.status().message();
  const auto many = StepOnThreads(config, layout, options, dealt.shares, world);
  EXPECT_TRUE(many.ok()) << many.status().message();
  if (!one.ok() || !many.ok()) return 1;
  const StepError error = CompareSteps(*many, *one);
  if (error.worst > 1e-9) GTEST_LOG_(INFO) << error.worst << " in " << error.where;
  return error.worst;
}

class Context : public ::testing::TestWithParam<int> {};

TEST_P(Context, RingsGiveTheGradientsOfOneRank) {
  for (const char* family : {"gpt2", "llama", "qwen3"}) {
    const ModelConfig config = Config(family);
    for (const uint64_t seed : {1, 2}) {
      SCOPED_TRACE(absl::StrCat(family, " seed ", seed));
      const auto dealt =
          Deal(GetParam(), RingItems(GetParam(), 4, 40, seed), config.vocabulary, seed);
      ASSERT_TRUE(dealt.ok()) << dealt.status();
      EXPECT_LT(ErrorOf(config, {.dp = GetParam()}, {}, *dealt), 1e-9);
    }
  }
}

TEST_P(Context, InSinglePrecisionWithDelaysAndRecomputation) {
  const ModelConfig config = Config("qwen3", 2);
  const auto dealt = Deal(GetParam(), RingItems(GetParam(), 3, 50, 7), config.vocabulary, 7);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  EXPECT_LT(ErrorOf(config, {.dp = GetParam()}, {.dtype = DType::kF32}, *dealt,
                    {.random_delay_us = 100, .delay_seed = 3}),
            1e-5);
  for (const Recompute recompute : {Recompute::kNormsAndActivations, Recompute::kBlock}) {
    EXPECT_LT(ErrorOf(config, {.dp = GetParam()}, {.recompute = recompute}, *dealt), 1e-9);
  }
}
INSTANTIATE_TEST_SUITE_P(, Context, ::testing::Values(2, 3, 5, 7));

TEST(ContextTest, UnderATensorAxisPipelinesAndZero) {
  const ModelConfig config = Config("qwen3", 3);
  for (const Layout& layout :
       {Layout{.dp = 2, .tp = 2}, Layout{.dp = 3, .tp = 2, .pieces = 2}, Layout{.dp = 3, .pp = 2},
        Layout{.dp = 2, .pp = 2, .kind = ScheduleKind::kZeroBubbleH1},
        Layout{.dp = 3, .zero = 3}}) {
    SCOPED_TRACE(layout.Name());
    const auto dealt = Deal(layout.dp, RingItems(layout.dp, 5, 30, 4), config.vocabulary, 4);
    ASSERT_TRUE(dealt.ok()) << dealt.status();
    EXPECT_LT(ErrorOf(config, layout, {}, *dealt), 1e-9);
  }
}

// With the bits of every run alike, whatever arrives when.
TEST(ContextTest, SameBitsUnderDelaysAndOnFifoStreams) {
  const ModelConfig config = Config("llama", 2);
  const auto dealt = Deal(3, RingItems(3, 4, 40, 5), config.vocabulary, 5);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    const auto run = [&](StreamMode stream, int delay) {
      return StepOnThreads(config, {.dp = 3}, {.dtype = dtype, .stream = stream}, dealt->shares,
                           {.random_delay_us = delay, .delay_seed = 8});
    };
    const auto first = run(StreamMode::kInline, 0);
    ASSERT_TRUE(first.ok()) << first.status();
    for (const auto& other : {run(StreamMode::kInline, 200), run(StreamMode::kFifo, 100)}) {
      ASSERT_TRUE(other.ok()) << other.status();
      EXPECT_EQ(first->loss, other->loss);
      EXPECT_EQ(first->gradients, other->gradients);
    }
  }
}

// One document more, in another ring or in the same, adds its own gradient and changes nothing
// else.
TEST(ContextTest, DocumentsDoNotSeeEachOther) {
  const ModelConfig config = Config("qwen3");
  const std::vector<PlanItem> together = {
      {.tokens = 44, .lengths = {21, 3, 20}, .pipelines = {1, 2, 0}}};
  const auto dealt = Deal(3, together, config.vocabulary, 9);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  const auto all = StepOnThreads(config, {.dp = 3}, {}, dealt->shares);
  ASSERT_TRUE(all.ok()) << all.status();
  testing::StepOutcome sum;
  for (int64_t d = 0, first = 0; d < 3; ++d) {
    const int64_t length = together[0].lengths[static_cast<size_t>(d)];
    std::vector<std::vector<PackedBatch>> alone(3, std::vector<PackedBatch>(1));
    for (int place = 0; place < 3; ++place) {
      PackedBatch& share =
          alone[static_cast<size_t>(together[0].pipelines[static_cast<size_t>(place)])][0];
      share.Clear();
      share.ring.ranks = together[0].pipelines;
      share.ring.index = place;
      const PackedBatch& whole = dealt->whole[0][0];
      const auto read = [&](Range range, int64_t at) {
        const auto from = static_cast<ptrdiff_t>(first + range.first);
        const auto to = static_cast<ptrdiff_t>(at);
        std::copy_n(whole.ids.begin() + from, range.count, share.ids.begin() + to);
        std::copy_n(whole.targets.begin() + from, range.count, share.targets.begin() + to);
        std::copy_n(whole.weights.begin() + from, range.count, share.weights.begin() + to);
        return absl::OkStatus();
      };
      ASSERT_TRUE(AppendRingShare(length, read, &share).ok());
    }
    const auto one = StepOnThreads(config, {.dp = 3}, {}, alone);
    ASSERT_TRUE(one.ok()) << one.status();
    sum.loss += one->loss;
    sum.tokens += one->tokens;
    for (const auto& [name, values] : one->gradients) {
      std::vector<double>& to = sum.gradients[name];
      to.resize(values.size());
      for (size_t i = 0; i < values.size(); ++i) to[i] += values[i];
    }
    first += length;
  }
  const StepError error = CompareSteps(sum, *all);
  EXPECT_LT(error.worst, 1e-9) << error.where;
}

// Plans of every schedule, whose items one to all pipelines share in any order: nothing waits in a
// circle, whatever is late.
TEST(ContextTest, RandomPlansOnRealRanksDoNotHang) {
  ModelConfig config = Config("llama");
  config.vocabulary = 11;
  config.hidden = 8;
  config.head_dim = 4;
  config.ffn = 9;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const testing::RandomShape shape = testing::DrawShape(seed, 6);
    const Layout layout = {.dp = shape.pipelines,
                           .pp = shape.pipeline_ranks,
                           .kind = shape.kind,
                           .chunks = shape.chunks};
    config.layers = layout.pp * layout.chunks;
    const auto dealt =
        Deal(layout.dp, testing::DrawItems(layout.dp, seed), config.vocabulary, seed);
    ASSERT_TRUE(dealt.ok()) << dealt.status();
    const WorldOptions world = {.random_delay_us = 20, .delay_seed = seed + 1};
    if (seed % 3 == 0) {
      ASSERT_LT(ErrorOf(config, layout, {}, *dealt, world), 1e-9);
    } else {
      const auto step = StepOnThreads(config, layout, {}, dealt->shares, world);
      ASSERT_TRUE(step.ok()) << step.status();
    }
  }
}

// Attention that is told something wrong about the ring.
class SpoiledRing : public internal::RingAttentionLayer {
 public:
  using Spoil = void (*)(RingViews&);
  SpoiledRing(SlotId qkv, const AttentionOptions& options, SlotId* o, Spoil spoil)
      : RingAttentionLayer(qkv, options, o), spoil_(spoil) {}

 private:
  void Attend(Run& run, Frame& frame, const Parts& in) const override {
    if (frame.tokens.ring == nullptr) return RingAttentionLayer::Attend(run, frame, in);
    RingViews wrong = *frame.tokens.ring;
    spoil_(wrong);
    Frame spoiled = frame;
    spoiled.tokens.ring = &wrong;
    RingAttentionLayer::Attend(run, spoiled, in);
  }
  Spoil spoil_;
};

double ErrorWith(SpoiledRing::Spoil spoil) {
  const ModelConfig config = Config("llama");
  const auto dealt =
      Deal(3, {{.tokens = 50, .lengths = {31, 19}, .pipelines = {2, 0, 1}}}, config.vocabulary, 6);
  EXPECT_TRUE(dealt.ok()) << dealt.status();
  StepOptions options;
  options.layers = [=](Strategies& strategies) {
    strategies.attention = [=](SlotId qkv, const AttentionOptions& o, SlotId* out) {
      return std::make_unique<SpoiledRing>(qkv, o, out, spoil);
    };
  };
  // Only the model on three ranks is spoiled: on one there is no ring.
  return ErrorOf(config, {.dp = 3}, options, *dealt);
}

TEST(ContextTest, NegativeControls) {
  EXPECT_LT(ErrorWith([](RingViews&) {}), 1e-9);
  // Places before this one are taken for places behind it: the back sees all of their keys.
  EXPECT_GT(ErrorWith([](RingViews& ring) {
              for (int p = 0; p < ring.index; ++p) {
                RingViews::Place& place = ring.places[static_cast<size_t>(p)];
                place.front = {};
                place.longest_front = place.longest;
              }
            }),
            1e-4);
  // The front sees keys behind it.
  EXPECT_GT(ErrorWith([](RingViews& ring) {
              ring.back_cu = ring.places[static_cast<size_t>(ring.index)].cu;
              ring.back_lengths = {};
              ring.longest_back = ring.places[static_cast<size_t>(ring.index)].longest;
            }),
            1e-4);
  // One place's keys are left out.
  EXPECT_GT(ErrorWith([](RingViews& ring) {
              if (ring.index == 1) ring.places[0].longest_front = 0;
            }),
            1e-4);
}

TEST(ContextTest, AWrongPositionShows) {
  const ModelConfig config = Config("llama");
  auto dealt =
      Deal(2, {{.tokens = 30, .lengths = {30}, .pipelines = {1, 0}}}, config.vocabulary, 6);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  EXPECT_LT(ErrorOf(config, {.dp = 2}, {}, *dealt), 1e-9);
  ++dealt->shares[0][0].positions[3];
  EXPECT_GT(ErrorOf(config, {.dp = 2}, {}, *dealt), 1e-4);
}

// Over the ring: (D - 1) T tokens' keys forward; the same and gradients in f64 backward.
TEST(ContextTest, BytesAreThoseOfTheFormula) {
  const ModelConfig config = Config("qwen3", 2);
  const std::vector<PlanItem> items = {
      {.tokens = 41, .lengths = {40, 1}, .pipelines = {3, 1, 0, 2}},
      {.tokens = 17, .lengths = {17}, .pipelines = {0, 2}},
      {.tokens = 9, .lengths = {9}, .pipelines = {1}}};
  const auto dealt = Deal(4, items, config.vocabulary, 6);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  for (const Recompute recompute : {Recompute::kNone, Recompute::kBlock}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      // StepUnder compares what each rank has sent with RingBytes.
      const auto step =
          StepOnThreads(config, {.dp = 4}, {.dtype = dtype, .recompute = recompute}, dealt->shares);
      ASSERT_TRUE(step.ok()) << step.status();
      const int64_t travels = 3 * 41 + 1 * 17, width = 2 * config.kv_heads * config.head_dim;
      const int64_t passes = recompute == Recompute::kNone ? 2 : 3;
      EXPECT_EQ(step->ring_bytes,
                config.layers * travels * width * (passes * SizeOf(dtype) + SizeOf(DType::kF32)));
    }
  }
}

TEST(ContextTest, OneRankHasTheBitsOfLocalAttentionAndSendsNothing) {
  const ModelConfig config = Config("qwen3", 2);
  const auto batches = testing::UnevenBatches(config.vocabulary, 2);
  const auto local = StepOnThreads(config, {.dp = 2}, {.dtype = DType::kF32}, batches);
  StepOptions options = {.dtype = DType::kF32};
  options.layers = [](Strategies& s) { s.attention = ContextStrategies(2).attention; };
  const auto ring = StepOnThreads(config, {.dp = 2}, options, batches);
  ASSERT_TRUE(local.ok() && ring.ok()) << local.status() << ring.status();
  EXPECT_EQ(local->loss, ring->loss);
  EXPECT_EQ(local->gradients, ring->gradients);
  EXPECT_EQ(ring->ring_bytes, 0);
}

TEST(ContextTest, WrongUseIsOneSentence) {
  const ModelConfig config = Config("llama");
  const auto dealt =
      Deal(2, {{.tokens = 30, .lengths = {30}, .pipelines = {1, 0}}}, config.vocabulary, 6);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  StepOptions local;
  local.layers = [](Strategies& s) { s.attention = LocalStrategies().attention; };
  const auto without = StepOnThreads(config, {.dp = 2}, local, dealt->shares);
  EXPECT_THAT(std::string(without.status().message()), HasSubstr("ContextStrategies"));

  const auto stream = Stream::Create(Device::Cpu());
  ASSERT_TRUE(stream.ok());
  Budget budget(-1, -1, -1);
  const auto message = [&](const RingCapacity& rings, PackedBatch batch, int64_t tokens = 20) {
    auto feeder = TokenFeeder::Create(**stream, tokens, budget, rings);
    EXPECT_TRUE(feeder.ok());
    return std::string((*feeder)->Feed(batch).status().message());
  };
  PackedBatch share = dealt->shares[0][0];
  EXPECT_EQ(message({.ranks = 2, .shares = 2}, share), "");
  EXPECT_THAT(message({}, share), HasSubstr("made for 1 ranks and 0 shares"));
  EXPECT_THAT(message({.ranks = 2, .shares = 1}, share), HasSubstr("1 documents"));
  EXPECT_THAT(message({.ranks = 2, .shares = 2}, share, 14), HasSubstr("15 tokens"));
  share.ring.lengths[0] = 33;
  EXPECT_THAT(message({.ranks = 2, .shares = 2}, share), HasSubstr("of document 0 of 33, not 1"));
  share.ring.index = 2;
  EXPECT_THAT(message({.ranks = 2, .shares = 2}, share), HasSubstr("place 2 of a ring of 2"));
}

}  // namespace
}  // namespace stretto
