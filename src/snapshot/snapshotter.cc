#include "stretto/snapshot/snapshotter.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "src/snapshot/keeper_connection.h"
#include "src/snapshot/keeper_wire.h"
#include "src/snapshot/restore_boxes.h"
#include "src/snapshot/slot_copies.h"
#include "stretto/core/log.h"
#include "stretto/snapshot/slot.h"

namespace stretto {
namespace {

using snapshot_internal::BoxSource;
using snapshot_internal::ConnectToKeeper;
using snapshot_internal::KeeperConnection;
using snapshot_internal::KeeperKind;
using snapshot_internal::kKeeperPatience;
using snapshot_internal::ReaderOn;
using snapshot_internal::ReceiveAnswer;
using snapshot_internal::Restorable;
using snapshot_internal::SendFrame;
using snapshot_internal::SlotCopies;

// Both slots of a node may be damaged, one after the other.
constexpr int kMostRepairs = 4;

// Captures without a miss before a smaller stride is tried; twice as many after each miss.
constexpr int64_t kPatientCaptures = 16, kMostPatientCaptures = 1024;
constexpr int64_t kMostStride = 1024;

std::string Encoded(wire::Writer& out) { return out.Frame().substr(sizeof(uint32_t)); }

}  // namespace

struct Snapshotter::Impl {
  World& world;
  const StateRegistry& registry;
  SnapshotterOptions options;
  SlotContents planned;
  uint64_t layout = 0;
  KeeperConnection keeper;
  Restorable told;
  std::optional<RestorableSnapshot> restorable;
  // The part of it that lies on this node, mapped until it is restored or a step is captured.
  struct OwnPart {
    std::shared_ptr<SlotMemory> memory;
    SlotContents contents;
  };
  std::optional<OwnPart> own;
  std::map<int, std::shared_ptr<SlotMemory>> slots;  // that this rank has written

  std::mutex mutex;
  std::condition_variable changed;
  bool busy = false, end = false, broken = false;
  int64_t epoch = 0;
  std::function<std::string()> trainer_state;
  std::vector<int64_t> missed;  // steps to be captured while another one was
  bool registering = false;     // what keeps the thread busy is no capture
  bool too_early = false;       // the last Capture
  int64_t asked = 0;            // calls of Capture
  int64_t clean = 0, patience = kPatientCaptures;
  std::thread thread;
  SnapshotStats stats;
  std::unique_ptr<SlotCopies> copies;

  Impl(World& w, const StateRegistry& r, SnapshotterOptions o)
      : world(w), registry(r), options(std::move(o)) {}
  ~Impl() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      end = true;
    }
    changed.notify_all();
    if (thread.joinable()) thread.join();
  }

  absl::Status Meet();
  // The keeper is this run's from here on. UNAVAILABLE while it is another one's.
  absl::Status Claim(uint64_t run);
  absl::Status Attach(int local_ranks, uint64_t attempt);
  absl::Status FindRestorable(uint64_t attempt, int local_ranks);
  // The part that lies on this node, as the keeper told of it. What has changed since is DATA_LOSS;
  // UNAVAILABLE when its keeper has ended.
  absl::StatusOr<OwnPart> OpenOwnPart() const;
  absl::Status ReadOwnPart();
  void TellDamage(const absl::Status& damage);
  void Loop();
  // Whether the step was captured.
  absl::StatusOr<bool> CaptureNow();
  // Asks the keeper for a slot. Null: it has none.
  absl::StatusOr<std::shared_ptr<SlotMemory>> AskForSlot(int64_t of_epoch);
  // Whether the snapshot counts.
  absl::StatusOr<bool> Seal(int64_t of_epoch, bool whole, const SlotHeader& header);
  // The keeper hears of a step that this rank has no part of: others may be writing it.
  absl::Status PassOver(int64_t missed_epoch);
};

