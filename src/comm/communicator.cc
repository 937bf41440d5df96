#include "stretto/comm/communicator.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <span>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/collectives.h"
#include "src/comm/device_operations.h"
#include "src/comm/flight_dump.h"
#include "src/comm/reduce.h"
#include "src/comm/watchdog.h"
#include "src/comm/world_internal.h"
#include "src/core/start_thread.h"
#include "stretto/core/log.h"
#include "stretto/core/rng.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;

// A tag is [1 bit point-to-point | 13 bits group | 16 bits sequence]: operations in flight between
// two ranks never share one.
constexpr int kSequenceBits = 16;
constexpr int kGroupBits = 13;
constexpr int kMaxGroups = 1 << kGroupBits;

int Tag(bool point_to_point, int group, int64_t sequence) {
  return (point_to_point ? 1 << (kGroupBits + kSequenceBits) : 0) | (group << kSequenceBits) |
         static_cast<int>(sequence & ((1 << kSequenceBits) - 1));
}

// How long a rank that cannot take part any more may stay without consequence for an operation:
// what it sent before may still be on its way.
constexpr auto kGraceLeft = std::chrono::seconds(2);
constexpr auto kGraceOutside = std::chrono::seconds(5);

// How often operations on a device are looked after while nobody else does: those under way, and
// those that wait to be handed over.
constexpr auto kGuardLook = std::chrono::milliseconds(50);
constexpr auto kGuardBusy = std::chrono::microseconds(100);

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

std::string RanksText(const RankList& ranks) {
  std::string text;
  for (int r : ranks) absl::StrAppend(&text, text.empty() ? "" : " ", r);
  return text;
}

}  // namespace

struct Communicator::Impl {
  struct GroupState {
    Group group;
    int64_t submitted = 0;   // collectives
    int64_t next_start = 1;  // sequence of the collective that starts next
    int active = 0;
    int64_t bytes_sent = 0;
  };

  explicit Impl(World& w);
  ~Impl();

  World& world;
  FlightRecorder recorder;
  Engine engine;
  Watchdog watchdog;
  std::deque<GroupState> groups;  // operations point into it
  std::vector<std::unique_ptr<Operation>> pool;
  std::vector<Operation*> free;
  std::vector<Operation*> in_flight;  // in order of submission
  Ticket last_ticket = 0;
  absl::Status error;
  uint64_t delays = 0;
  Operation room;  // has the room that any operation object ever needed

  // Operations on a device go on while this rank's thread does something else, and that may be to
  // wait for the device, which waits for a rank that is gone. So a guard looks after them: it hands
  // over the next one in time, and gives them up when they cannot finish. Everything above is used
  // under `mutex`, by the guard or by the one thread that calls the communicator.
  std::mutex mutex;
  std::unique_ptr<DeviceOperations> device;  // after UseDevice
  std::vector<Stream*> dependent;            // streams that wait for operations in flight
  std::thread guard;
  std::condition_variable guard_wake;
  bool guard_stop = false;
  bool abandon = false;  // the guard failed, but the transport is none of its business

  // Whose turn it is to move operations on.
  enum class Turn { kSubmit, kWait, kGuard };
  std::unique_lock<std::mutex> Lock();
  void Guard();
  absl::Status UseDevice(Device d);
  bool AdvanceDevice(Turn turn);
  const Operation* FirstOnDevice() const;
  // Until the ticket is done, or, for an operation on a device, in the order of its stream.
  absl::Status WaitUntil(Ticket ticket, bool queued);
  absl::Status Wait(Stream& stream, Ticket ticket);

