// The trainer on threads: any number of ranks learns the same, in the same bits every time, and a
// run that was interrupted goes on as if it had not been.
#include "stretto/train/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <utility>
#include <vector>

#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/train/memory.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using testing::RunRecord;
using testing::ScratchDirectory;
using testing::TinyRun;
using testing::TrainOnThreads;

void ExpectSameBits(const RunRecord& a, const RunRecord& b) {
  ASSERT_TRUE(a.status.ok()) << a.status;
  ASSERT_TRUE(b.status.ok()) << b.status;
  ASSERT_FALSE(a.parameters.empty());
  EXPECT_EQ(a.parameters, b.parameters);
  EXPECT_EQ(a.eval_loss, b.eval_loss);
  ASSERT_EQ(a.steps.size(), b.steps.size());
  for (size_t i = 0; i < a.steps.size(); ++i) {
    EXPECT_EQ(a.steps[i].loss, b.steps[i].loss) << "step " << i + 1;
    EXPECT_EQ(a.steps[i].grad_norm, b.steps[i].grad_norm) << "step " << i + 1;
  }
}

class TrainerFamilies : public ::testing::TestWithParam<std::string> {};

TEST_P(TrainerFamilies, AnyNumberOfRanksLearnsTheSame) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory, GetParam());
  config.steps = 20;
  const RunRecord one = TrainOnThreads(1, config);
  ASSERT_TRUE(one.status.ok()) << one.status;
  EXPECT_LT(one.steps.back().loss, 0.8 * one.steps.front().loss);  // it learns
  for (int ranks : {2, 3, 4, 8}) {
    const RunRecord many = TrainOnThreads(ranks, config);
    ASSERT_TRUE(many.status.ok()) << many.status;
    ASSERT_EQ(many.steps.size(), one.steps.size());
    for (size_t i = 0; i < one.steps.size(); ++i) {
      EXPECT_NEAR(many.steps[i].loss, one.steps[i].loss, 1e-5 * one.steps[i].loss)
          << ranks << " ranks, step " << i + 1;
      EXPECT_EQ(many.steps[i].tokens, one.steps[i].tokens);
    }
    EXPECT_NEAR(many.eval_loss, one.eval_loss, 1e-5 * one.eval_loss);
  }
}
INSTANTIATE_TEST_SUITE_P(Families, TrainerFamilies,
                         ::testing::Values("gpt2", "llama", "qwen2", "qwen3"),
                         [](const auto& info) { return info.param; });

TEST(Trainer, SumsAreExactInDoublePrecision) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.runtime.dtype = "f64";
  const RunRecord one = TrainOnThreads(1, config);
  const RunRecord five = TrainOnThreads(5, config);
  ASSERT_TRUE(one.status.ok() && five.status.ok()) << one.status << five.status;
  for (size_t i = 0; i < one.steps.size(); ++i) {
    EXPECT_NEAR(five.steps[i].loss, one.steps[i].loss, 1e-9);
    EXPECT_NEAR(five.steps[i].grad_norm, one.steps[i].grad_norm, 1e-9);
  }
}

TEST(Trainer, SameBitsUnderRandomDelaysAndWithoutOverlap) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  const RunRecord plain = TrainOnThreads(3, config);
  ExpectSameBits(plain, TrainOnThreads(3, config));
  for (uint64_t seed : {1, 2}) {
    WorldOptions slow;
    slow.random_delay_us = 2000;
    slow.delay_seed = seed;
    ExpectSameBits(plain, TrainOnThreads(3, config, slow));
  }
  config.parallel.overlap = false;
  ExpectSameBits(plain, TrainOnThreads(3, config));
  config.parallel.overlap = true;
  config.runtime.stream = "fifo";
  ExpectSameBits(plain, TrainOnThreads(3, config));
  config.runtime.recompute = "block";
  ExpectSameBits(plain, TrainOnThreads(3, config));
}

