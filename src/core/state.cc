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
  bool same = local.rank == static_cast<int>(entry.global_shape.size());
  for (int i = 1; same && i < local.rank; ++i) same = local.dims[i] == entry.global_shape[i];
  if (!same) {
    return Invalid(
        entry, absl::StrCat("has global shape ", shape, " but its local slice is ", Describe(local),
                            "; all dimensions but the first must agree"));
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

}  // namespace

absl::Status StateRegistry::Add(StateEntry entry) {
  if (entry.name.empty()) {
    return absl::InvalidArgumentError("a state tensor has no name; give it a unique one");
  }
  if (index_.count(entry.name) != 0) {
    return Invalid(entry, "is registered twice; names must be unique");
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
  index_.emplace(entry.name, entries_.size());
  entries_.push_back(std::move(entry));
  return absl::OkStatus();
}

const StateEntry* StateRegistry::Find(const std::string& name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &entries_[it->second];
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