  void Delay();
  GroupState* Find(const Group& g);
  GroupState& AddGroup(const std::string& name, const RankList& ranks);
  // Checks the group and makes an operation; null after an error.
  Operation* New(CommOp op, const Group& g, const std::string& label, const Event& after,
                 DType dtype, Device where);
  Ticket Submit(Operation* o, int64_t count);
  Ticket SubmitParts(CommOp op, const Group& g, std::span<const Tensor> outputs,
                     std::span<const Tensor> inputs, const std::string& label, const Event& after);
  Ticket Refuse(CommOp op, const Group& g, const std::string& label, const std::string& why);
  bool Usable(CommOp op, const Group& g, const std::string& label, const Tensor& t);
  bool SameDevice(CommOp op, const Group& g, const std::string& label, const Tensor& a,
                  const Tensor& b);
  bool Step(Turn turn);  // one round over what is in flight; true when something moved
  void Finish(Operation& o);
  void Fail(absl::Status status, bool publish);
  void FailOperation(const Operation& o, const absl::Status& status);
  void LookForTrouble();
  // Why `o` cannot finish; OK when no rank in trouble is known, or it is not yet time to give up.
  absl::Status BlameTrouble(const Operation& o, const Watchdog::Trouble& trouble);
  std::string What(const Operation& o) const;
  Operation* Flying(Ticket ticket);
  void TimedOut(const Operation& o, Clock::time_point since);
};

Communicator::Impl::Impl(World& w)
    : world(w),
      engine(w.transport(), w.options().random_delay_us > 0
                                ? std::function<void()>([this] { Delay(); })
                                : std::function<void()>([] {})),
      watchdog(w.store(), w.rank(), absl::StrCat(WorldAccess::phase(w).communicators++), recorder) {
  RankList everyone(static_cast<std::size_t>(w.size()));
  for (int r = 0; r < w.size(); ++r) everyone[static_cast<std::size_t>(r)] = r;
  AddGroup("all", everyone);
  const absl::Status watched = watchdog.Start();
  if (!watched.ok()) Fail(watched, true);
}

void Communicator::Impl::Delay() {
  const WorldOptions& options = world.options();
  const Rng rng(options.delay_seed, "comm/delay", static_cast<uint64_t>(world.rank()));
  const uint64_t us = rng.Below(delays++, static_cast<uint64_t>(options.random_delay_us) + 1);
  std::this_thread::sleep_for(std::chrono::microseconds(us));
}

Communicator::Impl::GroupState& Communicator::Impl::AddGroup(const std::string& name,
                                                             const RankList& ranks) {
  GroupState& state = groups.emplace_back();
  state.group.id = WorldAccess::phase(world).next_group++;
  state.group.name = name;
  state.group.ranks = ranks;
  const auto me = std::find(ranks.begin(), ranks.end(), world.rank());
  state.group.index = static_cast<int>(me - ranks.begin());
  watchdog.board().AddGroup(state.group.id, state.group.size());
  return state;
}

Communicator::Impl::GroupState* Communicator::Impl::Find(const Group& g) {
  // Ids of one communicator ascend.
  const auto found =
      std::lower_bound(groups.begin(), groups.end(), g.id,
                       [](const GroupState& state, int id) { return state.group.id < id; });
  return found != groups.end() && found->group.id == g.id ? &*found : nullptr;
}

std::string Communicator::Impl::What(const Operation& o) const {
  std::string text = absl::StrCat(Name(o.op), "(", o.group->name, ") seq ", o.sequence);
  if (o.point_to_point()) {
    absl::StrAppend(&text, o.op == CommOp::kSend ? " to rank " : " from rank ",
                    o.group->ranks[static_cast<std::size_t>(o.peer)]);
  }
  if (o.label[0] != '\0') absl::StrAppend(&text, " [", o.label, "]");
  return text;
}

Ticket Communicator::Impl::Refuse(CommOp op, const Group& g, const std::string& label,
                                  const std::string& why) {
  if (error.ok()) {
    Fail(absl::InvalidArgumentError(absl::StrCat(Name(op), "(", g.name, ") [", label, "] on rank ",
                                                 world.rank(), ": ", why)),
         true);
  }
  return ++last_ticket;
}

bool Communicator::Impl::Usable(CommOp op, const Group& g, const std::string& label,
                                const Tensor& t) {
  if (!error.ok()) return true;  // the first error stays
  std::string why;
  if (t.elements() < 0 || (t.elements() > 0 && !t.present())) {
    why = "a tensor has no data";
  } else if (!t.contiguous()) {
    why = absl::StrCat("the tensor ", Describe(t), " is not contiguous; copy it first");
  } else if (t.device.kind != DeviceKind::kCpu &&
             (device == nullptr || device->device() != t.device)) {
    why = absl::StrCat("the tensor ", Describe(t), " is not in host memory; call UseDevice(",
                       Name(t.device), ") first");
  }
  if (why.empty()) return true;
  Refuse(op, g, label, why);
  return false;
}

