// The commit protocol under all interleavings of messages, crashes and restarts of three keepers.
#include "stretto/snapshot/commit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr int kNodes = 3;

// How much may happen in an exploration.
struct Bounds {
  int epochs = 1;            // the trainers' steps with snapshots
  int losses = 0;            // keepers that die with all they hold and come back with nothing
  int keeper_restarts = 0;   // ... that come back with the slots that they held
  int trainer_restarts = 0;  // the trainers of all nodes die
  int resets = 0;            // connections between keepers that live on
  int damages = 0;           // slots of which a keeper finds that they are not what was written
  int64_t most_states = 4'000'000;
};

// What really lies in a slot: ids of what was completely written, torn in between.
struct Memory {
  SnapshotId data, parity;
};

template <class Protocol>
struct Node {
  explicit Node(Protocol p) : protocol(std::move(p)) {}
  Protocol protocol;
  std::array<Memory, kSlots> memory;
  bool whole = true;  // holds its part of what is promised, if anything is
  struct Work {
    int slot = 0;
    int64_t round = 0;
    bool rebuild = false;
  };
  std::optional<Work> work;
  enum class Trainers { kRunning, kDead, kAttached } trainers = Trainers::kRunning;
  int writing = -1;
  int64_t next_epoch = 1;
};

template <class Protocol>
struct System {
  std::vector<Node<Protocol>> nodes;
  std::array<std::array<std::vector<CommitMessage>, kNodes>, kNodes> wires;  // [from][to]
  std::array<std::array<bool, kNodes>, kNodes> connected = {};
  SnapshotId promised;
  std::optional<SnapshotId> restored;  // by the first trainers of this attempt that read
  uint64_t attempt = 0;
  Bounds left;
};

template <class Protocol>
class Explorer {
 public:
  using State = System<Protocol>;

  explicit Explorer(Bounds bounds, bool started = true) {
    State first;
    first.left = bounds;
    const ParityLayout layout = *ParityLayout::Create(kNodes, kNodes - 1, 1);
    for (int n = 0; n < kNodes; ++n) first.nodes.emplace_back(Protocol(n, layout));
    for (auto& node : first.nodes) node.protocol.Start();
    bounds_ = bounds;
    if (started) {  // the keepers' first meeting, in one order
      for (int n = 1; n < kNodes; ++n) Connect(first, 0, n);
      for (bool moved = true; moved;) {
        moved = false;
        for (int a = 0; a < kNodes; ++a) {
          for (int b = 0; b < kNodes; ++b) {
            if (first.wires[a][b].empty()) continue;
            Deliver(first, a, b);
            moved = true;
          }
        }
      }
    }
    pending_.push_back(std::move(first));
  }

  // Empty: no invariant was broken in any reachable state.
  std::string Run() {
    while (!pending_.empty() && wrong_.empty()) {
      const State state = std::move(pending_.back());
      pending_.pop_back();
      Expand(state);
    }
    return wrong_;
  }
  // Random ways through what is too much to explore.
  std::string Walk(int walks, unsigned seed) {
    std::mt19937 random(seed);
    const State first = std::move(pending_.back());
    for (int w = 0; w < walks && wrong_.empty(); ++w) {
      pending_ = {first};
      walk_ = &random;
      while (!pending_.empty() && wrong_.empty()) {
        const State state = std::move(pending_[random() % pending_.size()]);
        pending_.clear();
        seen_.clear();
        Expand(state);
      }
    }
    return wrong_;
  }
  int64_t states() const { return static_cast<int64_t>(seen_.size()); }
  bool complete() const { return pending_.empty(); }
  int64_t commits() const { return commits_; }
  int64_t newest_commit() const { return newest_commit_; }
  // States in which nothing more can happen.
  int64_t ends() const { return ends_; }

 private:
  using Trainers = typename Node<Protocol>::Trainers;
  static constexpr bool kTrouble = true;

  void Fail(const State& state, const std::string& what) {
    if (!wrong_.empty()) return;
    wrong_ = what + ";";
    for (int n = 0; n < kNodes; ++n) {
      const auto& node = state.nodes[n];
      absl::StrAppend(&wrong_, " node ", n, " round ", node.protocol.round().number);
      for (const SlotRecord& slot : node.protocol.slots()) {
        absl::StrAppend(&wrong_, " [", Name(slot.state), " ", slot.id.round, ".", slot.id.epoch,
                        "]");
      }
    }
    absl::StrAppend(&wrong_, " promised ", state.promised.round, ".", state.promised.epoch);
  }