TEST(Trainer, Bf16LearnsLikeF32) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 15;
  const RunRecord f32 = TrainOnThreads(2, config);
  config.runtime.dtype = "bf16";
  const RunRecord bf16 = TrainOnThreads(2, config);
  ASSERT_TRUE(bf16.status.ok()) << bf16.status;
  EXPECT_NEAR(bf16.steps.back().loss, f32.steps.back().loss, 0.05 * f32.steps.back().loss);
}

using testing::Precision;
class TrainerResume : public ::testing::TestWithParam<Precision> {};

TEST_P(TrainerResume, GoesOnAsIfNothingHadHappened) {
  ScratchDirectory directory;
  TrainConfig config = GetParam().Of(TinyRun(directory));
  config.steps = 9;
  config.optimizer.schedule = "constant";  // does not depend on the number of steps
  const RunRecord reference = TrainOnThreads(2, config);
  ASSERT_TRUE(reference.status.ok()) << reference.status;

  TrainConfig half = config;
  half.steps = 4;
  half.checkpoint.resume = "auto";
  ASSERT_TRUE(TrainOnThreads(2, half, {}, [](Trainer& t) { return t.Save(); }).status.ok());

  TrainConfig rest = config;
  rest.checkpoint.resume = "must";
  const RunRecord same = TrainOnThreads(2, rest);
  ASSERT_TRUE(same.status.ok()) << same.status;
  ASSERT_EQ(same.steps.size(), 5u);
  EXPECT_EQ(same.steps.front().step, 5);
  EXPECT_EQ(same.parameters, reference.parameters);
  EXPECT_EQ(same.steps.back().loss, reference.steps.back().loss);

  // A moment of bf16 that is rounded the other way is another number by up to 1/128.
  const double tolerance = GetParam().name == "F32" ? 1e-5 : 2e-3;
  for (int ranks : {1, 3}) {
    const RunRecord other = TrainOnThreads(ranks, rest);
    ASSERT_TRUE(other.status.ok()) << other.status;
    for (size_t i = 0; i < other.steps.size(); ++i) {
      EXPECT_NEAR(other.steps[i].loss, reference.steps[i + 4].loss,
                  tolerance * reference.steps[i + 4].loss);
    }
  }
}

// Random numbers belong to elements of parameters, not to ranks. One sample for each rank, so that
// the same two gradients are added on one rank and on two.
TEST_P(TrainerResume, TwoRanksHaveTheBitsOfOne) {
  if (GetParam().dtype != "bf16") GTEST_SKIP() << "gradients of f32 are added inside products";
  ScratchDirectory directory;
  TrainConfig config = GetParam().Of(TinyRun(directory));
  config.steps = 5;
  config.batch.global = 2;
  config.batch.micro = 1;
  config.optimizer.clip_norm = 0;  // the norm is summed in another order
  const RunRecord one = TrainOnThreads(1, config), two = TrainOnThreads(2, config);
  ASSERT_TRUE(one.status.ok()) << one.status;
  ASSERT_TRUE(two.status.ok()) << two.status;
  EXPECT_TRUE(one.parameters == two.parameters);
}
INSTANTIATE_TEST_SUITE_P(Precisions, TrainerResume, ::testing::ValuesIn(testing::AllPrecisions()),
                         [](const auto& info) { return info.param.name; });

TEST(Trainer, StochasticRoundingLearnsLikeF32) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory, "gpt2");
  config.steps = 150;
  config.model.hidden = 32;
  config.model.head_dim = 16;
  config.model.ffn = 64;
  config.batch.global = 16;
  config.batch.micro = 16;
  config.optimizer.lr = 2e-3;
  config.optimizer.beta2 = 0.99;
  const RunRecord f32 = TrainOnThreads(1, config);
  ASSERT_TRUE(f32.status.ok()) << f32.status;
  EXPECT_LT(f32.eval_loss, 0.6 * f32.steps.front().loss);
  for (const Precision& precision : testing::AllPrecisions()) {
    if (precision.moments == "f32" && precision.masters) continue;
    const RunRecord record = TrainOnThreads(1, precision.Of(config));
    ASSERT_TRUE(record.status.ok()) << record.status;
    EXPECT_NEAR(record.eval_loss / f32.eval_loss, 1, 0.015) << precision.name;
  }
}

