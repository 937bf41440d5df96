#include <cmath>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/observe/metrics.h"
#include "unit/observe/files.h"

namespace stretto {
namespace {

using Json = nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

StepStats Stats(int64_t step) {
  StepStats s;
  s.step = step;
  s.loss = 1.0 / 3 + static_cast<double>(step);
  s.lr = 3e-4;
  return s;
}

void WriteSteps(const std::string& path, int64_t first, int64_t last) {
  auto sink = JsonLinesSink::Open(path, first);
  ASSERT_TRUE(sink.ok()) << sink.status();
  for (int64_t step = first; step <= last; ++step) ASSERT_TRUE((*sink)->Write(Stats(step)).ok());
  ASSERT_TRUE((*sink)->Finish().ok());
}

std::vector<int64_t> Steps(const std::string& path) {
  std::vector<int64_t> steps;
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) steps.push_back(Json::parse(line)["step"]);
  return steps;
}

TEST(StepStatsJson, RoundTripsEveryField) {
  StepStats s;
  s.step = 12;
  s.loss = 0.1 + 0.2;
  s.grad_norm = 1e-300;
  s.lr = 3e-4;
  s.tokens = 1 << 20;
  s.tokens_per_second = 1e5;
  s.step_ms = 12.5;
  s.mfu_causal = 0.4;
  s.mfu_palm = 0.5;
  s.memory_bytes = int64_t{5} << 40;
  s.skipped = true;
  s.skipped_total = 3;
  s.eval_loss = 2.5;
  s.data_ms = 1;
  s.forward_ms = 2;
  s.backward_ms = 2.5;
  s.update_ms = 2.75;
  s.comm_exposed_ms = 3;
  s.exposed_data_ms = 1.5;
  s.exposed_tensor_ms = 0.75;
  s.exposed_context_ms = 0.375;
  s.exposed_pipeline_ms = 0.5;
  s.exposed_world_ms = 0.25;
  s.exposed_snapshot_ms = 0.125;
  const Json j = Json::parse(StepStatsJson(s, 1.5e9));
  EXPECT_EQ(j.size(), 25u);
  EXPECT_EQ(j["step"], 12);
  EXPECT_EQ(j["loss"].get<double>(), 0.1 + 0.2);  // all digits: curves can be compared bit for bit
  EXPECT_EQ(j["grad_norm"].get<double>(), 1e-300);
  EXPECT_EQ(j["tokens"], 1 << 20);
  EXPECT_EQ(j["tokens_per_second"], 1e5);
  EXPECT_EQ(j["step_ms"], 12.5);
  EXPECT_EQ(j["mfu_causal"], 0.4);
  EXPECT_EQ(j["mfu_palm"], 0.5);
  EXPECT_EQ(j["memory_bytes"], int64_t{5} << 40);
  EXPECT_EQ(j["skipped"], true);
  EXPECT_EQ(j["skipped_total"], 3);
  EXPECT_EQ(j["eval_loss"], 2.5);
  EXPECT_EQ(j["forward_ms"], 2);
  EXPECT_EQ(j["backward_ms"], 2.5);
  EXPECT_EQ(j["update_ms"], 2.75);
  EXPECT_EQ(j["comm_exposed_ms"], 3);
  EXPECT_EQ(j["exposed_data_ms"], 1.5);
  EXPECT_EQ(j["exposed_tensor_ms"], 0.75);
  EXPECT_EQ(j["exposed_context_ms"], 0.375);
  EXPECT_EQ(j["exposed_pipeline_ms"], 0.5);
  EXPECT_EQ(j["exposed_world_ms"], 0.25);
  EXPECT_EQ(j["exposed_snapshot_ms"], 0.125);
  EXPECT_EQ(j["time"], 1.5e9);
}

TEST(StepStatsJson, NothingThatIsNotANumber) {
  StepStats s = Stats(1);
  s.loss = std::numeric_limits<double>::quiet_NaN();
  s.grad_norm = std::numeric_limits<double>::infinity();
  s.eval_loss = -std::numeric_limits<double>::infinity();
  const std::string text = StepStatsJson(s, 0);
  const Json j = Json::parse(text);
  EXPECT_TRUE(j["loss"].is_null());
  EXPECT_TRUE(j["grad_norm"].is_null());
  EXPECT_TRUE(j["eval_loss"].is_null());
  EXPECT_TRUE(j["mfu_causal"].is_null());  // unknown peak
  s.memory_bytes = 0;
  EXPECT_TRUE(Json::parse(StepStatsJson(s, 0))["memory_bytes"].is_null());
  EXPECT_FALSE(Json::parse(StepStatsJson(Stats(1), 0)).contains("eval_loss"));
}

TEST(JsonLinesSink, ResumeKeepsEachStepOnce) {
  const TempDir dir;
  const std::string path = dir / "a/b/metrics.jsonl";  // folders are made
  WriteSteps(path, 1, 10);
  // A kill in the middle of a line, after step 10.
  std::ofstream(path, std::ios::app) << "{\"step\":11,\"lo";
  // The checkpoint was taken after step 7.
  WriteSteps(path, 8, 9);
  EXPECT_THAT(Steps(path), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9));
  EXPECT_FALSE(std::ifstream(path + ".tmp").good());
  WriteSteps(path, 10, 10);
  EXPECT_THAT(Steps(path), ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, 9, 10));
  WriteSteps(path, 1, 2);  // anew
  EXPECT_THAT(Steps(path), ElementsAre(1, 2));
}

