#include "stretto/snapshot/commit.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using Kind = CommitMessage::Kind;

void Clear(SlotRecord* slot) { *slot = SlotRecord(); }

SlotRecord Named(const SnapshotId& id) {
  SlotRecord slot;
  slot.id = id;
  return slot;
}

}  // namespace

const char* Name(SlotState state) {
  switch (state) {
    case SlotState::kEmpty:
      return "EMPTY";
    case SlotState::kWriting:
      return "WRITING";
    case SlotState::kSealed:
      return "SEALED";
    case SlotState::kProtected:
      return "PROTECTED";
    case SlotState::kCommitted:
      return "COMMITTED";
  }
  return "UNKNOWN";
}

CommitProtocol::CommitProtocol(int node, ParityLayout layout, NodeSlots held)
    : node_(node),
      layout_(layout),
      connected_(static_cast<size_t>(layout.nodes())),
      slots_(std::move(held)),
      members_(static_cast<size_t>(layout.nodes())) {
  connected_[static_cast<size_t>(node)] = true;
  for (SlotRecord& slot : slots_) {
    if (slot.state < SlotState::kProtected) Clear(&slot);
    round_.number = std::max(round_.number, slot.id.round);  // ids keep growing
  }
}

void CommitProtocol::Start() {
  if (layout_.nodes() == 1) BeginRound(round_);
}

bool CommitProtocol::MayOverwrite(const SlotRecord& slot, const SlotRecord& other) const {
  // The older committed snapshot goes when a newer one is COMMITTED, not before.
  return slot.state == SlotState::kEmpty ||
         (other.state == SlotState::kCommitted && slot.id < other.id);
}

// Neither overwritten nor overtaken: one snapshot at a time.
bool CommitProtocol::UnderWay(const SlotRecord& slot, const SlotRecord& other) const {
  return slot.state == SlotState::kWriting || slot.state == SlotState::kSealed ||
         (slot.state == SlotState::kProtected && !MayOverwrite(slot, other));
}

void CommitProtocol::Send(int to, Kind kind, NodeSlots slots, bool lost) {
  Post(to, {kind, round_, std::move(slots), lost});
}

void CommitProtocol::Post(int to, CommitMessage message) {
  if (to == node_) {
    Receive(node_, message);
    return;
  }
  if (!connected_[static_cast<size_t>(to)]) return;  // a round follows when it comes back
  CommitAction action;
  action.to = to;
  action.message = std::move(message);
  actions_.push_back(std::move(action));
}

void CommitProtocol::SendAll(Kind kind, const SlotRecord& slot, bool lost) {
  NodeSlots slots;
  slots[0] = slot;
  // To the others first: what this node then does about it may be said to them, too.
  for (int to = 0; to < layout_.nodes(); ++to) {
    if (to != node_) Send(to, kind, slots, lost);
  }
  Send(node_, kind, slots, lost);
}

// Rounds.

bool CommitProtocol::AllConnected() const {
  return std::all_of(connected_.begin(), connected_.end(), [](bool there) { return there; });
}

void CommitProtocol::Connected(int peer) {
  connected_[static_cast<size_t>(peer)] = true;
  if (leading()) {
    if (AllConnected()) BeginRound(round_);
  } else if (peer == 0 && wanted_ != 0) {
    Restart(wanted_);
  }
}

void CommitProtocol::Disconnected(int peer) { connected_[static_cast<size_t>(peer)] = false; }

void CommitProtocol::Restart(uint64_t attempt) {
  wanted_ = attempt;
  CommitMessage ask;
  ask.kind = Kind::kAsk;
  ask.round.attempt = attempt;
  Post(0, std::move(ask));
}

void CommitProtocol::BeginRound(CommitRound after) {
  ++after.number;
  Join(after);
  for (int to = 1; to < layout_.nodes(); ++to) Send(to, Kind::kGather);
  Send(node_, Kind::kReport, slots_, lost_);
}

// From here on nothing of an older round changes what this node holds.
void CommitProtocol::Join(const CommitRound& round) {
  round_ = round;
  phase_ = Phase::kGathering;
  target_ = SnapshotId();
  encoding_ = SnapshotId();
  members_.assign(members_.size(), Member());
  CommitAction stop;
  stop.kind = CommitAction::Kind::kStopWork;
  actions_.push_back(std::move(stop));
}