bool Communicator::Impl::SameDevice(CommOp op, const Group& g, const std::string& label,
                                    const Tensor& a, const Tensor& b) {
  if (!error.ok() || a.device == b.device) return true;
  Refuse(op, g, label,
         absl::StrCat("the tensors ", Describe(a), " on ", Name(a.device), " and ", Describe(b),
                      " on ", Name(b.device), " must be on one device"));
  return false;
}

Operation* Communicator::Impl::New(CommOp op, const Group& g, const std::string& label,
                                   const Event& after, DType dtype, Device where) {
  if (!error.ok()) return nullptr;
  GroupState* state = Find(g);
  if (state == nullptr) {
    Refuse(op, g, label, "this communicator does not know the group; make it with MakeGroup");
    --last_ticket;  // Submit counts this operation
    return nullptr;
  }
  if (free.empty()) {
    // Doubled, because how many operations are in flight in which step depends on timing.
    const std::size_t more = std::max<std::size_t>(16, pool.size());
    for (std::size_t i = 0; i < more; ++i) {
      pool.push_back(std::make_unique<Operation>());
      pool.back()->ReserveLike(room);
      free.push_back(pool.back().get());
    }
    free.reserve(pool.size());
    in_flight.reserve(pool.size());
  }
  Operation* o = free.back();
  free.pop_back();
  o->Reset();
  o->op = op;
  o->group = &state->group;
  o->after = after;
  o->dtype = dtype;
  if (where.kind != DeviceKind::kCpu) o->device = Operation::OnDevice::kWaiting;
  const std::size_t length = std::min(label.size(), sizeof(o->label) - 1);
  std::memcpy(o->label, label.data(), length);
  o->label[length] = '\0';
  return o;
}

Ticket Communicator::Impl::Submit(Operation* o, int64_t count) {
  const Ticket ticket = ++last_ticket;
  if (o == nullptr) return ticket;
  GroupState& state = *Find(*o->group);
  const int id = state.group.id;
  o->ticket = ticket;
  if (o->op == CommOp::kSend) {
    o->sequence = watchdog.board().Sends(id, o->peer);
  } else if (o->op == CommOp::kReceive) {
    o->sequence = watchdog.board().Receives(id, o->peer);
  } else {
    o->sequence = ++state.submitted;
    watchdog.board().Entered(id, o->sequence);
  }
  o->tag = Tag(o->point_to_point(), id, o->sequence);
  FlightRecord record;
  record.sequence = o->sequence;
  record.group = id;
  record.op = o->op;
  record.dtype = o->dtype;
  record.count = count;
  record.peer = o->point_to_point() ? o->group->ranks[static_cast<std::size_t>(o->peer)] : -1;
  std::memcpy(record.label, o->label, sizeof(record.label));
  o->record = recorder.Begin(record);
  in_flight.push_back(o);
  Step(Turn::kSubmit);
  if (device != nullptr && device->busy()) guard_wake.notify_one();
  return ticket;
}

