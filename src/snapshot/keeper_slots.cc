#include "src/snapshot/keeper_slots.h"

#include <dirent.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "src/core/start_thread.h"
#include "src/core/touch_pages.h"
#include "stretto/core/log.h"

namespace stretto::snapshot_internal {

std::string SlotNamePrefix(const std::string& job, int node) {
  return absl::StrCat("/stretto-", job, "-", node, "-");
}

namespace {

struct SlotName {
  std::string name;
  int slot = 0;
  int64_t number = 0;
};

// What in /dev/shm has the name of a node's slot. The prefix alone does not say so: that of node 1
// of the job "a" is one of job "a-1", too.
std::vector<SlotName> SlotNames(const std::string& prefix) {
  std::vector<SlotName> names;
  DIR* directory = opendir("/dev/shm");
  if (directory == nullptr) return names;
  while (const dirent* entry = readdir(directory)) {
    SlotName found = {.name = absl::StrCat("/", entry->d_name)};
    if (found.name.compare(0, prefix.size(), prefix) != 0) continue;
    const std::vector<std::string> parts = absl::StrSplit(found.name.substr(prefix.size()), '-');
    int rank = 0;
    const bool numbers = parts.size() == 3 && absl::SimpleAtoi(parts[0], &found.slot) &&
                         absl::SimpleAtoi(parts[1], &rank) &&
                         absl::SimpleAtoi(parts[2], &found.number);
    if (numbers && found.slot >= 0 && found.slot < kSlots) names.push_back(std::move(found));
  }
  closedir(directory);
  return names;
}

}  // namespace

void UnlinkSlots(const std::string& prefix) {
  for (const SlotName& slot : SlotNames(prefix)) shm_unlink(slot.name.c_str());
}

KeeperSlots::KeeperSlots(std::string job, int node, Budget* budget, int threads)
    : KeeperSlots(std::move(job), node, budget, threads, /*adopt=*/false) {}

KeeperSlots::KeeperSlots(std::string job, int node, Budget* budget, int threads, bool adopt)
    : job_(std::move(job)),
      prefix_(SlotNamePrefix(job_, node)),
      budget_(budget),
      threads_(threads) {
  if (!adopt) UnlinkSlots(prefix_);
}

KeeperSlots::~KeeperSlots() {
  for (Place& place : places_) {
    if (place.maker.joinable()) place.maker.join();
  }
  UnlinkSlots(prefix_);
}

std::unique_ptr<KeeperSlots> KeeperSlots::Adopt(std::string job, int node, Budget* budget,
                                                int threads, NodeSlots* held) {
  std::unique_ptr<KeeperSlots> slots(
      new KeeperSlots(std::move(job), node, budget, threads, /*adopt=*/true));
  std::array<std::vector<std::shared_ptr<SlotMemory>>, kSlots> found;
  for (const auto& [name, slot, number] : SlotNames(slots->prefix_)) {
    absl::StatusOr<std::shared_ptr<SlotMemory>> memory = SlotMemory::Open(name);
    absl::Status sound = memory.status();
    if (sound.ok()) sound = (*memory)->ReadHeader().status();
    if (sound.ok()) {
      slots->made_ = std::max(slots->made_.load(), number);  // names are not used again
      found[static_cast<size_t>(slot)].push_back(*std::move(memory));
    } else {
      LogWarning(
          absl::StrCat("an earlier keeper's memory is removed: ", std::string(sound.message())));
      shm_unlink(name.c_str());
    }
  }
  for (int s = 0; s < kSlots; ++s) {
    const auto& memory = found[static_cast<size_t>(s)];
    if (memory.empty()) continue;
    const absl::Status adopted = slots->AdoptSlot(s, memory);
    Place& place = slots->places_[static_cast<size_t>(s)];
    if (!adopted.ok()) {
      LogWarning(absl::StrCat("a slot that an earlier keeper left is given up: ",
                              std::string(adopted.message())));
      for (const auto& part : memory) part->Unlink();
      place = Place();
      continue;
    }
    SlotRecord& record = (*held)[static_cast<size_t>(s)];
    record.state = place.state;
    record.id = place.id;
    record.manifests = {Encode(place.manifest)};
    LogInfo(absl::StrCat("the snapshot of step ", place.id.epoch,
                         " that an earlier keeper left is taken over"));
  }
  return slots;
}

absl::Status KeeperSlots::AdoptSlot(int slot,
                                    const std::vector<std::shared_ptr<SlotMemory>>& memory) {
  Place& place = places_[static_cast<size_t>(slot)];
  int32_t ranks = 0;
  int64_t total = 0;
  for (const auto& part : memory) {
    const std::string where = "/dev/shm" + part->name();
    STRETTO_ASSIGN_OR_RETURN(SlotHeader header, part->ReadHeader());
    STRETTO_ASSIGN_OR_RETURN(const SlotContents contents,
                             part->ReadContents({job_, header.layout, header.rank}));
    if (header.state < SlotState::kProtected) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, " is ", Name(header.state), " only"));
    }
    if (ranks == 0) {
      place.id = header.id;
      place.state = header.state;
      ranks = header.world_size;
    }
    place.state = std::min(place.state, header.state);
    if (header.id != place.id || header.world_size != ranks || header.rank < 0 ||
        header.rank >= ranks || !place.ranks.emplace(header.rank, part).second) {
      return absl::FailedPreconditionError(
          absl::StrCat(where, " is of another snapshot or layout than the slot's other ranks'"));
    }
    STRETTO_RETURN_IF_ERROR(part->VerifyData(contents, threads_));
    total += part->capacity();
    RankPart known;
    known.rank = header.rank;
    known.world_size = header.world_size;
    known.layout = header.layout;
    known.payload_bytes = header.payload_bytes;
    known.contents_bytes = header.contents_bytes;
    known.contents_checksum = header.contents_checksum;
    place.manifest.ranks.push_back(known);
  }
  if (static_cast<int32_t>(memory.size()) != ranks) {
    return absl::FailedPreconditionError(absl::StrCat("of step ", place.id.epoch, " the parts of ",
                                                      memory.size(), " of ", ranks,
                                                      " ranks are there"));
  }
  std::sort(place.manifest.ranks.begin(), place.manifest.ranks.end(),
            [](const RankPart& a, const RankPart& b) { return a.rank < b.rank; });
  return budget_->Reserve(Resource::kHostMemory, absl::StrCat("snapshot slot ", slot), total);
}

