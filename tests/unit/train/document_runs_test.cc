// Runs on documents that go on, or that must not: what decides their steps is kept and compared.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "stretto/core/device_name.h"
#include "stretto/core/exit_code.h"
#include "stretto/core/log.h"
#include "stretto/data/token_file.h"
#include "stretto/plan/cost.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/train/prediction.h"
#include "stretto/train/sequence_planner.h"
#include "tests/support/training.h"

namespace stretto {
namespace {

using testing::GeneratedTokens;
using ::testing::HasSubstr;
using testing::ScratchDirectory;
using testing::TinyRun;

TrainConfig Documents(const ScratchDirectory& directory) {
  TrainConfig config = TinyRun(directory);
  config.data.documents = true;
  config.data.validation.clear();
  config.batch.tokens = 120;
  config.batch.capacity = 12;
  config.parallel.mesh = "dynamic";
  config.checkpoint.resume = "auto";
  return config;
}

// Trains up to `steps` steps on two ranks, and saves.
absl::Status RunTo(TrainConfig config, int64_t steps) {
  config.steps = steps;
  return World::RunThreads(2, [&](World& world) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
    return trainer->Run().status();
  });
}

// Costs that a fit of `config` on this machine could have written.
CostModel Costs(TrainConfig config) {
  EXPECT_TRUE(config.Resolve(2).ok());
  CostModel costs = AssumedH100(config).value();
  costs.device = DeviceName(Device::Cpu());
  costs.parts->model = ModelKey(config);
  costs.parts->assumed = false;
  costs.parts->ranks = 2;
  return costs;
}

nlohmann::json SavedState(const TrainConfig& config) {
  const auto newest = FindNewestCheckpoint(config.output + "/checkpoints");
  if (!newest.ok()) {
    ADD_FAILURE() << newest.status();
    return {};
  }
  return nlohmann::json::parse(newest->trainer_state, nullptr, false);
}

TEST(DocumentRuns, OtherTokenFilesDoNotGoOn) {
  const ScratchDirectory directory;
  TrainConfig config = Documents(directory);
  ASSERT_TRUE(RunTo(config, 2).ok());
  // The files may move, their documents may not change.
  config.data.train = directory / "moved.bin";
  std::filesystem::rename(directory / "train.bin", config.data.train);
  EXPECT_TRUE(RunTo(config, 3).ok());
  config.data.train = directory / "other.bin";
  ASSERT_TRUE(WriteTokenFile(config.data.train, GeneratedTokens(4000, 7), 257).ok());
  const absl::Status refused = RunTo(config, 4);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("documents of other lengths"));
  EXPECT_THAT(std::string(refused.message()), HasSubstr("other.bin"));
  EXPECT_EQ(TrainerExitCode(refused), kExitUsage);
  // Of the same lengths.
  std::vector<int32_t> ids = GeneratedTokens(4000, 1);
  for (int32_t& id : ids) id = id == 'e' ? 'o' : id;
  ASSERT_TRUE(WriteTokenFile(config.data.train, ids, 257).ok());
  const absl::Status others = RunTo(config, 4);
  EXPECT_THAT(std::string(others.message()), HasSubstr("documents of other tokens"));
  EXPECT_EQ(TrainerExitCode(others), kExitUsage);
}

// Each rank has a directory of its own, as machines have disks.
TEST(DocumentRuns, RanksWithOtherTokensAreRefused) {
  const ScratchDirectory directory;
  std::vector<int32_t> ids = GeneratedTokens(4000, 1);
  for (const char* disk : {"disk0", "disk1"}) {
    std::filesystem::create_directory(directory / disk);
    ASSERT_TRUE(WriteTokenFile(directory / disk + "/local.bin", ids, 257).ok());
    for (int32_t& id : ids) id = id == 'e' ? 'o' : id;  // documents of the same lengths
  }
  const auto run = [&](TrainConfig config) {
    config.data.train = "local.bin";
    return World::RunThreads(2, [&](World& world) -> absl::Status {
      absl::Status status;
      std::thread([&] {
        const std::string disk = directory / absl::StrCat("disk", world.rank());
        EXPECT_EQ(unshare(CLONE_FS), 0);  // the thread's own, and that of those it starts
        EXPECT_EQ(chdir(disk.c_str()), 0);
        status = Trainer::Create(world, config).status();
      }).join();
      return status;
    });
  };
  for (const bool documents : {false, true}) {
    const absl::Status refused = run(documents ? Documents(directory) : TinyRun(directory));
    EXPECT_THAT(std::string(refused.message()),
                HasSubstr("rank 1 finds other tokens than rank 0 in data.train"));
    EXPECT_EQ(TrainerExitCode(refused), kExitUsage);
  }
  // Whose file is not there does not wait for the others, nor they for it.
  std::filesystem::remove(directory / "disk1/local.bin");
  EXPECT_THAT(std::string(run(Documents(directory)).message()),
              HasSubstr("rank 1 failed in opening the data"));
}

