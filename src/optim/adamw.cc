#include <algorithm>

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

// Whether the update draws random numbers, which belong to elements of the whole parameter.
bool DrawsNumbers(DType model, const AdamWOptions& options) {
  return options.bf16_moments || (model == DType::kBF16 && !options.masters);
}

// Rows of a shard that are updated as one item, and the place of their first element in the whole
// parameter. Elements of an item follow each other in the numbering of the whole where that
// matters: with a part of the columns each row is an item of its own then.
struct ItemRows {
  Range rows;  // of this rank's part of the parameter
  uint64_t first_element = 0;
};
std::vector<ItemRows> RowsOfItems(const ParameterInfo& info, const Range& shard, bool numbered) {
  const ParameterSpec& spec = info.spec;
  const std::vector<int64_t>& whole = spec.whole_shape();
  const int64_t columns = whole.size() > 1 ? whole[1] : 1;
  if (!numbered || spec.part.whole.empty()) {
    return {{shard, static_cast<uint64_t>(shard.first * columns)}};
  }
  std::vector<ItemRows> items;
  for (const ParameterBox& box : BoxesOf(spec, shard.first, shard.count)) {
    const int64_t at_once = info.columns() == columns ? box.rows.count : 1;
    for (int64_t r = 0; r < box.rows.count; r += at_once) {
      items.push_back({{box.rows.first + r, at_once},
                       static_cast<uint64_t>((box.whole + r) * columns + spec.part.first_column)});
    }
  }
  return items;
}

}  // namespace

AdamW::Bytes AdamW::BytesOf(const Graph& graph, int ranks, int index, const AdamWOptions& options) {
  Bytes bytes;
  std::vector<int64_t> elements, counted;
  const bool numbered = DrawsNumbers(graph.dtype, options);
  bool counts_all = true;
  for (size_t i = 0; i < graph.parameters.size(); ++i) {
    if (static_cast<int>(i) == options.without.value) continue;
    const ParameterInfo& p = graph.parameters[i];
    const RowCut cut = CutRows(p.rows(), ranks, index);
    for (const ItemRows& item : RowsOfItems(p, {cut.first, cut.count}, numbered)) {
      elements.push_back(item.rows.count * p.columns());
      if (p.owned) counted.push_back(elements.back());
    }
    counts_all = counts_all && p.owned;
    bytes.state += ShardBytes(graph.dtype, cut.count * p.columns(), options);
  }
  bytes.table = OptimizerTable::Bytes(elements);
  if (!counts_all) bytes.table += OptimizerTable::Bytes(counted);
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
  std::vector<OptimizerItem> all, counted;
  const bool numbered = DrawsNumbers(graph.dtype, options);
  int64_t written = bytes.state;  // by the whole update
  for (const ParameterShard& shard : adamw->shards_) written += shard.value.bytes();
  const int64_t part_bytes = std::max(options.part_bytes, written / kMostParts + 1);
  int64_t in_part = 0;
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
    adamw->items_.push_back(item);
    if (in_part >= part_bytes || adamw->part_ends_.empty()) {
      adamw->part_ends_.push_back(0);
      in_part = 0;
    }
    adamw->parts_.push_back(adamw->parts() - 1);
    for (const Tensor* t : {&item.param, &item.m, &item.v, &item.master}) {
      if (t->present()) in_part += t->bytes();
    }
    for (const ItemRows& part :
         RowsOfItems(info, {shard.first_row, shard.value.rows()}, numbered)) {
      OptimizerItem rows = item;
      for (Tensor* t : {&rows.param, &rows.grad, &rows.m, &rows.v, &rows.master}) {
        if (t->present()) *t = t->Rows(part.rows.first - shard.first_row, part.rows.count);
      }
      rows.first_element = part.first_element;
      all.push_back(rows);
      if (info.owned) counted.push_back(rows);
    }
    adamw->part_ends_.back() = static_cast<int64_t>(all.size());
  }
  STRETTO_ASSIGN_OR_RETURN(adamw->table_, OptimizerTable::Create(device, all));
  if (counted.size() != all.size()) {
    STRETTO_ASSIGN_OR_RETURN(adamw->counted_, OptimizerTable::Create(device, counted));
  }
  adamw->ResetMasters();
  return adamw;
}

void AdamW::ResetMasters() const {
  for (const OptimizerItem& item : items_) {
    if (item.master.present() && item.param.rows() > 0) ops::Copy(ops_, item.master, item.param);
  }
}

void AdamW::AddSumSquares(Tensor scalars) const {
  ops::AddSumSquares(ops_, scalars.Rows(StepScalars::kSumSquares, 1),
                     counted_ ? *counted_ : table_);
}

void AdamW::Step(Tensor scalars, double lr, int64_t step,
                 const std::function<void(int part)>& before) const {
  const AdamWArgs args = {.scalars = scalars,
                          .lr = lr,
                          .beta1 = options_.beta1,
                          .beta2 = options_.beta2,
                          .eps = options_.eps,
                          .weight_decay = options_.weight_decay,
                          .step = step};
  if (!before) return ops::AdamW(ops_, table_, args);
  int64_t first = 0;
  for (int part = 0; part < parts(); ++part) {
    before(part);
    const int64_t end = part_ends_[static_cast<size_t>(part)];
    ops::AdamW(ops_, table_, args, first, end - first);
    first = end;
  }
}

absl::Status AdamW::Register(StateRegistry* registry, int first_part) const {
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
    for (const char* prefix : {"", "optim.exp_avg.", "optim.exp_avg_sq.", "optim.master."}) {
      registry->SetUpdatePart(prefix + info.spec.name, first_part + parts_[i]);
    }
  }
  return absl::OkStatus();
}

}  // namespace stretto
