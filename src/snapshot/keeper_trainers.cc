// The keeper's side of trainers (snapshotter.h has theirs), and what the commit protocol wants.
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/snapshot/keeper_impl.h"
#include "stretto/core/log.h"

namespace stretto {

using snapshot_internal::DecodeManifest;
using snapshot_internal::KeeperRole;
using snapshot_internal::KeeperWork;
using snapshot_internal::NodeManifest;
using snapshot_internal::RankPart;
using snapshot_internal::Restorable;

// Bytes of a rank that a keeper makes room for: no sum over ranks overflows.
constexpr int64_t kMostCapacity = int64_t{1} << 44;

void Keeper::Impl::HandleTrainer(Connection& c, Kind kind, wire::Reader& frame) {
  switch (kind) {
    case Kind::kClaim: {
      const auto run = frame.Int<uint64_t>();
      if (frame.ok() && run != 0) Claim(c, run);
      return;
    }
    case Kind::kAttach:
      Attach(c, frame);
      return;
    case Kind::kBegin: {
      const int64_t epoch = frame.Int<int64_t>();
      if (frame.ok()) Begin(c, epoch);
      return;
    }
    case Kind::kSeal:
      Seal(c, frame);
      return;
    case Kind::kDamaged: {
      const SnapshotId id = snapshot_internal::GetId(frame);
      const std::string what = frame.Text();
      if (!frame.ok()) return;
      Damaged(id, what);
      wire::Writer out;
      out.Int(Kind::kOk);
      Send(c, out);
      return;
    }
    case Kind::kStatus: {
      wire::Writer out;
      out.Int(Kind::kOk).Text(Describe());
      Send(c, out);
      return;
    }
    default:
      c.broken = true;
  }
}

// A keeper is one run's at a time: another one would end its snapshots, and overwrite what it would
// go on from. All ranks of a run claim theirs before the first attaches, so that who is turned away
// anywhere has changed nothing.
void Keeper::Impl::Claim(Connection& c, uint64_t run) {
  const auto others = std::count_if(connections.begin(), connections.end(), [&](const auto& o) {
    return o.run != 0 && o.run != run && !o.broken;
  });
  if (others > 0) {
    Refuse(c, absl::UnavailableError(absl::StrCat(
                  "another run has ", others, others == 1 ? " rank" : " ranks",
                  " with the keeper of job ", options.job, " on node ", options.node,
                  "; start again when it has ended, or give each run keepers of its own --job")));
    return;
  }
  c.run = run;
  wire::Writer out;
  out.Int(Kind::kOk);
  Send(c, out);
}

// Trainers of one attempt come one by one. The first of a new attempt ends what an earlier one was
// about, and lets all keepers agree anew.
void Keeper::Impl::Attach(Connection& c, wire::Reader& frame) {
  RankPart part;
  part.rank = frame.Int<int32_t>();
  part.world_size = frame.Int<int32_t>();
  const auto local = frame.Int<int32_t>();
  part.layout = frame.Int<uint64_t>();
  const auto capacity = frame.Int<int64_t>();
  const auto number = frame.Int<uint64_t>();
  if (!frame.ok() || c.run == 0 || part.rank < 0 || part.rank >= part.world_size || local < 1 ||
      capacity < 0 || capacity > kMostCapacity || number == 0) {
    c.broken = true;
    return;
  }
  if (number != attempt) {
    attempt = number;
    attached.clear();
    capacities.clear();
    // Pens that are still on a slot stay there until their owners are gone.
    writing.epoch = writing.refused = -1;
    writing.doomed = true;
    if (writing.slot >= 0 && writing.pens.empty()) {
      protocol.Abandon(std::exchange(writing.slot, -1));
    }
    local_ranks = local;
    protocol.Restart(attempt);
  }
  c.rank = part.rank;
  c.attempt = number;
  c.waits = true;
  attached[part.rank] = part;
  capacities[part.rank] = capacity;
  Act();
}

void Keeper::Impl::AnswerWaiting() {
  if (!protocol.ready()) return;
  for (Connection& c : connections) {
    if (!c.waits || c.attempt != attempt) continue;
    c.waits = false;
    Restorable restorable;
    restorable.lost = protocol.lost();
    restorable.peers = options.peers;
    if (const int s = protocol.restorable(); s >= 0) {
      const SlotRecord& slot = protocol.slots()[static_cast<size_t>(s)];
      restorable.id = slot.id;
      restorable.manifests = slot.manifests;
      for (const RankPart& part : slots->ManifestOf(s).ranks) {
        const auto memory = slots->MemoryOf(s, part.rank);
        if (part.rank == c.rank && memory != nullptr) restorable.name = memory->name();
      }
    }
    Tell("read", restorable.id);
    wire::Writer out;
    out.Int(Kind::kOk);
    snapshot_internal::Put(out, restorable);
    Send(c, out);
  }
}

bool Keeper::Impl::MemoryIsReady(int slot) {
  if (static_cast<int>(attached.size()) != local_ranks) return false;
  // Parity of others who have as much as this node.
  int64_t bytes = 0;
  for (const auto& [rank, capacity] : capacities) bytes += (capacity + 63) / 64 * 64;
  return slots->Prepare(slot, capacities, layout.parity() * layout.BlockBytes(bytes));
}

// Memory for free slots is made ahead, in the background.
void Keeper::Impl::PrepareFree() {
  if (attached.empty() || !protocol.ready()) return;
  for (int s = 0; s < kSlots; ++s) {
    if (protocol.slots()[static_cast<size_t>(s)].state == SlotState::kEmpty) MemoryIsReady(s);
  }
}

// The first rank of the node decides for all; so a node has all of an epoch or nothing.
void Keeper::Impl::Begin(Connection& c, int64_t epoch) {
  int slot = -1;
  std::string name, why;
  if (c.attempt != attempt || attached.count(c.rank) == 0) {
    Refuse(c, absl::FailedPreconditionError(absl::StrCat(
                  "rank ", c.rank, " is not attached to the keeper of job ", options.job)));
    return;
  }
  if (writing.slot >= 0 && epoch > writing.epoch) {
    // Some ranks are a snapshot behind. This one is passed over by them, too.
    why = "an older snapshot is still being written";
    if (epoch > writing.refused) {
      writing.refused = epoch;
      ++passed;
      protocol.Begin(epoch);
      Tell("pass", {protocol.round().number, epoch});
      Act();
    }
  } else if (epoch > writing.epoch && epoch > writing.refused) {
    writing = Writing{.epoch = epoch, .slot = protocol.Begin(epoch)};
    if (writing.slot >= 0 && !MemoryIsReady(writing.slot)) {
      protocol.Abandon(writing.slot);
      writing.slot = -1;
      why = slots->error().empty() ? "memory is being prepared" : slots->error();
    }
    if (writing.slot < 0) {
      ++passed;
      Tell("pass", {protocol.round().number, epoch});
    }
    Act();
  }
  if (epoch == writing.epoch && writing.slot >= 0 && !writing.doomed) {
    slot = writing.slot;
    writing.pens.insert(c.rank);
    if (const auto memory = slots->MemoryOf(slot, c.rank)) name = memory->name();
  }
  wire::Writer out;
  out.Int(Kind::kOk).Int(static_cast<int32_t>(slot)).Text(name).Text(why);
  Send(c, out);
}

void Keeper::Impl::Seal(Connection& c, wire::Reader& frame) {
  RankPart part;
  const int64_t epoch = frame.Int<int64_t>();
  Tell("seal", {protocol.round().number, epoch});
  const bool whole = frame.Int<uint8_t>() != 0;
  part.payload_bytes = frame.Int<int64_t>();
  part.contents_bytes = frame.Int<int64_t>();
  part.contents_checksum = frame.Int<uint64_t>();
  const bool current = frame.ok() && c.attempt == attempt && epoch == writing.epoch &&
                       writing.slot >= 0 && writing.pens.count(c.rank) > 0;
  if (current && whole && !writing.doomed) {
    const auto memory = slots->MemoryOf(writing.slot, c.rank);
    if (memory != nullptr && memory->Whole().ok() && part.contents_bytes >= 0 &&
        part.contents_bytes <= part.payload_bytes && part.payload_bytes <= memory->capacity()) {
      const RankPart& known = attached[c.rank];
      part.rank = known.rank;
      part.world_size = known.world_size;
      part.layout = known.layout;
      slots->SetPart(writing.slot, part);
    } else {
      writing.doomed = true;
    }
  }
  LetGo(c.rank, current && whole);
  wire::Writer out;
  out.Int(Kind::kOk).Int(static_cast<uint8_t>(current && whole && !writing.doomed));
  Send(c, out);
  Act();
}

void Keeper::Impl::LetGo(int rank, bool sealed) {
  if (writing.slot < 0) return;
  if (writing.pens.erase(rank) == 0) {
    // A rank that dies before it has begun will never seal.
    if (writing.done.count(rank) > 0 || static_cast<int>(writing.done.size()) == local_ranks)
      return;
    writing.doomed = true;
  } else if (sealed) {
    writing.done.insert(rank);
  } else {
    writing.doomed = true;
  }
  if (!writing.pens.empty()) return;
  const int slot = writing.slot;
  if (writing.doomed) {
    writing.slot = -1;
    protocol.Abandon(slot);
    ++passed;
  } else if (static_cast<int>(writing.done.size()) == local_ranks) {
    writing.slot = -1;
    if (!protocol.Seal(slot, Encode(slots->ManifestOf(slot)))) ++passed;
  }
}

void Keeper::Impl::Act() {
  slots->Publish(protocol.slots());
  for (size_t s = 0; s < kSlots && options.observer; ++s) {
    const SlotRecord& slot = protocol.slots()[s];
    if (slot.state == told[s].state && slot.id == told[s].id) continue;
    Tell(Name(slot.state), slot.state == SlotState::kEmpty ? told[s].id : slot.id);
    told[s].state = slot.state;
    told[s].id = slot.id;
  }
  if (options.observer && std::exchange(told_round, protocol.round().number) != told_round) {
    Tell("round", {told_round, -1});
  }
  for (CommitAction& action : protocol.TakeActions()) {
    switch (action.kind) {
      case CommitAction::Kind::kSend:
        if (Connection* const peer = PeerOf(action.to); peer != nullptr) {
          wire::Writer out;
          out.Int(Kind::kCommit);
          snapshot_internal::Put(out, action.message);
          Send(*peer, out);
        }
        break;
      case CommitAction::Kind::kStopWork:
        work->Stop();
        break;
      case CommitAction::Kind::kEncode:
      case CommitAction::Kind::kRebuild: {
        const SlotRecord& slot = protocol.slots()[static_cast<size_t>(action.slot)];
        KeeperWork::Task task;
        task.rebuild = action.kind == CommitAction::Kind::kRebuild;
        task.slot = action.slot;
        task.round = action.round;
        task.id = slot.id;
        absl::Status sound;
        for (const std::string& text : slot.manifests) {
          absl::StatusOr<NodeManifest> manifest = DecodeManifest(text);
          sound.Update(manifest.status());
          if (manifest.ok()) task.manifests.push_back(*std::move(manifest));
        }
        if (sound.ok() && static_cast<int>(task.manifests.size()) != layout.nodes()) {
          sound = absl::InternalError("a snapshot without all manifests");
        }
        if (task.rebuild) {
          LogInfo(absl::StrCat("rebuilding the snapshot of step ", slot.id.epoch));
        }
        if (sound.ok()) {
          work->Run(std::move(task));
        } else {
          trouble = std::string(sound.message());
          LogError(trouble);
        }
        break;
      }
      case CommitAction::Kind::kCommitted: {
        ++committed;
        trouble.clear();
        const SnapshotId id = protocol.slots()[static_cast<size_t>(action.slot)].id;
        LogDebug(absl::StrCat("the snapshot of step ", id.epoch, " is committed"));
        if (options.node == 0 && !options.directory.empty()) Spill(id);
        break;
      }
    }
  }
}

// What lies in a slot is not what was written: it is lost, as if it had never been here. Whose
// parity is being made is not promised yet, and given up by all.
void Keeper::Impl::Damaged(const SnapshotId& id, const std::string& what) {
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = protocol.slots()[static_cast<size_t>(s)];
    if (slot.id != id || slot.state < SlotState::kSealed) continue;
    LogWarning(absl::StrCat("the snapshot of step ", id.epoch, " is damaged on node ", options.node,
                            " and given up there: ", what));
    Tell("damaged", id);
    protocol.Forget(s);
    Act();
    return;
  }
}

