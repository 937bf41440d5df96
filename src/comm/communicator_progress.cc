// What happens to operations in flight: they move on, are waited for, finish or fail; and why one
// does not finish.
#include <algorithm>
#include <chrono>
#include <mutex>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/communicator_impl.h"
#include "src/comm/world_internal.h"
#include "stretto/core/rng.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;

// How long a rank that cannot take part any more may stay without consequence for an operation:
// what it sent before may still be on its way. Short enough for everybody to say what they know
// before mpirun ends them, a second or two after a rank has died.
constexpr auto kGraceOutside = std::chrono::milliseconds(300);
// ... when it said goodbye, which it may have done for a good reason.
constexpr auto kGraceLeft = std::chrono::seconds(2);
constexpr auto kGraceLeftOutside = std::chrono::seconds(5);

// A waiting loop hands its core to others at once, and sleeps when nothing has moved for a while.
class Backoff {
 public:
  void Moved() { idle_since_ = Clock::time_point(); }
  void Pause() {
    const Clock::time_point now = Clock::now();
    if (idle_since_ == Clock::time_point()) idle_since_ = now;
    if (now - idle_since_ < std::chrono::milliseconds(20)) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

 private:
  Clock::time_point idle_since_;
};

}  // namespace

void Communicator::Impl::Delay() {
  const WorldOptions& options = world.options();
  const Rng rng(options.delay_seed, "comm/delay", static_cast<uint64_t>(world.rank()));
  const uint64_t us = rng.Below(delays++, static_cast<uint64_t>(options.random_delay_us) + 1);
  std::this_thread::sleep_for(std::chrono::microseconds(us));
}

std::function<void(const Operation&)> Communicator::Impl::BeforePost() {
  const WorldOptions& options = world.options();
  if (!options.before_message && options.random_delay_us <= 0) return [](const Operation&) {};
  return [this, &options](const Operation& o) {
    if (options.before_message) options.before_message(What(o));
    if (options.random_delay_us > 0) Delay();
  };
}

std::string Communicator::Impl::What(const Operation& o) const {
  const int peer = o.point_to_point() ? o.group->ranks[static_cast<std::size_t>(o.peer)] : -1;
  return Describe(o.op, o.group->name, o.sequence, peer, o.label);
}

bool Communicator::Impl::Step(Turn turn) {
  bool moved = false;
  bool device_held = false;  // an operation on the device may not yet start, so no later one may
  // An operation on the device is not done, so hardly a later one is: asking about each of a long
  // queue would cost more than handing one over.
  bool device_behind = false;
  bool device_sound = false;
  std::size_t kept = 0;
  const auto give_up = [&](std::size_t i, const Operation& o, const absl::Status& status) {
    // Nothing has been taken out of its place yet that Fail would miss.
    in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(kept),
                    in_flight.begin() + static_cast<std::ptrdiff_t>(i));
    FailOperation(o, status);
    return true;
  };
  for (std::size_t i = 0; i < in_flight.size(); ++i) {
    Operation* o = in_flight[i];
    if (device_behind && o->device == Operation::OnDevice::kQueued) {
      in_flight[kept++] = o;
      continue;
    }
    GroupState& state = *Find(*o->group);
    const bool next = o->point_to_point() || o->sequence == state.next_start;
    if (o->device != Operation::OnDevice::kNo) {
      // The device itself waits for `after`.
      if (!o->started && next && !device_held) {
        o->started = true;
        if (!o->point_to_point()) ++state.next_start;
        device->Add(o);
        moved = true;
      }
      device_held = device_held || !o->started;
      if (o->started && !o->ready && !device_behind && o->after.Done()) {
        o->ready = true;
        if (!o->point_to_point()) watchdog.board().Started(state.group.id, o->sequence);
      }
      if (o->device == Operation::OnDevice::kQueued && o->done.Done()) {
        if (!device_sound) {
          const absl::Status sound = device->collectives().Check();
          if (!sound.ok()) return give_up(i, *o, sound);
          device_sound = true;
        }
        device->Finished(*o);
        Finish(*o);
        moved = true;
        continue;
      }
      device_behind = true;
      in_flight[kept++] = o;
      continue;
    }
    if (turn == Turn::kGuard) {
      in_flight[kept++] = o;
      continue;
    }
    if (!o->started && o->after.Done() &&
        (o->point_to_point() || (next && state.active < kActiveInGroup))) {
      if (trace != nullptr) trace->Begin(o->trace);
      engine.Start(*o);
      recorder.Started(o->record);
      if (!o->point_to_point()) {
        ++state.next_start;
        ++state.active;
        watchdog.board().Started(state.group.id, o->sequence);
      }
      moved = true;
    }
    if (o->started) {
      const absl::StatusOr<bool> done = engine.Advance(*o, &moved);
      if (!done.ok()) return give_up(i, *o, done.status());
      if (*done) {
        Finish(*o);
        moved = true;
        continue;
      }
    }
    in_flight[kept++] = o;
  }
  in_flight.resize(kept);
  return (device != nullptr && AdvanceDevice(turn)) || moved;
}

