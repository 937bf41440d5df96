// Training with FP8 layers on threads: as good as bf16, the same bits after a restart, and scales
// that all ranks share.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "stretto/train/memory.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TinyRun;
using testing::TrainOnThreads;

// Widths that FP8 layers take.
TrainConfig Float8Run(const ScratchDirectory& directory, const std::string& family,
                      const std::string& fp8) {
  TrainConfig c = TinyRun(directory, family);
  c.model.hidden = 32;
  c.model.head_dim = 16;
  c.model.ffn = 64;
  c.runtime.dtype = "bf16";
  c.runtime.fp8 = fp8;
  return c;
}

// Mean loss of the last `n` steps.
double LateLoss(const RunRecord& record, size_t n) {
  double sum = 0;
  for (size_t i = record.steps.size() - n; i < record.steps.size(); ++i) {
    sum += record.steps[i].loss;
  }
  return sum / static_cast<double>(n);
}

class Float8Training : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Families, Float8Training, ::testing::Values("gpt2", "qwen3"),
                         [](const auto& info) { return info.param; });

// Over three seeds, since a run and its twin with other roundings drift apart by a percent or two
// either way.
TEST_P(Float8Training, LearnsAsBf16Does) {
  ScratchDirectory directory;
  struct Losses {
    double late = 0, held_out = 0;
  };
  const auto train = [&](const std::string& fp8) {
    Losses sum;
    for (int64_t seed : {0, 1, 2}) {
      TrainConfig c = Float8Run(directory, GetParam(), fp8);
      c.seed = seed;
      c.steps = 250;
      c.batch.global = 16;
      c.batch.micro = 8;
      c.optimizer.lr = 2e-3;
      c.optimizer.warmup = 20;
      const RunRecord record = TrainOnThreads(1, c);
      EXPECT_TRUE(record.status.ok()) << record.status;
      if (!record.status.ok()) break;
      sum.late += LateLoss(record, 20) / 3;
      sum.held_out += record.eval_loss / 3;
      EXPECT_LT(LateLoss(record, 20), 0.2 * record.steps.front().loss);  // there is much to learn
    }
    return sum;
  };
  const Losses bf16 = train("none");
  for (const char* fp8 : {"e4m3", "hybrid"}) {
    const Losses losses = train(fp8);
    const double gap = losses.late / bf16.late - 1;
    const double held_out_gap = losses.held_out / bf16.held_out - 1;
    std::printf("%s %s: loss of steps 231 to 250 %+.2f %%, held-out loss %+.2f %% against bf16\n",
                GetParam().c_str(), fp8, 100 * gap, 100 * held_out_gap);
    EXPECT_LT(std::fabs(gap), 0.015) << fp8;
    EXPECT_LT(std::fabs(held_out_gap), 0.015) << fp8;
    EXPECT_NE(losses.late, bf16.late);
  }
}

TEST(Float8Trainer, AnyNumberOfRanksLearnsTheSame) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "gpt2", "hybrid");
  config.steps = 20;
  const RunRecord one = TrainOnThreads(1, config);
  ASSERT_TRUE(one.status.ok()) << one.status;
  EXPECT_LT(one.steps.back().loss, 0.8 * one.steps.front().loss);
  for (int ranks : {2, 3}) {
    const RunRecord many = TrainOnThreads(ranks, config);
    ASSERT_TRUE(many.status.ok()) << many.status;
    for (size_t i = 0; i < one.steps.size(); ++i) {
      EXPECT_NEAR(many.steps[i].loss, one.steps[i].loss, 5e-3 * one.steps[i].loss)
          << ranks << " ranks, step " << i + 1;
    }
    EXPECT_NEAR(many.eval_loss, one.eval_loss, 5e-3 * one.eval_loss);
    const RunRecord again = TrainOnThreads(ranks, config);
    EXPECT_EQ(again.parameters, many.parameters);
  }
}

class Float8Resume : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(AfterSteps, Float8Resume, ::testing::Values(1, 5),
                         [](const auto& info) { return "Step" + std::to_string(info.param); });