void Keeper::Impl::Done(const KeeperWork::Task& task, const absl::Status& status) {
  if (status.ok()) {
    protocol.Protected(task.slot, task.round);
    Act();
    return;
  }
  trouble = absl::StrCat(task.rebuild ? "rebuilding" : "encoding", " the snapshot of step ",
                         task.id.epoch, " failed: ", std::string(status.message()));
  LogWarning(trouble);
}

std::string Keeper::Impl::Describe() const {
  std::string text =
      absl::StrCat("job ", options.job, "\nnode ", options.node, " of ", layout.nodes(), "\ncode ",
                   layout.data(), " + ", layout.parity(), "\nround ", protocol.round().number,
                   "\nready ", protocol.ready() ? 1 : 0, "\nlost ", protocol.lost() ? 1 : 0,
                   "\ncommitted ", committed, "\npassed ", passed, "\nread to encode ",
                   work->encode_bytes(), "\nread to rebuild ", work->rebuild_bytes(), "\n");
  for (int s = 0; s < kSlots; ++s) {
    const SlotRecord& slot = protocol.slots()[static_cast<size_t>(s)];
    absl::StrAppend(&text, "slot ", s, " ", Name(slot.state), " step ", slot.id.epoch, " round ",
                    slot.id.round, "\n");
    if (slot.state < SlotState::kSealed) continue;
    for (const RankPart& part : slots->ManifestOf(s).ranks) {
      const auto memory = slots->MemoryOf(s, part.rank);
      if (memory == nullptr) continue;
      const std::string path = absl::StrCat("/dev/shm", memory->name());
      const bool there = access(path.c_str(), F_OK) == 0;
      if (there && memory->Whole().ok()) continue;
      absl::StrAppend(&text, "trouble slot ", s, " lacks what rank ", part.rank, " wrote: ", path,
                      there ? " was cut short" : " was removed",
                      "; it is given up when ranks start, and rebuilt if others have parity\n");
    }
  }
  if (!slots->error().empty()) absl::StrAppend(&text, "trouble ", slots->error(), "\n");
  if (!trouble.empty()) absl::StrAppend(&text, "trouble ", trouble, "\n");
  return text + budget.Report();
}

}  // namespace stretto
