// Phases on the CPU's streams; tests/cuda/core_test.cc has the GPU's.
#include "stretto/core/phase_timer.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

namespace stretto {
namespace {

using std::chrono::milliseconds;

class PhaseTimerTest : public ::testing::TestWithParam<StreamMode> {
 protected:
  void SetUp() override { stream_ = Stream::Create(Device::Cpu(), {.mode = GetParam()}).value(); }
  void Work(int ms) {
    stream_->Enqueue([ms] { std::this_thread::sleep_for(milliseconds(ms)); });
  }
  std::unique_ptr<Stream> stream_;
};

TEST_P(PhaseTimerTest, AddsUpEachPhase) {
  PhaseTimer timer(*stream_, 3);
  for (int round = 0; round < 2; ++round) {  // the second forgets the first
    const auto begin = std::chrono::steady_clock::now();
    timer.Restart(2);
    Work(10);
    EXPECT_EQ(timer.Begin(0), 2);
    Work(20);
    EXPECT_EQ(timer.Begin(2), 0);
    Work(10);
    EXPECT_EQ(timer.Begin(2), 2);  // nothing new
    timer.End();
    Work(50);  // belongs to none
    ASSERT_TRUE(stream_->Synchronize().ok());
    const std::vector<double> seconds = timer.Seconds();
    ASSERT_EQ(seconds.size(), 3u);
    EXPECT_GE(seconds[0], 0.020);
    EXPECT_EQ(seconds[1], 0);
    EXPECT_GE(seconds[2], 0.020);
    const double round_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    EXPECT_LE(seconds[0] + seconds[2], round_seconds - 0.050);
  }
}

TEST_P(PhaseTimerTest, CountsTheStreamsTimeNotTheHosts) {
  if (GetParam() == StreamMode::kInline) GTEST_SKIP() << "an inline stream's time is the host's";
  PhaseTimer timer(*stream_, 2);
  timer.Restart(0);
  Work(40);
  timer.Begin(1);
  Work(20);
  timer.End();
  ASSERT_TRUE(stream_->Synchronize().ok());
  EXPECT_GE(timer.Seconds()[0], 0.040);
  EXPECT_GE(timer.Seconds()[1], 0.020);
}

TEST_P(PhaseTimerTest, TakesMorePhasesThanUsual) {
  PhaseTimer timer(*stream_, 2);
  timer.Restart(0);
  for (int i = 1; i <= 5000; ++i) timer.Begin(i % 2);
  timer.End();
  ASSERT_TRUE(stream_->Synchronize().ok());
  for (double s : timer.Seconds()) EXPECT_GE(s, 0);
}

// Without room for them the host would have to wait for the stream.
TEST(PhaseTimerRoomTest, ReservedPhasesDoNotWaitForTheStream) {
  const auto stream =
      Stream::Create(Device::Cpu(), {.mode = StreamMode::kFifo, .queue_capacity = 4096}).value();
  PhaseTimer timer(*stream, 2);
  timer.Reserve(3002);
  std::atomic<bool> go = false, gave_up = false;
  stream->Enqueue([&] {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!go && !gave_up) gave_up = std::chrono::steady_clock::now() > end;
  });
  timer.Restart(0);
  for (int i = 1; i <= 3000; ++i) timer.Begin(i % 2);
  timer.End();
  go = true;
  ASSERT_TRUE(stream->Synchronize().ok());
  EXPECT_FALSE(gave_up);
  for (double s : timer.Seconds()) EXPECT_GE(s, 0);
}

INSTANTIATE_TEST_SUITE_P(Cpu, PhaseTimerTest,
                         ::testing::Values(StreamMode::kInline, StreamMode::kFifo),
                         [](const auto& mode) {
                           return mode.param == StreamMode::kInline ? "Inline" : "Fifo";
                         });

TEST(StreamCapture, TheCpuRefusesIt) {
  const auto stream = Stream::Create(Device::Cpu()).value();
  EXPECT_FALSE(stream->CanCapture());
  EXPECT_TRUE(absl::IsUnimplemented(stream->BeginCapture()));
  EXPECT_FALSE(stream->EndCapture().ok());
  EXPECT_TRUE(stream->Synchronize().ok());
  stream->Launch(StreamGraph());
  EXPECT_FALSE(stream->Synchronize().ok());
}

}  // namespace
}  // namespace stretto
