// The trainer with ZeRO-2 and 3: the losses, norms and parameters of one rank, alone and with
// pipelines; bytes on the wire; checkpoints between all levels.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/train/memory.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using testing::Precision;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TinyRun;
using testing::TrainOnThreads;

struct Layout {
  int zero = 2, dp = 2, pp = 1;
  std::string schedule = "1f1b";
  int chunks = 0;
  int ranks() const { return dp * pp; }
};
void PrintTo(const Layout& l, std::ostream* out) {
  *out << "zero " << l.zero << ", dp " << l.dp << ", pp " << l.pp << ", " << l.schedule;
}

TrainConfig With(TrainConfig config, const Layout& layout) {
  config.parallel.zero = layout.zero;
  config.parallel.dp = layout.dp;
  config.parallel.pp = layout.pp;
  config.parallel.schedule = layout.schedule;
  config.parallel.chunks = layout.chunks;
  return config;
}

TrainConfig FiveBlocks(const ScratchDirectory& directory, const std::string& family, bool tied) {
  TrainConfig config = TinyRun(directory, family);
  config.model.layers = 5;
  config.model.tie_embeddings = tied;
  config.runtime.dtype = "f64";
  config.steps = 4;
  return config;
}

void ExpectNear(const RunRecord& got, const RunRecord& expected, double tolerance) {
  ASSERT_TRUE(got.status.ok()) << got.status.message();
  ASSERT_TRUE(expected.status.ok()) << expected.status.message();
  ASSERT_EQ(got.steps.size(), expected.steps.size());
  for (size_t i = 0; i < got.steps.size(); ++i) {
    EXPECT_NEAR(got.steps[i].loss / expected.steps[i].loss, 1, tolerance) << "step " << i + 1;
    EXPECT_NEAR(got.steps[i].grad_norm / expected.steps[i].grad_norm, 1, tolerance)
        << "step " << i + 1;
    EXPECT_EQ(got.steps[i].tokens, expected.steps[i].tokens);
  }
  EXPECT_NEAR(got.eval_loss / expected.eval_loss, 1, tolerance);
}

void ExpectSameBits(const RunRecord& got, const RunRecord& expected) {
  ExpectNear(got, expected, 0);
  EXPECT_EQ(got.parameters, expected.parameters);
}

class ZeroTrainer : public ::testing::TestWithParam<Layout> {};

TEST_P(ZeroTrainer, FollowsOneRank) {
  for (const bool tied : {true, false}) {
    const std::string family = tied ? "gpt2" : "qwen3";
    SCOPED_TRACE(family);
    const ScratchDirectory directory;
    TrainConfig config = FiveBlocks(directory, family, tied);
    config.optimizer.clip_norm = 0.5;  // below the norm, so that it matters
    const RunRecord one = TrainOnThreads(1, config);
    const TrainConfig many = With(config, GetParam());
    const RunRecord plain = TrainOnThreads(GetParam().ranks(), many);
    ExpectNear(plain, one, 1e-9);
    // The same bits again, however long messages take.
    ExpectSameBits(TrainOnThreads(GetParam().ranks(), many,
                                  {.random_delay_us = 200, .delay_seed = 3}),
                   plain);
    TrainConfig single = config;
    single.runtime.dtype = "f32";
    ExpectNear(TrainOnThreads(GetParam().ranks(), With(single, GetParam())),
               TrainOnThreads(1, single), 1e-5);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, ZeroTrainer,
    ::testing::Values(Layout{2, 2}, Layout{2, 3}, Layout{2, 4}, Layout{3, 2}, Layout{3, 3},
                      Layout{3, 4}, Layout{3, 8}, Layout{2, 2, 2}, Layout{3, 2, 2},
                      Layout{2, 3, 2, "gpipe"}, Layout{3, 3, 2, "gpipe"}, Layout{2, 2, 2, "zb-h1"},
                      Layout{3, 2, 2, "zb-h1"}, Layout{2, 2, 2, "v-shaped"},
                      Layout{3, 2, 2, "v-shaped"}, Layout{3, 2, 2, "interleaved"}),
    [](const auto& info) {
      std::string name = info.param.schedule;
      std::erase_if(name, [](char c) { return c == '-'; });
      return absl::StrCat("Zero", info.param.zero, "Dp", info.param.dp, "Pp", info.param.pp, name);
    });

}  // namespace
}  // namespace stretto