TEST(Trainer, OffloadChangesNothingOnTheCpu) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  const RunRecord plain = TrainOnThreads(2, config);
  config.optimizer.offload = true;
  ExpectSameBits(plain, TrainOnThreads(2, config));
}

TEST(Trainer, InitialValuesDoNotDependOnThreads) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 1;
  config.optimizer.lr = 0;
  const RunRecord one = TrainOnThreads(1, config);
  config.runtime.threads = 3;
  const RunRecord three = TrainOnThreads(1, config);
  ASSERT_TRUE(one.status.ok() && three.status.ok()) << one.status << three.status;
  EXPECT_EQ(one.parameters, three.parameters);
}

TEST(Trainer, GoesBackToAnOlderCheckpointWhenTheNewestIsDamaged) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.checkpoint.resume = "auto";
  const auto save = [](Trainer& t) { return t.Save(); };
  for (int64_t steps : {2, 4}) {
    config.steps = steps;
    ASSERT_TRUE(TrainOnThreads(2, config, {}, save).status.ok());
  }
  const std::string shard =
      directory / "run/checkpoints/step-00000004/" + "shard-00002-model-00001-of-00001.safetensors";
  {
    std::fstream file(shard, std::ios::in | std::ios::out | std::ios::binary);
    ASSERT_TRUE(file.good());
    file.seekg(-5, std::ios::end);
    const char byte = static_cast<char>(file.peek() ^ 0x10);
    file.seekp(-5, std::ios::end);
    file.put(byte);
  }
  config.steps = 6;
  const RunRecord record = TrainOnThreads(2, config);
  ASSERT_TRUE(record.status.ok()) << record.status;
  EXPECT_EQ(record.steps.front().step, 3);
}

TEST(Trainer, RefusesCheckpointWithAnotherDataOrder) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 2;
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  config.checkpoint.resume = "must";
  config.batch.global = 8;
  EXPECT_THAT(std::string(TrainOnThreads(2, config).status.message()),
              HasSubstr("batch.global = 11, not 8"));
}

// Once, whatever the number of ranks.
TEST(Trainer, WarmUpLongerThanTheRunIsAWarning) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 2;
  for (const int64_t warmup : {2, 3}) {
    std::vector<std::string> said;
    SetLogSink([&](LogLevel level, const std::string& line) {
      if (level == LogLevel::kWarning) said.push_back(line);
    });
    config.optimizer.warmup = warmup;
    const RunRecord record = TrainOnThreads(2, config);
    SetLogSink({});
    ASSERT_TRUE(record.status.ok()) << record.status;
    ASSERT_EQ(said.size(), warmup > config.steps ? 1u : 0u);
    if (!said.empty()) {
      EXPECT_THAT(said[0], HasSubstr("optimizer.warmup is 3 but the run has only 2 steps"));
    }
  }
}

