// How long planning takes: batches of 32 Mi tokens, one thread.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/data/length_distribution.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/sim/sequence_simulation.h"

namespace stretto {
namespace {

// Arguments: distribution (0: github, 1: byted), pipelines, stages, method.
void BM_PlanSequences(benchmark::State& state) {
  const char* names[] = {"github", "byted"};
  const auto distribution = LengthDistribution::Named(names[state.range(0)]);
  SequencePlanOptions o = {.pipelines = static_cast<int>(state.range(1)),
                           .stages = static_cast<int>(state.range(2)),
                           .capacity = 8192,
                           .method = static_cast<SequenceMethod>(state.range(3))};
  o.context = 256;
  o.pipelines_per_machine = 4;
  o.cost = ByteScaleCost(2);
  o.memory = ByteScaleMemory(2);
  std::vector<std::vector<int64_t>> batches;
  for (uint64_t step = 0; step < 8; ++step) {
    batches.push_back(distribution->Batch(1, step, int64_t{1} << 25, int64_t{1} << 21));
  }
  size_t step = 0;
  for (auto _ : state) {
    const auto plan = PlanSequences(batches[step++ % batches.size()], o);
    if (!plan.ok()) return state.SkipWithError(std::string(plan.status().message()).c_str());
    benchmark::DoNotOptimize(plan->makespan);
  }
  state.SetLabel(std::string(names[state.range(0)]) + " " + Name(o.method));
}
constexpr auto kStatic = static_cast<int64_t>(SequenceMethod::kStatic);
constexpr auto kUnbalanced = static_cast<int64_t>(SequenceMethod::kUnbalanced);
constexpr auto kBalanced = static_cast<int64_t>(SequenceMethod::kBalanced);
constexpr auto kPipelines = static_cast<int64_t>(SequenceMethod::kBalancedPipelines);
BENCHMARK(BM_PlanSequences)
    ->Unit(benchmark::kMillisecond)
    ->ArgsProduct({{0, 1}, {512, 1024}, {1}, {kStatic, kUnbalanced, kBalanced}})
    ->ArgsProduct({{0, 1}, {256}, {4}, {kPipelines}});

}  // namespace
}  // namespace stretto

BENCHMARK_MAIN();
