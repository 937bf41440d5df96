#include "stretto/core/memory_plan.h"

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/core/rng.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

// The first pair that is live together and shares a byte, or "".
std::string Overlap(const MemoryPlan& plan) {
  for (size_t i = 0; i < plan.buffers.size(); ++i) {
    for (size_t j = i + 1; j < plan.buffers.size(); ++j) {
      const BufferSpec& a = plan.buffers[i];
      const BufferSpec& b = plan.buffers[j];
      if (a.last < b.first || b.last < a.first) continue;
      if (plan.offsets[i] < plan.offsets[j] + b.bytes &&
          plan.offsets[j] < plan.offsets[i] + a.bytes) {
        return a.name + " and " + b.name;
      }
    }
  }
  return "";
}

int64_t PeakByCounting(const MemoryPlan& plan) {
  int64_t peak = 0;
  for (const BufferSpec& at : plan.buffers) {
    int64_t live = 0;
    for (const BufferSpec& b : plan.buffers) {
      if (b.first <= at.first && at.first <= b.last) live += b.bytes;
    }
    peak = std::max(peak, live);
  }
  return peak;
}

TEST(MemoryPlannerTest, ReusesMemoryOfTheDead) {
  MemoryPlanner planner(64);
  const BufferId a = planner.Add({"a", 100, 0, 3});
  const BufferId b = planner.Add({"b", 100, 4, 5});
  const BufferId c = planner.Add({"c", 10, 3, 4});
  const absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->offsets[a], 0);
  EXPECT_EQ(plan->offsets[b], 0);
  EXPECT_EQ(plan->offsets[c], 128);
  EXPECT_EQ(plan->arena_bytes, 138);
  EXPECT_EQ(plan->peak_live_bytes, 110);
}

TEST(MemoryPlannerTest, LifetimesIncludeTheirLastAction) {
  MemoryPlanner planner(1);
  planner.Add({"a", 8, 0, 2});
  planner.Add({"b", 8, 2, 3});
  const absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->arena_bytes, 16);
  EXPECT_EQ(plan->peak_live_bytes, 16);
}

TEST(MemoryPlannerTest, RandomBuffersNeverOverlap) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const Rng rng(seed, "planner");
    const int alignment = 1 << rng.Below(0, 9);
    const int count = 1 + static_cast<int>(rng.Below(1, 120));
    MemoryPlanner planner(alignment);
    for (int i = 0; i < count; ++i) {
      const uint64_t e = 10 + 4 * i;
      const int first = static_cast<int>(rng.Below(e, 50));
      const int length = static_cast<int>(rng.Below(e + 1, rng.Below(e + 2, 4) == 0 ? 50 : 4));
      planner.Add(
          {std::to_string(i), static_cast<int64_t>(rng.Below(e + 3, 3000)), first, first + length});
    }
    absl::StatusOr<MemoryPlan> plan = planner.Solve();
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(Overlap(*plan), "") << "seed " << seed;
    EXPECT_EQ(plan->peak_live_bytes, PeakByCounting(*plan));
    EXPECT_GE(plan->arena_bytes, plan->peak_live_bytes);
    for (int i = 0; i < count; ++i) {
      EXPECT_EQ(plan->offsets[i] % alignment, 0);
      EXPECT_LE(plan->offsets[i] + plan->buffers[i].bytes, plan->arena_bytes);
    }
    const absl::StatusOr<MemoryPlan> again = planner.Solve();
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(plan->offsets, again->offsets);
  }
}

// The definition, buffer by buffer: largest first, each at the lowest offset that no buffer of its
// lifetime has taken. Quadratic.
std::vector<int64_t> PlacedOneByOne(const std::vector<BufferSpec>& buffers, int64_t alignment) {
  std::vector<int> order(buffers.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return buffers[a].bytes != buffers[b].bytes ? buffers[a].bytes > buffers[b].bytes
                                                : buffers[a].first < buffers[b].first;
  });
  std::vector<int64_t> offsets(buffers.size(), 0);
  std::vector<int> placed;  // by offset
  for (const int id : order) {
    const BufferSpec& b = buffers[id];
    if (b.bytes == 0) break;
    int64_t offset = 0;
    for (const int other : placed) {
      const BufferSpec& p = buffers[other];
      if (p.first > b.last || p.last < b.first) continue;
      if (offsets[other] >= offset + b.bytes) break;
      const int64_t end = offsets[other] + p.bytes;
      offset = std::max(offset, (end + alignment - 1) / alignment * alignment);
    }
    offsets[id] = offset;
    placed.insert(std::upper_bound(placed.begin(), placed.end(), id,
                                   [&](int x, int y) { return offsets[x] < offsets[y]; }),
                  id);
  }
  return offsets;
}