void Communicator::Impl::Finish(Operation& o) {
  GroupState& state = *Find(*o.group);
  recorder.Finished(o.record);
  state.bytes_sent += o.bytes_sent;
  if (o.copied) state.bytes_copied += o.bytes_sent;
  if (trace != nullptr && o.device == Operation::OnDevice::kNo) {
    if (o.op != CommOp::kReceive) trace->SetBytes(o.trace, o.bytes_sent);
    trace->End(o.trace);
  }
  if (!o.point_to_point()) {
    if (o.device == Operation::OnDevice::kNo) --state.active;
    watchdog.board().Finished(state.group.id, o.sequence);
  }
  engine.Release(o);
  free.push_back(&o);
  // Which operation object serves which call depends on timing too: all grow together.
  if (room.ReserveLike(o)) {
    for (const std::unique_ptr<Operation>& other : pool) other->ReserveLike(room);
  }
}

void Communicator::Impl::Fail(absl::Status status, bool own) {
  if (!error.ok()) return;
  error = std::move(status);
  WorldAccess::phase(world).failed = true;
  // Tell the others first: closing connections makes them look for a reason.
  watchdog.Fail(std::string(error.message()), own);
  for (Stream* stream : dependent) stream->Fail(error);
  dependent.clear();
  if (device != nullptr) device->Abort();
  if (std::this_thread::get_id() == guard.get_id()) {
    abandon = true;
  } else {
    world.transport().Abandon();
  }
  for (Operation* o : in_flight) {
    engine.Release(*o);
    free.push_back(o);
  }
  in_flight.clear();
}

