// What the plan says of the optimizer's state: its size in every precision, and where it lies.
#include "stretto/train/memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace stretto {
namespace {

using ::testing::HasSubstr;

TrainConfig Small(const std::string& device) {
  TrainConfig config;
  config.model.layers = 2;
  config.runtime.device = device;
  config.runtime.dtype = "bf16";
  EXPECT_TRUE(config.Resolve(1).ok());
  return config;
}

int64_t Bytes(const std::vector<NamedBytes>& arenas, const std::string& name) {
  for (const NamedBytes& a : arenas) {
    if (a.name == name) return a.bytes;
  }
  return -1;
}

TEST(RunPlan, OptimizerStateFollowsItsTypes) {
  TrainConfig config = Small("cpu");
  const auto bytes_per_element = [&] {
    const RunPlan plan = PlanRun(config, 1, 0).value();
    return static_cast<double>(Bytes(plan.arenas, "optimizer state")) /
           static_cast<double>(plan.stages.front().model.graph.ParameterElements());
  };
  EXPECT_NEAR(bytes_per_element(), 12, 0.05);
  config.optimizer.masters = false;
  EXPECT_NEAR(bytes_per_element(), 8, 0.05);
  config.optimizer.moments = "bf16";
  EXPECT_NEAR(bytes_per_element(), 4, 0.05);
  config.optimizer.masters = true;
  EXPECT_NEAR(bytes_per_element(), 8, 0.05);
  config.runtime.dtype = "f32";
  EXPECT_NEAR(bytes_per_element(), 4, 0.05);
  config.optimizer.offload = true;  // no matter on the CPU
  EXPECT_NEAR(bytes_per_element(), 4, 0.05);
  config.runtime.dtype = "f64";
  EXPECT_THAT(std::string(config.Resolve(1).message()), HasSubstr("optimizer.moments bf16"));
}

TEST(RunPlan, OffloadedStateCountsAgainstTheHost) {
  TrainConfig config = Small("cuda");
  config.parallel.dp = 2;
  const RunPlan resident = PlanRun(config, 2, 1).value();
  config.optimizer.offload = true;
  const RunPlan offloaded = PlanRun(config, 2, 1).value();
  const int64_t state = Bytes(resident.arenas, "optimizer state");
  ASSERT_GT(state, 0);
  EXPECT_EQ(Bytes(offloaded.arenas, "optimizer state"), -1);
  EXPECT_EQ(Bytes(offloaded.host_arenas, "optimizer state"), state);
  EXPECT_EQ(offloaded.host_arena_bytes, state);
  EXPECT_EQ(resident.host_arena_bytes, 0);
  EXPECT_EQ(offloaded.arena_bytes, resident.arena_bytes - state);
  EXPECT_THAT(offloaded.MemoryTable(), HasSubstr("in host memory"));
}

}  // namespace
}  // namespace stretto