void CommitProtocol::DecideIfAllReported() {
  std::set<SnapshotId> known;
  for (const Member& member : members_) {
    if (!member.reported) return;
    for (const SlotRecord& slot : member.slots) {
      if (Holds(slot)) known.insert(slot.id);
    }
  }
  SlotRecord target;
  for (auto id = known.rbegin(); id != known.rend() && target.state == SlotState::kEmpty; ++id) {
    std::vector<int> holders(static_cast<size_t>(layout_.groups()));
    SlotRecord found;
    for (int node = 0; node < layout_.nodes(); ++node) {
      for (const SlotRecord& slot : members_[static_cast<size_t>(node)].slots) {
        if (!Holds(slot) || slot.id != *id) continue;
        ++holders[static_cast<size_t>(layout_.GroupOf(node))];
        found = slot;
      }
    }
    if (*std::min_element(holders.begin(), holders.end()) >= layout_.data()) {
      target = std::move(found);
      target.state = SlotState::kProtected;
    }
  }
  // Said until something is committed again, for another round may come before trainers ask.
  const bool lost = target.state == SlotState::kEmpty &&
                    (!known.empty() || std::any_of(members_.begin(), members_.end(),
                                                   [](const Member& m) { return m.lost; }));
  SendAll(Kind::kDecide, target, lost);
}

int CommitProtocol::SlotOf(const SnapshotId& id) const {
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = slots_[static_cast<size_t>(s)];
    if (slot.state != SlotState::kEmpty && slot.id == id) return s;
  }
  return -1;
}

// The slot with the least to lose.
int CommitProtocol::SlotForRebuild(const SnapshotId& target) const {
  const int same = SlotOf(target);
  if (same >= 0) return same;
  const auto worth = [this](int s) {
    const SlotRecord& slot = slots_[static_cast<size_t>(s)];
    // Somebody may still write where it is WRITING.
    const int rank = slot.state == SlotState::kWriting ? 9 : static_cast<int>(slot.state);
    return std::pair(rank, slot.id);
  };
  return worth(0) <= worth(1) ? 0 : 1;
}

void CommitProtocol::Decided(const SlotRecord& target, bool lost) {
  phase_ = Phase::kRestoring;
  target_ = target.id;
  lost_ = lost;
  // Training may go back: what its earlier attempt passed over, this one may not.
  if (std::exchange(passed_in_, round_.attempt) != round_.attempt) passed_ = -1;
  const bool some = target.state != SlotState::kEmpty;
  int restored = some ? SlotForRebuild(target.id) : -1;
  for (int s = 0; s < kSlots; ++s) {
    SlotRecord& slot = slots_[static_cast<size_t>(s)];
    // Trainers that live on may still write there; Seal finds that it is of an older round. An
    // older snapshot stays until the decided one is complete everywhere.
    const bool older = some && slot.state >= SlotState::kProtected && slot.id < target.id;
    if (s == restored || slot.state == SlotState::kWriting || older) continue;
    Clear(&slot);
  }
  if (!some) phase_ = Phase::kReady;
  if (passed_ >= 0) Pass(passed_);  // what could not be said while nothing was decided
  if (!some) return;
  SlotRecord& slot = slots_[static_cast<size_t>(restored)];
  const bool complete = slot.id == target.id && slot.state >= SlotState::kProtected;
  slot = target;
  if (complete) {
    NodeSlots message;
    message[0].id = slot.id;
    Send(0, Kind::kProtected, std::move(message));
    return;
  }
  slot.state = SlotState::kSealed;  // no holder before it is complete
  CommitAction action;
  action.kind = CommitAction::Kind::kRebuild;
  action.slot = restored;
  action.round = round_.number;
  actions_.push_back(std::move(action));
}

// Snapshots.

int CommitProtocol::Begin(int64_t epoch) {
  int free = -1;
  bool busy = !ready() || epoch <= passed_;
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = slots_[static_cast<size_t>(s)];
    const SlotRecord& other = slots_[static_cast<size_t>(1 - s)];
    busy |= UnderWay(slot, other);
    if (MayOverwrite(slot, other) && !held_[static_cast<size_t>(s)]) free = s;
  }
  if (busy || free < 0) {
    Pass(epoch);
    return -1;
  }
  SlotRecord& slot = slots_[static_cast<size_t>(free)];
  Clear(&slot);
  slot.state = SlotState::kWriting;
  slot.id = {round_.number, epoch};
  return free;
}