  // What really could be put together of `id`.
  static bool CanRestore(const State& state, const SnapshotId& id) {
    int holders = 0;
    for (const auto& node : state.nodes) {
      for (int s = 0; s < kSlots; ++s) {
        holders += node.memory[s].data == id && node.memory[s].parity == id &&
                   node.protocol.slots()[s].id == id &&
                   node.protocol.slots()[s].state >= SlotState::kProtected;
      }
    }
    return holders >= kNodes - 1;
  }

  void Check(const State& state) {
    for (int n = 0; n < kNodes; ++n) {
      const auto& node = state.nodes[n];
      for (int s = 0; s < kSlots; ++s) {
        const SlotRecord& slot = node.protocol.slots()[s];
        if (slot.state >= SlotState::kProtected &&
            (node.memory[s].data != slot.id || node.memory[s].parity != slot.id)) {
          Fail(state,
               absl::StrCat("node ", n, " says that slot ", s, " is complete, and it is torn"));
        }
      }
    }
    if (!state.promised.present()) return;
    for (const auto& node : state.nodes) {
      for (const SlotRecord& slot : node.protocol.slots()) {
        if (slot.id >= state.promised && CanRestore(state, slot.id)) return;
      }
    }
    Fail(state, "nothing as new as what was promised can be restored");
  }

  // Carries out what a node wants.
  void Act(State& state, int n) {
    auto& node = state.nodes[n];
    for (CommitAction& action : node.protocol.TakeActions()) {
      switch (action.kind) {
        case CommitAction::Kind::kSend:
          if (state.connected[n][action.to]) {
            state.wires[n][action.to].push_back(std::move(action.message));
          }
          break;
        case CommitAction::Kind::kStopWork:
          node.work.reset();
          break;
        case CommitAction::Kind::kEncode:
        case CommitAction::Kind::kRebuild: {
          const bool rebuild = action.kind == CommitAction::Kind::kRebuild;
          node.work = {action.slot, action.round, rebuild};
          node.memory[action.slot].parity = SnapshotId();
          if (rebuild) node.memory[action.slot].data = SnapshotId();
          if (rebuild && node.writing == action.slot) Fail(state, "rebuilt under a writer's pen");
          break;
        }
        case CommitAction::Kind::kCommitted: {
          const SnapshotId id = node.protocol.slots()[action.slot].id;
          if (id < state.promised && !CanRestore(state, id)) break;  // late news of an older one
          state.promised = std::max(state.promised, id);
          ++commits_;
          newest_commit_ = std::max(newest_commit_, id.epoch);
          // Who has lost it before it was promised counts as lost from here on.
          for (auto& other : state.nodes) {
            const NodeSlots& slots = other.protocol.slots();
            other.whole = std::any_of(slots.begin(), slots.end(), [&](const SlotRecord& slot) {
              return slot.id == state.promised && slot.state >= SlotState::kProtected;
            });
          }
          break;
        }
      }
    }
  }

  void Connect(State& state, int a, int b) {
    state.connected[a][b] = state.connected[b][a] = true;
    state.nodes[a].protocol.Connected(b);
    Act(state, a);
    state.nodes[b].protocol.Connected(a);
    Act(state, b);
  }
  void Cut(State& state, int a, int b) {
    state.connected[a][b] = state.connected[b][a] = false;
    state.wires[a][b].clear();
    state.wires[b][a].clear();
    state.nodes[a].protocol.Disconnected(b);
    state.nodes[b].protocol.Disconnected(a);
  }
  void Deliver(State& state, int from, int to) {
    const CommitMessage message = std::move(state.wires[from][to].front());
    state.wires[from][to].erase(state.wires[from][to].begin());
    state.nodes[to].protocol.Receive(from, message);
    Act(state, to);
  }
  void KillTrainers(State& state) {
    for (int n = 0; n < kNodes; ++n) {
      auto& node = state.nodes[n];
      node.trainers = Trainers::kDead;
      if (node.writing >= 0) node.protocol.Abandon(node.writing);
      node.writing = -1;
      Act(state, n);
    }
    ++state.attempt;
    state.restored.reset();
  }
  // The keeper of `n` dies; its node's memory with it, or not. mpirun ends the trainers then.
  void KillKeeper(State& state, int n, bool with_memory) {
    KillTrainers(state);
    for (int peer = 0; peer < kNodes; ++peer) {
      if (state.connected[n][peer]) Cut(state, n, peer);
    }
    auto& node = state.nodes[n];
    const ParityLayout layout = *ParityLayout::Create(kNodes, kNodes - 1, 1);
    Node<Protocol> next(Protocol(n, layout, with_memory ? NodeSlots() : node.protocol.slots()));
    if (with_memory) {
      next.whole = !state.promised.present();
    } else {
      next.memory = node.memory;
      next.whole = node.whole;
    }
    next.trainers = Trainers::kDead;
    node = std::move(next);
    node.protocol.Start();
    Act(state, n);
  }

