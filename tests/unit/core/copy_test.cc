#include "stretto/core/copy.h"

#include <vector>

#include "gtest/gtest.h"

namespace stretto {
namespace {

TEST(FillFromHost, HostMemoryIsFilledWhereItLies) {
  std::vector<float> memory(5 * 7, -1);
  const Tensor t = Tensor::Of(memory.data(), DType::kF32, {5, 7}).Columns(2, 3);
  int calls = 0;
  const absl::Status status = FillFromHost(t, [&](int64_t first, const Tensor& rows) {
    ++calls;
    EXPECT_EQ(first, 0);
    EXPECT_EQ(rows.data, t.data);
    EXPECT_EQ(rows.row_stride, 7);
    for (int64_t r = 0; r < rows.rows(); ++r) rows.as<float>(r)[0] = static_cast<float>(r);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(calls, 1);
  for (int r = 0; r < 5; ++r) EXPECT_EQ(memory[r * 7 + 2], r);
}

TEST(FillFromHost, ReturnsTheErrorOfTheFiller) {
  float x = 0;
  const absl::Status status = FillFromHost(
      Tensor::Of(&x, DType::kF32, {1}),
      [](int64_t, const Tensor&) { return absl::DataLossError("the file ends too early"); });
  EXPECT_EQ(status.message(), "the file ends too early");
}

}  // namespace
}  // namespace stretto