TEST(JsonLinesSink, KnowsWhichRecordIsMissing) {
  const TempDir dir;
  const std::string path = dir / "m.jsonl";
  WriteSteps(path, 1, 6);
  EXPECT_TRUE((*JsonLinesSink::Open(path, 8))->Lacks(7));  // killed between saving 7 and its record
  EXPECT_FALSE((*JsonLinesSink::Open(path, 7))->Lacks(6));
  EXPECT_FALSE((*JsonLinesSink::Open(path, 9))->Lacks(8));  // another file's run
  EXPECT_FALSE((*JsonLinesSink::Open(path, 4))->Lacks(3));
  EXPECT_TRUE((*JsonLinesSink::Open(path, 5))->Lacks(4));  // the step before cut 4 and later off
}

TEST(JsonLinesSink, DamagedLinesAreDropped) {
  const TempDir dir;
  const std::string path = dir / "m.jsonl";
  std::ofstream(path)
      << "{\"step\":1}\nnot json\n{\"step\":\"2\"}\n[3]\n\n{\"step\":4}\n{\"step\":5}";
  WriteSteps(path, 6, 6);
  EXPECT_THAT(Steps(path), ElementsAre(1, 4, 6));  // 5 has no line end: cut off
}

TEST(JsonLinesSink, LinesAreThereBeforeFinish) {
  const TempDir dir;
  auto sink = JsonLinesSink::Open(dir / "m.jsonl", 1);
  ASSERT_TRUE(sink.ok());
  ASSERT_TRUE((*sink)->Write(Stats(1)).ok());
  EXPECT_THAT(Steps(dir / "m.jsonl"), ElementsAre(1));
  ASSERT_TRUE((*sink)->Finish().ok());
  EXPECT_TRUE((*sink)->Finish().ok());
  EXPECT_EQ((*sink)->Write(Stats(2)).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(JsonLinesSink, ErrorsNameTheFile) {
  const TempDir dir;
  std::ofstream(dir / "file") << "x";
  const auto below = JsonLinesSink::Open(dir / "file/m.jsonl", 1);
  ASSERT_FALSE(below.ok());
  EXPECT_THAT(std::string(below.status().message()), HasSubstr(dir / "file"));
  const auto folder = JsonLinesSink::Open(dir.path(), 1);
  ASSERT_FALSE(folder.ok());
  EXPECT_THAT(std::string(folder.status().message()), HasSubstr(dir.path()));
}

TEST(ReadLossPoints, GivesBackWhatWasWritten) {
  const TempDir dir;
  const std::string path = dir / "m.jsonl";
  {
    auto sink = JsonLinesSink::Open(path, 1);
    ASSERT_TRUE(sink.ok());
    StepStats s = Stats(1);
    s.eval_loss = 9.5;
    ASSERT_TRUE((*sink)->Write(s).ok());
    s = Stats(2);
    s.skipped = true;
    ASSERT_TRUE((*sink)->Write(s).ok());
    s = Stats(3);
    s.loss = std::nan("");
    ASSERT_TRUE((*sink)->Write(s).ok());
  }
  const auto points = ReadLossPoints(path);
  ASSERT_TRUE(points.ok());
  ASSERT_EQ(points->size(), 3u);
  EXPECT_EQ((*points)[0].train, Stats(1).loss);
  EXPECT_EQ((*points)[0].validation, 9.5);
  EXPECT_TRUE(std::isnan((*points)[1].train));
  EXPECT_FALSE((*points)[1].validation.has_value());
  EXPECT_TRUE(std::isnan((*points)[2].train));
  EXPECT_EQ(ReadLossPoints(dir / "none").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace stretto
