#include "stretto/snapshot/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "support/no_threads.h"
#include "unit/snapshot/model_state.h"
#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
namespace fs = std::filesystem;

std::string ShardName(int rank) {
  return "shard-0000" + std::to_string(rank + 1) + "-model-00001-of-00001.safetensors";
}

absl::Status SaveFrom(int ranks, const std::string& directory, const std::vector<int64_t>& steps,
                      bool async = true, int keep = 0,
                      const std::vector<GlobalTensor>& model = OddModel()) {
  return World::RunThreads(ranks, [&](World& world) -> absl::Status {
    ModelState state(model, world.rank(), world.size());
    CheckpointWriter writer(world, {.directory = directory, .keep = keep, .async = async});
    for (const int64_t step : steps) {
      state.Fill(step);
      STRETTO_RETURN_IF_ERROR(
          writer.Save(step, state.registry(), R"({"rank":)" + std::to_string(world.rank()) + "}"));
      state.Clear();  // what is trained on next does not reach the file
    }
    STRETTO_RETURN_IF_ERROR(writer.Finish());
    EXPECT_EQ(writer.last_committed_step(), steps.empty() ? -1 : steps.back());
    return absl::OkStatus();
  });
}

// Loads on every rank of a world of `ranks`, one after the other; no World is needed for that.
void ExpectLoads(const CheckpointInfo& info, int ranks,
                 const std::vector<GlobalTensor>& model = OddModel()) {
  for (int rank = 0; rank < ranks; ++rank) {
    ModelState state(model, rank, ranks);
    state.Clear();
    const absl::Status loaded = LoadCheckpoint(info, state.registry());
    ASSERT_TRUE(loaded.ok()) << loaded;
    EXPECT_EQ(state.Difference(info.step), "") << "rank " << rank << " of " << ranks;
  }
}

absl::Status LoadAlone(const CheckpointInfo& info, const std::vector<GlobalTensor>& model,
                       const LoadOptions& options = {}) {
  ModelState state(model, 0, 1);
  return LoadCheckpoint(info, state.registry(), options);
}

class CheckpointTest : public ::testing::Test {
 protected:
  std::string Step(int64_t step, const std::string& file = "") const {
    std::string digits = std::to_string(step);
    digits.insert(0, 8 - digits.size(), '0');
    return dir_.File("step-" + digits + (file.empty() ? "" : "/" + file));
  }
  TempDirectory dir_;
};

TEST_F(CheckpointTest, FourRanksSaveAnyNumberLoads) {
  ASSERT_TRUE(SaveFrom(4, dir_.path(), {12}).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000012"));
  EXPECT_THAT(dir_.Names("step-00000012"),
              ElementsAre(ShardName(0), ShardName(1), ShardName(2), ShardName(3), "stretto.json"));
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->step, 12);
  EXPECT_EQ(info->world_size, 4);
  EXPECT_EQ(info->trainer_state, R"({"rank":0})");
  for (const int ranks : {1, 3, 4, 8}) ExpectLoads(*info, ranks);
}

TEST_F(CheckpointTest, OneRankSavesSynchronously) {
  ASSERT_TRUE(SaveFrom(1, dir_.path(), {3}, /*async=*/false).ok());
  const auto info = FindNewestCheckpoint(dir_.path(), Verify::kDigests);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_TRUE(info->verified);
  for (const int ranks : {1, 5}) ExpectLoads(*info, ranks);
}

TEST_F(CheckpointTest, TheSameStateGivesTheSameBytes) {
  TempDirectory other;
  ASSERT_TRUE(SaveFrom(3, dir_.path(), {5}, true).ok());
  ASSERT_TRUE(SaveFrom(3, other.path(), {5}, false).ok());
  for (const std::string& name : dir_.Names("step-00000005")) {
    EXPECT_EQ(ReadText(Step(5, name)), ReadText(other.File("step-00000005/" + name))) << name;
  }
}

TEST_F(CheckpointTest, FloatingTypesAreConvertedOnLoad) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {9}).ok());
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok());
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16}) {
    std::vector<GlobalTensor> model = OddModel();
    for (GlobalTensor& tensor : model) {
      if (tensor.dtype != DType::kI64) tensor.dtype = dtype;
    }
    ExpectLoads(*info, 3, model);
  }
  std::vector<GlobalTensor> model = OddModel();
  model[0].dtype = DType::kI64;
  EXPECT_THAT(Message(LoadAlone(*info, model)), HasSubstr("wte.weight f32 there and i64 here"));
}

