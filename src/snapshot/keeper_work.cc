#include "src/snapshot/keeper_work.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "stretto/core/log.h"

namespace stretto::snapshot_internal {
namespace {

constexpr int64_t kPiece = int64_t{1} << 20;
constexpr auto kConnectTimeout = std::chrono::seconds(10);

constexpr auto kPause = std::chrono::milliseconds(100);

absl::Status Stopped() { return absl::CancelledError("the work was stopped"); }

}  // namespace

KeeperWork::KeeperWork(Options options, ParityLayout layout, ErasureCode code, KeeperSlots* slots,
                       std::function<void(const Task&)> begin,
                       std::function<void(const Task&, const absl::Status&)> done)
    : options_(std::move(options)),
      layout_(layout),
      code_(std::move(code)),
      slots_(slots),
      begin_(std::move(begin)),
      done_(std::move(done)) {}

KeeperWork::~KeeperWork() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
    stop_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

absl::Status KeeperWork::Start() {
  STRETTO_ASSIGN_OR_RETURN(thread_, StartThread("a keeper's parity", [this] { Loop(); }));
  return absl::OkStatus();
}

void KeeperWork::Run(Task task) {
  const std::lock_guard<std::mutex> lock(mutex_);
  waiting_.push_back(std::move(task));
  changed_.notify_all();
}

void KeeperWork::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  waiting_.clear();
  stop_ = true;
  changed_.notify_all();
}

void KeeperWork::Loop() {
  while (true) {
    Task task;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return end_ || !waiting_.empty(); });
      if (end_) return;
      task = std::move(waiting_.front());
      waiting_.erase(waiting_.begin());
      stop_ = false;
    }
    begin_(task);
    std::string told;
    while (true) {
      const absl::Status status = Do(task);
      // Answers that nobody waits for may still be on their way, and a peer that was replaced has
      // left its connection behind.
      if (!status.ok()) readers_.clear();
      if (absl::IsCancelled(status)) break;
      if (status.ok() || told != status.message()) done_(task, status);
      told = std::string(status.message());
      const bool away = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
                        absl::IsNotFound(status);
      if (!away || !Pause()) break;
    }
  }
}

bool KeeperWork::Pause() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, kPause, [this] { return end_ || stop_; });
  return !stop_;
}

int64_t KeeperWork::LargestShard(const Task& task) const {
  int64_t largest = 0;
  for (const int node : layout_.Members(layout_.GroupOf(options_.node))) {
    largest = std::max(largest, task.manifests[static_cast<size_t>(node)].ShardBytes());
  }
  return largest;
}

absl::Status KeeperWork::Do(const Task& task) {
  const int64_t block_bytes = layout_.BlockBytes(LargestShard(task));
  if (task.rebuild) {
    const NodeManifest& mine = task.manifests[static_cast<size_t>(options_.node)];
    KeeperSlots::Capacities ranks;
    for (const RankPart& part : mine.ranks) ranks[part.rank] = part.payload_bytes;
    STRETTO_RETURN_IF_ERROR(slots_->PrepareNow(task.slot, ranks));
    slots_->SetManifest(task.slot, mine);
  }
  STRETTO_ASSIGN_OR_RETURN(std::byte* const parity,
                           slots_->MakeParity(task.slot, layout_.parity(), block_bytes));
  STRETTO_RETURN_IF_ERROR(task.rebuild ? Rebuild(task, parity, block_bytes)
                                       : MakeParity(task, parity, block_bytes));
  slots_->SealParity(task.slot);
  return task.rebuild ? slots_->Verify(task.slot) : absl::OkStatus();
}

absl::StatusOr<SlotReader*> KeeperWork::ReaderOf(int node) {
  const auto found = readers_.find(node);
  if (found != readers_.end()) return &found->second;
  STRETTO_ASSIGN_OR_RETURN(
      SlotReader reader,
      SlotReader::Connect(options_.peers[static_cast<size_t>(node)], options_.token, options_.job,
                          net::After(kConnectTimeout)));
  return &readers_.emplace(node, std::move(reader)).first->second;
}

