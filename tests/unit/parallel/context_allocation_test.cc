// A step whose documents ranks share takes no memory once its shapes have been met, on the threads
// that drive it.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include "stretto/parallel/context.h"
#include "stretto/parallel/executor.h"
#include "tests/support/context_cases.h"

namespace {
thread_local bool counting = false;
std::atomic<int64_t> allocations{0};
}  // namespace

void* operator new(std::size_t size) {
  if (counting) allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(size == 0 ? 1 : size)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace stretto {
namespace {

TEST(ContextAllocationTest, SteadyStateAllocatesNothing) {
  constexpr int kRanks = 3;
  ModelConfig config = testing::OddModel("qwen3");
  config.max_positions = 31;
  const std::vector<PlanItem> items = {{.tokens = 50, .lengths = {31, 19}, .pipelines = {2, 0, 1}},
                                       {.tokens = 20, .lengths = {20}, .pipelines = {1, 2}},
                                       {.tokens = 9, .lengths = {9}, .pipelines = {0}}};
  const auto dealt = testing::Deal(kRanks, items, config.vocabulary, 6);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  const absl::Status ran = World::RunThreads(kRanks, [&](World& world) -> absl::Status {
    Communicator comm(world);
    ContextAxis axis(comm, comm.all());
    STRETTO_ASSIGN_OR_RETURN(
        const Model model,
        BuildModel(config, {.dtype = DType::kBF16, .strategies = ContextStrategies(kRanks)}));
    testing::Harness harness(model.graph, 5);
    harness.run().SetContextAxis(&axis);
    const ActionList actions = TrainingActions(model.graph, Recompute::kBlock);
    STRETTO_ASSIGN_OR_RETURN(const FrameLayout layout, PlanFrame(model.graph, actions, 20));
    std::vector<double> memory(static_cast<size_t>(layout.bytes()) / 8 + 8,
                               std::numeric_limits<double>::quiet_NaN());
    Budget budget(-1, -1, -1);
    STRETTO_ASSIGN_OR_RETURN(
        const auto feeder,
        TokenFeeder::Create(harness.stream(), 20, budget, {.ranks = kRanks, .shares = 2 * kRanks}));
    for (int step = 0; step < 5; ++step) {
      counting = step >= 3;
      harness.run().BeginStep();
      for (const PackedBatch& share : dealt->shares[static_cast<size_t>(world.rank())]) {
        if (share.sequences() == 0) continue;
        Frame frame(&model.graph, &actions, &layout, reinterpret_cast<std::byte*>(memory.data()));
        STRETTO_ASSIGN_OR_RETURN(frame.tokens, feeder->Feed(share));
        Execute(model.graph, actions, harness.run(), frame);
      }
      counting = false;
      STRETTO_RETURN_IF_ERROR(harness.stream().Synchronize());
    }
    EXPECT_GT(comm.BytesSent(comm.all().name), 0);
    return world.Barrier("done");
  });
  EXPECT_TRUE(ran.ok()) << ran;
  EXPECT_EQ(allocations.load(), 0);
}

}  // namespace
}  // namespace stretto