bool KeeperSlots::Suits(const Place& place, const Capacities& ranks) const {
  if (place.ranks.size() != ranks.size()) return false;
  return std::all_of(ranks.begin(), ranks.end(), [&](const auto& wanted) {
    const auto found = place.ranks.find(wanted.first);
    // Somebody may have removed it, so that trainers could not open it, or cut it short.
    return found != place.ranks.end() && found->second->capacity() >= wanted.second &&
           found->second->Whole().ok() &&
           access(("/dev/shm" + found->second->name()).c_str(), F_OK) == 0;
  });
}

absl::Status KeeperSlots::MakeInto(int slot, const Capacities& ranks, bool touch,
                                   std::map<int, std::shared_ptr<SlotMemory>>* made) {
  // One after the other: together they may not fit where each alone does.
  for (const auto& [rank, capacity] : ranks) {
    const std::string name = absl::StrCat(prefix_, slot, "-", rank, "-", ++made_);
    STRETTO_ASSIGN_OR_RETURN((*made)[rank], SlotMemory::Create(name, capacity));
    if (touch) STRETTO_RETURN_IF_ERROR((*made)[rank]->Prefault(threads_));
  }
  return absl::OkStatus();
}

absl::Status KeeperSlots::Make(int slot, const Capacities& ranks, bool touch) {
  const std::string owner = absl::StrCat("snapshot slot ", slot);
  std::map<int, std::shared_ptr<SlotMemory>> made;
  const auto unlink = [&made] {
    for (const auto& [rank, memory] : made) {
      if (memory != nullptr) memory->Unlink();
    }
    made.clear();
  };
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    made.swap(places_[slot].ranks);
  }
  unlink();
  int64_t total = 0;
  for (const auto& [rank, capacity] : ranks) total += capacity;
  budget_->Release(Resource::kHostMemory, owner);
  STRETTO_RETURN_IF_ERROR(budget_->Reserve(Resource::kHostMemory, owner, total));
  const absl::Status status = MakeInto(slot, ranks, touch, &made);
  if (!status.ok()) {
    unlink();
    budget_->Release(Resource::kHostMemory, owner);
    return status;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  places_[slot].ranks = std::move(made);
  WriteHeaders(places_[slot]);
  return absl::OkStatus();
}

