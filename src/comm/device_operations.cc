#include "src/comm/device_operations.h"

#include <algorithm>

namespace stretto {
namespace {

int64_t Items(const Operation& o) {
  return o.op == CommOp::kAllToAll ? 2 * o.group->size() : static_cast<int64_t>(o.items.size());
}

}  // namespace

void DeviceOperations::Add(Operation* o) {
  o->device = Operation::OnDevice::kWaiting;
  o->launches = kAround + collectives_->Prepare(o);
  o->together = together_;
  waiting_.push_back(o);
}

absl::StatusOr<bool> DeviceOperations::Advance(bool all) {
  if (all) ++together_;
  std::size_t handed_over = 0;
  while (handed_over < waiting_.size()) {
    const auto begin = waiting_.begin() + static_cast<std::ptrdiff_t>(handed_over);
    auto end = std::find_if(begin, waiting_.end(), [&](const Operation* o) {
      return !o->point_to_point() || o->together != (*begin)->together;
    });
    if (end == begin) {
      ++end;  // a collective, alone
    } else if (end == waiting_.end() && !all && (*begin)->together == together_) {
      break;
    }
    const std::span<Operation* const> batch(begin, end);
    if (!HasRoom(batch)) break;
    const absl::Status issued = Issue(batch);
    if (!issued.ok()) return issued;  // an error ends all of them
    handed_over += batch.size();
  }
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(handed_over));
  return handed_over > 0;
}

bool DeviceOperations::HasRoom(std::span<Operation* const> batch) const {
  if (queued_ == 0) return true;
  int64_t items = queued_items_, launches = queued_launches_;
  for (const Operation* o : batch) {
    items += Items(*o);
    launches += o->launches;
  }
  return launches <= kMostLaunches && items <= kMostItems;
}

absl::Status DeviceOperations::Issue(std::span<Operation* const> batch) {
  Stream& stream = collectives_->stream();
  failed_ = batch.front();
  before_issue_(*failed_);
  for (const Operation* o : batch) stream.Wait(o->after);
  STRETTO_RETURN_IF_ERROR(stream.status());
  if (trace_ != nullptr) {
    // Of several that proceed together all begin here and end together.
    for (const Operation* o : batch) trace_->Begin(o->trace, stream);
  }
  STRETTO_ASSIGN_OR_RETURN(Stream* const end, collectives_->Issue(batch));
  const Event done = end->Record();
  for (Operation* o : batch) {
    o->device = Operation::OnDevice::kQueued;
    o->done = done;
    o->bytes_sent = BytesToSend(*o);
    recorder_.Started(o->record);
    if (trace_ != nullptr) {
      if (o->op != CommOp::kReceive) trace_->SetBytes(o->trace, o->bytes_sent);
      trace_->End(o->trace, *end);
    }
    ++queued_;
    queued_launches_ += o->launches;
    queued_items_ += Items(*o);
  }
  return absl::OkStatus();
}

void DeviceOperations::Finished(const Operation& o) {
  --queued_;
  queued_launches_ -= o.launches;
  queued_items_ -= Items(o);
}

bool DeviceOperations::busy() const {
  return std::any_of(waiting_.begin(), waiting_.end(), [&](const Operation* o) {
    return !o->point_to_point() || o->together != together_;
  });
}

void DeviceOperations::Abort() {
  waiting_.clear();
  queued_ = queued_launches_ = queued_items_ = 0;
  collectives_->Abort();
}

}  // namespace stretto
