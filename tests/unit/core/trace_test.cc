// Recorded actions and the files made of them; tests/unit/train/trace_test.cc has whole runs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "stretto/core/chrome_trace.h"
#include "stretto/core/trace_recorder.h"

namespace stretto {
namespace {

using Json = nlohmann::json;
using ::testing::HasSubstr;

Json FileOf(const std::vector<std::string>& processes) {
  std::string text = kChromeTraceBegin;
  for (size_t i = 0; i < processes.size(); ++i) {
    absl::StrAppend(&text, i > 0 ? kChromeTraceSeparator : "", processes[i]);
  }
  return Json::parse(text + ChromeTraceEnd({{"source", JsonString("test")}}));
}

std::vector<Json> Of(const Json& file, const char* phase) {
  std::vector<Json> events;
  for (const Json& event : file["traceEvents"]) {
    if (event["ph"] == phase) events.push_back(event);
  }
  return events;
}

TEST(ChromeTrace, MergesRanksAndKeepsRowsApart) {
  const std::vector<TraceSlice> first = {
      {.row = "compute", .category = "forward", .tags = {.item = 4}, .begin_ns = 0, .end_ns = 10},
      {.row = "dp",
       .category = "all_gather",
       .label = "param \"b\"\n",
       .begin_ns = 5,
       .end_ns = 30},
      {.row = "dp", .category = "all_gather", .begin_ns = 20, .end_ns = 40, .finished = false},
      {.row = "dp", .category = "all_gather", .begin_ns = 30, .end_ns = 31},
      {.row = "compute", .category = "optimizer", .begin_ns = 10, .end_ns = 10}};
  const Json file = FileOf({ChromeTraceProcess(0, "rank 0", "", first),
                            ChromeTraceProcess(1, "rank 1", "clock to 2 us", {}),
                            ChromeTraceProcess(7, "rank 7", "", {first[0]})});
  EXPECT_EQ(file["otherData"]["source"], "test");
  const std::vector<Json> slices = Of(file, "X");
  ASSERT_EQ(slices.size(), 6u);
  EXPECT_EQ(slices[0]["name"], "forward 4");
  EXPECT_EQ(slices[0]["args"], Json({{"item", 4}}));
  EXPECT_EQ(slices[0]["dur"].get<double>(), 0.01);
  EXPECT_EQ(slices[1]["name"], "optimizer");
  EXPECT_EQ(slices[2]["name"], "param \"b\"\n");
  EXPECT_EQ(slices[5]["pid"], 7);
  // The one that overlaps has a thread of its own, and the one behind it the first again.
  EXPECT_EQ(slices[2]["tid"], slices[3]["tid"]);
  EXPECT_NE(slices[2]["tid"], slices[4]["tid"]);
  EXPECT_EQ(slices[4]["args"]["unfinished"], true);
  std::vector<std::string> names;
  for (const Json& event : Of(file, "M")) {
    if (event["args"].contains("name")) names.push_back(event["args"]["name"]);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"rank 0", "compute", "dp", "dp (2)", "rank 1",
                                             "rank 7", "compute"}));
}

class TraceRecorderTest : public ::testing::TestWithParam<StreamMode> {
 protected:
  void SetUp() override { stream_ = Stream::Create(Device::Cpu(), {.mode = GetParam()}).value(); }
  std::unique_ptr<Stream> stream_;
};

TEST_P(TraceRecorderTest, TakesTheStreamsTimes) {
  TraceRecorder recorder(*stream_, 8);
  EXPECT_EQ(recorder.Open("compute", "forward", ""), -1);  // in no step
  recorder.SetStep(3);
  const int64_t before = SteadyNanoseconds();
  const int first = recorder.Open("compute", "forward", "", {.item = 1});
  recorder.Begin(first, *stream_);
  stream_->Enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); });
  recorder.End(first, *stream_);
  const int second = recorder.Open("compute", "backward", "");
  recorder.Begin(second, *stream_);
  recorder.End(second, *stream_);
  const int host = recorder.Open("host", "data wait", "");
  recorder.Begin(host);
  recorder.End(host);
  const int open = recorder.Open("dp", "all_gather", "never ends");
  recorder.Begin(open);
  recorder.Open("dp", "all_gather", "never begins");
  ASSERT_TRUE(stream_->Synchronize().ok());
  const int64_t now = SteadyNanoseconds();
  const std::vector<TraceSlice> slices = recorder.Slices(now);
  ASSERT_EQ(slices.size(), 4u);
  EXPECT_EQ(recorder.lost(), 1);
  EXPECT_GE(slices[0].begin_ns, before);
  EXPECT_GE(slices[0].end_ns - slices[0].begin_ns, 20'000'000);
  EXPECT_EQ(slices[0].step, 3);
  EXPECT_EQ(slices[0].tags.item, 1);
  EXPECT_GE(slices[1].begin_ns, slices[0].end_ns);
  EXPECT_TRUE(slices[2].finished);
  EXPECT_FALSE(slices[3].finished);
  EXPECT_EQ(slices[3].end_ns, now);
}

INSTANTIATE_TEST_SUITE_P(Streams, TraceRecorderTest,
                         ::testing::Values(StreamMode::kInline, StreamMode::kFifo));

TEST(TraceRecorder, CountsWhatFindsNoRoom) {
  const auto stream = Stream::Create(Device::Cpu()).value();
  TraceRecorder recorder(*stream, 3);
  recorder.SetStep(1);
  for (int i = 0; i < 5; ++i) {
    const int action = recorder.Open("host", "data wait", std::string(100, 'x').c_str());
    EXPECT_EQ(action >= 0, i < 3);
    recorder.Begin(action);
    recorder.End(action);
    recorder.SetBytes(action, i);
  }
  const std::vector<TraceSlice> slices = recorder.Slices(SteadyNanoseconds());
  ASSERT_EQ(slices.size(), 3u);
  EXPECT_EQ(slices[2].tags.bytes, 2);
  EXPECT_EQ(slices[2].label, std::string(55, 'x'));
  EXPECT_EQ(recorder.lost(), 2);
}

TEST(TraceRecorder, ScopesSayWhatActionsLeaveOpen) {
  const auto stream = Stream::Create(Device::Cpu()).value();
  TraceRecorder recorder(*stream, 3);
  recorder.SetStep(1);
  const auto record = [&](const TraceTags& tags) {
    const int action = recorder.Open("host", "data wait", "", tags);
    recorder.Begin(action);
  };
  {
    const TraceScope outer(&recorder, {.stage = 2, .item = 5});
    {
      const TraceScope inner(&recorder, {.item = 6, .bucket = 1});
      record({.peer = 3});
    }
    record({.stage = 0});
  }
  record({});
  const TraceScope nothing(nullptr, {.stage = 1});
  const std::vector<TraceSlice> slices = recorder.Slices(SteadyNanoseconds());
  ASSERT_EQ(slices.size(), 3u);
  EXPECT_EQ(slices[0].tags.stage, 2);
  EXPECT_EQ(slices[0].tags.item, 6);
  EXPECT_EQ(slices[0].tags.bucket, 1);
  EXPECT_EQ(slices[0].tags.peer, 3);
  EXPECT_EQ(slices[1].tags.stage, 0);
  EXPECT_EQ(slices[1].tags.item, 5);
  EXPECT_EQ(slices[1].tags.bucket, -1);
  EXPECT_EQ(slices[2].tags.stage, -1);
}

}  // namespace
}  // namespace stretto