bool KeeperSlots::Prepare(int slot, const Capacities& ranks, int64_t parity_bytes) {
  std::unique_lock<std::mutex> lock(mutex_);
  Place& place = places_[slot];
  if (place.making || place.filling) return false;
  if (place.maker.joinable()) place.maker.join();
  if (Suits(place, ranks)) return true;
  place.making = true;
  absl::StatusOr<std::thread> maker =
      StartThread("a keeper's memory", [this, slot, ranks, parity_bytes] {
        const absl::Status status = Make(slot, ranks, /*touch=*/true);
        if (status.ok() && parity_bytes > 0) {
          const std::lock_guard<std::mutex> parity(parity_mutexes_[static_cast<size_t>(slot)]);
          // Why it cannot be had is said when it is needed.
          if (ParityOf(slot) == nullptr)
            NewParity(slot, parity_bytes, /*touch=*/true).IgnoreError();
        }
        const std::lock_guard<std::mutex> done(mutex_);
        Place& made = places_[slot];
        made.error = std::string(status.message());
        made.making = false;
        Tell(status);
      });
  if (maker.ok()) {
    place.maker = *std::move(maker);
  } else {
    place.making = false;
    place.error = std::string(maker.status().message());
  }
  return false;
}

// It is tried again and again, and how much memory lacks changes. error() has what it is now.
void KeeperSlots::Tell(const absl::Status& status) {
  if (!status.ok()) {
    if (status.code() != told_) {
      LogWarning(absl::StrCat("no snapshots: ", std::string(status.message())));
    }
    told_ = status.code();
  } else if (std::all_of(places_.begin(), places_.end(),
                         [](const Place& place) { return place.error.empty(); })) {
    told_ = absl::StatusCode::kOk;
  }
}

absl::StatusOr<bool> KeeperSlots::BeginFill(int slot, const SnapshotId& id,
                                            const NodeManifest& manifest) {
  Capacities ranks;
  for (const RankPart& part : manifest.ranks) ranks[part.rank] = part.payload_bytes;
  std::thread maker;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Place& place = places_[slot];
    if (place.id != id) return absl::CancelledError("the slot is another snapshot's by now");
    place.filling = true;
    maker = std::move(place.maker);
  }
  if (maker.joinable()) maker.join();
  bool suits = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    suits = Suits(places_[slot], ranks);
  }
  // What receives the bytes touches the memory, each thread its own.
  if (!suits) {
    // With the room that trainers want, so that it need not be made anew for their next snapshot.
    Capacities roomy = ranks;
    for (auto& [rank, capacity] : roomy) capacity = RoomyCapacity(capacity);
    absl::Status made = Make(slot, roomy, /*touch=*/false);
    if (absl::IsResourceExhausted(made)) made = Make(slot, ranks, /*touch=*/false);
    STRETTO_RETURN_IF_ERROR(made);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  Place& place = places_[slot];
  const bool again = suits && place.filled == id;
  place.filled = id;
  place.manifest = manifest;
  WriteHeaders(place);
  return again;
}

void KeeperSlots::EndFill(int slot) {
  const std::lock_guard<std::mutex> lock(mutex_);
  places_[slot].filling = false;
}

std::string KeeperSlots::error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const Place& place : places_) {
    if (!place.error.empty()) return place.error;
  }
  return "";
}

void KeeperSlots::WriteHeaders(Place& place) {
  for (const auto& [rank, memory] : place.ranks) {
    SlotHeader header;
    header.job = HashOf(job_);
    header.rank = rank;
    header.state = place.state;
    header.id = place.id;
    for (const RankPart& part : place.manifest.ranks) {
      if (part.rank != rank) continue;
      header.layout = part.layout;
      header.world_size = part.world_size;
      header.payload_bytes = part.payload_bytes;
      header.contents_bytes = part.contents_bytes;
      header.contents_checksum = part.contents_checksum;
    }
    memory->WriteHeader(header);
  }
}

void KeeperSlots::Publish(const NodeSlots& slots) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t s = 0; s < kSlots; ++s) {
    Place& place = places_[s];
    if (place.state == slots[s].state && place.id == slots[s].id) continue;
    if (place.id != slots[s].id) {
      place.manifest = NodeManifest();
      place.filled = SnapshotId();
    }
    place.state = slots[s].state;
    place.id = slots[s].id;
    if (!place.making) WriteHeaders(place);
  }
}

void KeeperSlots::SetPart(int slot, const RankPart& part) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<RankPart>& ranks = places_[slot].manifest.ranks;
  const auto at =
      std::lower_bound(ranks.begin(), ranks.end(), part,
                       [](const RankPart& a, const RankPart& b) { return a.rank < b.rank; });
  ranks.insert(at, part);
}

NodeManifest KeeperSlots::ManifestOf(int slot) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return places_[slot].manifest;
}

