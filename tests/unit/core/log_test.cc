#include "stretto/core/log.h"

#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::Pair;

class LogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    SetLogSink(
        [this](LogLevel level, const std::string& line) { lines_.emplace_back(level, line); });
  }
  void TearDown() override {
    SetLogSink({});
    SetLogLevel(LogLevel::kInfo);
    SetLogRank(0, 1);
  }
  std::vector<std::pair<LogLevel, std::string>> lines_;
};

TEST_F(LogTest, FiltersByLevel) {
  SetLogRank(0, 1);
  LogDebug("d");
  LogInfo("i");
  SetLogLevel(LogLevel::kError);
  LogWarning("w");
  LogError("e {} %s");  // not a format
  SetLogLevel(LogLevel::kOff);
  LogError("off");
  EXPECT_THAT(lines_, ElementsAre(Pair(LogLevel::kInfo, "[rank 0 of 1] i"),
                                  Pair(LogLevel::kError, "[rank 0 of 1] e {} %s")));
}

TEST_F(LogTest, InfoComesFromRankZeroOnly) {
  SetLogRank(3, 8);
  LogInfo("i");
  LogWarning("w");
  SetLogRank(0, 8);
  LogInfo("i");
  EXPECT_THAT(lines_, ElementsAre(Pair(LogLevel::kWarning, "[rank 3 of 8] w"),
                                  Pair(LogLevel::kInfo, "[rank 0 of 8] i")));
}

TEST_F(LogTest, TheDefaultIsStandardErrorWithTime) {
  SetLogSink({});
  SetLogRank(2, 4);
  testing::internal::CaptureStderr();
  LogWarning("disk {} is slow");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text, HasSubstr(" W [rank 2 of 4] disk {} is slow\n"));
  EXPECT_THAT(text, MatchesRegex("....-..-.. ..:..:.......(.|\n)*"));
  EXPECT_TRUE(lines_.empty());
}

TEST_F(LogTest, SinksMayThrowOrLog) {
  SetLogSink([](LogLevel, const std::string&) { throw std::runtime_error("no"); });
  LogError("lost");
  SetLogSink([](LogLevel, const std::string&) { LogError("inner"); });
  testing::internal::CaptureStderr();
  LogError("outer");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text, HasSubstr("inner"));
  EXPECT_THAT(text, Not(HasSubstr("outer")));
}

TEST_F(LogTest, LinesOfManyThreadsArriveWhole) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 200; ++i) LogWarning("line");
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(lines_.size(), 800u);
}

}  // namespace
}  // namespace stretto