void CommitProtocol::Pass(int64_t epoch) {
  passed_ = std::max(passed_, epoch);
  if (phase_ != Phase::kReady && phase_ != Phase::kRestoring) return;  // said after the decision
  NodeSlots message;
  message[0].id.epoch = passed_;
  Send(0, Kind::kPassed, std::move(message));
}

bool CommitProtocol::Seal(int slot, std::string manifest) {
  SlotRecord& record = slots_[static_cast<size_t>(slot)];
  if (record.state != SlotState::kWriting) return false;
  if (record.id.round != round_.number || phase_ != Phase::kReady) {
    Abandon(slot);
    return false;
  }
  record.state = SlotState::kSealed;
  passed_ = std::max(passed_, record.id.epoch);
  NodeSlots message;
  message[0].id = record.id;
  message[0].manifests = {std::move(manifest)};
  Send(0, Kind::kSealed, std::move(message));
  return true;
}

void CommitProtocol::Abandon(int slot) {
  SlotRecord& record = slots_[static_cast<size_t>(slot)];
  if (record.state != SlotState::kWriting) return;
  const int64_t epoch = record.id.epoch;
  Clear(&record);
  Pass(epoch);
}

void CommitProtocol::Protected(int slot, int64_t round) {
  SlotRecord& record = slots_[static_cast<size_t>(slot)];
  if (round != round_.number || record.state != SlotState::kSealed) return;
  record.state = SlotState::kProtected;
  NodeSlots message;
  message[0].id = record.id;
  Send(0, Kind::kProtected, std::move(message));
}

int CommitProtocol::restorable() const {
  int newest = -1;
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = slots_[static_cast<size_t>(s)];
    if (slot.state != SlotState::kCommitted) continue;
    if (newest < 0 || slots_[static_cast<size_t>(newest)].id < slot.id) newest = s;
  }
  return newest;
}

void CommitProtocol::Forget(int slot) {
  SlotRecord& record = slots_[static_cast<size_t>(slot)];
  if (record.state < SlotState::kSealed) return;
  // Unless the round finds that enough of it, or of an older one, is left. What was SEALED only
  // was promised to nobody.
  if (record.state >= SlotState::kProtected) lost_ = true;
  Clear(&record);
  if (phase_ == Phase::kReady) phase_ = Phase::kRestoring;  // nobody reads what is older meanwhile
  Send(0, Kind::kAgain);
}

// Messages.

void CommitProtocol::Receive(int from, const CommitMessage& message) {
  switch (message.kind) {
    case Kind::kGather:
      if (message.round.number > round_.number) {
        Join(message.round);
        Send(from, Kind::kReport, slots_, lost_);
      } else {
        Send(from, Kind::kBehind);
      }
      return;
    case Kind::kBehind:
      // Others may have said so, too.
      if (message.round.number >= round_.number && phase_ == Phase::kGathering) {
        const bool asked = round_.attempt != 0;
        BeginRound({message.round.number, asked ? round_.attempt : message.round.attempt});
      }
      return;
    case Kind::kAsk:
      if (!leading() || message.round.attempt == round_.attempt) return;
      // Until all are there it is only remembered.
      round_.attempt = message.round.attempt;
      if (phase_ != Phase::kAlone) BeginRound(round_);
      return;
    default:
      break;
  }
  if (message.round.number != round_.number) return;
  const SlotRecord& told = message.slots[0];
  const int s = SlotOf(told.id);
  switch (message.kind) {
    case Kind::kDecide:
      if (phase_ == Phase::kGathering) Decided(told, message.lost);
      return;
    case Kind::kEncode:
      if (s >= 0 && slots_[static_cast<size_t>(s)].state == SlotState::kSealed) {
        slots_[static_cast<size_t>(s)].manifests = told.manifests;
        CommitAction action;
        action.kind = CommitAction::Kind::kEncode;
        action.slot = s;
        action.round = round_.number;
        actions_.push_back(std::move(action));
      }
      return;
    case Kind::kDrop:
      if (s >= 0 && slots_[static_cast<size_t>(s)].state == SlotState::kSealed) {
        Clear(&slots_[static_cast<size_t>(s)]);
      }
      return;
    case Kind::kCommitted:
      if (s >= 0 && slots_[static_cast<size_t>(s)].state == SlotState::kProtected) {
        slots_[static_cast<size_t>(s)].state = SlotState::kCommitted;
        if (phase_ == Phase::kRestoring) phase_ = Phase::kReady;
        lost_ = false;
        CommitAction action;
        action.kind = CommitAction::Kind::kCommitted;
        action.slot = s;
        actions_.push_back(std::move(action));
      }
      return;
    default:
      if (leading()) Lead(from, message);
  }
}