bool Communicator::Impl::Step(Turn turn) {
  bool moved = false;
  bool device_held = false;  // an operation on the device may not yet start, so no later one may
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
      if (o->started && !o->ready && o->after.Done()) {
        o->ready = true;
        if (!o->point_to_point()) watchdog.board().Started(state.group.id, o->sequence);
      }
      if (o->device == Operation::OnDevice::kQueued && o->done.Done()) {
        const absl::Status sound = device->collectives().Check();
        if (!sound.ok()) return give_up(i, *o, sound);
        Finish(*o);
        moved = true;
        continue;
      }
      in_flight[kept++] = o;
      continue;
    }
    if (turn == Turn::kGuard) {
      in_flight[kept++] = o;
      continue;
    }
    if (!o->started && o->after.Done() &&
        (o->point_to_point() || (next && state.active < kActiveInGroup))) {
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

void Communicator::Impl::Finish(Operation& o) {
  GroupState& state = *Find(*o.group);
  recorder.Finished(o.record);
  state.bytes_sent += o.bytes_sent;
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

void Communicator::Impl::Fail(absl::Status status, bool publish) {
  if (!error.ok()) return;
  error = std::move(status);
  WorldAccess::phase(world).failed = true;
  // Tell the others first: closing connections makes them look for a reason.
  if (publish) watchdog.Fail(std::string(error.message()));
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

absl::Status Communicator::Impl::BlameTrouble(const Operation& o,
                                              const Watchdog::Trouble& trouble) {
  const auto inside = [&](int rank) {
    const RankList& ranks = o.group->ranks;
    return std::find(ranks.begin(), ranks.end(), rank) != ranks.end();
  };
  const auto age = Clock::now() - trouble.since;
  const std::string waiting = absl::StrCat(" while rank ", world.rank(), " waited for ", What(o));
  for (const bool outside : {false, true}) {
    if (outside && age < kGraceOutside) break;
    for (int r : trouble.dead) {
      if (r == world.rank() || inside(r) == outside) continue;
      return absl::UnavailableError(
          absl::StrCat("rank ", r, " died", waiting, "; restart from the last checkpoint"));
    }
    for (const auto& [r, message] : trouble.failed) {
      if (r == world.rank() || inside(r) == outside) continue;
      return absl::UnavailableError(absl::StrCat("rank ", r, " failed", waiting, ": ", message));
    }
    if (age < kGraceLeft) continue;
    for (int r : trouble.left) {
      if (r == world.rank() || inside(r) == outside) continue;
      return absl::UnavailableError(
          absl::StrCat("rank ", r, " left the job", waiting, "; see its messages"));
    }
  }
  return absl::OkStatus();
}

void Communicator::Impl::LookForTrouble() {
  if (!watchdog.trouble() || in_flight.empty() || !error.ok()) return;
  const Watchdog::Trouble trouble = watchdog.Known();
  for (Operation* o : in_flight) {
    absl::Status blamed = BlameTrouble(*o, trouble);
    if (blamed.ok()) continue;
    Fail(std::move(blamed), false);
    return;
  }
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
  device = std::make_unique<DeviceOperations>(std::move(connected), recorder,
                                              world.options().random_delay_us > 0
                                                  ? std::function<void()>([this] { Delay(); })
                                                  : std::function<void()>([] {}));
  STRETTO_ASSIGN_OR_RETURN(guard, StartThread("the communicator's guard", [this] { Guard(); }));
  return absl::OkStatus();
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

Communicator::Communicator(World& world) : impl_(std::make_unique<Impl>(world)) {}

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

Communicator::~Communicator() {
  auto lock = impl_->Lock();
  if (!impl_->in_flight.empty()) impl_->Step(Impl::Turn::kGuard);  // some may just have finished
  if (!impl_->in_flight.empty()) {
    LogWarning(absl::StrCat("a Communicator ends with ", impl_->in_flight.size(),
                            " operations in flight, the first being ",
                            impl_->What(*impl_->in_flight[0]), "; call WaitAll before"));
    impl_->Fail(
        absl::AbortedError(absl::StrCat("rank ", impl_->world.rank(),
                                        " destroyed its Communicator with operations in flight")),
        true);
  }
  lock.unlock();
  ForgetFlightDump(&impl_->recorder);
}

World& Communicator::world() { return impl_->world; }
const Group& Communicator::all() const { return impl_->groups.front().group; }
FlightRecorder& Communicator::recorder() { return impl_->recorder; }
absl::Status Communicator::status() const {
  const auto lock = impl_->Lock();
  return impl_->error;
}

absl::Status Communicator::UseDevice(Device device) {
  STRETTO_RETURN_IF_ERROR(WaitAll());
  const auto lock = impl_->Lock();
  return impl_->UseDevice(device);
}

absl::StatusOr<Group> Communicator::MakeGroup(const std::string& name, const RankList& ranks) {
  if (impl_->device != nullptr) STRETTO_RETURN_IF_ERROR(WaitAll());
  const auto lock = impl_->Lock();
  STRETTO_RETURN_IF_ERROR(impl_->error);
  World& world = impl_->world;
  absl::Status mine;
  const std::string where = absl::StrCat("group '", name, "' of rank ", world.rank(), ": ");
  if (WorldAccess::phase(world).next_group >= kMaxGroups) {
    mine = absl::ResourceExhaustedError(absl::StrCat(
        where, "there are ", kMaxGroups, " groups already; make them once and keep them"));
  }
  RankList sorted = ranks;
  std::sort(sorted.begin(), sorted.end());
  if (sorted.empty() || sorted.front() < 0 || sorted.back() >= world.size() ||
      std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end() ||
      !std::binary_search(sorted.begin(), sorted.end(), world.rank())) {
    mine = absl::InvalidArgumentError(
        absl::StrCat(where, "the list [", RanksText(ranks),
                     "] must hold this rank, and each rank of the world once at most"));
  }
  // Everybody learns everybody's list here, so a disagreement is found now and not as a hang.
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> lists,
      world.AllGather(absl::StrCat("group ", name), mine.ok() ? RanksText(ranks) : "-"));
  STRETTO_RETURN_IF_ERROR(mine);
  for (int r = 0; r < world.size(); ++r) {
    if (lists[static_cast<std::size_t>(r)] == "-") {
      return absl::InvalidArgumentError(absl::StrCat(
          "rank ", r, " gave an impossible list for group '", name, "'; see its message"));
    }
  }
  for (int r : ranks) {
    if (lists[static_cast<std::size_t>(r)] != RanksText(ranks)) {
      return absl::InvalidArgumentError(absl::StrCat(
          where, "it is [", RanksText(ranks), "] here but [", lists[static_cast<std::size_t>(r)],
          "] on rank ", r, "; the ranks of a group must list the same ranks in the same order"));
    }
  }
  // Also when this rank's own group is sound: all go on with it or none, so that ids stay in step.
  for (int r = 0; r < world.size(); ++r) {
    const std::string& theirs = lists[static_cast<std::size_t>(r)];
    std::istringstream members(theirs);
    for (int q = 0; members >> q;) {
      if (lists[static_cast<std::size_t>(q)] == theirs) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          where, "it is [", theirs, "] on rank ", r, " but [", lists[static_cast<std::size_t>(q)],
          "] on rank ", q, "; the ranks of a group must list the same ranks in the same order"));
    }
  }
  const Group& group = impl_->AddGroup(name, ranks).group;
  if (impl_->device != nullptr) {
    STRETTO_RETURN_IF_ERROR(impl_->device->collectives().AddGroup(group));
  }
  return group;
}

Ticket Communicator::AllReduce(const Group& g, Tensor data, ReduceOp op, const std::string& label,
                               Event after) {
  constexpr CommOp kOp = CommOp::kAllReduce;
  const auto lock = impl_->Lock();
  if (!impl_->Usable(kOp, g, label, data)) return impl_->last_ticket;
  if (!CanReduce(data.dtype)) {
    return impl_->Refuse(kOp, g, label, absl::StrCat("cannot reduce ", Name(data.dtype)));
  }
  Operation* o = impl_->New(kOp, g, label, after, data.dtype, data.device);
  if (o != nullptr) {
    o->reduce = op;
    o->items.push_back({data.data, data.data, data.elements()});
  }
  return impl_->Submit(o, data.elements());
}

// Reduce-scatters or all-gathers as one operation: the smaller side of item i is one rank's part.
Ticket Communicator::Impl::SubmitParts(CommOp op, const Group& g, std::span<const Tensor> outputs,
                                       std::span<const Tensor> inputs, const std::string& label,
                                       const Event& after) {
  const bool reduces = op == CommOp::kReduceScatter;
  if (outputs.size() != inputs.size()) {
    return Refuse(op, g, label, "the lists of inputs and outputs differ in length");
  }
  int64_t count = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor &input = inputs[i], &output = outputs[i];
    if (!Usable(op, g, label, output) || !Usable(op, g, label, input) ||
        !SameDevice(op, g, label, output, input) || !SameDevice(op, g, label, inputs[0], input)) {
      return last_ticket;
    }
    const Tensor &whole = reduces ? input : output, &part = reduces ? output : input;
    if ((reduces && !CanReduce(input.dtype)) || output.dtype != input.dtype ||
        input.dtype != inputs[0].dtype || whole.elements() != part.elements() * g.size()) {
      return Refuse(
          op, g, label,
          absl::StrCat(reduces ? "cannot reduce " : "cannot gather ", Describe(input),
                       reduces ? " to " : " into ", Describe(output), " over ", g.size(),
                       " ranks (item ", i, " of ", inputs.size(), "; items share one type)"));
    }
    count += input.elements();
  }
  const bool none = inputs.empty();
  Operation* o = New(op, g, label, after, none ? DType::kF32 : inputs[0].dtype,
                     none ? Device::Cpu() : inputs[0].device);
  if (o != nullptr) {
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const Tensor& part = reduces ? outputs[i] : inputs[i];
      o->items.push_back({inputs[i].data, outputs[i].data, part.elements()});
    }
  }
  return Submit(o, count);
}