TEST(DocumentRuns, KeepTheirCosts) {
  const ScratchDirectory directory;
  TrainConfig config = Documents(directory);
  config.parallel.cost_model = directory / "costs.json";
  CostModel costs = Costs(config);
  const auto write = [&](const std::string& file) {
    std::ofstream(file) << ToJson(costs);
    return ToJson(costs);
  };
  const std::string first = write(config.parallel.cost_model);
  ASSERT_TRUE(RunTo(config, 1).ok()) << RunTo(config, 1);
  EXPECT_EQ(SavedState(config)["costs"]["model"], first);
  // Without the file, and with another content under its name.
  config.parallel.cost_model = "";
  std::string said;
  SetLogSink([&](LogLevel, const std::string& line) { said += line + "\n"; });
  ASSERT_TRUE(RunTo(config, 2).ok());
  SetLogSink({});
  EXPECT_THAT(said, HasSubstr("costs that the checkpoint (from '" + (directory / "costs.json") +
                              "') holds, although parallel.cost_model is empty"));
  EXPECT_EQ(SavedState(config)["costs"]["model"], first);
  costs.forward[0].per_pair *= 2;
  config.parallel.cost_model = directory / "costs.json";
  const std::string second = write(config.parallel.cost_model);
  ASSERT_TRUE(RunTo(config, 3).ok());
  EXPECT_EQ(SavedState(config)["costs"]["model"], first);
  // By another name it is asked for.
  config.parallel.cost_model = directory / "new.json";
  write(config.parallel.cost_model);
  ASSERT_TRUE(RunTo(config, 4).ok());
  EXPECT_EQ(SavedState(config)["costs"]["model"], second);
  EXPECT_EQ(SavedState(config)["costs"]["file"], config.parallel.cost_model);
}

TEST(DocumentRuns, CostsOfSomethingElseAreRefused) {
  const ScratchDirectory directory;
  TrainConfig config = Documents(directory);
  config.parallel.cost_model = directory / "costs.json";
  const auto refusal = [&](const std::function<void(CostModel&)>& change) {
    CostModel costs = Costs(config);
    change(costs);
    std::ofstream(config.parallel.cost_model) << ToJson(costs);
    const absl::Status status = RunTo(config, 1);
    EXPECT_EQ(TrainerExitCode(status), kExitUsage) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(refusal([](CostModel& c) { c.parts.reset(); }), HasSubstr("are those of stages"));
  EXPECT_THAT(refusal([](CostModel& c) { c.parts->ranks = 1; }), HasSubstr("fitted on one rank"));
  EXPECT_THAT(refusal([](CostModel& c) { c.parts->model = "a giant"; }),
              HasSubstr("are of a giant"));
  const auto foreign = [](CostModel& c) { c.device = "NVIDIA H100 80GB HBM3"; };
  EXPECT_THAT(refusal(foreign),
              HasSubstr("measured on 'NVIDIA H100 80GB HBM3', but this run is on '" +
                        DeviceName(Device::Cpu()) + "'"));
  config.parallel.cost_model_any_device = true;
  EXPECT_TRUE(RunTo(config, 1).ok());
  std::ofstream(config.parallel.cost_model, std::ios::trunc);
  EXPECT_THAT(std::string(RunTo(
                              [&] {
                                TrainConfig other = config;
                                other.output = directory / "other";
                                return other;
                              }(),
                              1)
                              .message()),
              HasSubstr("is empty"));
}

// The control: one rank plans a step in another way than the others.
class DifferentPlans : public ::testing::TestWithParam<bool> {};

TEST_P(DifferentPlans, AreToldBeforeTheirStepOnEveryRank) {
  constexpr int kRanks = 3, kOdd = 1;
  for (const int64_t odd_step : {1, 3}) {  // of the first, at the start
    SCOPED_TRACE(odd_step);
    const ScratchDirectory directory;
    TrainConfig config = Documents(directory);
    config.data.prefetch = GetParam();
    config.steps = 5;
    TrainConfig resolved = config;
    ASSERT_TRUE(resolved.Resolve(kRanks).ok());
    std::mutex mutex;
    std::vector<std::string> messages;
    std::vector<int64_t> steps;
    (void)World::RunThreads(kRanks, [&](World& world) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const DocumentPlanner plan, DocumentPlannerOf(resolved, kRanks));
      int64_t planned = 0;
      const auto planner = [&](const std::vector<int64_t>& lengths) -> absl::StatusOr<Program> {
        STRETTO_ASSIGN_OR_RETURN(Program program, plan(lengths));
        if (++planned != odd_step || world.rank() != kOdd) return program;
        // Another one that is as valid: places take each other's items.
        std::vector<PlanItem> items = std::move(program.items);
        for (PlanItem& item : items) {
          for (int& place : item.pipelines) place = kRanks - 1 - place;
        }
        return MakeProgram(ScheduleKind::kOneF1B, kRanks, 1, 1, std::move(items));
      };
      absl::Status status;
      int64_t done = 0;
      {
        auto trainer = Trainer::Create(world, config, {.planner = planner});
        status = trainer.status();
        while (status.ok() && (*trainer)->step() < config.steps) {
          status = (*trainer)->Step().status();
          done = (*trainer)->step();
        }
      }
      const std::lock_guard<std::mutex> lock(mutex);
      messages.emplace_back(status.message());
      steps.push_back(done);
      EXPECT_TRUE(IsAgreed(status)) << status;
      return status;
    });
    ASSERT_EQ(messages.size(), static_cast<size_t>(kRanks));
    for (const std::string& message : messages) {
      EXPECT_THAT(message, HasSubstr(absl::StrCat("step ", odd_step, ": rank ", kOdd, " (plan ")));
    }
    EXPECT_EQ(steps, std::vector<int64_t>(kRanks, odd_step - 1));
  }
}
INSTANTIATE_TEST_SUITE_P(, DifferentPlans, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Prefetched" : "Inline"; });

}  // namespace
}  // namespace stretto