absl::Status Snapshotter::Impl::Meet() {
  // Who has which keeper; and a number that no earlier attempt had.
  absl::Status status;
  if (!options.keeper.empty()) {
    absl::StatusOr<KeeperConnection> connected = ConnectToKeeper(options.keeper, options.token);
    status = connected.status();
    if (connected.ok()) keeper = *std::move(connected);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("finding the keepers of snapshots", status));
  std::random_device random;
  const uint64_t number = (uint64_t{random()} << 32 | random()) | 1;
  wire::Writer mine;
  mine.Int(static_cast<uint8_t>(!options.keeper.empty())).Int(keeper.node).Int(keeper.nodes);
  mine.Int(number).Text(keeper.job);
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                           world.AllGather("snapshot keepers", Encoded(mine)));
  uint64_t attempt = 0;
  int with = 0, local = 0;
  std::vector<int> ranks(static_cast<size_t>(std::max(1, keeper.nodes)));
  for (size_t rank = 0; rank < all.size(); ++rank) {
    wire::Reader in = ReaderOn(all[rank]);
    const bool has = in.Int<uint8_t>() != 0;
    const auto node = in.Int<int32_t>(), nodes = in.Int<int32_t>();
    const auto told_number = in.Int<uint64_t>();
    const std::string job = in.Text();
    if (rank == 0) attempt = told_number;
    with += has ? 1 : 0;
    if (!has) {
      status = absl::FailedPreconditionError(
          absl::StrCat("rank ", rank,
                       " has no keeper of snapshots and others have; set "
                       "STRETTO_KEEPER for all ranks or for none"));
    } else if (!options.keeper.empty() && (job != keeper.job || nodes != keeper.nodes)) {
      status = absl::FailedPreconditionError(absl::StrCat(
          "rank ", rank, " has a keeper of job ", job, " with ", nodes, " nodes, rank ",
          world.rank(), " of job ", keeper.job, " with ", keeper.nodes));
    } else if (node >= 0 && node < static_cast<int>(ranks.size())) {
      ++ranks[static_cast<size_t>(node)];
      local += node == keeper.node ? 1 : 0;
    }
  }
  if (with == 0) {
    options.keeper.clear();
    return absl::OkStatus();
  }
  const auto idle = std::find(ranks.begin(), ranks.end(), 0);
  if (status.ok() && idle != ranks.end()) {
    status = absl::FailedPreconditionError(
        absl::StrCat("no rank runs on node ", idle - ranks.begin(), " of the keepers' ",
                     keeper.nodes, "; start one keeper for each node that has ranks"));
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("comparing the keepers of snapshots", status));
  STRETTO_RETURN_IF_ERROR(world.Agree("claiming the keepers of snapshots", Claim(attempt)));
  for (int repairs = 0;; ++repairs) {
    // A number of its own for each time.
    const absl::Status found = FindRestorable(attempt + static_cast<uint64_t>(2 * repairs), local);
    if (!absl::IsDataLoss(found) || repairs == kMostRepairs) return found;
    if (world.rank() == 0) {
      LogWarning(absl::StrCat(std::string(found.message()),
                              "; the keepers look for it, or for an older one, anew"));
    }
  }
}