Ticket Communicator::ReduceScatter(const Group& g, Tensor output, Tensor input,
                                   const std::string& label, Event after) {
  const auto lock = impl_->Lock();
  return impl_->SubmitParts(CommOp::kReduceScatter, g, {&output, 1}, {&input, 1}, label, after);
}

Ticket Communicator::ReduceScatterMany(const Group& g, const std::vector<Tensor>& outputs,
                                       const std::vector<Tensor>& inputs, const std::string& label,
                                       Event after) {
  const auto lock = impl_->Lock();
  return impl_->SubmitParts(CommOp::kReduceScatter, g, outputs, inputs, label, after);
}

Ticket Communicator::AllGather(const Group& g, Tensor output, Tensor input,
                               const std::string& label, Event after) {
  const auto lock = impl_->Lock();
  return impl_->SubmitParts(CommOp::kAllGather, g, {&output, 1}, {&input, 1}, label, after);
}

Ticket Communicator::AllGatherMany(const Group& g, const std::vector<Tensor>& outputs,
                                   const std::vector<Tensor>& inputs, const std::string& label,
                                   Event after) {
  const auto lock = impl_->Lock();
  return impl_->SubmitParts(CommOp::kAllGather, g, outputs, inputs, label, after);
}

Ticket Communicator::Broadcast(const Group& g, Tensor data, int root_index,
                               const std::string& label, Event after) {
  constexpr CommOp kOp = CommOp::kBroadcast;
  const auto lock = impl_->Lock();
  if (!impl_->Usable(kOp, g, label, data)) return impl_->last_ticket;
  if (root_index < 0 || root_index >= g.size()) {
    return impl_->Refuse(kOp, g, label,
                         absl::StrCat("root ", root_index, " is outside the group of ", g.size()));
  }
  Operation* o = impl_->New(kOp, g, label, after, data.dtype, data.device);
  if (o != nullptr) {
    o->peer = root_index;
    o->items.push_back({data.data, data.data, data.elements()});
  }
  return impl_->Submit(o, data.elements());
}

