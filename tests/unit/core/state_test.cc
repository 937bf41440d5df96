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
  ExpectRefused(Entry("w", {7, 4}, 0, 5), "all dimensions but the first");
  ExpectRefused(Entry("w", {7, 3, 1}, 0, 5), "all dimensions but the first");
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
