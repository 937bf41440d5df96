// When a snapshot counts: the protocol by which the keepers of a job agree on what a restart reads.
// It has no I/O and no clock: calls and messages in, messages and actions out. The keeper drives it
// over sockets, a test drives the same class through all interleavings.
//
// Order of events (docs/snapshots.md):
//   WRITING    trainers of a node copy their state into a slot
//   SEALED     all of them have; the node tells the leader
//   (the leader has heard that all nodes sealed it, and lets them encode)
//   PROTECTED  the node holds its parity of the others; it tells the leader
//   COMMITTED  the leader has heard that all nodes are, and says so; the other slot is free
//
// A *round* precedes that. It begins when keepers have met, when one was replaced and when trainers
// start anew. The leader, node 0, gathers what everyone holds, and decides: the newest snapshot
// that is PROTECTED on as many nodes of each group as the erasure code needs. Nodes that lack it
// rebuild it; once it is PROTECTED everywhere it is COMMITTED, and only then is an older one given
// up, and may trainers read. A leader that was replaced learns the number of the round from the
// others. (Without node 0 nothing is committed; but then its part is missing, too.)
//
// Why this is safe. A snapshot that was COMMITTED to anybody was PROTECTED everywhere, so whoever
// did not hear of it still holds it, and any loss that the code bears leaves enough holders: the
// next round finds it, or a newer one. A slot is reused only when a newer snapshot is PROTECTED
// everywhere (COMMITTED says so), so at any instant one complete committed snapshot exists. What a
// round decides holds for all, because the leader has heard from all; from its report on a keeper
// ignores what belongs to an older round.
#ifndef STRETTO_SNAPSHOT_COMMIT_H_
#define STRETTO_SNAPSHOT_COMMIT_H_

#include <array>
#include <compare>
#include <cstdint>
#include <string>
#include <vector>

#include "stretto/snapshot/parity.h"

namespace stretto {

// Two snapshots of the same step differ where training went back between them.
struct SnapshotId {
  int64_t round = 0;   // in which it was written; 0: no snapshot
  int64_t epoch = -1;  // completed steps
  bool present() const { return round > 0; }
  auto operator<=>(const SnapshotId&) const = default;
};

enum class SlotState : uint8_t { kEmpty, kWriting, kSealed, kProtected, kCommitted };
const char* Name(SlotState state);  // "SEALED"

// One of the two places of a node, for its data and its parity of others alike.
struct SlotRecord {
  SlotState state = SlotState::kEmpty;
  SnapshotId id;
  // By node: what the keeper knows of its data (opaque here), from SEALED of all nodes on.
  std::vector<std::string> manifests;
};
inline constexpr int kSlots = 2;
using NodeSlots = std::array<SlotRecord, kSlots>;

struct CommitRound {
  int64_t number = 0;    // grows
  uint64_t attempt = 0;  // of trainers to start, the last that was asked for; 0: none
};

struct CommitMessage {
  enum class Kind : uint8_t {
    kAsk,        // round.attempt: trainers start
    kGather,     // leader: what do you hold?
    kReport,     // slots: this
    kBehind,     // the leader's round is older than mine
    kDecide,     // leader: slots[0] is to be restored; EMPTY: nothing is
    kSealed,     // slots[0]; manifests[0] is the sender's
    kPassed,     // slots[0].id.epoch and all before it will not be sealed by the sender any more
    kEncode,     // leader: all have sealed slots[0]; its manifests are complete
    kDrop,       // leader: slots[0] will not be completed
    kProtected,  // slots[0]
    kCommitted,  // leader: slots[0]
    kAgain,      // what I reported in this round I have no longer
  };
  Kind kind = Kind::kGather;
  CommitRound round;
  NodeSlots slots;
  // kDecide: there was something, but too little of it is left. kReport: so this node was told, and
  // nothing was committed since.
  bool lost = false;
};

struct CommitAction {
  enum class Kind : uint8_t {
    kSend,      // `message` to node `to`
    kEncode,    // make this node's parity in `slot`, then call Protected
    kRebuild,   // make this node's data and parity in `slot` from the others, then call Protected
    kStopWork,  // what kEncode and kRebuild began is of no use any more
    kCommitted  // `slot` may be promised, read and spilled
  };
  Kind kind = Kind::kSend;
  int to = -1;
  CommitMessage message;
  int slot = -1;
  int64_t round = 0;  // to be handed to Protected
};

class CommitProtocol {
 public:
  // `held`: the slots that outlived an earlier keeper of this node, if any; what was not PROTECTED
  // is forgotten.
  CommitProtocol(int node, ParityLayout layout, NodeSlots held = {});
  virtual ~CommitProtocol() = default;
  CommitProtocol(const CommitProtocol&) = default;
  CommitProtocol& operator=(const CommitProtocol&) = default;