// Going on with other tokens may be meant. Said once, also where the checkpoint is gone by then for
// a newer one.
TEST(Trainer, SaysThatItGoesOnWithOtherTokens) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.checkpoint.resume = "auto";
  for (config.steps = 2; config.steps <= 4; config.steps += 2) {
    ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  }
  const std::string step = directory / "run/checkpoints/step-0000000", later = directory / "later";
  std::filesystem::rename(step + "4", later);
  std::vector<std::string> said;
  bool move = false;
  SetLogSink([&](LogLevel, const std::string& line) {
    if (line.find("other tokens") == std::string::npos) return;
    said.push_back(line);
    if (!std::exchange(move, false)) return;
    std::filesystem::rename(later, step + "4");
    std::filesystem::remove_all(step + "2");
  });
  config.steps = 3;
  EXPECT_TRUE(TrainOnThreads(2, config).status.ok());
  EXPECT_THAT(said, ::testing::IsEmpty());
  config.data.train = directory / "other.bin";
  ASSERT_TRUE(WriteTokenFile(config.data.train, testing::GeneratedTokens(4000, 9), 257).ok());
  EXPECT_TRUE(TrainOnThreads(2, config).status.ok());
  ASSERT_EQ(said.size(), 1u);
  EXPECT_THAT(said[0], HasSubstr("step-00000002 was written in a run on other tokens"));
  EXPECT_THAT(said[0], HasSubstr("other.bin"));
  move = true;
  config.steps = 6;
  const RunRecord record = TrainOnThreads(1, config);
  SetLogSink({});
  ASSERT_TRUE(record.status.ok()) << record.status;
  EXPECT_EQ(record.steps.front().step, 5);
  EXPECT_FALSE(move);
}

// Settings that no tensor's shape shows.
TEST(Trainer, RefusesCheckpointOfAnotherModel) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 2;
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  config.checkpoint.resume = "must";
  TrainConfig other = config;
  other.model.rope_theta = 5000;
  EXPECT_THAT(std::string(TrainOnThreads(1, other).status.message()),
              HasSubstr("model.rope_theta"));
  other = config;
  other.runtime.dtype = "bf16";
  EXPECT_THAT(std::string(TrainOnThreads(1, other).status.message()), HasSubstr("runtime.dtype"));
  other = config;
  other.optimizer.moments = "bf16";
  EXPECT_THAT(std::string(TrainOnThreads(1, other).status.message()),
              HasSubstr("optimizer.moments = \"f32\", not \"bf16\""));
  other = config;
  other.optimizer.masters = false;
  EXPECT_THAT(std::string(TrainOnThreads(1, other).status.message()),
              HasSubstr("optimizer.masters = true, not false"));
  other = config;
  other.seed = 2;
  EXPECT_THAT(std::string(TrainOnThreads(1, other).status.message()), HasSubstr("seed = 1, not 2"));
  other = config;
  other.output = directory / "other";
  other.checkpoint.resume = "never";
  other.checkpoint.initial = config.output + "/checkpoints";
  other.runtime.dtype = "bf16";  // starting from given weights may convert them
  EXPECT_TRUE(TrainOnThreads(1, other).status.ok());
  EXPECT_TRUE(TrainOnThreads(1, config).status.ok());
}

TEST(Trainer, EverythingThatTakesMemoryDrawsOnTheBudget) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 1;
  config.runtime.host_memory_bytes = int64_t{40} << 20;
  const absl::Status status = TrainOnThreads(1, config).status;
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status.message();
  EXPECT_THAT(std::string(status.message()), HasSubstr("matrix products"));
  config.runtime.host_memory_bytes = int64_t{80} << 20;
  EXPECT_TRUE(TrainOnThreads(1, config).status.ok());
}