TEST_P(Float8Resume, GoesOnInTheSameBits) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "gpt2", "hybrid");
  config.steps = 12;
  config.optimizer.schedule = "constant";  // does not depend on the number of steps
  const RunRecord reference = TrainOnThreads(2, config);
  ASSERT_TRUE(reference.status.ok()) << reference.status;

  TrainConfig first = config;
  first.steps = GetParam();
  ASSERT_TRUE(TrainOnThreads(2, first, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  TrainConfig rest = config;
  rest.checkpoint.resume = "must";
  const RunRecord same = TrainOnThreads(2, rest);
  ASSERT_TRUE(same.status.ok()) << same.status;
  EXPECT_EQ(same.parameters, reference.parameters);
  EXPECT_EQ(same.steps.back().loss, reference.steps.back().loss);
  EXPECT_EQ(same.eval_loss, reference.eval_loss);

  const RunRecord other = TrainOnThreads(3, rest);
  ASSERT_TRUE(other.status.ok()) << other.status;
  EXPECT_NEAR(other.steps.back().loss, reference.steps.back().loss,
              5e-3 * reference.steps.back().loss);

  rest.runtime.fp8 = "none";
  const RunRecord bf16 = TrainOnThreads(1, rest);
  EXPECT_THAT(std::string(bf16.status.message()), HasSubstr("runtime.fp8"));
  // Its weights can be taken without the rest.
  TrainConfig fresh = config;
  fresh.runtime.fp8 = "none";
  fresh.output = directory / "fresh";
  fresh.checkpoint.initial = config.output + "/checkpoints";
  const RunRecord from_weights = TrainOnThreads(1, fresh);
  ASSERT_TRUE(from_weights.status.ok()) << from_weights.status;
}

// After a restart all ranks have the scales of one. Had they had their own, which over so many
// steps and with samples of their own would have drifted apart, the bits would change.
TEST(Float8Trainer, RanksShareTheirScales) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "gpt2", "hybrid");
  config.steps = 45;
  config.batch.global = 4;
  config.batch.micro = 1;
  config.optimizer.schedule = "constant";
  const RunRecord reference = TrainOnThreads(4, config);
  ASSERT_TRUE(reference.status.ok()) << reference.status;
  TrainConfig first = config, rest = config;
  first.steps = 30;
  ASSERT_TRUE(TrainOnThreads(4, first, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  rest.checkpoint.resume = "must";
  const RunRecord same = TrainOnThreads(4, rest);
  ASSERT_TRUE(same.status.ok()) << same.status;
  EXPECT_EQ(same.parameters, reference.parameters);
}

TEST(Float8Trainer, EvaluationBetweenStepsChangesNoBit) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "gpt2", "e4m3");
  const auto losses = [&](bool evaluating) {
    std::vector<double> seen;
    const absl::Status status = World::RunThreads(1, [&](World& world) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
      while (trainer->step() < config.steps) {
        if (evaluating) STRETTO_RETURN_IF_ERROR(trainer->Evaluate().status());
        STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
        seen.push_back(stats.loss);
      }
      return trainer->Finish();
    });
    EXPECT_TRUE(status.ok()) << status;
    return seen;
  };
  EXPECT_EQ(losses(true), losses(false));
}

TEST(Float8Trainer, StreamsAndRecomputationChangeNoBit) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "qwen3", "hybrid");
  const RunRecord plain = TrainOnThreads(2, config);
  ASSERT_TRUE(plain.status.ok()) << plain.status;
  config.runtime.stream = "fifo";
  config.runtime.recompute = "block";
  EXPECT_EQ(TrainOnThreads(2, config).parameters, plain.parameters);
  config.runtime.recompute = "norms";
  config.parallel.overlap = false;
  EXPECT_EQ(TrainOnThreads(2, config).parameters, plain.parameters);
}

TEST(Float8Trainer, ThePlanShowsWhatItTakes) {
  ScratchDirectory directory;
  TrainConfig config = Float8Run(directory, "gpt2", "hybrid");
  ASSERT_TRUE(config.Resolve(2).ok());
  const RunPlan fp8 = PlanRun(config, 2, 0).value();
  EXPECT_THAT(fp8.MemoryTable(), HasSubstr("fp8 weights"));
  config.runtime.fp8 = "none";
  const RunPlan bf16 = PlanRun(config, 2, 0).value();
  EXPECT_THAT(bf16.MemoryTable(), ::testing::Not(HasSubstr("fp8")));
  EXPECT_GT(fp8.scalar_bytes_sent, bf16.scalar_bytes_sent);

  config.runtime.fp8 = "e4m3";
  config.runtime.dtype = "f32";
  EXPECT_THAT(std::string(config.Resolve(1).message()), HasSubstr("runtime.fp8 is e4m3"));
}

}  // namespace
}  // namespace stretto
