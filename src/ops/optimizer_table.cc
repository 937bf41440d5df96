#include "stretto/ops/optimizer_table.h"

#include <cstring>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "stretto/core/copy.h"
#include "stretto/ops/kernels.h"

namespace stretto {
namespace {

int64_t ChunksOf(int64_t elements) {
  return (elements + OptimizerChunk::kElements - 1) / OptimizerChunk::kElements;
}

int64_t TableBytes(int64_t entries, int64_t chunks) {
  return entries * static_cast<int64_t>(sizeof(OptimizerEntry)) +
         chunks * static_cast<int64_t>(sizeof(OptimizerChunk));
}

// Why `item` cannot stand beside `first`; null when it can.
const char* Misfit(const OptimizerItem& item, const OptimizerItem& first, Device device) {
  const DType wide = AccumulateType(first.param.dtype);
  const DType moments = first.m.dtype;
  if (item.param.dtype != first.param.dtype) return "param must be of the other items' type";
  if (item.grad.dtype != wide) return "grad must be f32 (f64 for f64 parameters)";
  if (item.m.dtype != moments || item.v.dtype != moments) {
    return "m and v must be of one type, the same in all items";
  }
  if (moments != wide && (moments != DType::kBF16 || wide != DType::kF32)) {
    return "m and v must be f32 or bf16 (f64 for f64 parameters)";
  }
  if (item.master.present() != first.master.present()) {
    return "all items must have a master or none";
  }
  if (item.master.present() && (item.master.dtype != wide || item.param.dtype == wide)) {
    return "a master must be f32, beside a bf16 param";
  }
  for (const Tensor* t : {&item.param, &item.grad, &item.m, &item.v, &item.master}) {
    if (t == &item.master && !t->present()) continue;
    if (!SameShape(*t, item.param)) return "all tensors must have param's shape";
    if (!t->present() || !t->contiguous()) return "all tensors must be present and contiguous";
    if (t->device.kind != device.kind) return "all tensors must be on the table's device";
  }
  if (ChunksOf(item.param.elements()) > std::numeric_limits<int32_t>::max()) {
    return "param has too many elements";
  }
  return nullptr;
}

}  // namespace

int64_t OptimizerTable::Bytes(const std::vector<int64_t>& elements) {
  int64_t entries = 0, chunks = 0;
  for (const int64_t n : elements) {
    entries += n > 0 ? 1 : 0;
    chunks += ChunksOf(n);
  }
  return TableBytes(entries, chunks);
}

OptimizerShards OptimizerTable::Part(int64_t first, int64_t count) const {
  const int64_t begin = chunks_before_[static_cast<size_t>(first)];
  OptimizerShards part = shards_;
  part.chunk_count = chunks_before_[static_cast<size_t>(first + count)] - begin;
  if (part.chunk_count > 0) part.chunks += begin;
  return part;
}

absl::StatusOr<OptimizerTable> OptimizerTable::Create(Device device,
                                                      const std::vector<OptimizerItem>& items) {
  std::vector<OptimizerEntry> entries;
  std::vector<OptimizerChunk> chunks;
  OptimizerTable table;
  const OptimizerItem* first = nullptr;
  for (size_t i = 0; i < items.size(); ++i) {
    const OptimizerItem& item = items[i];
    table.chunks_before_.push_back(static_cast<int64_t>(chunks.size()));
    if (item.param.elements() == 0) continue;
    if (first == nullptr) first = &item;
    if (const char* rule = Misfit(item, *first, device); rule != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "item ", i, " of an optimizer table: ", rule, "; got param ", Describe(item.param),
          ", grad ", Describe(item.grad), ", m ", Describe(item.m), ", v ", Describe(item.v),
          ", master ", item.master.present() ? Describe(item.master) : std::string("absent")));
    }
    const auto entry = static_cast<int32_t>(entries.size());
    entries.push_back({.param = item.param.data,
                       .grad = item.grad.data,
                       .m = item.m.data,
                       .v = item.v.data,
                       .master = item.master.data,
                       .elements = item.param.elements(),
                       .first_element = item.first_element,
                       .key = {item.key[0], item.key[1]},
                       .decay = item.decay ? 1 : 0});
    for (int64_t k = 0; k < ChunksOf(item.param.elements()); ++k) {
      chunks.push_back({.entry = entry, .index = static_cast<int32_t>(k)});
    }
  }
  table.chunks_before_.push_back(static_cast<int64_t>(chunks.size()));
  const int64_t entry_bytes = TableBytes(static_cast<int64_t>(entries.size()), 0);
  const int64_t bytes = entry_bytes + TableBytes(0, static_cast<int64_t>(chunks.size()));
  STRETTO_ASSIGN_OR_RETURN(table.memory_, Arena::Create(device, "optimizer table", bytes));
  if (first == nullptr) return table;
  std::vector<std::byte> host(static_cast<size_t>(bytes));
  std::memcpy(host.data(), entries.data(), static_cast<size_t>(entry_bytes));
  std::memcpy(host.data() + entry_bytes, chunks.data(), static_cast<size_t>(bytes - entry_bytes));
  std::byte* const data = table.memory_.data();
  STRETTO_RETURN_IF_ERROR(CopyFromHost(Tensor::Of(data, DType::kU8, {bytes}, device), host.data()));
  table.shards_ = {.entries = reinterpret_cast<const OptimizerEntry*>(data),
                   .chunks = reinterpret_cast<const OptimizerChunk*>(data + entry_bytes),
                   .chunk_count = static_cast<int64_t>(chunks.size()),
                   .param = first->param.dtype,
                   .moments = first->m.dtype,
                   .masters = first->master.present()};
  return table;
}

}  // namespace stretto