  // Once, before anything else.
  void Start();
  // The connection to a peer is there (messages of it arrive in order), or gone. Only those between
  // node 0 and others are needed. A peer that comes back may be another process that knows nothing.
  void Connected(int peer);
  void Disconnected(int peer);
  void Receive(int from, const CommitMessage& message);

  // Trainers of this node start, in an attempt that all nodes' trainers have agreed on. Read what
  // restorable() says as soon as ready() holds.
  void Restart(uint64_t attempt);
  // A slot for what follows `epoch` steps, for all trainers of this node; -1: none is free, and
  // this node passes the epoch over. Epochs must grow between restarts.
  int Begin(int64_t epoch);
  // All trainers of this node have written; false: it has become useless meanwhile.
  bool Seal(int slot, std::string manifest);
  // A trainer died while it wrote, or has no use for the slot.
  void Abandon(int slot);
  // The work of an action is done. `round` is the action's.
  void Protected(int slot, int64_t round);
  // A slot that was SEALED or more is damaged: another round decides without it.
  void Forget(int slot);
  // While held, a committed slot is not given to Begin although a newer one exists (it is being
  // written to disk).
  void Hold(int slot, bool held) { held_[static_cast<size_t>(slot)] = held; }

  // What was decided is complete on all nodes, since the trainers' start: they may read and write.
  bool ready() const {
    return phase_ == Phase::kReady && (wanted_ == 0 || wanted_ == round_.attempt);
  }
  // The newest COMMITTED slot; -1: none.
  int restorable() const;
  // A round decided that too little is left of what there was, and nothing was committed since.
  bool lost() const { return lost_; }
  const NodeSlots& slots() const { return slots_; }
  const CommitRound& round() const { return round_; }

  // What is to be done, in order, since the last call.
  std::vector<CommitAction> TakeActions();
  // All that decides what happens next, for comparing states.
  std::string Fingerprint() const;

 protected:
  // For tests of the tests: a variant that is wrong here must be caught.
  virtual bool EnoughProtected(int nodes) const { return nodes == layout_.nodes(); }
  virtual bool MayOverwrite(const SlotRecord& slot, const SlotRecord& other) const;
  virtual bool UnderWay(const SlotRecord& slot, const SlotRecord& other) const;
  virtual bool Holds(const SlotRecord& slot) const { return slot.state >= SlotState::kProtected; }

 private:
  enum class Phase : uint8_t {
    kAlone,      // no round yet
    kGathering,  // reported, nothing decided
    kRestoring,  // decided, not everywhere complete
    kReady,
  };
  // What the leader of a round knows of a node.
  struct Member {
    bool reported = false, lost = false;
    NodeSlots slots;
    SnapshotId sealed;  // and nothing was decided about it
    std::string manifest;
    int64_t passed = -1;
    SnapshotId is_protected;
  };

  void Send(int to, CommitMessage::Kind kind, NodeSlots slots = {}, bool lost = false);
  void Post(int to, CommitMessage message);
  void SendAll(CommitMessage::Kind kind, const SlotRecord& slot, bool lost = false);
  void BeginRound(CommitRound after);
  bool AllConnected() const;
  void Join(const CommitRound& round);
  void DecideIfAllReported();
  void Decided(const SlotRecord& target, bool lost);
  void Lead(int from, const CommitMessage& message);
  void SettleSealed();
  void Pass(int64_t epoch);
  int SlotOf(const SnapshotId& id) const;
  int SlotForRebuild(const SnapshotId& target) const;
  bool leading() const { return node_ == 0; }

  int node_;
  ParityLayout layout_;
  Phase phase_ = Phase::kAlone;
  CommitRound round_;
  std::vector<bool> connected_;
  NodeSlots slots_;
  std::array<bool, kSlots> held_ = {};
  SnapshotId target_;  // of the round
  bool lost_ = false;
  uint64_t wanted_ = 0;  // attempt of this node's trainers
  int64_t passed_ = -1;
  uint64_t passed_in_ = 0;       // attempt that passed_ is of
  std::vector<Member> members_;  // as leader
  SnapshotId encoding_;          // as leader: all have sealed it, not all have protected it
  std::vector<CommitAction> actions_;
};

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_COMMIT_H_
