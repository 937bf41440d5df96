// Groups, and what is asked of a communicator: operations are checked and submitted here; how they
// go on from there is in communicator_progress.cc.
#include "stretto/comm/communicator.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <span>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/comm/communicator_impl.h"
#include "src/comm/flight_dump.h"
#include "src/comm/reduce.h"
#include "src/comm/world_internal.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

// A tag is [1 bit point-to-point | 13 bits group | 16 bits sequence]: operations in flight between
// two ranks never share one.
constexpr int kSequenceBits = 16;
constexpr int kGroupBits = 13;
constexpr int kMaxGroups = 1 << kGroupBits;

int Tag(bool point_to_point, int group, int64_t sequence) {
  return (point_to_point ? 1 << (kGroupBits + kSequenceBits) : 0) | (group << kSequenceBits) |
         static_cast<int>(sequence & ((1 << kSequenceBits) - 1));
}

std::string ListText(const RankList& ranks) {
  std::string text;
  for (int r : ranks) absl::StrAppend(&text, text.empty() ? "" : " ", r);
  return text;
}

}  // namespace

Communicator::Impl::Impl(World& w)
    : world(w),
      engine(w.transport(), BeforePost()),
      watchdog(w.store(), w.rank(), absl::StrCat(WorldAccess::phase(w).communicators++), recorder) {
  RankList everyone(static_cast<std::size_t>(w.size()));
  for (int r = 0; r < w.size(); ++r) everyone[static_cast<std::size_t>(r)] = r;
  AddGroup("all", everyone);
  const absl::Status watched = watchdog.Start();
  if (!watched.ok()) Fail(watched, true);
}

Communicator::Impl::GroupState& Communicator::Impl::AddGroup(const std::string& name,
                                                             const RankList& ranks) {
  GroupState& state = groups.emplace_back();
  state.group.id = WorldAccess::phase(world).next_group++;
  state.group.name = name;
  state.send_row = name + " send";
  state.receive_row = name + " receive";
  state.group.ranks = ranks;
  const auto me = std::find(ranks.begin(), ranks.end(), world.rank());
  state.group.index = static_cast<int>(me - ranks.begin());
  recorder.NameGroup(state.group.id, name);
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
  if (trace != nullptr) {
    const std::string& row = o->op == CommOp::kSend      ? state.send_row
                             : o->op == CommOp::kReceive ? state.receive_row
                                                         : state.group.name;
    o->trace = trace->Open(row.c_str(), Name(o->op), o->label,
                           {.peer = record.peer, .bytes = count * SizeOf(o->dtype)});
  }
  in_flight.push_back(o);
  Step(Turn::kSubmit);
  if (device != nullptr && device->busy()) guard_wake.notify_one();
  return ticket;
}

Communicator::Communicator(World& world) : impl_(std::make_unique<Impl>(world)) {}

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
TraceRecorder* Communicator::trace() const { return impl_->trace; }
void Communicator::SetTrace(TraceRecorder* trace) {
  const auto lock = impl_->Lock();
  impl_->trace = trace;
  if (impl_->device != nullptr) impl_->device->SetTrace(trace);
}
absl::Status Communicator::status() const {
  const auto lock = impl_->Lock();
  return impl_->error;
}

absl::StatusOr<Group> Communicator::MakeGroup(const std::string& name, const RankList& ranks) {
  // With a device, nothing stays in flight that the guard would have to look after meanwhile.
  STRETTO_RETURN_IF_ERROR(impl_->device == nullptr ? status() : WaitAll());
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
        absl::StrCat(where, "the list [", ListText(ranks),
                     "] must hold this rank, and each rank of the world once at most"));
  }
  // Everybody learns everybody's list here, so a disagreement is found now and not as a hang.
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> lists,
      world.AllGather(absl::StrCat("group ", name), mine.ok() ? ListText(ranks) : "-"));
  STRETTO_RETURN_IF_ERROR(mine);
  for (int r = 0; r < world.size(); ++r) {
    if (lists[static_cast<std::size_t>(r)] == "-") {
      return absl::InvalidArgumentError(absl::StrCat(
          "rank ", r, " gave an impossible list for group '", name, "'; see its message"));
    }
  }
  // Also when this rank's own group is sound: all go on with it or none, so that ids stay in step.
  // Each rank begins with its own list, which its user knows.
  for (int i = 0; i < world.size(); ++i) {
    const int r = (world.rank() + i) % world.size();
    const std::string& theirs = lists[static_cast<std::size_t>(r)];
    std::istringstream members(theirs);
    for (int q = 0; members >> q;) {
      if (lists[static_cast<std::size_t>(q)] == theirs) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          where, "it is [", theirs, "] on rank ", r, " but [", lists[static_cast<std::size_t>(q)],
          "] on rank ", q, "; the ranks of a group must list the same ranks in the same order"));
    }
  }
  const auto lock = impl_->Lock();
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
                                       const Event& after, bool adds) {
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
    const std::byte* const input_end = input.data + input.bytes();
    if (adds && output.data < input_end && input.data < output.data + output.bytes()) {
      return Refuse(op, g, label,
                    absl::StrCat("cannot add to ", Describe(output),
                                 ", which lies in the input; give it a place of its own"));
    }
    if (adds && (input.device.kind == DeviceKind::kCpu ||
                 (input.dtype != DType::kF32 && input.dtype != DType::kBF16))) {
      return Refuse(op, g, label,
                    absl::StrCat("cannot add to ", Describe(output), " on ", Name(output.device),
                                 "; reduce to a tensor of its own and add that"));
    }
    count += input.elements();
  }
  const bool none = inputs.empty();
  Operation* o = New(op, g, label, after, none ? DType::kF32 : inputs[0].dtype,
                     none ? Device::Cpu() : inputs[0].device);
  if (o != nullptr) {
    o->adds = adds;
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

Ticket Communicator::ReduceScatterAddMany(const Group& g, const std::vector<Tensor>& outputs,
                                          const std::vector<Tensor>& inputs,
                                          const std::string& label, Event after) {
  const auto lock = impl_->Lock();
  return impl_->SubmitParts(CommOp::kReduceScatter, g, outputs, inputs, label, after,
                            /*adds=*/true);
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

int64_t Communicator::BytesSent(const std::string& group_name) const {
  return impl_->Count(group_name, &Impl::GroupState::bytes_sent);
}

int64_t Communicator::BytesCopied(const std::string& group_name) const {
  return impl_->Count(group_name, &Impl::GroupState::bytes_copied);
}

int64_t Communicator::Impl::Count(const std::string& name, int64_t GroupState::*bytes) {
  const auto lock = Lock();
  int64_t all = 0;
  for (const GroupState& state : groups) {
    if (state.group.name == name) all += state.*bytes;
  }
  return all;
}

}  // namespace stretto