void CommitProtocol::Lead(int from, const CommitMessage& message) {
  Member& member = members_[static_cast<size_t>(from)];
  const SlotRecord& told = message.slots[0];
  switch (message.kind) {
    case Kind::kReport:
      if (phase_ != Phase::kGathering) return;
      member.reported = true;
      member.slots = message.slots;
      member.lost = message.lost;
      DecideIfAllReported();
      return;
    case Kind::kAgain:
      if (AllConnected()) BeginRound(round_);
      return;
    case Kind::kSealed:
      if (told.manifests.size() != 1) return;
      member.sealed = told.id;
      member.manifest = told.manifests[0];
      member.passed = std::max(member.passed, told.id.epoch);
      SettleSealed();
      return;
    case Kind::kPassed:
      member.passed = std::max(member.passed, told.id.epoch);
      SettleSealed();
      return;
    case Kind::kProtected: {
      member.is_protected = told.id;
      const auto count = std::count_if(members_.begin(), members_.end(), [&](const Member& other) {
        return other.is_protected == told.id;
      });
      if (EnoughProtected(static_cast<int>(count))) {
        if (encoding_ == told.id) encoding_ = SnapshotId();
        SendAll(Kind::kCommitted, Named(told.id));
      }
      return;
    }
    default:
      return;
  }
}

// Lets all encode what all have sealed, and gives up what somebody has passed over.
void CommitProtocol::SettleSealed() {
  std::set<SnapshotId> pending;
  for (const Member& member : members_) {
    if (member.sealed.present() && member.sealed != encoding_) pending.insert(member.sealed);
  }
  for (const SnapshotId& id : pending) {
    bool all = true, passed = false;
    for (const Member& member : members_) {
      all &= member.sealed == id;
      passed |= member.sealed != id && member.passed >= id.epoch;
    }
    if (passed) {
      for (Member& member : members_) {
        if (member.sealed == id) member.sealed = SnapshotId();
      }
      SendAll(Kind::kDrop, Named(id));
    } else if (all) {
      encoding_ = id;
      SlotRecord slot = Named(id);
      for (Member& member : members_) {
        slot.manifests.push_back(member.manifest);
        member.sealed = SnapshotId();
      }
      SendAll(Kind::kEncode, slot);
    }
  }
}

std::vector<CommitAction> CommitProtocol::TakeActions() { return std::exchange(actions_, {}); }

std::string CommitProtocol::Fingerprint() const {
  std::string text;
  const auto number = [&text](int64_t value) { text.push_back(static_cast<char>(value + 1)); };
  const auto id = [&](const SnapshotId& snapshot) {
    number(snapshot.round);
    number(snapshot.epoch);
  };
  const auto both = [&](const NodeSlots& slots) {
    for (const SlotRecord& slot : slots) {
      number(static_cast<int64_t>(slot.state));
      id(slot.id);
    }
  };
  number(static_cast<int64_t>(phase_));
  number(round_.number);
  number(static_cast<int64_t>(round_.attempt));
  for (const bool there : connected_) number(there);
  both(slots_);
  id(target_);
  number(lost_);
  number(static_cast<int64_t>(wanted_));
  number(passed_);
  number(static_cast<int64_t>(passed_in_));
  if (leading()) {
    id(encoding_);
    for (const Member& member : members_) {
      number(member.reported);
      number(member.lost);
      if (phase_ == Phase::kGathering) both(member.slots);
      id(member.sealed);
      number(member.passed);
      id(member.is_protected);
    }
  }
  return text;
}

}  // namespace stretto
