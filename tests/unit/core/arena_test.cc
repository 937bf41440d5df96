#include "stretto/core/arena.h"

#include <cstdint>
#include <limits>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

TEST(ArenaTest, IsZeroedAlignedAndWritableToTheLastByte) {
  for (bool prefault : {false, true}) {
    for (int64_t bytes : {int64_t{1}, int64_t{4095}, int64_t{4097}, (int64_t{5} << 20) + 3}) {
      absl::StatusOr<Arena> arena = Arena::Create(Device::Cpu(), "test", bytes, prefault);
      ASSERT_TRUE(arena.ok()) << arena.status();
      EXPECT_EQ(arena->bytes(), bytes);
      EXPECT_EQ(arena->name(), "test");
      EXPECT_EQ(reinterpret_cast<uintptr_t>(arena->data()) % 4096, 0u);
      for (int64_t i = 0; i < bytes; i += 511) ASSERT_EQ(arena->data()[i], std::byte{0});
      arena->data()[0] = std::byte{1};
      arena->data()[bytes - 1] = std::byte{2};
      EXPECT_EQ(arena->data()[bytes - 1], std::byte{2});
    }
  }
}

TEST(ArenaTest, EmptyArenaHasAnAddress) {
  absl::StatusOr<Arena> arena = Arena::Create(Device::Cpu(), "empty", 0);
  ASSERT_TRUE(arena.ok()) << arena.status();
  EXPECT_EQ(arena->bytes(), 0);
  EXPECT_NE(arena->data(), nullptr);
}

TEST(ArenaTest, MovesKeepTheMemory) {
  absl::StatusOr<Arena> arena = Arena::Create(Device::Cpu(), "first", 10000);
  ASSERT_TRUE(arena.ok());
  std::byte* const data = arena->data();
  data[9999] = std::byte{7};
  Arena moved = std::move(arena).value();
  EXPECT_EQ(moved.data(), data);
  absl::StatusOr<Arena> other = Arena::Create(Device::Cpu(), "second", 20000);
  ASSERT_TRUE(other.ok());
  *other = std::move(moved);
  EXPECT_EQ(moved.data(), nullptr);  // NOLINT(bugprone-use-after-move): what a move leaves
  EXPECT_EQ(moved.bytes(), 0);
  EXPECT_EQ(other->data()[9999], std::byte{7});
  EXPECT_EQ(other->name(), "first");
  Arena& self = *other;
  *other = std::move(self);
  EXPECT_EQ(other->data(), data);
}

TEST(ArenaTest, RefusesWhatCannotBeHad) {
  const absl::Status huge = Arena::Create(Device::Cpu(), "activations", int64_t{1} << 60).status();
  EXPECT_EQ(huge.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(huge.message()), HasSubstr("\"activations\""));
  EXPECT_THAT(std::string(huge.message()), HasSubstr("1152921504606846976"));
  EXPECT_EQ(
      Arena::Create(Device::Cpu(), "max", std::numeric_limits<int64_t>::max()).status().code(),
      absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Arena::Create(Device::Cpu(), "negative", -1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace stretto