absl::StatusOr<std::byte*> KeeperSlots::MakeParity(int slot, int blocks, int64_t block_bytes) {
  const int64_t bytes = std::max<int64_t>(1, blocks * block_bytes);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    places_[slot].blocks = 0;
    places_[slot].parity_checksums.clear();
  }
  const std::lock_guard<std::mutex> parity(parity_mutexes_[static_cast<size_t>(slot)]);
  if (const auto arena = ParityOf(slot); arena == nullptr || arena->bytes() < bytes) {
    STRETTO_RETURN_IF_ERROR(NewParity(slot, bytes, /*touch=*/false));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  places_[slot].block_bytes = block_bytes;
  places_[slot].blocks = blocks;
  return places_[slot].parity->data();
}

std::shared_ptr<Arena> KeeperSlots::ParityOf(int slot) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return places_[slot].parity;
}

absl::Status KeeperSlots::NewParity(int slot, int64_t bytes, bool touch) {
  const std::string owner = absl::StrCat("snapshot parity ", slot);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    places_[slot].parity.reset();
  }
  budget_->Release(Resource::kHostMemory, owner);
  STRETTO_RETURN_IF_ERROR(budget_->Reserve(Resource::kHostMemory, owner, bytes));
  STRETTO_ASSIGN_OR_RETURN(Arena made, Arena::Create(Device::Cpu(), owner, bytes));
  if (touch && TouchPages(made.data(), bytes, threads_) != 0) {
    budget_->Release(Resource::kHostMemory, owner);
    return absl::ResourceExhaustedError("no memory for parity of snapshots");
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  places_[slot].parity = std::make_shared<Arena>(std::move(made));
  return absl::OkStatus();
}

std::vector<KeeperSlots::Span> KeeperSlots::Spans(const Place& place, int64_t offset,
                                                  int64_t bytes) {
  std::vector<Span> spans;
  for (size_t i = 0; i < place.manifest.ranks.size() && bytes > 0; ++i) {
    const RankPart& part = place.manifest.ranks[i];
    const int64_t begin = place.manifest.BeginOf(i), end = place.manifest.BeginOf(i + 1);
    if (offset >= end) continue;
    const auto memory = place.ranks.find(part.rank);
    if (memory == place.ranks.end()) return {};
    // The payload, then what pads it.
    const int64_t data_end = begin + part.payload_bytes;
    if (offset < data_end) {
      const int64_t n = std::min(bytes, data_end - offset);
      spans.push_back({memory->second->payload() + (offset - begin), n});
      offset += n;
      bytes -= n;
    }
    const int64_t padding = std::min(bytes, end - offset);
    if (padding > 0) spans.push_back({nullptr, padding});
    offset += padding;
    bytes -= padding;
  }
  if (bytes > 0) spans.push_back({nullptr, bytes});  // behind the shard
  return spans;
}

bool KeeperSlots::Holds(const Place& place, const SnapshotId& id, SlotState least) {
  return place.state >= least && place.state != SlotState::kEmpty && place.id == id;
}

namespace {

absl::Status Gone(const SnapshotId& id) {
  return absl::NotFoundError(absl::StrCat("this keeper does not hold the snapshot of step ",
                                          id.epoch, " (round ", id.round, ")"));
}

}  // namespace

absl::StatusOr<KeeperSlots::View> KeeperSlots::Look(const SnapshotId& id, SlotState least,
                                                    int32_t what, int64_t offset,
                                                    int64_t bytes) const {
  View view{.spans = {}, .id = id, .least = least, .slot = -1, .ranks = {}, .parity = nullptr};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (int i = 0; i < kSlots; ++i) {
      if (Holds(places_[i], id, least)) view.slot = i;
    }
    if (view.slot < 0 || offset < 0 || bytes < 0) return Gone(id);
    const Place& place = places_[view.slot];
    view.ranks = place.ranks;
    view.parity = place.parity;
    if (what == kWholeShard) {
      view.spans = Spans(place, offset, bytes);
    } else if (what < kWholeShard) {
      const int64_t block = kWholeShard - 1 - int64_t{what};
      if (view.parity == nullptr || block >= place.blocks || offset > place.block_bytes - bytes) {
        return Gone(id);
      }
      view.spans.push_back({view.parity->data() + block * place.block_bytes + offset, bytes});
    } else {
      const auto found = view.ranks.find(what);
      if (found == view.ranks.end() || offset > found->second->capacity() - bytes) return Gone(id);
      view.spans.push_back({found->second->payload() + offset, bytes});
    }
  }
  int64_t seen = 0;
  for (const Span& span : view.spans) seen += span.bytes;
  if (seen != bytes) return Gone(id);
  STRETTO_RETURN_IF_ERROR(WholeOf(view.ranks));
  return view;
}