absl::Status Snapshotter::Impl::Claim(uint64_t run) {
  const net::Deadline deadline = net::After(options.leaving);
  for (bool said = false;; said = true) {
    wire::Writer out;
    out.Int(KeeperKind::kClaim).Int(run);
    STRETTO_RETURN_IF_ERROR(SendFrame(keeper.fd, out, net::After(kKeeperPatience)));
    const absl::Status claimed = ReceiveAnswer(keeper.fd, net::After(kKeeperPatience)).status();
    if (claimed.ok() || net::Clock::now() >= deadline) return claimed;
    if (!said && world.rank() == 0) {
      LogInfo(
          absl::StrCat("waiting for ranks of before to be gone: ", std::string(claimed.message())));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

// What all ranks can restore; DATA_LOSS when what one has is damaged, which its keeper then knows.
absl::Status Snapshotter::Impl::FindRestorable(uint64_t attempt, int local_ranks) {
  restorable.reset();
  own.reset();
  told = Restorable();
  STRETTO_RETURN_IF_ERROR(world.Agree("attaching to the keepers", Attach(local_ranks, attempt)));
  wire::Writer found;
  found.Int(told.id.round).Int(told.id.epoch);
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> ids,
                           world.AllGather("restorable snapshots", Encoded(found)));
  for (size_t rank = 0; rank < ids.size(); ++rank) {
    if (ids[rank] == ids[0]) continue;
    return absl::InternalError(absl::StrCat("the keepers of ranks 0 and ", rank,
                                            " restore different snapshots; start again"));
  }
  const absl::Status read = ReadOwnPart();
  // Of another node's part that node knows.
  if (absl::IsDataLoss(read) && !told.name.empty()) TellDamage(read);
  return world.Agree("reading the snapshot's state", read);
}

void Snapshotter::Impl::TellDamage(const absl::Status& damage) {
  wire::Writer out;
  out.Int(KeeperKind::kDamaged);
  snapshot_internal::Put(out, told.id);
  out.Text(std::string(damage.message()));
  absl::Status status = SendFrame(keeper.fd, out, net::After(kKeeperPatience));
  if (status.ok()) status = ReceiveAnswer(keeper.fd, net::After(kKeeperPatience)).status();
  if (!status.ok()) LogWarning(std::string(status.message()));
}

absl::Status Snapshotter::Impl::Attach(int local_ranks, uint64_t attempt) {
  wire::Writer out;
  out.Int(KeeperKind::kAttach).Int(static_cast<int32_t>(world.rank()));
  out.Int(static_cast<int32_t>(world.size())).Int(static_cast<int32_t>(local_ranks));
  out.Int(layout).Int(PayloadCapacity(planned)).Int(attempt);
  STRETTO_RETURN_IF_ERROR(SendFrame(keeper.fd, out, net::After(kKeeperPatience)));
  const absl::StatusOr<std::string> answer = ReceiveAnswer(keeper.fd, net::After(options.timeout));
  if (absl::IsDeadlineExceeded(answer.status())) {
    const absl::StatusOr<std::string> state = AskKeeper(options.keeper, options.token);
    return absl::DeadlineExceededError(absl::StrCat(
        "the keepers have not agreed on a snapshot within ", options.timeout.count() / 1000,
        " s; that of node ", keeper.node, " says: ", state.ok() ? *state : "nothing"));
  }
  STRETTO_RETURN_IF_ERROR(answer.status());
  wire::Reader in = ReaderOn(*answer);
  told = snapshot_internal::GetRestorable(in);
  if (!in.ok()) return absl::DataLossError("the keeper sent a malformed answer");
  return absl::OkStatus();
}

absl::StatusOr<Snapshotter::Impl::OwnPart> Snapshotter::Impl::OpenOwnPart() const {
  absl::StatusOr<std::shared_ptr<SlotMemory>> memory = SlotMemory::Open(told.name);
  if (absl::IsNotFound(memory.status())) {
    return absl::UnavailableError(absl::StrCat(std::string(memory.status().message()),
                                               "; its keeper has ended meanwhile: start again"));
  }
  STRETTO_RETURN_IF_ERROR(memory.status());
  OwnPart part = {*std::move(memory), {}};
  STRETTO_ASSIGN_OR_RETURN(const SlotHeader header, part.memory->ReadHeader());
  if (header.id != told.id) {
    return absl::DataLossError(absl::StrCat("/dev/shm", told.name, " holds step ", header.id.epoch,
                                            ", not ", told.id.epoch));
  }
  STRETTO_ASSIGN_OR_RETURN(part.contents, part.memory->ReadContents({keeper.job, 0, world.rank()}));
  return part;
}

// Checks it, so that Restore may trust it.
absl::Status Snapshotter::Impl::ReadOwnPart() {
  if (!told.id.present()) return absl::OkStatus();
  RestorableSnapshot snapshot;
  snapshot.epoch = told.id.epoch;
  if (!told.name.empty()) {
    absl::StatusOr<OwnPart> opened = OpenOwnPart();
    if (absl::IsUnavailable(opened.status())) {  // the keeper, if it lives, has it made anew
      return absl::DataLossError(absl::StrCat("/dev/shm", told.name, " was removed"));
    }
    STRETTO_ASSIGN_OR_RETURN(own, std::move(opened));
    STRETTO_RETURN_IF_ERROR(own->memory->VerifyData(own->contents, options.restart_threads));
    snapshot.trainer_state = own->contents.trainer_state;
  } else {
    BoxSource source(told, options.token, keeper.job);
    const absl::Status opened = source.Open();
    // A node is gone, or has given it up since the keepers decided: they decide anew.
    if (absl::IsUnavailable(opened)) return absl::DataLossError(opened.message());
    STRETTO_RETURN_IF_ERROR(opened);
    snapshot.trainer_state = source.trainer_state();
  }
  restorable = std::move(snapshot);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Snapshotter>> Snapshotter::Create(World& world,
                                                                 const StateRegistry& registry,
                                                                 SnapshotterOptions options) {
  auto impl = std::make_unique<Impl>(world, registry, std::move(options));
  impl->planned = PlanContents(registry);
  impl->layout = LayoutHash(impl->planned, world.rank(), world.size());
  STRETTO_RETURN_IF_ERROR(impl->Meet());
  if (impl->options.keeper.empty()) return std::unique_ptr<Snapshotter>();
  Impl& i = *impl;
  i.stats.bytes = i.planned.data_bytes;
  const auto start = [&]() -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(i.copies,
                             SlotCopies::Create(registry, i.planned,
                                                {.device = i.options.device,
                                                 .threads = i.options.threads,
                                                 .restart_threads = i.options.restart_threads}));
    STRETTO_ASSIGN_OR_RETURN(i.thread, StartThread("snapshots", [&i] { i.Loop(); }));
    return absl::OkStatus();
  };
  STRETTO_RETURN_IF_ERROR(world.Agree("starting snapshots", start()));
  return std::unique_ptr<Snapshotter>(new Snapshotter(std::move(impl)));
}

Snapshotter::Snapshotter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Snapshotter::~Snapshotter() = default;

const std::optional<RestorableSnapshot>& Snapshotter::restorable() const {
  return impl_->restorable;
}
bool Snapshotter::lost() const { return impl_->told.lost; }

void Snapshotter::Forget() {
  impl_->restorable.reset();
  impl_->own.reset();
}

absl::Status Snapshotter::Restore() {
  Impl& s = *impl_;
  if (!s.restorable) return absl::NotFoundError("the keepers hold no snapshot");
  // Still mapped, as mapping anew costs as much as copying.
  std::optional<Impl::OwnPart> own = std::exchange(s.own, std::nullopt);
  if (own) {
    STRETTO_ASSIGN_OR_RETURN(const SlotHeader now, own->memory->ReadHeader());
    if (now.id != s.told.id) {
      return absl::UnavailableError(absl::StrCat("/dev/shm", s.told.name, " holds step ",
                                                 now.id.epoch, " meanwhile; start again"));
    }
    if (now.layout != s.layout || now.world_size != s.world.size()) own.reset();
  }
  if (own) {
    STRETTO_RETURN_IF_ERROR(s.copies->Restore(*own->memory, own->contents));
    // What was cut short since it was verified reads as zeroes.
    STRETTO_RETURN_IF_ERROR(own->memory->Whole());
  }
  std::optional<BoxSource> others;
  size_t index = 0;
  for (const StateEntry& entry : s.registry.entries()) {
    const size_t i = index++;
    if (entry.local.bytes() == 0) continue;
    if (own && own->contents.entries[i].bytes == entry.local.bytes()) continue;
    if (!others) {
      others.emplace(s.told, s.options.token, s.keeper.job);
      STRETTO_RETURN_IF_ERROR(others->Open());
    }
    STRETTO_RETURN_IF_ERROR(others->Fill(entry));
  }
  return absl::OkStatus();
}

void Snapshotter::Impl::Loop() {
  std::unique_lock<std::mutex> lock(mutex);
  while (true) {
    changed.wait(lock, [this] { return busy || end; });
    if (!busy) return;
    lock.unlock();
    absl::StatusOr<bool> done = CaptureNow();
    copies->End();
    absl::Status status = done.status();
    lock.lock();
    if (status.ok()) ++(*done ? stats.captured : stats.passed_over);
    while (status.ok() && !missed.empty()) {
      const std::vector<int64_t> epochs = std::exchange(missed, {});
      stats.passed_over += static_cast<int64_t>(epochs.size());
      lock.unlock();
      for (const int64_t missed_epoch : epochs) status.Update(PassOver(missed_epoch));
      lock.lock();
    }
    busy = false;
    if (!status.ok()) {
      broken = true;
      LogWarning(absl::StrCat("no snapshot of step ", epoch, ": ", std::string(status.message()),
                              ". Training goes on without snapshots."));
    }
    changed.notify_all();
  }
}

absl::StatusOr<std::shared_ptr<SlotMemory>> Snapshotter::Impl::AskForSlot(int64_t of_epoch) {
  wire::Writer begin;
  begin.Int(KeeperKind::kBegin).Int(of_epoch);
  STRETTO_RETURN_IF_ERROR(SendFrame(keeper.fd, begin, net::After(kKeeperPatience)));
  STRETTO_ASSIGN_OR_RETURN(const std::string answer,
                           ReceiveAnswer(keeper.fd, net::After(kKeeperPatience)));
  wire::Reader in = ReaderOn(answer);
  const auto slot = in.Int<int32_t>();
  const std::string name = in.Text(), why = in.Text();
  if (!in.ok()) return absl::DataLossError("the keeper sent a malformed answer");
  if (slot < 0) {
    LogDebug(absl::StrCat("step ", of_epoch, " is passed over by snapshots: ", why));
    return std::shared_ptr<SlotMemory>();
  }
  std::shared_ptr<SlotMemory>& memory = slots[slot];
  if (memory != nullptr && memory->name() == name) return memory;
  absl::StatusOr<std::shared_ptr<SlotMemory>> opened = SlotMemory::Open(name);
  // Cut short since the keeper gave it out, which makes it anew then.
  const bool cut = absl::IsDataLoss(opened.status()) ||
                   (opened.ok() && (*opened)->capacity() < planned.data_bytes);
  memory = opened.ok() && !cut ? *opened : nullptr;
  if (memory == nullptr) {
    STRETTO_RETURN_IF_ERROR(Seal(of_epoch, /*whole=*/false, {}).status());
  }
  if (cut) return std::shared_ptr<SlotMemory>();
  return opened;
}

absl::StatusOr<bool> Snapshotter::Impl::Seal(int64_t of_epoch, bool whole,
                                             const SlotHeader& header) {
  wire::Writer seal;
  seal.Int(KeeperKind::kSeal).Int(of_epoch).Int(static_cast<uint8_t>(whole));
  seal.Int(header.payload_bytes).Int(header.contents_bytes).Int(header.contents_checksum);
  STRETTO_RETURN_IF_ERROR(SendFrame(keeper.fd, seal, net::After(kKeeperPatience)));
  STRETTO_ASSIGN_OR_RETURN(const std::string sealed,
                           ReceiveAnswer(keeper.fd, net::After(kKeeperPatience)));
  wire::Reader counts = ReaderOn(sealed);
  return counts.Int<uint8_t>() != 0 && counts.ok();
}

absl::Status Snapshotter::Impl::PassOver(int64_t missed_epoch) {
  STRETTO_ASSIGN_OR_RETURN(const std::shared_ptr<SlotMemory> slot, AskForSlot(missed_epoch));
  return slot == nullptr ? absl::OkStatus() : Seal(missed_epoch, /*whole=*/false, {}).status();
}

absl::StatusOr<bool> Snapshotter::Impl::CaptureNow() {
  const auto start = std::chrono::steady_clock::now();
  STRETTO_ASSIGN_OR_RETURN(const std::shared_ptr<SlotMemory> slot, AskForSlot(epoch));
  if (slot == nullptr) return false;
  if (copies->WantsRegistration(slot)) {
    // This takes longer than a step. The slot stays free meanwhile, and training goes on.
    copies->End();
    STRETTO_RETURN_IF_ERROR(Seal(epoch, /*whole=*/false, {}).status());
    const auto busy_with_it = [this](bool on) {
      const std::lock_guard<std::mutex> lock(mutex);
      registering = on;
    };
    busy_with_it(true);
    const absl::Status registered = copies->Register(slot);
    busy_with_it(false);
    if (!registered.ok()) {
      LogWarning(absl::StrCat("the driver does not page-lock the keeper's memory (",
                              std::string(registered.message()),
                              "); snapshots go through a ring of page-locked memory, which is "
                              "slower"));
    }
    return false;
  }
  planned.trainer_state = trainer_state();
  SlotHeader header;
  absl::Status filled = copies->Capture(slot, &planned);
  copies->End();
  if (filled.ok()) filled = FinishSlot(planned, *slot, &header);
  const bool whole = filled.ok() && slot->Whole().ok();
  STRETTO_ASSIGN_OR_RETURN(const bool counts, Seal(epoch, whole, header));
  STRETTO_RETURN_IF_ERROR(filled);
  if (counts) {
    const std::lock_guard<std::mutex> lock(mutex);
    stats.copy_seconds = copies->copy_seconds();
    stats.seal_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return counts;
}

void Snapshotter::Capture(int64_t epoch, std::function<std::string()> trainer_state,
                          const Event& after) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  if (impl_->broken) return;
  impl_->too_early = false;
  if (impl_->asked++ % impl_->stats.stride != 0) {
    ++impl_->stats.passed_over;
    return;
  }
  ++impl_->clean;  // the same on all ranks
  if (impl_->busy) {
    impl_->missed.push_back(epoch);
    impl_->too_early = !impl_->registering;
    return;
  }
  impl_->own.reset();  // neither restored nor forgotten
  impl_->epoch = epoch;
  impl_->trainer_state = std::move(trainer_state);
  impl_->copies->Begin(after);
  impl_->busy = true;
  impl_->changed.notify_all();
}

bool Snapshotter::missed() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->too_early;
}

void Snapshotter::Adapt(bool anybody_missed) {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->too_early = false;  // told once
  int64_t& stride = impl_->stats.stride;
  if (anybody_missed) {
    impl_->patience = std::min(2 * impl_->patience, kMostPatientCaptures);
    stride = std::min(stride + 1, kMostStride);
    impl_->clean = 0;
  } else if (stride > 1 && impl_->clean >= impl_->patience) {
    --stride;
    impl_->clean = 0;
  }
}

void Snapshotter::WaitForPart(Stream& stream, int part) {
  if (!copying()) return;
  const auto start = std::chrono::steady_clock::now();
  impl_->copies->WaitForPart(stream, part);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  impl_->stats.waited_seconds += seconds.count();
}

bool Snapshotter::copying() const { return impl_->copies->under_way(); }

void Snapshotter::Wait() {
  std::unique_lock<std::mutex> lock(impl_->mutex);
  impl_->changed.wait(lock, [this] { return !impl_->busy; });
}

SnapshotStats Snapshotter::stats() const {
  const std::lock_guard<std::mutex> lock(impl_->mutex);
  return impl_->stats;
}

}  // namespace stretto