void Communicator::Impl::FailOperation(const Operation& o, const absl::Status& status) {
  const std::string what = What(o);
  if (absl::IsUnavailable(status)) {
    // A connection broke. The control plane may know more about why than this rank saw: give it
    // the moment that it needs to notice.
    for (int attempt = 0; attempt < 8; ++attempt) {
      const absl::Status blamed = BlameTrouble(o, watchdog.Ask());
      if (!blamed.ok()) {
        Fail(blamed, false);
        return;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
  }
  Fail(absl::Status(status.code(), absl::StrCat(what, " failed on rank ", world.rank(), ": ",
                                                std::string(status.message()))),
       true);
}

absl::Status Communicator::Impl::BlameTrouble(const Operation& o, const Watchdog::News& trouble) {
  const auto inside = [&](int rank) {
    const RankList& ranks = o.group->ranks;
    return rank != world.rank() && std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
  };
  const auto named_inside = [&](const std::pair<int, std::string>& r) { return inside(r.first); };
  const auto age = Clock::now() - trouble.since;
  // The cause may be outside the group, and a rank of the group the first to suffer from it.
  const bool now = age >= kGraceOutside ||
                   std::any_of(trouble.failed.begin(), trouble.failed.end(), named_inside) ||
                   std::any_of(trouble.gave_up.begin(), trouble.gave_up.end(), named_inside);
  const std::string waiting = absl::StrCat(" while rank ", world.rank(), " waited for ", What(o));
  for (const bool outside : {false, true}) {
    if (outside && !now) break;
    for (int r : trouble.dead) {
      if (r == world.rank() || inside(r) == outside) continue;
      return absl::UnavailableError(
          absl::StrCat("rank ", r, " died", waiting, "; restart from the last checkpoint"));
    }
    for (const auto& [r, message] : trouble.failed) {
      if (r == world.rank() || inside(r) == outside) continue;
      return absl::UnavailableError(absl::StrCat("rank ", r, " failed", waiting, ": ", message));
    }
  }
  for (int r : trouble.left) {
    if (r == world.rank() || age < (inside(r) ? kGraceLeft : kGraceLeftOutside)) continue;
    return absl::UnavailableError(
        absl::StrCat("rank ", r, " left the job", waiting, "; see its messages"));
  }
  for (const auto& [r, message] : trouble.gave_up) {
    if (!inside(r)) continue;
    return absl::UnavailableError(absl::StrCat("rank ", r, " gave up", waiting, ": ", message));
  }
  return absl::OkStatus();
}

void Communicator::Impl::LookForTrouble() {
  if (!watchdog.trouble() || in_flight.empty() || !error.ok()) return;
  const Watchdog::News trouble = watchdog.Known();
  for (Operation* o : in_flight) {
    absl::Status blamed = BlameTrouble(*o, trouble);
    if (blamed.ok()) continue;
    Fail(std::move(blamed), false);
    return;
  }
}

void Communicator::Impl::Advance() {
  if (error.ok() && !Step(Turn::kWait)) LookForTrouble();
}

Operation* Communicator::Impl::Flying(Ticket ticket) {
  for (Operation* o : in_flight) {
    if (o->ticket == ticket) return o;
  }
  return nullptr;
}

absl::Status Communicator::Impl::WaitUntil(Ticket ticket, bool queued) {
  const Clock::time_point begin = Clock::now();
  const std::chrono::milliseconds limit = world.options().timeout;
  Backoff backoff;
  while (error.ok()) {
    const Operation* flying = Flying(ticket);
    if (flying == nullptr) return absl::OkStatus();
    if (queued && flying->device == Operation::OnDevice::kQueued) return absl::OkStatus();
    if (Step(Turn::kWait)) {
      backoff.Moved();
      continue;
    }
    LookForTrouble();
    if (limit.count() > 0 && Clock::now() - begin > limit) {
      if (const Operation* o = Flying(ticket)) TimedOut(*o, begin);
      break;
    }
    backoff.Pause();
  }
  return error;
}

void Communicator::Impl::TimedOut(const Operation& o, Clock::time_point since) {
  // What holds a collective back may be an earlier one of its group that nobody waits for.
  const Operation* culprit = &o;
  // ... and on a device, one that comes before it on the communication stream.
  if (o.device != Operation::OnDevice::kNo) culprit = FirstOnDevice();
  for (const Operation* other : in_flight) {
    if (o.device != Operation::OnDevice::kNo) break;
    if (!o.point_to_point() && !other->point_to_point() && other->group == o.group) {
      culprit = other;
      break;
    }
  }
  const std::string what = What(*culprit);
  std::string why;
  const bool held = !culprit->started || culprit->device != Operation::OnDevice::kNo;
  if (held && !culprit->after.Done()) {
    why = absl::StrCat("rank ", world.rank(), " itself still computes what ", what, " waits for");
  } else {
    why = watchdog.Diagnose(*culprit->group, culprit->op, culprit->sequence, culprit->peer, what);
  }
  const double waited = std::chrono::duration<double>(Clock::now() - since).count();
  Fail(absl::DeadlineExceededError(
           absl::StrFormat("rank %d waited %.1f s: %s", world.rank(), waited, why)),
       true);
}

void Communicator::Progress() {
  const auto lock = impl_->Lock();
  impl_->Advance();
}

bool Communicator::Done(Ticket ticket) {
  const auto lock = impl_->Lock();
  impl_->Advance();
  return impl_->Flying(ticket) == nullptr;
}

absl::Status Communicator::Wait(Ticket ticket) {
  const auto lock = impl_->Lock();
  return impl_->WaitUntil(ticket, false);
}

absl::Status Communicator::WaitAll() {
  const auto lock = impl_->Lock();
  while (impl_->error.ok() && !impl_->in_flight.empty()) {
    impl_->WaitUntil(impl_->in_flight.front()->ticket, false).IgnoreError();
  }
  return impl_->error;
}

}  // namespace stretto
