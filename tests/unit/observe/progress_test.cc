#include "stretto/observe/progress.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "unit/observe/files.h"

namespace stretto {
namespace {

TEST(Progress, MarksComeBack) {
  const TempDir folder;
  absl::StatusOr<ProgressFile> file = ProgressFile::Create(folder.path(), 3);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto read = [&] { return ParseProgress(ReadAll(ProgressPath(folder.path(), 3))); };
  EXPECT_EQ(read().met, 0);
  EXPECT_EQ(read().restored_step, -1);
  file->Met();
  RankProgress progress = read();
  EXPECT_GT(progress.met, 1.5e9);
  EXPECT_EQ(progress.step, -1);
  file->Restored(15);
  file->Step(16);
  file->Step(17);
  file->Beat("evaluate", 17);
  const ProgressFile moved = *std::move(file);
  progress = read();
  EXPECT_GE(progress.restored, progress.met);
  EXPECT_EQ(progress.restored_step, 15);
  EXPECT_GE(progress.first_step, progress.restored);
  EXPECT_GE(progress.beat, progress.first_step);
  EXPECT_EQ(progress.step, 17);
  EXPECT_EQ(progress.doing, "evaluate");
}

TEST(Progress, ASecondStartBeginsAnew) {
  const TempDir folder;
  ProgressFile::Create(folder.path(), 0)->Restored(15);
  ASSERT_TRUE(ProgressFile::Create(folder.path(), 0).ok());
  EXPECT_EQ(ReadAll(ProgressPath(folder.path(), 0)), "");
}

TEST(Progress, DamagedLinesAreAsIfNotMarked) {
  const TempDir folder;
  absl::StatusOr<ProgressFile> file = ProgressFile::Create(folder.path(), 0);
  ASSERT_TRUE(file.ok());
  file->Beat("a word that is too long for its place", 7);  // a hole where the others would be
  const std::string text = ReadAll(ProgressPath(folder.path(), 0));
  EXPECT_EQ(ParseProgress(text).step, -1);  // three words where one was expected
  EXPECT_EQ(ParseProgress(text).met, 0);
  EXPECT_EQ(ParseProgress(text.substr(0, 100)).beat, 0);
  EXPECT_EQ(ParseProgress("").step, -1);
}

TEST(Progress, WithoutADirectoryMarksGoNowhere) {
  ProgressFile().Step(1);
  const absl::Status missing = ProgressFile::Create("/does/not/exist", 0).status();
  EXPECT_NE(missing.message().find("/does/not/exist/rank-0.progress"), std::string::npos);
}

TEST(JobFacts, ComeBackOrAreNothing) {
  const TempDir folder;
  EXPECT_FALSE(ReadJobFacts(folder.path()).has_value());
  ASSERT_TRUE(WriteJobFacts(folder.path(), {.output = "/a \"b\"",
                                            .flight_directory = "/a/flight",
                                            .dp = 2,
                                            .pp = 3,
                                            .tp = 4,
                                            .dp_fixed = true})
                  .ok());
  const std::optional<JobFacts> facts = ReadJobFacts(folder.path());
  ASSERT_TRUE(facts.has_value());
  EXPECT_EQ(facts->output, "/a \"b\"");
  EXPECT_EQ(facts->flight_directory, "/a/flight");
  EXPECT_EQ(facts->dp * 100 + facts->pp * 10 + facts->tp, 234);
  EXPECT_TRUE(facts->dp_fixed);
  for (const char* text : {"", "[]", "{\"output\": 1}", "{\"dp\": 0"}) {
    std::ofstream(folder / "job.json") << text;
    EXPECT_FALSE(ReadJobFacts(folder.path()).has_value()) << text;
  }
}

}  // namespace
}  // namespace stretto
