#include <sys/mman.h>

#include <csignal>
#include <cstdint>
#include <utility>

#include "gtest/gtest.h"
#include "stretto/observe/memory.h"
#include "stretto/observe/signals.h"

namespace stretto {
namespace {

TEST(ProcessMemory, SeesWhatIsTouched) {
  const auto before = ReadProcessMemory();
  ASSERT_TRUE(before.ok()) << before.status();
  EXPECT_GT(before->resident_bytes, 100 << 10);
  EXPECT_GE(before->peak_resident_bytes, before->resident_bytes);
  constexpr int64_t kBytes = 96 << 20;
  int64_t peak = 0;
  {
    // Straight from the kernel: allocators (and sanitizers more so) keep memory of their own.
    void* block = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(block, MAP_FAILED);
    auto* bytes = static_cast<volatile char*>(block);
    for (int64_t i = 0; i < kBytes; i += 1024) bytes[i] = 1;
    const auto during = ReadProcessMemory();
    ASSERT_TRUE(during.ok());
    EXPECT_NEAR(static_cast<double>(during->resident_bytes - before->resident_bytes), kBytes,
                kBytes / 8.0);
    peak = during->peak_resident_bytes;
    EXPECT_EQ(munmap(block, kBytes), 0);
  }
  const auto after = ReadProcessMemory();
  ASSERT_TRUE(after.ok());
  EXPECT_LT(after->resident_bytes, before->resident_bytes + kBytes / 2);
  EXPECT_GE(peak, before->resident_bytes + kBytes / 2);
}

int earlier_calls = 0;
void Earlier(int) { ++earlier_calls; }

class StopSignalsTest : public testing::Test {
 protected:
  void SetUp() override {
    earlier_calls = 0;
    StopSignals::Clear();
    old_term_ = std::signal(SIGTERM, Earlier);
    old_usr1_ = std::signal(SIGUSR1, Earlier);
  }
  void TearDown() override {
    std::signal(SIGTERM, old_term_);
    std::signal(SIGUSR1, old_usr1_);
    StopSignals::Clear();
  }

 private:
  void (*old_term_)(int) = nullptr;
  void (*old_usr1_)(int) = nullptr;
};

TEST_F(StopSignalsTest, FlagIsSetAndCleared) {
  auto signals = StopSignals::Install();
  ASSERT_TRUE(signals.ok()) << signals.status();
  EXPECT_EQ(StopSignals::Received(), 0);
  std::raise(SIGUSR1);
  EXPECT_EQ(StopSignals::Received(), SIGUSR1);
  std::raise(SIGTERM);
  EXPECT_EQ(StopSignals::Received(), SIGTERM);
  std::raise(SIGTERM);  // again: the handler stays
  StopSignals::Clear();
  EXPECT_EQ(StopSignals::Received(), 0);
  EXPECT_EQ(earlier_calls, 0);
}

TEST_F(StopSignalsTest, EarlierHandlersComeBack) {
  {
    auto signals = StopSignals::Install();
    ASSERT_TRUE(signals.ok());
    StopSignals moved = std::move(*signals);
    std::raise(SIGTERM);
    EXPECT_EQ(earlier_calls, 0);
  }
  EXPECT_EQ(StopSignals::Received(), SIGTERM);  // a request outlives the handler
  StopSignals::Clear();
  std::raise(SIGTERM);
  std::raise(SIGUSR1);
  EXPECT_EQ(earlier_calls, 2);
  EXPECT_EQ(StopSignals::Received(), 0);
  EXPECT_TRUE(StopSignals::Install().ok());  // and a new one may follow
}

TEST_F(StopSignalsTest, OnlyOneAtATime) {
  auto first = StopSignals::Install();
  ASSERT_TRUE(first.ok());
  EXPECT_EQ(StopSignals::Install().status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace stretto
