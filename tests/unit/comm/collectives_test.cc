#include <gtest/gtest.h>

#include <cmath>

#include "support/collective_cases.h"

namespace stretto {
namespace {

using testing::CheckCollectives;
using testing::Data;
using testing::Reference;
using testing::RunCollectiveCases;
using testing::Values;

std::vector<uint64_t> Hashes(int ranks, bool large, const WorldOptions& options = {}) {
  std::vector<uint64_t> hashes(static_cast<std::size_t>(ranks), 0);
  const absl::Status status = World::RunThreads(
      ranks,
      [&](World& world) -> absl::Status {
        STRETTO_ASSIGN_OR_RETURN(hashes[static_cast<std::size_t>(world.rank())],
                                 RunCollectiveCases(world, large));
        return absl::OkStatus();
      },
      options);
  EXPECT_TRUE(status.ok()) << status;
  return hashes;
}

class CollectivesTest : public ::testing::TestWithParam<int> {};

TEST_P(CollectivesTest, MatchReferencesBitForBit) { Hashes(GetParam(), GetParam() <= 4); }

INSTANTIATE_TEST_SUITE_P(Ranks, CollectivesTest, ::testing::Values(1, 2, 3, 4, 7, 8));

TEST(Collectives, RandomDelaysChangeNoBit) {
  const std::vector<uint64_t> plain = Hashes(3, false);
  WorldOptions options;
  options.random_delay_us = 200;
  options.delay_seed = 1;
  EXPECT_EQ(plain, Hashes(3, false, options));
  options.delay_seed = 2;
  EXPECT_EQ(plain, Hashes(3, false, options));
}

// The reference must notice a wrong order of additions, or the tests above prove nothing.
TEST(Collectives, AnotherOrderOfAdditionsIsNoticed) {
  for (const DType dtype : {DType::kF64, DType::kF32}) {
    std::vector<Data> all;
    for (int r = 0; r < 4; ++r) all.push_back(Values(dtype, 1021, r, 5));
    EXPECT_FALSE(Reference(all, ReduceOp::kSum) == Reference(all, ReduceOp::kSum, true));
  }
}

TEST(Collectives, Bf16IsSummedInF32AndRoundedOnce) {
  const absl::Status status = World::RunThreads(4, [&](World& world) -> absl::Status {
    Communicator c(world);
    // 256 + 1 + 1 + 1: in bf16 each addition of 1 would be lost.
    BFloat16 value(world.rank() == 0 ? 256.0f : 1.0f);
    Tensor t = Tensor::Of(&value, DType::kBF16, {1});
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), t, ReduceOp::kSum, "sum")));
    if (static_cast<float>(value) != 260.0f) return absl::InternalError("rounded too early");
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(Collectives, MaximumCarriesNan) {
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    Communicator c(world);
    for (int holder = 0; holder < 3; ++holder) {
      float value = world.rank() == holder ? NAN : static_cast<float>(world.rank());
      STRETTO_RETURN_IF_ERROR(c.Wait(
          c.AllReduce(c.all(), Tensor::Of(&value, DType::kF32, {1}), ReduceOp::kMax, "max")));
      if (value == value) return absl::InternalError("a NaN was lost");
    }
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace stretto
