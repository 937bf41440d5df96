#include "stretto/comm/clock.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

namespace stretto {
namespace {

// A clock that is 5000 ahead of rank 0's; the way there takes longer than the way back.
TEST(ClockOffset, ComesFromTheShortestRoundTrip) {
  const auto reading = [](int64_t asked, int64_t there, int64_t back) {
    return ClockReading{asked, asked - 5000 + there, asked + there + back};
  };
  const ClockOffset one = OffsetOf({reading(100, 30, 10)});
  EXPECT_EQ(one.error_ns, 20);
  EXPECT_EQ(one.offset_ns, -5000 + 10);  // off by half the difference of the two ways
  const ClockOffset best =
      OffsetOf({reading(100, 900, 10), reading(2000, 4, 6), reading(3000, 10, 500)});
  EXPECT_EQ(best.error_ns, 5);
  EXPECT_LE(std::abs(best.offset_ns + 5000), best.error_ns);
  EXPECT_EQ(OffsetOf({}).offset_ns, 0);
}

// Ranks whose clocks are off by planted amounts find them, to the error that they state.
TEST(AlignClocks, FindsPlantedOffsets) {
  const absl::Status status = World::RunThreads(
      4,
      [](World& world) -> absl::Status {
        Communicator comm(world);
        const int64_t planted = int64_t{1'000'000'000} * world.rank() * (world.rank() % 2 ? 1 : -1);
        STRETTO_ASSIGN_OR_RETURN(const ClockOffset found,
                                 AlignClocks(comm, [&] { return SteadyNanoseconds() + planted; }));
        EXPECT_LE(std::abs(found.offset_ns + planted), found.error_ns) << world.rank();
        EXPECT_LT(found.error_ns, 100'000'000);
        EXPECT_EQ(found.error_ns > 0, world.rank() > 0);
        return comm.WaitAll();
      },
      {.random_delay_us = 50, .delay_seed = 2});
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace stretto
