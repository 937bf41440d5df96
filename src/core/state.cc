#include "stretto/core/state.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace stretto {
namespace {

absl::Status Invalid(const StateEntry& entry, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("the state tensor \"", entry.name, "\" ", what));
}

// The slice of a rank that owns nothing of the tensor.
Tensor EmptySlice(const StateEntry& entry) {
  Tensor t;
  t.dtype = entry.dtype;
  t.device = entry.local.device;
  for (int64_t d : entry.global_shape) t.dims[t.rank++] = d;
  t.dims[0] = 0;
  t.row_stride = t.row_elements();
  return t;
}

absl::Status Check(const StateEntry& entry) {
  const Tensor& local = entry.local;
  const std::string shape = absl::StrCat("[", absl::StrJoin(entry.global_shape, ", "), "]");
  if (local.dtype != entry.dtype) {
    return Invalid(entry, absl::StrCat("is registered as ", Name(entry.dtype),
                                       " but its local slice is ", Describe(local)));
  }
  // A matrix may be there with some of its columns.
  const bool matrix = entry.global_shape.size() == 2;
  bool same = local.rank == static_cast<int>(entry.global_shape.size());
  for (int i = 1; same && i < local.rank; ++i) {
    same = matrix ? local.dims[i] >= 0 && local.dims[i] <= entry.global_shape[i]
                  : local.dims[i] == entry.global_shape[i];
  }
  if (!same) {
    return Invalid(
        entry, absl::StrCat("has global shape ", shape, " but its local slice is ", Describe(local),
                            "; all dimensions but the first must agree, or of a matrix be columns "
                            "of it"));
  }
  if (entry.first_column < 0 || (!matrix && entry.first_column != 0) ||
      (matrix && entry.first_column > entry.global_shape[1] - local.dims[1])) {
    return Invalid(entry, absl::StrCat("has global shape ", shape, " but its local slice ",
                                       Describe(local), " starts at column ", entry.first_column,
                                       "; the slice must lie inside"));
  }
  // Written without a sum that could overflow.
  if (entry.first_row < 0 || local.rows() < 0 || local.rows() > entry.global_shape[0] ||
      entry.first_row > entry.global_shape[0] - local.rows()) {
    return Invalid(
        entry, absl::StrCat("has global shape ", shape, " but its local slice is ", local.rows(),
                            " rows from row ", entry.first_row, "; the slice must lie inside"));
  }
  if (!local.contiguous()) {
    return Invalid(
        entry, absl::StrCat("has the local slice ", Describe(local), ", which is not contiguous"));
  }
  if (!local.present() && local.elements() > 0) {
    return Invalid(entry, absl::StrCat("has the local slice ", Describe(local),
                                       " without memory; allocate it before registering"));
  }
  return absl::OkStatus();
}

bool Overlap(const StateEntry& a, const StateEntry& b) {
  if (a.local.elements() == 0 || b.local.elements() == 0) return false;
  const auto meet = [](int64_t first, int64_t count, int64_t other, int64_t others) {
    return first < other + others && other < first + count;
  };
  return meet(a.first_row, a.local.rows(), b.first_row, b.local.rows()) &&
         (a.local.rank != 2 ||
          meet(a.first_column, a.local.dims[1], b.first_column, b.local.dims[1]));
}

}  // namespace

absl::Status StateRegistry::Add(StateEntry entry) {
  if (entry.name.empty()) {
    return absl::InvalidArgumentError("a state tensor has no name; give it a unique one");
  }
  if (entry.global_shape.empty() || entry.global_shape.size() > Tensor::kMaxRank) {
    return Invalid(entry, absl::StrCat("has ", entry.global_shape.size(), " dimensions; one to ",
                                       Tensor::kMaxRank, " are possible"));
  }
  for (int64_t d : entry.global_shape) {
    if (d < 0) {
      return Invalid(entry, absl::StrCat("has the negative dimension ", d));
    }
  }
  if (!entry.local.present() && entry.local.rank == 0) entry.local = EmptySlice(entry);
  STRETTO_RETURN_IF_ERROR(Check(entry));
  std::vector<std::size_t>& boxes = index_[entry.name];
  for (const std::size_t i : boxes) {
    const StateEntry& other = entries_[i];
    if (other.dtype != entry.dtype || other.global_shape != entry.global_shape) {
      return Invalid(entry, "is registered with two types or shapes; names must be unique");
    }
    if (Overlap(other, entry)) {
      return Invalid(entry, "is registered twice; its boxes must not overlap");
    }
  }
  boxes.push_back(entries_.size());
  entries_.push_back(std::move(entry));
  return absl::OkStatus();
}

const StateEntry* StateRegistry::Find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &entries_[it->second.front()];
}

void StateRegistry::SetUpdatePart(const std::string& name, int part) {
  const auto found = index_.find(name);
  if (found == index_.end()) return;
  for (const std::size_t i : found->second) entries_[i].update_part = part;
}

void StateRegistry::SetEpoch(int64_t epoch) {
  for (StateEntry& entry : entries_) entry.epoch = epoch;
}

int64_t StateRegistry::LocalBytes() const {
  int64_t bytes = 0;
  for (const StateEntry& entry : entries_) bytes += entry.local.bytes();
  return bytes;
}

}  // namespace stretto