TEST_F(CheckpointTest, OldOnesArePruned) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1, 2, 3, 4}, true, 2).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000003", "step-00000004"));
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {5, 6, 7}, true, 0).ok());
  EXPECT_EQ(dir_.Names().size(), 5u);
}

// A run falls back from a damaged newest checkpoint and saves: the sound one that it came from
// stays until another sound one takes its place.
TEST_F(CheckpointTest, ADamagedOneDoesNotCountAsKept) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1, 2, 9}).ok());
  fs::resize_file(Step(9, ShardName(1)), 5);
  LogCapture log;
  const auto run = [&](const std::vector<int64_t>& steps) {
    return World::RunThreads(2, [&](World& world) -> absl::Status {
      ModelState state(OddModel(), world.rank(), world.size());
      CheckpointWriter writer(world, {.directory = dir_.path(), .keep = 2});
      STRETTO_ASSIGN_OR_RETURN(const CheckpointInfo info, FindNewestCheckpoint(world, dir_.path()));
      writer.Distrust(info.passed_over);
      for (const int64_t step : steps) {
        state.Fill(step);
        STRETTO_RETURN_IF_ERROR(writer.Save(step, state.registry(), "{}"));
      }
      return writer.Finish();
    });
  };
  ASSERT_TRUE(run({3}).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000002", "step-00000003"));
  // Step 9 again, whole this time: it counts from then on.
  fs::rename(Step(2), Step(9));
  ASSERT_TRUE(run({9, 10}).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000009", "step-00000010"));
  ExpectLoads(*FindNewestCheckpoint(dir_.path()), 2);
}

TEST_F(CheckpointTest, WithoutAThreadTheSaveIsMadeAtOnce) {
  LogCapture log;
  const absl::Status status = World::RunThreads(1, [&](World& world) -> absl::Status {
    ModelState state(OddModel(), 0, 1);
    state.Fill(4);
    CheckpointWriter writer(world, {.directory = dir_.path()});
    const testing::NoMoreThreads none;
    STRETTO_RETURN_IF_ERROR(writer.Save(4, state.registry(), "{}"));
    EXPECT_EQ(writer.last_committed_step(), 4);
    return writer.Finish();
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(log.text(), HasSubstr("the thread of the checkpoint writer could not be started"));
  ExpectLoads(*FindNewestCheckpoint(dir_.path()), 2);
}

TEST_F(CheckpointTest, SavesQueueUpBehindOneAnother) {
  // Each Save waits for the one before it; nothing is lost, and each file holds its own step.
  ASSERT_TRUE(SaveFrom(3, dir_.path(), {1, 2, 3, 4, 5}).ok());
  for (int64_t step = 1; step <= 5; ++step) {
    const auto info = ReadCheckpointInfo(Step(step));
    ASSERT_TRUE(info.ok()) << info.status();
    ExpectLoads(*info, 2);
  }
}

TEST_F(CheckpointTest, TwoWritersDoNotMeet) {
  TempDirectory other;
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    ModelState state(OddModel(), world.rank(), world.size());
    CheckpointWriter a(world, {.directory = dir_.path()});
    CheckpointWriter b(world, {.directory = other.path()});
    state.Fill(1);
    STRETTO_RETURN_IF_ERROR(a.Save(1, state.registry(), "{}"));
    state.Fill(2);
    STRETTO_RETURN_IF_ERROR(b.Save(2, state.registry(), "{}"));
    STRETTO_RETURN_IF_ERROR(b.Finish());
    return a.Finish();
  });
  ASSERT_TRUE(status.ok()) << status;
  ExpectLoads(*FindNewestCheckpoint(dir_.path()), 2);
  ExpectLoads(*FindNewestCheckpoint(other.path()), 2);
}

TEST_F(CheckpointTest, TheSameStepAgainReplacesIt) {
  ASSERT_TRUE(SaveFrom(3, dir_.path(), {4}).ok());
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {4}).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000004"));
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->world_size, 2);
  ExpectLoads(*info, 3);
}