// One rank has room for its shard, which is smaller than the other one's: both hear of it, and go
// on in the same world.
TEST(Trainer, WithoutRoomOnOneRankTheWorldGoesOn) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 1;
  config.optimizer.warmup = 0;
  config.model.vocabulary += 1 - config.model.vocabulary % 2;  // rows that two ranks cannot halve
  TrainConfig resolved = config;
  ASSERT_TRUE(resolved.Resolve(2).ok());
  const auto larger = PlanRun(resolved, 2, 0), smaller = PlanRun(resolved, 2, 1);
  ASSERT_TRUE(larger.ok() && smaller.ok());
  ASSERT_GT(larger->arena_bytes, smaller->arena_bytes);
  const auto with = [&](int64_t bytes) {
    TrainConfig c = config;
    c.runtime.host_memory_bytes = bytes;
    return c;
  };
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    int64_t low = 1, high = int64_t{1} << 32;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      const absl::Status made = Trainer::Create(world, with(middle)).status();
      EXPECT_EQ(made.ok(), !IsNoRoom(made)) << made;
      (made.ok() ? high : low) = middle;
    }
    const absl::Status refused = Trainer::Create(world, with(low)).status();
    EXPECT_TRUE(IsNoRoom(refused) && IsAgreed(refused)) << refused;
    EXPECT_THAT(std::string(refused.message()), HasSubstr("rank 0 failed in"));
    STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, with(high)));
    STRETTO_RETURN_IF_ERROR(trainer->Step().status());
    return trainer->Finish();
  });
  EXPECT_TRUE(status.ok()) << status;
  // The same code of another place.
  const absl::Status other = absl::ResourceExhaustedError("too many open files");
  EXPECT_FALSE(IsNoRoom(other));
  const absl::Status agreed =
      World::RunThreads(1, [&](World& world) { return world.Agree("opening the data", other); });
  EXPECT_TRUE(absl::IsResourceExhausted(agreed) && !IsNoRoom(agreed)) << agreed;
}

// What starting again cannot heal is told from what it may.
TEST(Trainer, ExitCodesTellMistakesFromFailures) {
  ScratchDirectory directory;
  const TrainConfig good = TinyRun(directory);
  const auto code = [&](const std::function<void(TrainConfig&)>& change) {
    TrainConfig config = good;
    config.steps = 1;
    change(config);
    // The statuses of several ranks are those that a program sees.
    return TrainerExitCode(World::RunThreads(
        2, [&](World& world) { return Trainer::Create(world, config).status(); }));
  };
  EXPECT_EQ(code([](TrainConfig&) {}), kExitDone);
  const auto absent = [&](TrainConfig& c) { c.data.train = directory / "absent.bin"; };
  EXPECT_EQ(code(absent), kExitUsage);
  EXPECT_EQ(code([](TrainConfig& c) { c.parallel.dp = 3; }), kExitUsage);
  EXPECT_EQ(code([](TrainConfig& c) { c.data.tokenizer = "none.tiktoken"; }), kExitUsage);
  EXPECT_EQ(code([](TrainConfig& c) { c.checkpoint.resume = "must"; }), kExitUsage);
  EXPECT_EQ(code([](TrainConfig& c) { c.checkpoint.initial = "absent"; }), kExitUsage);
  EXPECT_EQ(code([](TrainConfig& c) { c.runtime.host_memory_bytes = 1 << 20; }), kExitFailed);
  // Later the same codes say something else: a file that is gone may come back.
  EXPECT_EQ(TrainerExitCode(absl::NotFoundError("a token file is gone")), kExitFailed);
  EXPECT_EQ(TrainerExitCode(absl::DataLossError("loss nan")), kExitFailed);
  EXPECT_EQ(TrainerExitCode(absl::InvalidArgumentError("token id 300")), kExitUsage);
}

TEST(Trainer, OneRunAtATimeUsesAnOutputDirectory) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 1;
  const RunRecord record = TrainOnThreads(1, config, {}, [&](Trainer&) {
    const absl::Status refused = TrainOnThreads(1, config).status;
    EXPECT_THAT(std::string(refused.message()),
                HasSubstr("another run is using the output directory"));
    EXPECT_EQ(TrainerExitCode(refused), kExitFailed);  // that other run may end
    return absl::OkStatus();
  });
  ASSERT_TRUE(record.status.ok()) << record.status.message();
  EXPECT_TRUE(TrainOnThreads(1, config).status.ok());
}

absl::Status RunToTheEnd(const TrainConfig& config) {
  return World::RunThreads(1, [&](World& world) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    return trainer->Run().status();
  });
}

