#include "stretto/comm/recorder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

namespace stretto {
namespace {

using ::testing::HasSubstr;

FlightRecord Record(int64_t sequence, const char* label) {
  FlightRecord r;
  r.sequence = sequence;
  r.op = CommOp::kReduceScatter;
  r.count = sequence * 1000;
  std::strncpy(r.label, label, sizeof(r.label) - 1);
  return r;
}

TEST(FlightRecorder, KeepsTheNewest) {
  FlightRecorder recorder(4);
  for (int64_t s = 1; s <= 10; ++s) {
    const int64_t handle = recorder.Begin(Record(s, "x"));
    recorder.Started(handle);
    if (s != 9) recorder.Finished(handle);
  }
  recorder.Finished(0);  // forgotten long ago: no effect
  const std::vector<FlightRecord> records = recorder.Snapshot();
  ASSERT_EQ(records.size(), 4u);
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(records[i].sequence, 7 + i);
    EXPECT_GT(records[i].enqueued_us, 0);
    EXPECT_GE(records[i].started_us, records[i].enqueued_us);
  }
  EXPECT_EQ(records[2].finished_us, 0);
  EXPECT_GT(records[3].finished_us, 0);
  const std::string summary = recorder.Summary();
  EXPECT_THAT(summary, HasSubstr("last finished: reduce_scatter(group 0) seq 10 [x]"));
  EXPECT_THAT(summary, HasSubstr("in flight: reduce_scatter(group 0) seq 9"));
  recorder.NameGroup(0, "dp");
  FlightRecord sent = Record(11, "boundary");
  sent.op = CommOp::kSend;
  sent.peer = 3;
  recorder.Begin(sent);
  EXPECT_THAT(recorder.Summary(), HasSubstr("last finished: reduce_scatter(dp) seq 10 [x]"));
  EXPECT_THAT(recorder.Summary(), HasSubstr("send(dp) seq 11 to rank 3 [boundary]"));
}

TEST(FlightRecorder, WritesJson) {
  FlightRecorder recorder;
  recorder.Finished(recorder.Begin(Record(41, "say \"hi\"")));
  const std::string directory = ::testing::TempDir();
  ASSERT_TRUE(recorder.Dump(directory, 3, 8).ok());
  std::ifstream file(directory + "/flight-rank3.json");
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_THAT(text.str(), HasSubstr("\"sequence\": 41"));
  EXPECT_THAT(text.str(), HasSubstr("\"op\": \"reduce_scatter\""));
  EXPECT_THAT(text.str(), HasSubstr("say \\\"hi\\\""));
  EXPECT_THAT(text.str(), HasSubstr("\"state\": \"completed\""));
  EXPECT_THAT(text.str(), HasSubstr("\"world_size\": 8"));
  const absl::Status bad = recorder.Dump("/nonexistent/folder", 0, 1);
  EXPECT_THAT(std::string(bad.message()), HasSubstr("/nonexistent/folder/flight-rank0.json"));
}

// Readers see whole records or none, never halves of two.
TEST(FlightRecorder, SnapshotsWhileWriting) {
  FlightRecorder recorder(8);
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (int64_t s = 1; !stop; ++s) {
      const int64_t handle = recorder.Begin(Record(s, s % 2 == 0 ? "even" : "odd"));
      recorder.Started(handle);
      recorder.Finished(handle);
    }
  });
  int64_t seen = 0;
  for (int round = 0; round < 2000 || seen == 0; ++round) {
    for (const FlightRecord& r : recorder.Snapshot()) {
      ++seen;
      ASSERT_EQ(r.count, r.sequence * 1000);
      ASSERT_STREQ(r.label, r.sequence % 2 == 0 ? "even" : "odd");
    }
    recorder.Summary();
  }
  stop = true;
  writer.join();
}

}  // namespace
}  // namespace stretto