TEST_F(CheckpointTest, NoneYet) {
  EXPECT_EQ(FindNewestCheckpoint(dir_.path()).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(FindNewestCheckpoint(dir_.File("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(CheckpointTest, ACrashBeforeTheCommitIsNoCheckpoint) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1, 2}).ok());
  fs::rename(Step(2), Step(2) + ".tmp");
  fs::create_directory(dir_.File("step-00000003.tmp"));
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->step, 1);
  // The next job cleans up behind the crash.
  ASSERT_TRUE(SaveFrom(3, dir_.path(), {4}).ok());
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000001", "step-00000004"));
}

TEST_F(CheckpointTest, DamagedOnesArePassedOver) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1, 2, 3, 4, 5}).ok());
  LogCapture log;
  fs::remove(Step(5, "stretto.json"));
  fs::remove(Step(4, ShardName(1)));
  fs::resize_file(Step(3, ShardName(0)), fs::file_size(Step(3, ShardName(0))) - 1);
  FlipByte(Step(2, ShardName(0)), 9);  // in the header
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->step, 1);
  EXPECT_THAT(log.text(),
              AllOf(HasSubstr("step-00000005 is passed over"), HasSubstr("stretto.json"),
                    HasSubstr(ShardName(1) + " is missing"), HasSubstr("were written"),
                    HasSubstr("not a valid safetensors file")));
}

TEST_F(CheckpointTest, ARenamedDirectoryIsNotTakenForAnotherStep) {
  ASSERT_TRUE(SaveFrom(1, dir_.path(), {1}).ok());
  fs::rename(Step(1), Step(9));
  LogCapture log;
  EXPECT_EQ(FindNewestCheckpoint(dir_.path()).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(log.text(), HasSubstr("holds step 1"));
}

// A keeper that is late commits a newer one and removes the one that was listed.
TEST_F(CheckpointTest, WhatComesWhileTheListIsReadIsFound) {
  for (const bool together : {false, true}) {
    ASSERT_TRUE(SaveFrom(1, dir_.path(), {1, 2, 3}, true, 0).ok());
    const std::string later = dir_.path() + "/later";
    fs::rename(Step(3), later);
    fs::resize_file(Step(2, ShardName(0)), 5);
    bool changed = false;
    SetLogSink([&](LogLevel, const std::string& line) {
      if (changed || line.find("step-00000002 is passed over") == std::string::npos) return;
      changed = true;
      fs::rename(later, Step(3));
      fs::remove_all(Step(1));
    });
    const auto find = [&](World& world) {
      return together ? FindNewestCheckpoint(world, dir_.path())
                      : FindNewestCheckpoint(dir_.path());
    };
    const absl::Status status = World::RunThreads(1, [&](World& world) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const CheckpointInfo info, find(world));
      EXPECT_EQ(info.step, 3);
      return absl::OkStatus();
    });
    SetLogSink({});
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(changed);
    fs::remove_all(Step(2));
    fs::remove_all(Step(3));
  }
}

TEST_F(CheckpointTest, AFlippedByteIsRefusedByName) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1, 2}).ok());
  FlipByte(Step(2, ShardName(1)), fs::file_size(Step(2, ShardName(1))) - 1);
  // Sizes and headers are fine, so the quick look does not see it ...
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok());
  EXPECT_EQ(info->step, 2);
  // ... loading does, and leaves what was there.
  ModelState state(OddModel(), 0, 1);
  state.Fill(77);
  const absl::Status loaded = LoadCheckpoint(*info, state.registry());
  EXPECT_EQ(loaded.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(loaded), HasSubstr(ShardName(1)));
  EXPECT_EQ(state.Difference(77), "");
  // Looked for with digests, the one before it is found.
  LogCapture log;
  const auto sound = FindNewestCheckpoint(dir_.path(), Verify::kDigests);
  ASSERT_TRUE(sound.ok());
  EXPECT_EQ(sound->step, 1);
  ExpectLoads(*sound, 1);
  EXPECT_THAT(log.text(), HasSubstr(ShardName(1)));
}

TEST_F(CheckpointTest, AllRanksFindTheSameSoundCheckpoint) {
  ASSERT_TRUE(SaveFrom(5, dir_.path(), {1, 2, 3}).ok());
  FlipByte(Step(3, ShardName(4)), fs::file_size(Step(3, ShardName(4))) - 1);
  LogCapture log;
  for (const int ranks : {1, 3}) {
    const absl::Status status = World::RunThreads(ranks, [&](World& world) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const CheckpointInfo info, FindNewestCheckpoint(world, dir_.path()));
      EXPECT_EQ(info.step, 2);
      EXPECT_TRUE(info.verified);
      ModelState state(OddModel(), world.rank(), world.size());
      STRETTO_RETURN_IF_ERROR(LoadCheckpoint(info, state.registry()));
      EXPECT_EQ(state.Difference(2), "");
      return absl::OkStatus();
    });
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_THAT(log.text(), HasSubstr(ShardName(4)));
  const absl::Status none = World::RunThreads(2, [&](World& world) {
    EXPECT_EQ(FindNewestCheckpoint(world, dir_.File("none")).status().code(),
              absl::StatusCode::kNotFound);
    return absl::OkStatus();
  });
  EXPECT_TRUE(none.ok()) << none;
}

