#include "stretto/core/rng.h"
#include "stretto/optim/optimizer.h"

namespace stretto {
namespace {

constexpr int64_t kAlignment = 64;
int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

DType MomentType(DType model, const AdamWOptions& options) {
  return options.bf16_moments ? DType::kBF16 : AccumulateType(model);
}
bool HasMaster(DType model, const AdamWOptions& options) {
  return model == DType::kBF16 && options.masters;
}

// Bytes of m, v and the master of a shard, each aligned.
int64_t ShardBytes(DType model, int64_t elements, const AdamWOptions& options) {
  return 2 * Aligned(elements * SizeOf(MomentType(model, options))) +
         (HasMaster(model, options) ? Aligned(elements * SizeOf(DType::kF32)) : 0);
}

}  // namespace

AdamW::Bytes AdamW::BytesOf(const Graph& graph, int ranks, int index, const AdamWOptions& options) {
  Bytes bytes;
  std::vector<int64_t> elements;
  for (size_t i = 0; i < graph.parameters.size(); ++i) {
    if (static_cast<int>(i) == options.without.value) continue;
    const ParameterInfo& p = graph.parameters[i];
    elements.push_back(CutRows(p.rows(), ranks, index).count * p.columns());
    bytes.state += ShardBytes(graph.dtype, elements.back(), options);
  }
  bytes.table = OptimizerTable::Bytes(elements);
  return bytes;
}

absl::StatusOr<std::unique_ptr<AdamW>> AdamW::Create(const Graph& graph,
                                                     const DataParallel& parameters,
                                                     ops::Context ops, Budget& budget,
                                                     const AdamWOptions& options) {
  if (options.bf16_moments && graph.dtype == DType::kF64) {
    return absl::InvalidArgumentError(
        "AdamW keeps no bf16 moments for f64 parameters; set optimizer.moments=f32, or choose "
        "another runtime.dtype");
  }
  auto adamw = std::unique_ptr<AdamW>(new AdamW(graph, ops, options));
  const Device device = ops.stream->device();
  const Bytes bytes = BytesOf(graph, parameters.group().size(), parameters.group().index, options);
  STRETTO_RETURN_IF_ERROR(budget.Reserve(options.offload ? Resource::kHostMemory : MemoryOf(device),
                                         "optimizer state", bytes.state));
  STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(device), "optimizer table", bytes.table));
  STRETTO_ASSIGN_OR_RETURN(
      adamw->state_, options.offload ? Arena::CreateHost(device, "optimizer state", bytes.state)
                                     : Arena::Create(device, "optimizer state", bytes.state));
  std::byte* next = adamw->state_.data();
  for (const ParameterShard& shard : parameters.shards()) {
    if (shard.param.value != options.without.value) adamw->shards_.push_back(shard);
  }
  for (const ParameterShard& shard : adamw->shards_) {
    const ParameterInfo& info = graph.parameters[shard.param.value];
    // Of the gradient's shape, and of the device's kernels wherever it lies.
    const auto state = [&](DType dtype) {
      Tensor t = shard.grad;
      t.dtype = dtype;
      t.data = next;
      next += Aligned(t.bytes());
      return t;
    };
    OptimizerItem item;
    item.param = shard.value;
    item.grad = shard.grad;
    item.m = state(MomentType(graph.dtype, options));
    item.v = state(MomentType(graph.dtype, options));
    if (HasMaster(graph.dtype, options)) item.master = state(DType::kF32);
    item.decay = info.spec.weight_decay;
    item.key = Rng(options.seed, "round/" + info.spec.name).key();
    item.first_element = static_cast<uint64_t>(shard.first_row * info.columns());
    adamw->items_.push_back(item);
  }
  STRETTO_ASSIGN_OR_RETURN(adamw->table_, OptimizerTable::Create(device, adamw->items_));
  adamw->ResetMasters();
  return adamw;
}

void AdamW::ResetMasters() const {
  for (const OptimizerItem& item : items_) {
    if (item.master.present() && item.param.rows() > 0) ops::Copy(ops_, item.master, item.param);
  }
}

void AdamW::AddSumSquares(Tensor scalars) const {
  ops::AddSumSquares(ops_, scalars.Rows(StepScalars::kSumSquares, 1), table_);
}

void AdamW::Step(Tensor scalars, double lr, int64_t step) const {
  ops::AdamW(ops_, table_,
             {.scalars = scalars,
              .lr = lr,
              .beta1 = options_.beta1,
              .beta2 = options_.beta2,
              .eps = options_.eps,
              .weight_decay = options_.weight_decay,
              .step = step});
}

absl::Status AdamW::Register(StateRegistry* registry) const {
  for (size_t i = 0; i < items_.size(); ++i) {
    const OptimizerItem& item = items_[i];
    const ParameterInfo& info = graph_.parameters[shards_[i].param.value];
    const auto add = [&](const char* prefix, Tensor local) {
      // Where it lies: the host reads what is offloaded without a copy.
      local.device = state_.device();
      return RegisterRows(registry, prefix, info, shards_[i].first_row, local);
    };
    STRETTO_RETURN_IF_ERROR(add("optim.exp_avg.", item.m));
    STRETTO_RETURN_IF_ERROR(add("optim.exp_avg_sq.", item.v));
    if (item.master.present()) STRETTO_RETURN_IF_ERROR(add("optim.master.", item.master));
  }
  return absl::OkStatus();
}

}  // namespace stretto