TEST(Trainer, SavesBeforeAnEvaluationThatFails) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 3;
  std::vector<int32_t> ids = testing::GeneratedTokens(900, 2);
  ids[30] = 300;  // outside the vocabulary, found when it is read
  ASSERT_TRUE(WriteTokenFile(config.data.validation, ids, 301).ok());
  EXPECT_FALSE(RunToTheEnd(config).ok());
  EXPECT_TRUE(std::filesystem::exists(config.output + "/checkpoints/step-00000003/stretto.json"));
}

TEST(Trainer, SkippedUpdatesDoNotPushOutGoodCheckpoints) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 4;
  config.checkpoint.every = 2;
  ASSERT_TRUE(RunToTheEnd(config).ok());
  config.steps = 30;
  config.optimizer.lr = 1e300;  // infinite in f32: the weights become NaN
  config.checkpoint.resume = "must";
  config.spikes.max_skipped = 100;
  const absl::Status status = RunToTheEnd(config);
  EXPECT_THAT(std::string(status.message()), HasSubstr("not saved"));
  EXPECT_TRUE(std::filesystem::exists(config.output + "/checkpoints/step-00000004/stretto.json"));
}

TEST(Trainer, NewRunDoesNotMixWithAnOlderOne) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 2;
  ASSERT_TRUE(TrainOnThreads(1, config, {}, [](Trainer& t) { return t.Save(); }).status.ok());
  EXPECT_THAT(std::string(TrainOnThreads(2, config).status.message()),
              HasSubstr("holds a checkpoint of step 2"));
}

TEST(Trainer, MustResumeFailsOnAllRanksWithoutACheckpoint) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.checkpoint.resume = "must";
  const RunRecord record = TrainOnThreads(3, config);
  EXPECT_FALSE(record.status.ok());
  EXPECT_THAT(std::string(record.status.message()), HasSubstr("checkpoint"));
}

TEST(Trainer, SkipsTheUpdateOfANonFiniteStepEverywhere) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 3;
  config.spikes.max_loss = 1e-3;  // every step counts as a spike
  const RunRecord record = TrainOnThreads(2, config);
  ASSERT_TRUE(record.status.ok()) << record.status;
  for (const StepStats& s : record.steps) EXPECT_TRUE(s.skipped);
  EXPECT_EQ(record.steps.back().skipped_total, 3);
  // Nothing has changed: a run whose updates are all zero ends with the same parameters.
  TrainConfig still = TinyRun(directory);
  still.steps = 3;
  still.optimizer.lr = 0;
  const RunRecord unchanged = TrainOnThreads(2, still);
  ASSERT_TRUE(unchanged.status.ok()) << unchanged.status;
  EXPECT_EQ(unchanged.steps.back().skipped_total, 0);
  EXPECT_EQ(record.parameters, unchanged.parameters);

  config.spikes.nonfinite = "stop";
  EXPECT_THAT(std::string(TrainOnThreads(2, config).status.message()),
              HasSubstr("spikes.nonfinite is stop"));
}

TEST(Trainer, RefusesTokensOutsideTheVocabulary) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.model.vocabulary = 200;
  EXPECT_THAT(std::string(TrainOnThreads(2, config).status.message()),
              HasSubstr("raise model.vocabulary"));
}

TEST(Trainer, SamplesTheSameTextOnAnyNumberOfRanks) {
  ScratchDirectory directory;
  TrainConfig config = TinyRun(directory);
  config.steps = 2;
  std::vector<std::string> texts;
  for (int ranks : {1, 2}) {
    std::string text;
    const RunRecord record = TrainOnThreads(ranks, config, {}, [&](Trainer& t) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const std::string sample, t.Sample("the ", 40, 0.0, 0));
      if (!sample.empty()) text = sample;
      return absl::OkStatus();
    });
    ASSERT_TRUE(record.status.ok()) << record.status;
    texts.push_back(text);
  }
  EXPECT_FALSE(texts[0].empty());
  EXPECT_EQ(texts[0], texts[1]);
}

}  // namespace
}  // namespace stretto