TEST_F(CheckpointTest, OnlyDamagedOnesAreNotNone) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1}).ok());
  fs::remove(Step(1, ShardName(1)));
  LogCapture log;
  const absl::Status found = World::RunThreads(2, [&](World& world) {
    EXPECT_EQ(FindNewestCheckpoint(world, dir_.path()).status().code(),
              absl::StatusCode::kDataLoss);
    return absl::OkStatus();
  });
  EXPECT_TRUE(found.ok()) << found;
}

TEST_F(CheckpointTest, AnotherModelIsNamed) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1}).ok());
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok());
  std::vector<GlobalTensor> model = OddModel();
  model[0].shape = {13, 6};
  model[1].name = "h.0.renamed";
  const absl::Status loaded = LoadAlone(*info, model);
  EXPECT_EQ(loaded.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(loaded),
              AllOf(HasSubstr("1 tensors are not in it (h.0.renamed)"),
                    HasSubstr("1 of its tensors are not part of this model (h.0.attn.weight)"),
                    HasSubstr("wte.weight [13, 5] there and [13, 6] here")));
}

TEST_F(CheckpointTest, WeightsMayBeLoadedWithoutTheOptimizer) {
  ASSERT_TRUE(SaveFrom(2, dir_.path(), {1}).ok());
  const auto info = FindNewestCheckpoint(dir_.path());
  ASSERT_TRUE(info.ok());
  std::vector<GlobalTensor> weights = OddModel();
  weights.pop_back();
  ExpectLoads(*info, 2, weights);

  // With some optimizer state, all of it must fit.
  std::vector<GlobalTensor> other = weights;
  other.push_back({"optim.exp_avg_sq.wte.weight", DType::kF32, {13, 5}});
  EXPECT_THAT(Message(LoadAlone(*info, other)),
              AllOf(HasSubstr("not in it (optim.exp_avg_sq.wte.weight)"),
                    HasSubstr("not part of this model (optim.exp_avg.wte.weight)")));

  // A pipeline stage registers a part of the model only.
  const std::vector<GlobalTensor> stage = {weights[1]};
  EXPECT_FALSE(LoadAlone(*info, stage).ok());
  EXPECT_TRUE(LoadAlone(*info, stage, {.allow_unused = true}).ok());
}

TEST_F(CheckpointTest, AFullDiskFailsTheSaveAndNothingElse) {
  std::vector<GlobalTensor> model = OddModel();
  model.push_back({"large", DType::kF32, {1000, 20}, 1});  // owned by rank 1
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    ModelState state(model, world.rank(), world.size());
    CheckpointWriter writer(world, {.directory = dir_.path()});
    state.Fill(1);
    STRETTO_RETURN_IF_ERROR(writer.Save(1, state.registry(), "{}"));
    STRETTO_RETURN_IF_ERROR(writer.Finish());
    STRETTO_RETURN_IF_ERROR(world.Barrier("limit"));
    std::unique_ptr<FileSizeLimit> limit;
    if (world.rank() == 0) limit = std::make_unique<FileSizeLimit>(40000);
    STRETTO_RETURN_IF_ERROR(world.Barrier("limited"));
    STRETTO_RETURN_IF_ERROR(writer.Save(2, state.registry(), "{}"));
    const absl::Status failed = writer.Finish();
    // The same on every rank, with the rank that failed.
    EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(Message(failed), AllOf(HasSubstr("rank 1: "), HasSubstr("bytes are missing")));
    EXPECT_TRUE(writer.Finish().ok());  // told once
    EXPECT_EQ(writer.last_committed_step(), 1);
    STRETTO_RETURN_IF_ERROR(world.Barrier("unlimit"));
    limit.reset();
    EXPECT_EQ(fs::exists(Step(2) + ".tmp"), false);
    STRETTO_RETURN_IF_ERROR(world.Barrier("unlimited"));
    // The next one works.
    state.Fill(3);
    STRETTO_RETURN_IF_ERROR(writer.Save(3, state.registry(), "{}"));
    return writer.Finish();
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000001", "step-00000003"));
  ExpectLoads(*FindNewestCheckpoint(dir_.path()), 2, model);
}