absl::Status KeeperWork::Combine(
    const Task& task, const ErasureMap& map, const std::vector<Source>& sources, SlotState least,
    int64_t block_bytes, const std::function<void(int64_t at, const std::byte*, int64_t)>& write) {
  const auto request = [&](const Source& source, int64_t at) -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(SlotReader* const reader, ReaderOf(source.node));
    const int64_t bytes = std::min(kPiece, block_bytes - at);
    if (source.member < layout_.data()) {
      return reader->Request(task.id, least, kWholeShard, source.member * block_bytes + at, bytes);
    }
    return reader->Request(task.id, least, ParityBlock(source.member - layout_.data()), at, bytes);
  };
  std::vector<std::byte> block(kPiece), sum(kPiece);
  std::byte* out = sum.data();
  // One request ahead of what is computed.
  const auto pieces = (block_bytes + kPiece - 1) / kPiece;
  const auto count = static_cast<int64_t>(sources.size());
  const auto source_of = [&](int64_t step) { return sources[static_cast<size_t>(step % count)]; };
  for (int64_t step = 0; step < pieces * count; ++step) {
    if (stop_) return Stopped();
    if (step == 0) STRETTO_RETURN_IF_ERROR(request(source_of(0), 0));
    const int64_t at = step / count * kPiece;
    const int64_t bytes = std::min(kPiece, block_bytes - at);
    if (step + 1 < pieces * count) {
      STRETTO_RETURN_IF_ERROR(request(source_of(step + 1), (step + 1) / count * kPiece));
    }
    const auto source = static_cast<int>(step % count);
    if (source == 0) std::memset(out, 0, static_cast<size_t>(bytes));
    STRETTO_ASSIGN_OR_RETURN(SlotReader* const reader, ReaderOf(source_of(step).node));
    STRETTO_RETURN_IF_ERROR(reader->Answer(block.data(), bytes));
    (task.rebuild ? rebuild_bytes_ : encode_bytes_) += bytes;
    map.Accumulate(source, block.data(), &out, bytes);
    if (source + 1 == count) write(at, out, bytes);
  }
  return absl::OkStatus();
}

absl::Status KeeperWork::MakeParity(const Task& task, std::byte* parity, int64_t block_bytes) {
  const int group = layout_.GroupOf(options_.node), place = layout_.PlaceOf(options_.node);
  std::vector<int> data;
  for (int j = 0; j < layout_.data(); ++j) data.push_back(j);
  for (int p = 0; p < layout_.parity(); ++p) {
    const int stripe = layout_.StripeOf(place, layout_.data() + p);
    STRETTO_ASSIGN_OR_RETURN(const ErasureMap map, code_.Rebuild(data, {layout_.data() + p}));
    std::vector<Source> sources(data.size());
    for (int other = 0; other < layout_.group_size(); ++other) {
      const int member = layout_.MemberOf(other, stripe);
      if (member < layout_.data()) {
        sources[static_cast<size_t>(member)] = {layout_.NodeAt(group, other), member};
      }
    }
    std::byte* const to = parity + p * block_bytes;
    STRETTO_RETURN_IF_ERROR(Combine(task, map, sources, SlotState::kSealed, block_bytes,
                                    [to](int64_t at, const std::byte* from, int64_t bytes) {
                                      std::memcpy(to + at, from, static_cast<size_t>(bytes));
                                    }));
  }
  return absl::OkStatus();
}

absl::Status KeeperWork::Rebuild(const Task& task, std::byte* parity, int64_t block_bytes) {
  const int group = layout_.GroupOf(options_.node), place = layout_.PlaceOf(options_.node);
  // Who holds it, and holds what was written? Who does not forgets it, and another round follows.
  std::vector<int> holders;  // places
  for (int other = 0; other < layout_.group_size(); ++other) {
    const int node = layout_.NodeAt(group, other);
    if (node == options_.node || static_cast<int>(holders.size()) == layout_.data()) continue;
    const absl::StatusOr<SlotReader*> reader = ReaderOf(node);
    if (!reader.ok()) continue;
    std::byte none;
    absl::Status held = (*reader)->Request(task.id, SlotState::kProtected, kSoundness, 0, 0);
    if (held.ok()) held = (*reader)->Answer(&none, 0, kVerifying);
    if (held.ok()) holders.push_back(other);
  }
  if (static_cast<int>(holders.size()) < layout_.data()) {
    return absl::UnavailableError(
        absl::StrCat("the snapshot of step ", task.id.epoch, " cannot be rebuilt: ", holders.size(),
                     " other nodes of the group hold it and ", layout_.data(), " are needed"));
  }
  for (int stripe = 0; stripe < layout_.group_size(); ++stripe) {
    const int lost = layout_.MemberOf(place, stripe);
    std::vector<int> members;
    std::vector<Source> sources;
    for (const int holder : holders) {
      members.push_back(layout_.MemberOf(holder, stripe));
      sources.push_back({layout_.NodeAt(group, holder), members.back()});
    }
    STRETTO_ASSIGN_OR_RETURN(const ErasureMap map, code_.Rebuild(members, {lost}));
    STRETTO_RETURN_IF_ERROR(Combine(
        task, map, sources, SlotState::kProtected, block_bytes,
        [&](int64_t at, const std::byte* from, int64_t bytes) {
          if (lost < layout_.data()) {
            slots_->WriteShard(task.slot, lost * block_bytes + at, bytes, from).IgnoreError();
          } else {
            std::memcpy(parity + (lost - layout_.data()) * block_bytes + at, from,
                        static_cast<size_t>(bytes));
          }
        }));
  }
  return absl::OkStatus();
}

}  // namespace stretto::snapshot_internal
