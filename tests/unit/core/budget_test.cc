#include "stretto/core/budget.h"

#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

constexpr int64_t kMiB = int64_t{1} << 20;

TEST(BudgetTest, GrantsUpToTheCapacity) {
  Budget budget(100, 200, 8);
  EXPECT_TRUE(budget.Reserve(Resource::kHostMemory, "snapshots", 60).ok());
  EXPECT_TRUE(budget.Reserve(Resource::kHostMemory, "snapshots", 40).ok());
  EXPECT_EQ(budget.Used(Resource::kHostMemory), 100);
  EXPECT_EQ(budget.Used(Resource::kDeviceMemory), 0);
  EXPECT_EQ(budget.Reserve(Resource::kHostMemory, "offload", 1).code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(budget.Reserve(Resource::kHostMemory, "offload", 0).ok());
  EXPECT_EQ(budget.Used(Resource::kHostMemory), 100);
  budget.Release(Resource::kHostMemory, "snapshots");
  EXPECT_EQ(budget.Used(Resource::kHostMemory), 0);
  budget.Release(Resource::kHostMemory, "nobody");
  EXPECT_TRUE(budget.Reserve(Resource::kHostMemory, "offload", 100).ok());
  EXPECT_EQ(budget.Capacity(Resource::kSms), 8);
}

TEST(BudgetTest, RefusalNamesTheOwners) {
  Budget budget(-1, 100 * kMiB, 20);
  ASSERT_TRUE(budget.Reserve(Resource::kDeviceMemory, "weights", 64 * kMiB).ok());
  ASSERT_TRUE(budget.Reserve(Resource::kDeviceMemory, "frames", 30 * kMiB).ok());
  const absl::Status refused = budget.Reserve(Resource::kDeviceMemory, "workspace", 7 * kMiB);
  ASSERT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  const std::string message(refused.message());
  for (const char* part :
       {"\"workspace\" asked for 7.00 MiB of device memory", "94.0 MiB of 100 MiB is taken",
        "weights", "64.0 MiB", "frames", "30.0 MiB"}) {
    EXPECT_THAT(message, HasSubstr(part));
  }
  EXPECT_THAT(budget.Report(), HasSubstr("device memory: 94.0 MiB of 100 MiB"));
  EXPECT_THAT(budget.Report(), HasSubstr("host memory: 0 B of no limit"));
}

TEST(BudgetTest, RefusesNegativeAmountsAndSurvivesOverflow) {
  Budget budget(-1, -1, -1);
  EXPECT_EQ(budget.Reserve(Resource::kSms, "a", -1).code(), absl::StatusCode::kInvalidArgument);
  const int64_t all = std::numeric_limits<int64_t>::max();
  EXPECT_TRUE(budget.Reserve(Resource::kHostMemory, "a", all).ok());
  EXPECT_EQ(budget.Reserve(Resource::kHostMemory, "b", 1).code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(BudgetTest, NeverGrantsTooMuchToManyThreads) {
  Budget budget(1000, 0, 0);
  std::vector<int> granted(4, 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const std::string owner = "owner " + std::to_string(t);
      for (int i = 0; i < 500; ++i) {
        if (budget.Reserve(Resource::kHostMemory, owner, 3).ok()) granted[t] += 3;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(granted[0] + granted[1] + granted[2] + granted[3], 999);
  EXPECT_EQ(budget.Used(Resource::kHostMemory), 999);
}

}  // namespace
}  // namespace stretto