  template <class Event>
  void Try(const State& state, const Event& event, bool trouble = false) {
    if (!wrong_.empty() || (trouble && walk_ != nullptr && (*walk_)() % 24 != 0)) return;
    State next = state;
    event(next);
    Check(next);
    if (wrong_.empty() && seen_.insert(Hash(next)).second) {
      if (static_cast<int64_t>(seen_.size()) > bounds_.most_states) {
        wrong_ = "too many states; lower the bounds";
        return;
      }
      pending_.push_back(std::move(next));
    }
    moved_ = moved_ || !trouble;
  }

  void Expand(const State& state) {
    moved_ = false;
    for (int a = 0; a < kNodes; ++a) {
      for (int b = 0; b < kNodes; ++b) {
        if (!state.wires[a][b].empty()) {
          Try(state, [&](State& next) { Deliver(next, a, b); });
        }
        if (a == 0 && b > 0 && !state.connected[a][b]) {
          Try(state, [&](State& next) { Connect(next, a, b); });
        }
        if (a == 0 && b > 0 && state.connected[a][b] && state.left.resets > 0) {
          Try(
              state,
              [&](State& next) {
                --next.left.resets;
                Cut(next, a, b);
              },
              kTrouble);
        }
      }
    }
    for (int n = 0; n < kNodes; ++n) {
      const auto& node = state.nodes[n];
      if (node.work && SourcesAreThere(state, n)) {
        Try(state, [&](State& next) { FinishWork(next, n); });
      }
      if (node.trainers == Trainers::kRunning && node.writing < 0 &&
          node.next_epoch <= bounds_.epochs) {
        Try(state, [&](State& next) {
          auto& me = next.nodes[n];
          me.writing = me.protocol.Begin(me.next_epoch);
          if (me.writing >= 0) me.memory[me.writing] = Memory();
          ++me.next_epoch;
          Act(next, n);
        });
      }
      if (node.writing >= 0) {
        Try(state, [&](State& next) {
          auto& me = next.nodes[n];
          const int s = std::exchange(me.writing, -1);
          const SnapshotId id = me.protocol.slots()[s].id;
          me.memory[s].data = id;
          me.protocol.Seal(s, "");
          Act(next, n);
        });
      }
      if (node.trainers == Trainers::kDead) {
        Try(state, [&](State& next) {
          next.nodes[n].trainers = Trainers::kAttached;
          next.nodes[n].protocol.Restart(next.attempt);
          Act(next, n);
        });
      }
      if (node.trainers == Trainers::kAttached && node.protocol.ready()) {
        Try(state, [&](State& next) { Restore(next, n); });
      }
      const bool others_whole =
          std::all_of(state.nodes.begin(), state.nodes.end(),
                      [&](const auto& other) { return &other == &node || other.whole; });
      if (state.left.losses > 0 && others_whole) {
        Try(
            state,
            [&](State& next) {
              --next.left.losses;
              KillKeeper(next, n, true);
            },
            kTrouble);
      }
      for (int s = 0; s < kSlots && state.left.damages > 0 && others_whole; ++s) {
        const SlotState damaged = node.protocol.slots()[s].state;
        if (damaged < SlotState::kSealed) continue;
        Try(
            state,
            [&](State& next) {
              --next.left.damages;
              auto& me = next.nodes[n];
              me.memory[s] = Memory();
              // It may yet be promised by who has not heard of it.
              if (damaged >= SlotState::kProtected) me.whole = false;
              me.protocol.Forget(s);
              Act(next, n);
            },
            kTrouble);
      }
      if (state.left.keeper_restarts > 0) {
        Try(
            state,
            [&](State& next) {
              --next.left.keeper_restarts;
              KillKeeper(next, n, false);
            },
            kTrouble);
      }
    }
    if (state.left.trainer_restarts > 0) {
      Try(
          state,
          [&](State& next) {
            --next.left.trainer_restarts;
            KillTrainers(next);
          },
          kTrouble);
    }
    if (!moved_) End(state);
  }

