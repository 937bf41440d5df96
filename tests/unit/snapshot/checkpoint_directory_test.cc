#include "src/snapshot/checkpoint_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "unit/snapshot/testing.h"

namespace stretto::snapshot_internal {
namespace {

using ::testing::ElementsAre;
namespace fs = std::filesystem;
const auto kLongAgo = fs::file_time_type::clock::now() - std::chrono::hours(1);

void Make(const TempDirectory& dir, const std::string& name) {
  fs::create_directories(dir.File(name));
  WriteText(dir.File(name + "/file"), "x");
}

TEST(CheckpointDirectoryTest, OnlyStepDirectoriesAreListedNewestFirst) {
  TempDirectory dir;
  for (const char* name : {"step-00000002", "step-00000010", "step-00000003.tmp", "step-7",
                           "step-000000004", "step-0000000x", "latest", "step-123456789"}) {
    Make(dir, name);
  }
  WriteText(dir.File("step-00000005"), "a file");
  const auto steps = ListSteps(dir.path());
  ASSERT_TRUE(steps.ok());
  EXPECT_THAT(*steps, ElementsAre(123456789, 10, 2));
  EXPECT_EQ(ListSteps(dir.File("none")).status().code(), absl::StatusCode::kNotFound);
}

TEST(CheckpointDirectoryTest, PrepareEmptiesWhatAnEarlierAttemptLeft) {
  TempDirectory dir;
  Make(dir, "root/step-00000007.tmp");
  ASSERT_TRUE(PrepareTemporary(dir.File("root"), 7).ok());
  EXPECT_TRUE(dir.Names("root/step-00000007.tmp").empty());
}

TEST(CheckpointDirectoryTest, ACommitReplacesACheckpointOfTheSameStep) {
  TempDirectory dir;
  Make(dir, "step-00000007");
  ASSERT_TRUE(PrepareTemporary(dir.path(), 7).ok());
  WriteText(dir.File("step-00000007.tmp/new"), "y");
  ASSERT_TRUE(CommitTemporary(dir.path(), 7).ok());
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000007"));
  EXPECT_THAT(dir.Names("step-00000007"), ElementsAre("new"));
}

TEST(CheckpointDirectoryTest, TwoWritersOfOneStepDoNotMeet) {
  TempDirectory dir;
  const std::string root = dir.path();
  for (const int64_t step : {6, 7}) {
    ASSERT_TRUE(PrepareTemporary(root, step).ok());
    std::ofstream(TemporaryPath(root, step) + "/file") << "trainer's";
  }
  ASSERT_TRUE(PrepareTemporary(root, 7, StepWriter::kKeeper).ok());
  std::ofstream(TemporaryPath(root, 7, StepWriter::kKeeper) + "/file") << "keeper's";
  ASSERT_TRUE(CommitTemporary(root, 7, StepWriter::kKeeper).ok());
  Prune(root, 7, 1, std::filesystem::file_time_type::clock::now(), {}, StepWriter::kKeeper);
  for (const int64_t step : {6, 7}) {
    EXPECT_TRUE(std::filesystem::exists(TemporaryPath(root, step) + "/file")) << step;
  }
  ASSERT_TRUE(CommitTemporary(root, 7).ok());
  EXPECT_FALSE(std::filesystem::exists(TemporaryPath(root, 7)));
  std::string text;
  std::getline(std::ifstream(StepPath(root, 7) + "/file"), text);
  EXPECT_EQ(text, "trainer's");
}

TEST(CheckpointDirectoryTest, PruneKeepsTheNewestAndTheOneJustCommitted) {
  TempDirectory dir;
  for (const char* name : {"step-00000001", "step-00000002", "step-00000003", "step-00000009"}) {
    Make(dir, name);
  }
  Prune(dir.path(), 3, 2, kLongAgo);  // the run went back from step 9
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000003", "step-00000009"));
  Prune(dir.path(), 3, 1, kLongAgo);
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000003"));
}

TEST(CheckpointDirectoryTest, PruneKeepsDamagedStepsLast) {
  TempDirectory dir;
  for (const char* name : {"step-00000001", "step-00000002", "step-00000003", "step-00000009"}) {
    Make(dir, name);
  }
  Prune(dir.path(), 3, 4, kLongAgo, {2, 9});  // there is room for all
  EXPECT_EQ(dir.Names().size(), 4u);
  Prune(dir.path(), 3, 3, kLongAgo, {2, 9});
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000001", "step-00000003", "step-00000009"));
  Prune(dir.path(), 3, 2, kLongAgo, {2, 9});
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000001", "step-00000003"));
  // The one just committed stays whatever is said of it.
  Prune(dir.path(), 3, 1, kLongAgo, {3});
  EXPECT_THAT(dir.Names(), ElementsAre("step-00000003"));
}

TEST(CheckpointDirectoryTest, PruneKeepsAllWhenAskedTo) {
  TempDirectory dir;
  for (const char* name : {"step-00000001", "step-00000002", "step-00000003"}) Make(dir, name);
  Prune(dir.path(), 3, 0, kLongAgo);
  EXPECT_EQ(dir.Names().size(), 3u);
}

TEST(CheckpointDirectoryTest, PruneRemovesStaleTemporariesOnly) {
  TempDirectory dir;
  for (const char* name : {"step-00000003", "step-00000002.tmp", "step-00000001.old.tmp",
                           "step-00000008.tmp", "notes.tmp", "step-00000005.tmp"}) {
    Make(dir, name);
  }
  fs::last_write_time(dir.File("step-00000005.tmp"), kLongAgo - std::chrono::hours(1));
  Prune(dir.path(), 3, 2, kLongAgo);
  // 8 is newer than this job and of a higher step: perhaps somebody writes it.
  EXPECT_THAT(dir.Names(), ElementsAre("notes.tmp", "step-00000003", "step-00000008.tmp"));
}

}  // namespace
}  // namespace stretto::snapshot_internal