Ticket Communicator::AllToAll(const Group& g, Tensor output,
                              const std::vector<int64_t>& receive_counts, Tensor input,
                              const std::vector<int64_t>& send_counts, const std::string& label,
                              Event after) {
  constexpr CommOp kOp = CommOp::kAllToAll;
  const auto lock = impl_->Lock();
  if (!impl_->Usable(kOp, g, label, output) || !impl_->Usable(kOp, g, label, input) ||
      !impl_->SameDevice(kOp, g, label, output, input)) {
    return impl_->last_ticket;
  }
  const std::size_t n = static_cast<std::size_t>(g.size());
  int64_t sent = 0;
  int64_t received = 0;
  bool sane = send_counts.size() == n && receive_counts.size() == n &&
              output.dtype == input.dtype && g.index < g.size() &&
              (n == 0 || send_counts[static_cast<std::size_t>(g.index)] ==
                             receive_counts[static_cast<std::size_t>(g.index)]);
  for (std::size_t i = 0; sane && i < n; ++i) {
    sane = send_counts[i] >= 0 && receive_counts[i] >= 0;
    sent += send_counts[i];
    received += receive_counts[i];
  }
  if (!sane || sent > input.elements() || received > output.elements()) {
    return impl_->Refuse(kOp, g, label,
                         absl::StrCat("the counts do not fit ", g.size(), " ranks, the input ",
                                      Describe(input), " and the output ", Describe(output)));
  }
  Operation* o = impl_->New(kOp, g, label, after, input.dtype, input.device);
  if (o != nullptr) {
    o->items.push_back({input.data, output.data, 0});
    int64_t send_begin = 0;
    int64_t receive_begin = 0;
    for (std::size_t i = 0; i < n; ++i) {
      o->send_counts.push_back(send_counts[i]);
      o->send_begins.push_back(std::exchange(send_begin, send_begin + send_counts[i]));
      o->receive_counts.push_back(receive_counts[i]);
      o->receive_begins.push_back(std::exchange(receive_begin, receive_begin + receive_counts[i]));
    }
  }
  return impl_->Submit(o, sent);
}