TEST(MemoryPlannerTest, PlacesAsTheDefinitionSays) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const Rng rng(seed, "definition");
    const int alignment =
        seed % 3 == 0 ? 1 + static_cast<int>(rng.Below(0, 100)) : 1 << rng.Below(1, 9);
    const int count = 1 + static_cast<int>(rng.Below(2, seed % 10 == 0 ? 900 : 90));
    const int actions = 1 + static_cast<int>(rng.Below(3, 200));
    const uint64_t sizes = 1 + rng.Below(4, 4) * 700;  // also many of one size
    MemoryPlanner planner(alignment);
    std::vector<BufferSpec> buffers;
    for (int i = 0; i < count; ++i) {
      const uint64_t e = 10 + 4 * static_cast<uint64_t>(i);
      int first = static_cast<int>(rng.Below(e, actions)) - 7;
      int last = first + static_cast<int>(rng.Below(e + 1, rng.Below(e + 2, 3) == 0 ? 4 : actions));
      if (rng.Below(e + 2, 5) == 0) first = -first, last = first + 2 * actions;  // nested
      buffers.push_back(
          {std::to_string(i), static_cast<int64_t>(rng.Below(e + 3, sizes)), first, last});
      planner.Add(buffers.back());
    }
    const absl::StatusOr<MemoryPlan> plan = planner.Solve();
    ASSERT_TRUE(plan.ok()) << plan.status();
    ASSERT_EQ(plan->offsets, PlacedOneByOne(buffers, alignment)) << "seed " << seed;
  }
}

// A training step of 6000 layers is planned while the test waits. The time limit of the test is
// all that it asks for; looking at every pair of its 60 000 buffers takes far longer.
TEST(MemoryPlannerTest, PlansManyLayers) {
  constexpr int kLayers = 6000;
  MemoryPlanner planner(256);
  for (int layer = 0; layer < kLayers; ++layer) {
    const int backward = 2 * kLayers - 1 - layer;
    for (int i = 0; i < 8; ++i) planner.Add({"act", 256 * (i + 1), layer, backward});
    planner.Add({"scratch", 256 * 16, layer, layer});
    planner.Add({"grad", 256 * 8, backward, backward + 1});
  }
  const absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->arena_bytes, plan->peak_live_bytes);
}

TEST(MemoryPlannerTest, TheCheckSeesAnOverlap) {
  MemoryPlanner planner;
  planner.Add({"a", 100, 0, 3});
  planner.Add({"b", 100, 3, 5});
  absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  ASSERT_EQ(Overlap(*plan), "");
  std::swap(plan->offsets[0], plan->offsets[1]);
  ASSERT_EQ(Overlap(*plan), "");
  plan->offsets[0] = plan->offsets[1] + 99;
  EXPECT_EQ(Overlap(*plan), "a and b");
}

// Forward fills one set of activations a layer and backward frees them: the shape of a training
// step. Greedy placement meets the lower bound here.
TEST(MemoryPlannerTest, MeetsTheBoundOnATrainingStep) {
  constexpr int kLayers = 300;
  MemoryPlanner planner(256);
  for (int layer = 0; layer < kLayers; ++layer) {
    const int backward = 2 * kLayers - 1 - layer;
    for (int i = 0; i < 8; ++i) {
      planner.Add({"act" + std::to_string(layer) + "." + std::to_string(i), 256 * (i + 1), layer,
                   backward});
    }
    planner.Add({"scratch" + std::to_string(layer), 256 * 16, layer, layer});
    planner.Add({"grad" + std::to_string(layer), 256 * 8, backward, backward + 1});
  }
  const absl::StatusOr<MemoryPlan> plan = planner.Solve();  // 3000 buffers
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(Overlap(*plan), "");
  EXPECT_EQ(plan->arena_bytes, plan->peak_live_bytes);
}

TEST(MemoryPlannerTest, EmptyPlansAndBuffers) {
  MemoryPlanner planner;
  absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->arena_bytes, 0);
  EXPECT_FALSE(plan->Report().empty());
  planner.Add({"empty", 0, 0, 9});
  planner.Add({"full", 5, 0, 9});
  plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->arena_bytes, 5);
}

TEST(MemoryPlannerTest, RefusesBadInput) {
  MemoryPlanner size;
  size.Add({"bad", -1, 0, 1});
  const absl::Status status = size.Solve().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("\"bad\" has -1 bytes"));
  MemoryPlanner lifetime;
  lifetime.Add({"bad", 1, 2, 1});
  EXPECT_EQ(lifetime.Solve().status().code(), absl::StatusCode::kInvalidArgument);
  MemoryPlanner total;
  total.Add({"a", int64_t{1} << 61, 0, 1});
  total.Add({"b", int64_t{1} << 61, 2, 3});
  EXPECT_EQ(total.Solve().status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(MemoryPlanner(0).Solve().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(MemoryPlanTest, ReportsTheLargest) {
  MemoryPlanner planner;
  planner.Add({"small", 10, 0, 1});
  planner.Add({"embedding", int64_t{3} << 30, 0, 12});
  planner.Add({"logits", 1536, 5, 6});
  const absl::StatusOr<MemoryPlan> plan = planner.Solve();
  ASSERT_TRUE(plan.ok());
  const std::string report = plan->Report(2);
  EXPECT_THAT(report, HasSubstr("embedding"));
  EXPECT_THAT(report, HasSubstr("3.00 GiB"));
  EXPECT_THAT(report, HasSubstr("0..12"));
  EXPECT_THAT(report, HasSubstr("1.50 KiB"));
  EXPECT_THAT(report, HasSubstr("and 1 smaller ones of 10 B"));
  EXPECT_THAT(report, HasSubstr("3 buffers"));
}

}  // namespace
}  // namespace stretto
