#include "stretto/optim/optimizer.h"

namespace stretto {
namespace {

constexpr int64_t kAlignment = 64;
int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
bool HasMaster(DType model) { return model == DType::kBF16; }
// m, v and, where parameters are stored in less than f32, a master copy.
int CopiesOf(DType model) { return HasMaster(model) ? 3 : 2; }

}  // namespace

int64_t AdamW::StateBytes(const Graph& graph, int ranks, int index) {
  int64_t bytes = 0;
  for (const ParameterInfo& p : graph.parameters) {
    const int64_t elements = CutRows(p.rows(), ranks, index).count * p.columns();
    bytes += CopiesOf(graph.dtype) * Aligned(elements * SizeOf(AccumulateType(graph.dtype)));
  }
  return bytes;
}

absl::StatusOr<std::unique_ptr<AdamW>> AdamW::Create(const Graph& graph,
                                                     const DataParallel& parameters,
                                                     ops::Context ops, Budget& budget,
                                                     const AdamWOptions& options) {
  auto adamw = std::unique_ptr<AdamW>(new AdamW(graph, ops, options));
  const int64_t bytes = StateBytes(graph, parameters.group().size(), parameters.group().index);
  STRETTO_RETURN_IF_ERROR(budget.Reserve(MemoryOf(ops.stream->device()), "optimizer state", bytes));
  STRETTO_ASSIGN_OR_RETURN(adamw->arena_,
                           Arena::Create(ops.stream->device(), "optimizer state", bytes));
  std::byte* next = adamw->arena_.data();
  for (const ParameterShard& shard : parameters.shards()) {
    Item item;
    item.shard = shard;
    item.decay = graph.parameters[shard.param.value].spec.weight_decay;
    const auto state = [&] {
      Tensor t = shard.grad;  // its shape and type
      t.data = next;
      next += Aligned(t.bytes());
      return t;
    };
    item.m = state();
    item.v = state();
    if (HasMaster(graph.dtype)) item.master = state();
    adamw->items_.push_back(item);
  }
  adamw->ResetMasters();
  return adamw;
}

void AdamW::ResetMasters() const {
  for (const Item& item : items_) {
    if (item.master.present() && item.shard.value.rows() > 0) {
      ops::Copy(ops_, item.master, item.shard.value);
    }
  }
}

void AdamW::AddSumSquares(Tensor scalars) const {
  const Tensor total = scalars.Rows(StepScalars::kSumSquares, 1);
  for (const Item& item : items_) {
    if (item.shard.grad.rows() > 0) ops::SumSquares(ops_, total, item.shard.grad, true);
  }
}

void AdamW::Step(Tensor scalars, double lr, int64_t step) const {
  for (const Item& item : items_) {
    if (item.shard.value.rows() == 0) continue;
    AdamWArgs args;
    args.param = item.shard.value;
    args.master = item.master;
    args.grad = item.shard.grad;
    args.m = item.m;
    args.v = item.v;
    args.scalars = scalars;
    args.lr = lr;
    args.beta1 = options_.beta1;
    args.beta2 = options_.beta2;
    args.eps = options_.eps;
    args.weight_decay = item.decay ? options_.weight_decay : 0;
    args.step = step;
    ops::AdamW(ops_, args);
  }
}

absl::Status AdamW::Register(StateRegistry* registry) const {
  for (const Item& item : items_) {
    const ParameterSpec& spec = graph_.parameters[item.shard.param.value].spec;
    const auto add = [&](const char* prefix, Tensor local) {
      return registry->Add({.name = prefix + spec.name,
                            .dtype = local.dtype,
                            .global_shape = spec.shape,
                            .first_row = item.shard.first_row,
                            .local = local});
    };
    STRETTO_RETURN_IF_ERROR(add("optim.exp_avg.", item.m));
    STRETTO_RETURN_IF_ERROR(add("optim.exp_avg_sq.", item.v));
    if (item.master.present()) STRETTO_RETURN_IF_ERROR(add("optim.master.", item.master));
  }
  return absl::OkStatus();
}

}  // namespace stretto
