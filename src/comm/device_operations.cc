#include "src/comm/device_operations.h"

#include <algorithm>

namespace stretto {

void DeviceOperations::Add(Operation* o) {
  o->device = Operation::OnDevice::kWaiting;
  waiting_.push_back(o);
}

absl::StatusOr<bool> DeviceOperations::Advance(bool all) {
  bool moved = false;
  if (!batch_.empty()) {
    failed_ = batch_.front();
    STRETTO_ASSIGN_OR_RETURN(const bool issued, collectives_->Issued());
    if (!issued) return false;
    const Event done = collectives_->stream().Record();
    for (Operation* o : batch_) {
      o->device = Operation::OnDevice::kQueued;
      o->done = done;
      if (trace_ != nullptr) trace_->End(o->trace, collectives_->stream());
    }
    batch_.clear();
    moved = true;
  }
  if (waiting_.empty()) return moved;

  auto end = std::find_if(waiting_.begin(), waiting_.end(),
                          [](const Operation* o) { return !o->point_to_point(); });
  if (end == waiting_.begin()) {
    ++end;  // a collective, alone
  } else if (end == waiting_.end() && !all) {
    return moved;
  }
  batch_.assign(waiting_.begin(), end);
  waiting_.erase(waiting_.begin(), end);
  failed_ = batch_.front();
  before_issue_(*failed_);
  for (Operation* o : batch_) collectives_->stream().Wait(o->after);
  STRETTO_RETURN_IF_ERROR(collectives_->stream().status());
  if (trace_ != nullptr) {
    // Of several that proceed together all begin here and end together.
    for (Operation* o : batch_) trace_->Begin(o->trace, collectives_->stream());
  }
  STRETTO_RETURN_IF_ERROR(collectives_->Issue(batch_));
  for (Operation* o : batch_) {
    o->device = Operation::OnDevice::kIssued;
    o->bytes_sent = BytesToSend(*o);
    recorder_.Started(o->record);
  }
  return true;
}

bool DeviceOperations::busy() const {
  return !batch_.empty() || std::any_of(waiting_.begin(), waiting_.end(),
                                        [](const Operation* o) { return !o->point_to_point(); });
}

void DeviceOperations::Abort() {
  waiting_.clear();
  batch_.clear();
  collectives_->Abort();
}

}  // namespace stretto
