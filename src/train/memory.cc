#include "stretto/train/memory.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/model/float8.h"
#include "stretto/parallel/data_parallel.h"

namespace stretto {

std::string HumanBytes(int64_t bytes) {
  const char* units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1024 && unit < 5) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrFormat("%d B", bytes)
                   : absl::StrFormat("%.2f %s", value, units[unit]);
}

absl::StatusOr<Recompute> ParseRecompute(const std::string& name) {
  for (Recompute r : {Recompute::kNone, Recompute::kNormsAndActivations, Recompute::kBlock}) {
    if (name == Name(r)) return r;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("runtime.recompute is '", name, "'; it must be none, norms or block"));
}

std::string RunPlan::MemoryTable() const {
  std::string out;
  for (const NamedBytes& a : arenas) {
    absl::StrAppendFormat(&out, "  %-18s %12s\n", a.name.c_str(), HumanBytes(a.bytes).c_str());
  }
  absl::StrAppendFormat(&out, "  %-18s %12s\n", "planned", HumanBytes(arena_bytes).c_str());
  for (const NamedBytes& a : host_arenas) {
    absl::StrAppendFormat(&out, "  %-18s %12s in host memory\n", a.name.c_str(),
                          HumanBytes(a.bytes).c_str());
  }
  for (const NamedBytes& o : overheads) {
    absl::StrAppendFormat(&out, "  %-18s %12s at most\n", o.name.c_str(),
                          HumanBytes(o.bytes).c_str());
  }
  return out;
}

namespace {

// Bytes that one rank sends when every rank sends each other rank its part.
int64_t SentParts(const Graph& graph, int ranks, DType dtype) {
  int64_t bytes = 0;
  for (const ParameterInfo& p : graph.parameters) {
    bytes += CutRows(p.rows(), ranks, 0).part * p.columns() * SizeOf(dtype) * (ranks - 1);
  }
  return bytes;
}

}  // namespace

AdamWOptions OptimizerOptions(const TrainConfig& config) {
  const TrainConfig::Optimizer& o = config.optimizer;
  return {.beta1 = o.beta1,
          .beta2 = o.beta2,
          .eps = o.eps,
          .weight_decay = o.weight_decay,
          .bf16_moments = o.moments == "bf16",
          .masters = o.masters,
          .offload = o.offload,
          .seed = static_cast<uint64_t>(config.seed)};
}

int64_t DeviceWorkspaceBytes(DeviceKind device) {
  return device == DeviceKind::kCpu ? 0 : int64_t{2} << 30;
}

absl::StatusOr<RunPlan> PlanRun(const TrainConfig& config, int ranks, int index) {
  const DeviceKind device = config.runtime.device == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
  RunPlan plan;
  const std::optional<DType> dtype = ParseDType(config.runtime.dtype);
  if (!dtype) {
    return absl::InvalidArgumentError(absl::StrCat("runtime.dtype '", config.runtime.dtype,
                                                   "' is not known; use f64, f32 or bf16"));
  }
  STRETTO_ASSIGN_OR_RETURN(const Recompute recompute, ParseRecompute(config.runtime.recompute));
  // A build without the backend can still plan for it, without the scratch it asks layers to keep.
  const absl::StatusOr<const KernelTable*> kernels = KernelsFor(Device{device, 0});
  ModelOptions options = {.dtype = *dtype, .loss_chunk = config.runtime.loss_chunk};
  if (kernels.ok() && (*kernels)->supports(*dtype)) options.kernels = *kernels;
  if (const std::optional<DType> gradients = Float8GradientType(config.runtime.fp8)) {
    options.strategies = Float8Strategies(*gradients);
  }
  STRETTO_ASSIGN_OR_RETURN(plan.model, BuildModel(config.model, options));
  const Graph& graph = plan.model.graph;
  plan.train_actions = TrainingActions(graph, recompute);
  plan.evaluation_actions = EvaluationActions(graph);
  plan.micro_batch_tokens = config.batch.micro * config.data.sequence_length;
  STRETTO_ASSIGN_OR_RETURN(plan.train_frame,
                           PlanFrame(graph, plan.train_actions, plan.micro_batch_tokens));
  STRETTO_ASSIGN_OR_RETURN(plan.evaluation_frame,
                           PlanFrame(graph, plan.evaluation_actions, plan.micro_batch_tokens));

  const StorageBytes storage = DataParallelStorage(graph, ranks);
  int64_t constants = 0;
  for (const ConstantInfo& c : graph.constants) constants += c.rows * c.columns * SizeOf(c.dtype);
  plan.arenas = {
      {"parameters", storage.parameters},
      {"gradients", storage.gradients},
      {"constants", constants},
  };
  const AdamWOptions optimizer = OptimizerOptions(config);
  const AdamW::Bytes update = AdamW::BytesOf(graph, ranks, index, optimizer);
  const bool offload = optimizer.offload && device != DeviceKind::kCpu;
  (offload ? plan.host_arenas : plan.arenas).push_back({"optimizer state", update.state});
  plan.arenas.push_back({"optimizer table", update.table});
  plan.arenas.push_back(
      {"activations", std::max(plan.train_frame.bytes(), plan.evaluation_frame.bytes())});
  const int64_t float8_bytes = Float8State::Bytes(graph);
  if (float8_bytes > 0) plan.arenas.push_back({"fp8 weights", float8_bytes});
  if (device != DeviceKind::kCpu) {
    plan.arenas.push_back({"tokens", TokenFeeder::DeviceBytes(device, plan.micro_batch_tokens)});
    plan.arenas.push_back({"workspace", DeviceWorkspaceBytes(device)});
  }
  for (const NamedBytes& a : plan.arenas) plan.arena_bytes += a.bytes;
  for (const NamedBytes& a : plan.host_arenas) plan.host_arena_bytes += a.bytes;
  // Measured on Debian 12 with OpenBLAS 0.3.21 and Open MPI 4.1.4: code, heap and thread stacks of
  // a process; the panels that OpenBLAS packs (most for a wide vocabulary); MPI's shared segments
  // and the staging buffers of reductions.
  constexpr int64_t kMiB = 1 << 20;
  plan.overheads = {{"process", 16 * kMiB}, {"matrix products", 56 * kMiB}};
  // On a GPU what the driver keeps for the process and the code of kernels and libraries.
  if (device != DeviceKind::kCpu) plan.overheads = {{"context and libraries", 1024 * kMiB}};
  if (ranks > 1) plan.overheads.push_back({"messages", 32 * kMiB});
  for (const NamedBytes& o : plan.overheads) plan.overhead_bytes += o.bytes;
  if (ranks > 1) {
    plan.gradient_bytes_sent = SentParts(graph, ranks, AccumulateType(graph.dtype));
    plan.parameter_bytes_sent = SentParts(graph, ranks, graph.dtype);
    // Small all-reduces send everything to everybody.
    const auto operands = static_cast<int64_t>(graph.float8_operands.size());
    plan.scalar_bytes_sent =
        (StepScalars::kReduced * SizeOf(DType::kF64) + operands * SizeOf(DType::kF32)) *
        (ranks - 1);
  }
  return plan;
}

}  // namespace stretto