Ticket Communicator::Send(const Group& g, Tensor data, int peer, const std::string& label,
                          Event after) {
  constexpr CommOp kOp = CommOp::kSend;
  const auto lock = impl_->Lock();
  if (!impl_->Usable(kOp, g, label, data)) return impl_->last_ticket;
  if (peer < 0 || peer >= g.size()) {
    return impl_->Refuse(kOp, g, label,
                         absl::StrCat("peer ", peer, " is outside the group of ", g.size()));
  }
  Operation* o = impl_->New(kOp, g, label, after, data.dtype, data.device);
  if (o != nullptr) {
    o->peer = peer;
    o->items.push_back({data.data, nullptr, data.elements()});
  }
  return impl_->Submit(o, data.elements());
}

Ticket Communicator::Receive(const Group& g, Tensor data, int peer, const std::string& label,
                             Event after) {
  constexpr CommOp kOp = CommOp::kReceive;
  const auto lock = impl_->Lock();
  if (!impl_->Usable(kOp, g, label, data)) return impl_->last_ticket;
  if (peer < 0 || peer >= g.size()) {
    return impl_->Refuse(kOp, g, label,
                         absl::StrCat("peer ", peer, " is outside the group of ", g.size()));
  }
  Operation* o = impl_->New(kOp, g, label, after, data.dtype, data.device);
  if (o != nullptr) {
    o->peer = peer;
    o->items.push_back({nullptr, data.data, data.elements()});
  }
  return impl_->Submit(o, data.elements());
}

void Communicator::Progress() {
  const auto lock = impl_->Lock();
  if (impl_->error.ok() && !impl_->Step(Impl::Turn::kWait)) impl_->LookForTrouble();
}

bool Communicator::Done(Ticket ticket) {
  Progress();
  const auto lock = impl_->Lock();
  return impl_->Flying(ticket) == nullptr;
}

absl::Status Communicator::Wait(Ticket ticket) {
  const auto lock = impl_->Lock();
  return impl_->WaitUntil(ticket, false);
}

absl::Status Communicator::Wait(Stream& stream, Ticket ticket) {
  const auto lock = impl_->Lock();
  return impl_->Wait(stream, ticket);
}

absl::Status Communicator::WaitAll() {
  const auto lock = impl_->Lock();
  while (impl_->error.ok() && !impl_->in_flight.empty()) {
    impl_->WaitUntil(impl_->in_flight.front()->ticket, false).IgnoreError();
  }
  return impl_->error;
}

int64_t Communicator::BytesSent(const std::string& group_name) const {
  const auto lock = impl_->Lock();
  int64_t bytes = 0;
  for (const Impl::GroupState& state : impl_->groups) {
    if (state.group.name == group_name) bytes += state.bytes_sent;
  }
  return bytes;
}

}  // namespace stretto