  // What kEncode and kRebuild read from others is served only while it is there.
  static bool SourcesAreThere(const State& state, int n) {
    const auto& node = state.nodes[n];
    const SnapshotId id = node.protocol.slots()[node.work->slot].id;
    int sources = 0;
    for (int peer = 0; peer < kNodes; ++peer) {
      const auto& other = state.nodes[peer];
      for (int s = 0; s < kSlots && peer != n; ++s) {
        const SlotRecord& slot = other.protocol.slots()[s];
        if (slot.id != id || other.memory[s].data != id) continue;
        sources += node.work->rebuild ? slot.state >= SlotState::kProtected
                                      : slot.state >= SlotState::kSealed;
      }
    }
    return sources >= kNodes - 1;
  }
  void FinishWork(State& state, int n) {
    auto& node = state.nodes[n];
    const auto work = *std::exchange(node.work, std::nullopt);
    const SnapshotId id = node.protocol.slots()[work.slot].id;
    if (work.rebuild) node.memory[work.slot].data = id;
    node.memory[work.slot].parity = id;
    node.protocol.Protected(work.slot, work.round);
    Act(state, n);
  }
  void Restore(State& state, int n) {
    auto& node = state.nodes[n];
    const int s = node.protocol.restorable();
    SnapshotId id;
    if (s >= 0) {
      id = node.protocol.slots()[s].id;
      if (node.memory[s].data != id) Fail(state, "trainers read a torn slot");
    }
    if (id < state.promised) {
      Fail(state, absl::StrCat("trainers went back to ", id.round, ".", id.epoch));
    }
    if (state.restored && *state.restored != id) {
      Fail(state, "trainers of one attempt restored different snapshots");
    }
    state.restored = id;
    node.trainers = Trainers::kRunning;
    node.next_epoch = std::max<int64_t>(id.epoch, 0) + 1;
  }

  // When all is quiet (but for trouble that may come), nothing may be stuck: everybody is ready and
  // agrees.
  void End(const State& state) {
    ++ends_;
    for (const auto& node : state.nodes) {
      if (!node.protocol.ready()) Fail(state, "at rest, and a keeper is not ready");
      for (const SlotRecord& slot : node.protocol.slots()) {
        if (slot.state == SlotState::kSealed || slot.state == SlotState::kWriting) {
          Fail(state, "at rest, and a slot is neither committed nor given up");
        }
      }
    }
    const int s = state.nodes[0].protocol.restorable();
    const SnapshotId id = s < 0 ? SnapshotId() : state.nodes[0].protocol.slots()[s].id;
    for (const auto& node : state.nodes) {
      const int mine = node.protocol.restorable();
      if ((mine < 0 ? SnapshotId() : node.protocol.slots()[mine].id) != id) {
        Fail(state, "at rest, and keepers disagree on what is committed");
      }
    }
  }

  static uint64_t Hash(const State& state) {
    std::string text;
    const auto number = [&text](int64_t value) { text.push_back(static_cast<char>(value + 1)); };
    for (int a = 0; a < kNodes; ++a) {
      const auto& node = state.nodes[a];
      text += node.protocol.Fingerprint();
      for (const Memory& memory : node.memory) {
        for (const SnapshotId& id : {memory.data, memory.parity}) {
          number(id.round);
          number(id.epoch);
        }
      }
      number(node.whole);
      number(node.work ? node.work->slot + (node.work->rebuild ? 2 : 0) : -1);
      if (node.work) number(node.work->round);
      number(static_cast<int64_t>(node.trainers));
      number(node.writing);
      number(node.next_epoch);
      for (int b = 0; b < kNodes; ++b) {
        number(state.connected[a][b]);
        number(static_cast<int64_t>(state.wires[a][b].size()));
        for (const CommitMessage& message : state.wires[a][b]) {
          number(static_cast<int64_t>(message.kind));
          number(message.round.number);
          number(static_cast<int64_t>(message.round.attempt));
          number(message.lost);
          for (const SlotRecord& slot : message.slots) {
            number(static_cast<int64_t>(slot.state));
            number(slot.id.round);
            number(slot.id.epoch);
          }
        }
      }
    }
    number(state.promised.round);
    number(state.promised.epoch);
    number(state.restored ? state.restored->round : -1);
    number(state.restored ? state.restored->epoch : -1);
    number(static_cast<int64_t>(state.attempt));
    for (int n : {state.left.losses, state.left.keeper_restarts, state.left.trainer_restarts,
                  state.left.resets, state.left.damages}) {
      number(n);
    }
    return std::hash<std::string>()(text);
  }

