// Documents that GPUs share, one GPU for each rank, under mpirun: loss and every gradient against
// one CPU that has them whole, the same bits again and with what lies between the rings' messages
// replayed. Prints SKIP where there are fewer GPUs than ranks.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "stretto/core/copy.h"
#include "stretto/parallel/context.h"
#include "stretto/parallel/data_parallel.h"
#include "stretto/parallel/executor.h"
#include "tests/support/context_cases.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

using Values = std::vector<double>;

Values ToHost(const Tensor& t) {
  std::vector<std::byte> bytes(static_cast<size_t>(t.bytes()) + 8);
  if (t.elements() > 0 && !CopyToHost(bytes.data(), t).ok()) return {};
  Tensor host = t;
  host.data = bytes.data();
  host.device = Device::Cpu();
  host.row_stride = host.row_elements();
  Values values;
  for (int64_t i = 0; i < t.elements(); ++i) values.push_back(testing::Get(host, i));
  return values;
}

struct Outcome {
  double loss = 0;
  std::vector<Values> gradients;  // by parameter, of all ranks together
  int64_t launched = 0;           // pieces that were replayed
};

// The last of `steps` equal steps; `batches` are this rank's.
absl::StatusOr<Outcome> StepOn(World& world, Device device, const ModelConfig& config, DType dtype,
                               const std::vector<PackedBatch>& batches, int64_t capacity,
                               bool graphs, int steps) {
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device));
  STRETTO_ASSIGN_OR_RETURN(const KernelTable* const kernels, KernelsFor(device));
  STRETTO_ASSIGN_OR_RETURN(const Model model,
                           BuildModel(config, {.dtype = dtype,
                                               .strategies = ContextStrategies(world.size()),
                                               .kernels = kernels}));
  const Graph& graph = model.graph;
  Communicator comm(world);
  STRETTO_RETURN_IF_ERROR(comm.UseDevice(device));
  ContextAxis context(comm, comm.all());
  Budget budget(-1, -1, -1);
  STRETTO_ASSIGN_OR_RETURN(const auto dp, DataParallel::Create(comm, comm.all(), graph, *stream,
                                                               *kernels, 5, budget, {}));
  Run run({stream.get(), kernels});
  run.SetContextAxis(&context);
  const ActionList actions = TrainingActions(graph, Recompute::kNone);
  ReplayCache replays(*stream);
  STRETTO_ASSIGN_OR_RETURN(const FrameLayout layout, PlanFrame(graph, actions, capacity));
  STRETTO_ASSIGN_OR_RETURN(const Arena memory, Arena::Create(device, "frame", layout.bytes()));
  // Reading what nothing wrote shows.
  const std::vector<std::byte> poison(static_cast<size_t>(layout.bytes()), std::byte{0xff});
  STRETTO_RETURN_IF_ERROR(
      CopyFromHost(Tensor::Of(memory.data(), DType::kU8, {layout.bytes()}, device), poison.data()));
  STRETTO_ASSIGN_OR_RETURN(
      const auto feeder, TokenFeeder::Create(*stream, capacity, budget,
                                             {.ranks = world.size(), .shares = 16 * world.size()}));
  STRETTO_ASSIGN_OR_RETURN(const Arena scalar_memory, Arena::Create(device, "scalars", 1024));
  const Tensor scalars =
      Tensor::Of(scalar_memory.data(), DType::kF64, {StepScalars::kCount}, device);
  dp->Attach(&run, scalars.Rows(0, 2));
  for (int step = 0; step < steps; ++step) {
    ops::Zero(run.ops(), scalars);
    dp->BeginStep(run);
    for (size_t i = 0; i < batches.size(); ++i) {
      ActionHooks& hooks = dp->hooks(i + 1 == batches.size());
      if (batches[i].sequences() == 0) {
        FollowHooks(actions, 0, actions.actions.size(), hooks);
        continue;
      }
      Frame frame(&graph, &actions, &layout, memory.data(), device);
      STRETTO_ASSIGN_OR_RETURN(frame.tokens, feeder->Feed(batches[i]));
      Execute(graph, actions, run, frame, &hooks, graphs ? &replays : nullptr);
    }
    STRETTO_RETURN_IF_ERROR(dp->FinishGradients(run));
    STRETTO_RETURN_IF_ERROR(stream->Synchronize());
  }
  Outcome out = {.loss = ToHost(scalars)[StepScalars::kLossSum], .launched = replays.launched()};
  const auto sum = [&](double* data, int64_t count) {
    return comm.Wait(comm.AllReduce(comm.all(), Tensor::Of(data, DType::kF64, {count}),
                                    ReduceOp::kSum, "outcome"));
  };
  STRETTO_RETURN_IF_ERROR(sum(&out.loss, 1));
  for (const ParameterInfo& p : graph.parameters) {
    out.gradients.emplace_back(static_cast<size_t>(p.elements()), 0.0);
  }
  for (const ParameterShard& shard : dp->shards()) {
    const Values mine = ToHost(shard.grad);
    const auto param = static_cast<size_t>(shard.param.value);
    std::copy(mine.begin(), mine.end(),
              out.gradients[param].begin() +
                  static_cast<std::ptrdiff_t>(shard.first_row * graph.parameters[param].columns()));
  }
  for (Values& gradient : out.gradients) {
    STRETTO_RETURN_IF_ERROR(sum(gradient.data(), static_cast<int64_t>(gradient.size())));
  }
  return out;
}