absl::Status KeeperSlots::StillHeld(const View& view) const {
  const absl::Status whole = WholeOf(view.ranks);
  const std::lock_guard<std::mutex> lock(mutex_);
  return Holds(places_[view.slot], view.id, view.least) ? whole : Gone(view.id);
}

absl::Status KeeperSlots::WholeOf(const std::map<int, std::shared_ptr<SlotMemory>>& ranks) {
  for (const auto& [rank, memory] : ranks) STRETTO_RETURN_IF_ERROR(memory->Whole());
  return absl::OkStatus();
}

absl::Status KeeperSlots::Whole(int slot) const {
  std::map<int, std::shared_ptr<SlotMemory>> ranks;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ranks = places_[slot].ranks;
  }
  return WholeOf(ranks);
}

absl::StatusOr<std::vector<KeeperSlots::Span>> KeeperSlots::SpansToFill(int slot, int64_t offset,
                                                                        int64_t bytes) const {
  std::vector<Span> spans;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    spans = Spans(places_[slot], offset, bytes);
  }
  for (const Span& span : spans) {
    const int error = span.data == nullptr ? 0 : TouchPages(span.data, span.bytes);
    if (error != 0) {
      return absl::ResourceExhaustedError(
          absl::StrCat("no memory for a slot of a snapshot: ", std::strerror(error),
                       "; enlarge /dev/shm or do without snapshots"));
    }
  }
  return spans;
}

std::shared_ptr<SlotMemory> KeeperSlots::MemoryOf(int slot, int rank) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = places_[slot].ranks.find(rank);
  return found == places_[slot].ranks.end() ? nullptr : found->second;
}

void KeeperSlots::SealParity(int slot, std::vector<uint64_t> checksums) {
  const std::lock_guard<std::mutex> lock(mutex_);
  places_[slot].parity_checksums = std::move(checksums);
}

absl::Status KeeperSlots::VerifyHeld(const SnapshotId& id) const {
  STRETTO_ASSIGN_OR_RETURN(const View held, Look(id, SlotState::kProtected, kWholeShard, 0, 0));
  absl::Status sound = VerifyData(held.slot);
  if (sound.ok()) sound = VerifyParity(held.slot);
  // What was taken away meanwhile is not damaged.
  STRETTO_RETURN_IF_ERROR(StillHeld(held));
  return sound;
}

absl::Status KeeperSlots::VerifyData(int slot) const {
  for (const RankPart& part : ManifestOf(slot).ranks) {
    const std::shared_ptr<SlotMemory> memory = MemoryOf(slot, part.rank);
    if (memory == nullptr) return absl::InternalError("a slot lost its memory");
    STRETTO_ASSIGN_OR_RETURN(const SlotContents contents,
                             memory->ReadContents({job_, part.layout, part.rank}));
    STRETTO_RETURN_IF_ERROR(memory->VerifyData(contents, threads_));
  }
  return absl::OkStatus();
}

absl::Status KeeperSlots::VerifyParity(int slot) const {
  std::shared_ptr<Arena> parity;
  std::vector<uint64_t> checksums;
  int64_t block_bytes = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Place& place = places_[slot];
    if (place.parity_checksums.empty()) return absl::OkStatus();
    parity = place.parity;
    checksums = place.parity_checksums;
    block_bytes = place.block_bytes;
  }
  const auto pieces = (block_bytes + kParityPiece - 1) / kParityPiece;
  std::atomic<int64_t> next = 0;
  std::atomic<bool> sound = true;
  OnThreads(threads_, "checksums of parity", [&](int) {
    const auto count = static_cast<int64_t>(checksums.size());
    for (int64_t i = next.fetch_add(1); i < count && sound; i = next.fetch_add(1)) {
      const int64_t at = i % pieces * kParityPiece;
      const auto bytes = static_cast<size_t>(std::min(kParityPiece, block_bytes - at));
      const std::byte* const from = parity->data() + i / pieces * block_bytes + at;
      if (XXH3_64bits(from, bytes) != checksums[static_cast<size_t>(i)]) sound = false;
    }
  });
  if (sound) return absl::OkStatus();
  return absl::DataLossError("its parity of other nodes is not what was computed");
}

}  // namespace stretto::snapshot_internal