TEST_F(CheckpointTest, AnErrorIsReturnedByTheNextSaveWhichRunsAllTheSame) {
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    ModelState state(OddModel(), world.rank(), world.size());
    CheckpointWriter writer(world, {.directory = dir_.path()});
    state.Fill(1);
    STRETTO_RETURN_IF_ERROR(writer.Save(1, state.registry(), "no JSON"));
    state.Fill(2);
    const absl::Status earlier = writer.Save(2, state.registry(), "{}");
    EXPECT_THAT(Message(earlier), AllOf(HasSubstr("rank 0: "), HasSubstr("trainer state")));
    EXPECT_TRUE(writer.Save(3, state.registry(), "{}").ok());  // told once, step 2 went well
    EXPECT_THAT(Message(writer.Finish()), HasSubstr("trainer state"));
    EXPECT_EQ(writer.last_committed_step(), 3);
    return absl::OkStatus();
  });
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(dir_.Names(), ElementsAre("step-00000002", "step-00000003"));
  ExpectLoads(*ReadCheckpointInfo(Step(2)), 1);
}

TEST_F(CheckpointTest, RanksThatCannotAgreeDoNotCommit) {
  const auto run = [&](const std::function<absl::Status(World&, CheckpointWriter&)>& save) {
    absl::Status rank0;
    const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
      CheckpointWriter writer(world, {.directory = dir_.path(), .async = false});
      const absl::Status result = save(world, writer);
      if (world.rank() == 0) rank0 = result;
      STRETTO_ASSIGN_OR_RETURN(const auto all, world.AllGather("results", result.ToString()));
      for (const std::string& other : all) EXPECT_EQ(other, result.ToString());
      return absl::OkStatus();
    });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_THAT(dir_.Names(), IsEmpty());
    return Message(rank0);
  };
  EXPECT_THAT(run([](World& world, CheckpointWriter& writer) {
                ModelState state(OddModel(), world.rank(), world.size());
                return writer.Save(world.rank() == 2 ? 5 : 4, state.registry(), "{}");
              }),
              HasSubstr("rank 2: saves step 5 while rank 0 saves step 4"));
  EXPECT_THAT(run([](World& world, CheckpointWriter& writer) {
                ModelState state(OddModel(), 0, world.size());  // all own the first third
                return writer.Save(4, state.registry(), "{}");
              }),
              HasSubstr("ranks 0 and 1 both own row 0"));
  EXPECT_THAT(run([](World& world, CheckpointWriter& writer) {
                ModelState state(OddModel(), world.rank(), 4);  // the last quarter is nobody's
                return writer.Save(4, state.registry(), "{}");
              }),
              HasSubstr("is owned by no rank"));
}

TEST_F(CheckpointTest, ADirectoryThatCannotBeMade) {
  WriteText(dir_.File("file"), "");
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    ModelState state(OddModel(), world.rank(), world.size());
    CheckpointWriter writer(world, {.directory = dir_.File("file"), .async = false});
    const absl::Status saved = writer.Save(1, state.registry(), "{}");
    EXPECT_THAT(Message(saved), AllOf(HasSubstr("rank 0: "), HasSubstr(dir_.File("file"))));
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(CheckpointTest, ARankThatNeverSavesIsNamed) {
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    if (world.rank() == 1) return world.Barrier("end");
    ModelState state(OddModel(), world.rank(), world.size());
    CheckpointWriter writer(
        world, {.directory = dir_.path(),
                .timeout = std::chrono::milliseconds(world.rank() == 0 ? 1000 : 30000)});
    STRETTO_RETURN_IF_ERROR(writer.Save(1, state.registry(), "{}"));
    const absl::Status failed = writer.Finish();
    EXPECT_EQ(failed.code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(Message(failed), HasSubstr("rank 1 has not written its part"));
    return world.Barrier("end");
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(dir_.Names(), IsEmpty());
}

TEST_F(CheckpointTest, ARankThatLeftIsNamedAtOnce) {
  const auto start = std::chrono::steady_clock::now();
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    if (world.rank() == 2) return absl::OkStatus();
    ModelState state(OddModel(), world.rank(), world.size());
    CheckpointWriter writer(world, {.directory = dir_.path()});
    STRETTO_RETURN_IF_ERROR(writer.Save(1, state.registry(), "{}"));
    const absl::Status failed = writer.Finish();
    EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(Message(failed), HasSubstr("rank 2 died or left before"));
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(dir_.Names(), IsEmpty());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
}

}  // namespace
}  // namespace stretto