// ||a - b|| / ||b||, where ||b|| counts as `floor` an element at least.
double Distance(const Values& a, const Values& b, double floor) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / std::max(norm, floor * floor * static_cast<double>(b.size())));
}

absl::Status Check(World& world, const std::string& family, int64_t head_dim, DType dtype) {
  const Device device = Device::Cuda(world.info().local_rank);
  ModelConfig config;
  config.family = family;
  config.vocabulary = 331;
  config.layers = 2;
  config.hidden = 128;
  config.heads = 4;
  config.kv_heads = family == "gpt2" ? 4 : 2;
  config.head_dim = head_dim;
  config.ffn = 256;
  config.max_positions = 700;
  config.init_std = 0.05;
  STRETTO_RETURN_IF_ERROR(config.Resolve());
  std::vector<PlanItem> items = testing::RingItems(world.size(), 4, 600, 3);
  items.push_back({.tokens = 700, .lengths = {700}, .pipelines = {0}});
  STRETTO_ASSIGN_OR_RETURN(const testing::DealtItems dealt,
                           testing::Deal(world.size(), items, config.vocabulary, 3));
  int64_t capacity = 0;
  for (const auto& of_rank : dealt.shares) {
    for (const PackedBatch& b : of_rank) capacity = std::max(capacity, b.tokens());
  }
  capacity += 5;
  const auto& mine = dealt.shares[static_cast<size_t>(world.rank())];
  const auto on_gpus = [&](bool graphs, int steps) {
    return StepOn(world, device, config, dtype, mine, capacity, graphs, steps);
  };
  STRETTO_ASSIGN_OR_RETURN(const Outcome gpus, on_gpus(false, 1));
  STRETTO_ASSIGN_OR_RETURN(const Outcome again, on_gpus(false, 2));
  STRETTO_ASSIGN_OR_RETURN(const Outcome replayed, on_gpus(true, 4));
  absl::Status verdict;
  const std::string what = absl::StrCat(family, " ", head_dim, " ", Name(dtype));
  if (again.gradients != gpus.gradients) {
    verdict = absl::InternalError(absl::StrCat(what, " has other bits the second time"));
  } else if (replayed.gradients != gpus.gradients || replayed.launched == 0) {
    verdict = absl::InternalError(
        absl::StrCat(what, " has other bits replayed, in ", replayed.launched, " launches"));
  }
  if (world.rank() == 0) {
    int64_t whole = 0;
    for (const PackedBatch& b : dealt.whole[0]) whole = std::max(whole, b.tokens());
    Outcome cpu;
    const absl::Status ran = World::RunThreads(1, [&](World& alone) -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(
          cpu, StepOn(alone, Device::Cpu(), config, dtype == DType::kF32 ? DType::kF64 : dtype,
                      dealt.whole[0], whole, false, 1));
      return absl::OkStatus();
    });
    verdict.Update(ran);
    double squares = 0, elements = 0, worst = 0;
    for (const Values& gradient : cpu.gradients) {
      for (const double g : gradient) squares += g * g;
      elements += static_cast<double>(gradient.size());
    }
    const double scale = std::sqrt(squares / std::max(1.0, elements)) / 100;
    for (size_t p = 0; p < cpu.gradients.size(); ++p) {
      const double distance = Distance(gpus.gradients[p], cpu.gradients[p], scale);
      if (!(distance <= worst)) worst = distance;
    }
    const double loss = std::fabs(gpus.loss / cpu.loss - 1);
    std::printf("%s on %d GPUs: loss differs by %.2g, gradients by %.2g; %ld pieces replayed\n",
                what.c_str(), world.size(), loss, worst, static_cast<long>(replayed.launched));
    if (!(worst <= (dtype == DType::kF32 ? 2e-5 : 3e-2)) ||
        !(loss <= (dtype == DType::kF32 ? 1e-6 : 2e-3))) {
      verdict.Update(absl::InternalError(absl::StrCat(what, " differs from one CPU")));
    }
  }
  return world.Agree("comparing", verdict);
}

absl::Status RunAll(World& world) {
  STRETTO_ASSIGN_OR_RETURN(const bool gpus, testing::EveryRankHasAGpu(world));
  if (!gpus) return absl::OkStatus();
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    STRETTO_RETURN_IF_ERROR(Check(world, "gpt2", 64, dtype));
    STRETTO_RETURN_IF_ERROR(Check(world, "llama", 64, dtype));
    STRETTO_RETURN_IF_ERROR(Check(world, "qwen3", 128, dtype));
    STRETTO_RETURN_IF_ERROR(Check(world, "llama", 6, dtype));  // what libraries do not take
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main() {
  return stretto::testing::RankMain(stretto::RunAll, {.random_delay_us = 100, .delay_seed = 7});
}
