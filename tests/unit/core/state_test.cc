#include "stretto/core/state.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

class StateTest : public ::testing::Test {
 protected:
  StateEntry Entry(const std::string& name, std::vector<int64_t> global_shape, int64_t first_row,
                   int64_t rows) {
    StateEntry e;
    e.name = name;
    e.global_shape = std::move(global_shape);
    e.first_row = first_row;
    e.local = Tensor::Of(memory_.data(), DType::kF32, {rows, 3});
    return e;
  }
  void ExpectRefused(StateEntry entry, const std::string& part) {
    StateRegistry registry;
    const absl::Status status = registry.Add(std::move(entry));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
    EXPECT_TRUE(registry.entries().empty());
  }
  std::vector<float> memory_ = std::vector<float>(100);
};

TEST_F(StateTest, KeepsEntriesInOrder) {
  StateRegistry registry;
  ASSERT_TRUE(registry.Add(Entry("b", {7, 3}, 2, 5)).ok());
  ASSERT_TRUE(registry.Add(Entry("a", {7, 3}, 7, 0)).ok());
  ASSERT_EQ(registry.entries().size(), 2u);
  EXPECT_EQ(registry.entries()[0].name, "b");
  ASSERT_NE(registry.Find("a"), nullptr);
  EXPECT_EQ(registry.Find("a")->first_row, 7);
  EXPECT_EQ(registry.Find("c"), nullptr);
  EXPECT_EQ(registry.LocalBytes(), 5 * 3 * 4);
  registry.SetEpoch(12);
  EXPECT_EQ(registry.Find("a")->epoch, 12);
  EXPECT_EQ(registry.Find("b")->epoch, 12);
}

TEST_F(StateTest, AnAbsentTensorOwnsNothing) {
  StateRegistry registry;
  StateEntry entry;
  entry.name = "elsewhere";
  entry.global_shape = {7, 3, 2};
  ASSERT_TRUE(registry.Add(entry).ok());
  EXPECT_EQ(registry.entries()[0].local.rows(), 0);
  EXPECT_EQ(registry.entries()[0].local.rank, 3);
  EXPECT_EQ(registry.LocalBytes(), 0);
}

TEST_F(StateTest, RefusesARepeatedName) {
  StateRegistry registry;
  ASSERT_TRUE(registry.Add(Entry("w", {7, 3}, 0, 7)).ok());
  const absl::Status status = registry.Add(Entry("w", {7, 3}, 0, 7));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"w\" is registered twice"));
  EXPECT_EQ(registry.entries().size(), 1u);
}

TEST_F(StateTest, RefusesSlicesOutsideTheTensor) {
  ExpectRefused(Entry("w", {7, 3}, 3, 5), "5 rows from row 3");
  ExpectRefused(Entry("w", {7, 3}, -1, 5), "from row -1");
  ExpectRefused(Entry("w", {7, 3}, INT64_MAX, 5), "must lie inside");
  ExpectRefused(Entry("w", {7, 2}, 0, 5), "all dimensions but the first");
  ExpectRefused(Entry("w", {7, 3, 1}, 0, 5), "all dimensions but the first");
}

TEST_F(StateTest, ATensorMayHaveSeveralBoxes) {
  StateRegistry registry;
  const auto box = [&](int64_t first_row, int64_t rows, int64_t first_column) {
    StateEntry entry = Entry("w", {9, 7}, first_row, rows);
    entry.first_column = first_column;
    return entry;
  };
  ASSERT_TRUE(registry.Add(box(0, 2, 0)).ok());
  ASSERT_TRUE(registry.Add(box(2, 3, 0)).ok());
  ASSERT_TRUE(registry.Add(box(0, 5, 3)).ok());
  EXPECT_EQ(registry.entries().size(), 3u);
  EXPECT_EQ(registry.Find("w")->local.rows(), 2);
  EXPECT_EQ(registry.LocalBytes(), 10 * 3 * 4);
  for (const StateEntry& wrong : {box(1, 2, 2), box(4, 2, 0), box(4, 1, 5)}) {
    EXPECT_FALSE(registry.Add(wrong).ok());
  }
  StateEntry other = Entry("w", {9, 3}, 6, 1);
  EXPECT_THAT(std::string(registry.Add(other).message()), HasSubstr("two types or shapes"));
  ExpectRefused(box(0, 2, 5), "starts at column 5");
  ExpectRefused(box(0, 2, -1), "starts at column -1");
  StateEntry cube = Entry("w", {7, 3, 1}, 0, 5);
  cube.local = Tensor::Of(memory_.data(), DType::kF32, {5, 3, 1});
  cube.first_column = 1;
  ExpectRefused(cube, "starts at column 1");
}

TEST_F(StateTest, RefusesWhatCannotBeStored) {
  ExpectRefused(Entry("", {7, 3}, 0, 7), "no name");
  ExpectRefused(Entry("w", {}, 0, 7), "0 dimensions");
  ExpectRefused(Entry("w", {7, -3}, 0, 7), "negative dimension");
  StateEntry entry = Entry("w", {7, 3}, 0, 7);
  entry.dtype = DType::kBF16;
  ExpectRefused(entry, "registered as bf16");
  entry = Entry("w", {7, 3}, 0, 7);
  entry.local.data = nullptr;
  ExpectRefused(entry, "without memory");
  entry = Entry("w", {7, 3}, 0, 7);
  entry.local.row_stride = 4;
  ExpectRefused(entry, "not contiguous");
}

}  // namespace
}  // namespace stretto
