// What only operations on a device need: its connection, the guard that looks after them, and
// streams that wait for them.
#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/comm/communicator_impl.h"
#include "src/comm/world_internal.h"
#include "src/core/start_thread.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;

// How often operations on a device are looked after while nobody else does: those under way, and
// those that wait to be handed over.
constexpr auto kGuardLook = std::chrono::milliseconds(50);
constexpr auto kGuardBusy = std::chrono::microseconds(100);

}  // namespace

absl::Status Communicator::Impl::UseDevice(Device d) {
  if (d.kind == DeviceKind::kCpu || (device != nullptr && device->device() == d)) {
    return absl::OkStatus();
  }
  if (device != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("UseDevice(", Name(d), ") on rank ", world.rank(), ": the communicator uses ",
                     Name(device->device()), " already; make another communicator"));
  }
  STRETTO_ASSIGN_OR_RETURN(std::unique_ptr<DeviceCollectives> connected, ConnectDevices(world, d));
  for (const GroupState& state : groups) {
    STRETTO_RETURN_IF_ERROR(connected->AddGroup(state.group));
  }
  device = std::make_unique<DeviceOperations>(std::move(connected), recorder, BeforePost());
  absl::StatusOr<std::thread> started =
      StartThread("the communicator's guard", [this] { Guard(); });
  if (started.ok()) {
    guard = *std::move(started);
  } else {
    Fail(started.status(), true);  // the other ranks already believe in this device
  }
  return error;
}

Communicator::Impl::~Impl() {
  if (guard.joinable()) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      guard_stop = true;
    }
    guard_wake.notify_all();
    guard.join();
  }
}

std::unique_lock<std::mutex> Communicator::Impl::Lock() {
  std::unique_lock<std::mutex> lock(mutex);
  if (std::exchange(abandon, false)) world.transport().Abandon();
  return lock;
}

void Communicator::Impl::Guard() {
  const std::chrono::milliseconds limit = world.options().timeout;
  Ticket first = 0;
  Clock::time_point since;
  std::unique_lock<std::mutex> lock(mutex);
  device->collectives().EnterThread();
  while (!guard_stop) {
    guard_wake.wait_for(lock, device->busy() ? Clock::duration(kGuardBusy) : kGuardLook);
    if (guard_stop) return;
    if (!error.ok() || FirstOnDevice() == nullptr) continue;
    Step(Turn::kGuard);
    LookForTrouble();
    const Operation* o = error.ok() ? FirstOnDevice() : nullptr;
    if (o == nullptr || limit.count() <= 0) continue;
    // Only what the device could do now, if the other ranks came, waits for them.
    if (o->ticket != first || !o->ready || o->device == Operation::OnDevice::kWaiting) {
      first = o->ticket;
      since = Clock::now();
    } else if (Clock::now() - since > limit) {
      TimedOut(*o, since);
    }
  }
}

bool Communicator::Impl::AdvanceDevice(Turn turn) {
  if (FirstOnDevice() == nullptr) {
    dependent.clear();
    return false;
  }
  const absl::StatusOr<bool> moved = device->Advance(turn == Turn::kWait);
  if (moved.ok()) return *moved;
  FailOperation(*device->failed(), moved.status());
  return true;
}

const Operation* Communicator::Impl::FirstOnDevice() const {
  for (const Operation* o : in_flight) {
    if (o->device != Operation::OnDevice::kNo) return o;
  }
  return nullptr;
}

absl::Status Communicator::Impl::Wait(Stream& stream, Ticket ticket) {
  // What happens on the stream's own device, the device can wait for.
  const bool on_device = device != nullptr && stream.device() == device->device();
  absl::Status status = WaitUntil(ticket, on_device);
  if (!status.ok()) {
    stream.Fail(status);
    return status;
  }
  if (const Operation* o = on_device ? Flying(ticket) : nullptr) {
    stream.Wait(o->done);
    if (std::find(dependent.begin(), dependent.end(), &stream) == dependent.end()) {
      dependent.push_back(&stream);
    }
  }
  return absl::OkStatus();
}

absl::Status Communicator::UseDevice(Device device) {
  STRETTO_RETURN_IF_ERROR(WaitAll());
  const auto lock = impl_->Lock();  // nothing is in flight, so nobody needs the mutex meanwhile
  return impl_->UseDevice(device);
}

absl::StatusOr<std::string> Communicator::UseCopyEngines(const Group& g) {
  STRETTO_RETURN_IF_ERROR(WaitAll());
  const auto lock = impl_->Lock();  // as for UseDevice
  if (impl_->device == nullptr) return "the communicator has no device that is not a CPU";
  const Impl::GroupState* state = impl_->Find(g);
  if (state == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("UseCopyEngines of group '", g.name, "' on rank ", impl_->world.rank(),
                     ": this communicator does not know the group; make it with MakeGroup"));
  }
  return impl_->device->collectives().UseCopyEngines(state->group);
}

absl::StatusOr<std::string> Communicator::ShareMemory(const Group& g, Tensor memory,
                                                      uint64_t layout) {
  STRETTO_RETURN_IF_ERROR(WaitAll());
  const auto lock = impl_->Lock();  // as for UseDevice
  if (impl_->device == nullptr) return "the communicator has no device that is not a CPU";
  const Impl::GroupState* state = impl_->Find(g);
  if (state == nullptr || memory.device != impl_->device->device() || !memory.contiguous()) {
    return absl::InvalidArgumentError(
        absl::StrCat("ShareMemory of ", Describe(memory), " with group '", g.name, "' on rank ",
                     impl_->world.rank(),
                     ": this needs contiguous memory of the communicator's device and a "
                     "group that MakeGroup made"));
  }
  return impl_->device->collectives().Share(
      state->group, {memory.data, static_cast<std::size_t>(memory.bytes())}, layout);
}

absl::Status Communicator::Wait(Stream& stream, Ticket ticket) {
  const auto lock = impl_->Lock();
  return impl_->Wait(stream, ticket);
}

}  // namespace stretto