  Bounds bounds_;
  std::vector<State> pending_;
  std::unordered_set<uint64_t> seen_;
  std::string wrong_;
  int64_t commits_ = 0, newest_commit_ = -1, ends_ = 0;
  bool moved_ = false;
  std::mt19937* walk_ = nullptr;
};

// Explores all; `started`: the keepers have met.
void ExpectSound(const Bounds& bounds, bool started = true) {
  Explorer<CommitProtocol> explorer(bounds, started);
  EXPECT_EQ(explorer.Run(), "");
  EXPECT_TRUE(explorer.complete());
  EXPECT_GT(explorer.ends(), 0);
  EXPECT_EQ(explorer.newest_commit(), bounds.epochs);  // the way without trouble is among them
  ::testing::Test::RecordProperty("states", std::to_string(explorer.states()));
}

TEST(CommitExplorer, WithoutTrouble) { ExpectSound({.epochs = 3}); }
TEST(CommitExplorer, KeepersMeet) { ExpectSound({.epochs = 1}, /*started=*/false); }
TEST(CommitExplorer, ANodeIsLost) { ExpectSound({.epochs = 1, .losses = 1}); }
TEST(CommitExplorer, TrainersDie) { ExpectSound({.epochs = 2, .trainer_restarts = 1}); }
TEST(CommitExplorer, AKeeperRestarts) { ExpectSound({.epochs = 1, .keeper_restarts = 1}); }
TEST(CommitExplorer, ASlotIsDamaged) { ExpectSound({.epochs = 2, .damages = 1}); }
TEST(CommitExplorer, AConnectionBreaks) { ExpectSound({.epochs = 2, .resets = 1}); }

TEST(CommitExplorer, ManyTroublesAtRandom) {
  const Bounds bounds = {.epochs = 8,
                         .losses = 3,
                         .keeper_restarts = 2,
                         .trainer_restarts = 3,
                         .resets = 3,
                         .damages = 3};
  Explorer<CommitProtocol> explorer(bounds);
  EXPECT_EQ(explorer.Walk(1000, /*seed=*/1), "");
  EXPECT_GE(explorer.ends(), 1000);
  EXPECT_GT(explorer.newest_commit(), 4);
}

// The explorer finds what is wrong with these.

// Promises before all nodes hold their parity.
struct CommitsEarly : CommitProtocol {
  using CommitProtocol::CommitProtocol;
  bool EnoughProtected(int nodes) const override { return nodes >= kNodes - 1; }
};
// Gives the older snapshot up when this node has protected the newer one.
struct OverwritesEarly : CommitProtocol {
  using CommitProtocol::CommitProtocol;
  bool MayOverwrite(const SlotRecord& slot, const SlotRecord& other) const override {
    return slot.state == SlotState::kEmpty ||
           (other.state >= SlotState::kProtected && slot.id < other.id);
  }
  bool UnderWay(const SlotRecord& slot, const SlotRecord&) const override {
    return slot.state == SlotState::kWriting || slot.state == SlotState::kSealed;
  }
};
// Restores what was only sealed.
struct TrustsSealed : CommitProtocol {
  using CommitProtocol::CommitProtocol;
  bool Holds(const SlotRecord& slot) const override { return slot.state >= SlotState::kSealed; }
};
template <class Protocol>
std::string WhatIsWrong() {
  return Explorer<Protocol>({.epochs = 6, .losses = 1, .trainer_restarts = 1}).Walk(2000, 1);
}

TEST(CommitExplorer, FindsPlantedBugs) {
  EXPECT_EQ(WhatIsWrong<CommitProtocol>().substr(0, 200), "");
  EXPECT_NE(WhatIsWrong<CommitsEarly>(), "");
  EXPECT_NE(WhatIsWrong<OverwritesEarly>(), "");
  EXPECT_NE(WhatIsWrong<TrustsSealed>(), "");
}

}  // namespace
}  // namespace stretto
