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

// Two slots and their parity for all ranks of a machine, by the table of docs/snapshots.md.
TEST(RunPlan, KeepersHaveTwoSlotsAndTheirParity) {
  TrainConfig config = Small("cuda");
  config.parallel.dp = 8;
  config.batch.global = 8;
  const RunPlan plan = PlanRun(config, 8, 0).value();
  const auto elements = static_cast<double>(plan.stages.front().model.graph.ParameterElements());
  const auto state = static_cast<double>(plan.snapshot_bytes);
  EXPECT_GT(state, 14 * elements / 8);
  EXPECT_LT(state, 14 * elements / 8 + (256 << 10));  // and a table of contents
  const auto of_state = [&](int keepers, int parity, const char* name) {
    const auto memory = SnapshotMemory(plan, 8, keepers, parity).value();
    return static_cast<double>(Bytes(memory, name)) / (state * 8 / keepers);
  };
  EXPECT_DOUBLE_EQ(of_state(1, -1, "snapshot slots"), 2);
  EXPECT_LT(of_state(1, -1, "snapshot parity"), 0);  // none
  EXPECT_NEAR(of_state(2, -1, "snapshot parity"), 2, 1e-3);
  EXPECT_NEAR(of_state(4, -1, "snapshot parity"), 2.0 / 3, 1e-3);
  EXPECT_NEAR(of_state(8, 2, "snapshot parity"), 2.0 / 3, 1e-3);
  EXPECT_EQ(Bytes(SnapshotMemory(plan, 8, 4).value(), "snapshot rings"), 2 * (int64_t{128} << 20));
  EXPECT_THAT(std::string(SnapshotMemory(plan, 8, 3).status().message()), HasSubstr("8 ranks"));
  EXPECT_THAT(std::string(SnapshotMemory(plan, 8, 2, 2).status().message()), HasSubstr("parity 2"));
}

// Gradients and parameters of which a rank keeps a shard, beside buffers that do not grow with the
// model.
TEST(RunPlan, ShardsShrinkWithTheRanks) {
  TrainConfig config;
  config.model.family = "llama";
  config.model.vocabulary = 512;
  config.model.hidden = 128;
  config.model.heads = 4;
  config.model.kv_heads = 4;
  config.model.ffn = 256;
  config.model.tie_embeddings = false;
  config.parallel.bucket_bytes = 1;
  const auto plan = [&](int zero, int64_t layers, int ranks) {
    TrainConfig c = config;
    c.model.layers = layers;
    c.parallel.zero = zero;
    EXPECT_TRUE(c.Resolve(ranks).ok());
    return PlanRun(c, ranks, 0).value();
  };
  for (const int64_t layers : {4, 12}) {
    const RunPlan whole = plan(1, layers, 8), two = plan(2, layers, 8), three = plan(3, layers, 8);
    // Nothing is padded: all rows divide by 8, and all shards by 64 bytes.
    const int64_t bytes = Bytes(whole.arenas, "parameters");
    EXPECT_EQ(bytes, 4 * whole.stages.front().model.graph.ParameterElements());
    EXPECT_EQ(Bytes(whole.arenas, "gradients"), bytes);
    EXPECT_EQ(Bytes(two.arenas, "parameters"), bytes);
    EXPECT_EQ(Bytes(two.arenas, "gradients"), bytes / 8);
    EXPECT_EQ(Bytes(three.arenas, "parameters"), bytes / 8);
    EXPECT_EQ(Bytes(three.arenas, "gradients"), bytes / 8);
    EXPECT_EQ(Bytes(two.arenas, "optimizer state"), Bytes(whole.arenas, "optimizer state"));
    EXPECT_EQ(Bytes(whole.arenas, "bucket buffers"), -1);
    EXPECT_EQ(Bytes(two.arenas, "bucket buffers"), Bytes(plan(2, 4, 8).arenas, "bucket buffers"));
    EXPECT_EQ(Bytes(three.arenas, "bucket buffers"), Bytes(plan(3, 4, 8).arenas, "bucket buffers"));
    // Sent: 7/8 of everything, once a step, or once or twice in each of its micro-batches. Backward
    // reads no embedding, and finds the head and the norm before it where forward left them.
    const int64_t table = 4 * 512 * 128, norm = 4 * 128, micro_batches = two.micro_batches;
    EXPECT_EQ(whole.gradient_bytes_sent, 7 * bytes / 8);
    EXPECT_EQ(two.gradient_bytes_sent, micro_batches * 7 * bytes / 8);
    EXPECT_EQ(two.parameter_bytes_sent, 7 * bytes / 8);
    EXPECT_EQ(three.gradient_bytes_sent, two.gradient_bytes_sent);
    EXPECT_EQ(three.parameter_bytes_sent, micro_batches * 7 * (2 * bytes - 2 * table - norm) / 8);
  }
  // A table that embedding and head share is gathered and reduced for each of them.
  config.model.tie_embeddings = true;
  const RunPlan tied = plan(3, 4, 8);
  const int64_t bytes = 4 * tied.stages.front().model.graph.ParameterElements();
  EXPECT_EQ(tied.gradient_bytes_sent, tied.micro_batches * 7 * (bytes + 4 * 512 * 128) / 8);
  EXPECT_EQ(tied.parameter_bytes_sent, tied.micro_batches * 7 * (2 * bytes - 4 * 128) / 8);
  // On one rank there is nothing to shard.
  EXPECT_EQ(plan(3, 4, 1).arena_bytes, plan(1, 4, 1).arena_bytes);
}

}  // namespace
}  // namespace stretto
