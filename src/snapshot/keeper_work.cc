#include "src/snapshot/keeper_work.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/start_thread.h"
#include "stretto/core/log.h"

namespace stretto::snapshot_internal {
namespace {

constexpr int64_t kPiece = KeeperSlots::kParityPiece;
// Short: what is refused is tried again, and an end waits for it.
constexpr auto kConnectTimeout = std::chrono::seconds(2);
constexpr auto kPause = std::chrono::milliseconds(100);
constexpr size_t kMostConnections = 64;

int64_t PiecesOf(int64_t block_bytes) { return (block_bytes + kPiece - 1) / kPiece; }

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
      done_(std::move(done)),
      readers_(static_cast<size_t>(std::max(1, options_.threads))) {}

KeeperWork::~KeeperWork() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    end_ = true;
    StopWithLock();
  }
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
  StopWithLock();
}

void KeeperWork::StopWithLock() {
  stop_ = true;
  changed_.notify_all();
  for (const auto& readers : readers_) {
    for (const auto& [node, reader] : readers) reader.Interrupt();
  }
}

void KeeperWork::Disconnect() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& readers : readers_) readers.clear();
}

void KeeperWork::Loop() {
  while (true) {
    Task task;
    bool stopped = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return end_ || !waiting_.empty(); });
      if (end_) return;
      task = std::move(waiting_.front());
      waiting_.erase(waiting_.begin());
      stopped = stop_.exchange(false);
    }
    if (stopped) Disconnect();  // a peer may be another process by now
    begin_(task);
    std::string told;
    while (true) {
      const absl::Status status = Do(task);
      // Answers that nobody waits for may still be on their way.
      if (!status.ok()) Disconnect();
      if (absl::IsCancelled(status)) break;
      if (status.ok() || told != status.message()) done_(task, status);
      told = std::string(status.message());
      // Who is away comes back, and who has something damaged gives it up.
      const bool again = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
                         absl::IsNotFound(status) || absl::IsDataLoss(status);
      if (!again || !Pause()) break;
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
  const absl::Cleanup end_fill = [&] {
    if (task.rebuild) slots_->EndFill(task.slot);
  };
  const int64_t pieces = PiecesOf(block_bytes);
  const auto begin = net::Clock::now();
  bool again = false;
  if (task.rebuild) {
    const NodeManifest& mine = task.manifests[static_cast<size_t>(options_.node)];
    STRETTO_ASSIGN_OR_RETURN(again, slots_->BeginFill(task.slot, task.id, mine));
  }
  if (!again || !progress_.rebuild || progress_.slot != task.slot || progress_.id != task.id) {
    progress_ = {
        .rebuild = task.rebuild,
        .slot = task.slot,
        .id = task.id,
        .holders = {},
        .done = std::vector<uint8_t>(static_cast<size_t>(pieces * layout_.group_size())),
        .checksums = std::vector<uint64_t>(static_cast<size_t>(pieces * layout_.parity()))};
  }
  STRETTO_ASSIGN_OR_RETURN(std::byte* const parity,
                           slots_->MakeParity(task.slot, layout_.parity(), block_bytes));
  absl::Status status =
      task.rebuild ? Rebuild(task, parity, block_bytes) : MakeParity(task, parity, block_bytes);
  if (status.ok()) slots_->SealParity(task.slot, progress_.checksums);
  if (status.ok() && task.rebuild) {
    const auto read = net::Clock::now();
    status = slots_->VerifyData(task.slot);
    if (status.ok()) {
      LogInfo(
          absl::StrFormat("the snapshot of step %d is rebuilt: read in %.2f s, verified in %.2f s",
                          task.id.epoch, std::chrono::duration<double>(read - begin).count(),
                          std::chrono::duration<double>(net::Clock::now() - read).count()));
    }
  }
  if (!status.ok() && stop_) status = Stopped();
  // Who held it may have lost it; what has come from there is what was written.
  if (!status.ok() && !absl::IsCancelled(status)) progress_.holders.clear();
  if (absl::IsDataLoss(status)) progress_ = Progress();
  return status;
}

absl::StatusOr<SlotReader*> KeeperWork::ReaderOf(int lane, int node) {
  std::map<int, SlotReader>& readers = readers_[static_cast<size_t>(lane)];
  if (const auto found = readers.find(node); found != readers.end()) return &found->second;
  STRETTO_ASSIGN_OR_RETURN(
      SlotReader reader,
      SlotReader::Connect(options_.peers[static_cast<size_t>(node)], options_.token, options_.job,
                          net::After(kConnectTimeout)));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stop_) return Stopped();
  return &readers.emplace(node, std::move(reader)).first->second;
}

struct KeeperWork::Shared {
  std::atomic<int64_t> next = 0;  // piece that nobody has taken
  std::atomic<bool> failed = false;
  std::mutex mutex;
  absl::Status status;  // of the lane that failed first
};

absl::Status KeeperWork::Combine(const Task& task, const Stripe& stripe) {
  const size_t wanted = task.rebuild ? readers_.size() : (readers_.size() + 1) / 2;
  const size_t most = std::max<size_t>(1, kMostConnections / stripe.sources.size());
  const auto lanes =
      std::min(static_cast<int64_t>(std::min(wanted, most)), PiecesOf(stripe.block_bytes));
  Shared shared;
  OnThreads(static_cast<int>(lanes), "a keeper's lanes", [&](int lane) {
    const absl::Status status = RunLane(task, stripe, lane, shared);
    if (status.ok()) return;
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (!shared.failed) shared.status = status;
    shared.failed = true;
  });
  return shared.status;
}

absl::Status KeeperWork::RunLane(const Task& task, const Stripe& stripe, int lane, Shared& shared) {
  const auto& [map, sources, member, block_bytes, parity, done, checksums] = stripe;
  const bool is_data = member < layout_.data();
  const SlotState least = task.rebuild ? SlotState::kProtected : SlotState::kSealed;
  // With one source and one parity both are the same bytes, which need not be computed.
  const bool same = layout_.data() == 1 && layout_.parity() == 1;
  std::vector<std::byte> blocks(same ? 0 : sources.size() * kPiece), apart(is_data ? kPiece : 0);
  std::vector<const std::byte*> inputs;
  for (size_t i = 0; i < sources.size(); ++i) inputs.push_back(blocks.data() + i * kPiece);
  // Asks all sources for the next piece and says where it begins; behind the end: there is none.
  const auto ask = [&]() -> absl::StatusOr<int64_t> {
    int64_t piece = shared.next.fetch_add(1);
    while (piece < PiecesOf(block_bytes) && done[piece] != 0) piece = shared.next.fetch_add(1);
    const int64_t at = piece * kPiece;
    const int64_t bytes = std::min(kPiece, block_bytes - at);
    for (size_t i = 0; i < sources.size() && bytes > 0; ++i) {
      const Source& source = sources[i];
      STRETTO_ASSIGN_OR_RETURN(SlotReader* const reader, ReaderOf(lane, source.node));
      const bool of_data = source.member < layout_.data();
      STRETTO_RETURN_IF_ERROR(reader->Request(
          task.id, least, of_data ? kWholeShard : ParityBlock(source.member - layout_.data()),
          of_data ? source.member * block_bytes + at : at, bytes));
    }
    return at;
  };
  STRETTO_ASSIGN_OR_RETURN(int64_t at, ask());
  while (at < block_bytes) {
    if (stop_) return Stopped();
    if (shared.failed) return absl::OkStatus();  // another lane says why
    STRETTO_ASSIGN_OR_RETURN(const int64_t next, ask());
    const int64_t bytes = std::min(kPiece, block_bytes - at);
    std::byte* out = parity + at;
    std::vector<KeeperSlots::Span> spans;
    if (is_data) {
      STRETTO_ASSIGN_OR_RETURN(spans,
                               slots_->SpansToFill(task.slot, member * block_bytes + at, bytes));
      const bool whole = spans.size() == 1 && spans[0].data != nullptr;
      out = whole ? spans[0].data : apart.data();
    }
    for (size_t i = 0; i < sources.size(); ++i) {
      STRETTO_ASSIGN_OR_RETURN(SlotReader* const reader, ReaderOf(lane, sources[i].node));
      std::byte* const to = same ? out : blocks.data() + i * kPiece;
      STRETTO_RETURN_IF_ERROR(reader->Answer(to, bytes));
      (task.rebuild ? rebuild_bytes_ : encode_bytes_) += bytes;
    }
    if (!same) map.Apply(inputs.data(), &out, bytes);
    if (!is_data) {
      checksums[at / kPiece] = XXH3_64bits(out, static_cast<size_t>(bytes));
    } else if (out == apart.data()) {
      for (const KeeperSlots::Span& span : spans) {
        if (span.data != nullptr) std::memcpy(span.data, out, static_cast<size_t>(span.bytes));
        out += span.bytes;
      }
    }
    done[at / kPiece] = 1;
    at = next;
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
    STRETTO_RETURN_IF_ERROR(
        Combine(task, {map, sources, layout_.data() + p, block_bytes, parity + p * block_bytes,
                       progress_.done.data() + p * PiecesOf(block_bytes),
                       progress_.checksums.data() + p * PiecesOf(block_bytes)}));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int>> KeeperWork::Holders(const Task& task) {
  const int group = layout_.GroupOf(options_.node);
  std::vector<int> holders;
  int other = 0;
  const auto needed = [&] { return static_cast<size_t>(layout_.data()) - holders.size(); };
  while (needed() > 0 && other < layout_.group_size()) {
    // As many as are still needed look at the same time.
    std::vector<std::pair<int, SlotReader*>> asked;
    for (; other < layout_.group_size() && asked.size() < needed(); ++other) {
      const int node = layout_.NodeAt(group, other);
      if (node == options_.node) continue;
      const absl::StatusOr<SlotReader*> reader = ReaderOf(0, node);
      if (reader.ok() &&
          (*reader)->Request(task.id, SlotState::kProtected, kSoundness, 0, 0).ok()) {
        asked.emplace_back(other, *reader);
      }
    }
    for (const auto& [place, reader] : asked) {
      std::byte none;
      if (reader->Answer(&none, 0, kVerifying).ok()) {
        holders.push_back(place);
        continue;
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      readers_[0].erase(layout_.NodeAt(group, place));  // its answer may still come
    }
  }
  if (needed() == 0) return holders;
  return absl::UnavailableError(
      absl::StrCat("the snapshot of step ", task.id.epoch, " cannot be rebuilt: ", holders.size(),
                   " other nodes of the group hold it and ", layout_.data(), " are needed"));
}

absl::Status KeeperWork::Rebuild(const Task& task, std::byte* parity, int64_t block_bytes) {
  const int group = layout_.GroupOf(options_.node), place = layout_.PlaceOf(options_.node);
  // Who does not hold what was written forgets it, and another round follows.
  if (progress_.holders.empty()) {
    STRETTO_ASSIGN_OR_RETURN(progress_.holders, Holders(task));
  }
  const int64_t pieces = PiecesOf(block_bytes);
  for (int stripe = 0; stripe < layout_.group_size(); ++stripe) {
    const int lost = layout_.MemberOf(place, stripe);
    std::vector<int> members;
    std::vector<Source> sources;
    for (const int holder : progress_.holders) {
      members.push_back(layout_.MemberOf(holder, stripe));
      sources.push_back({layout_.NodeAt(group, holder), members.back()});
    }
    STRETTO_ASSIGN_OR_RETURN(const ErasureMap map, code_.Rebuild(members, {lost}));
    const int block = std::max(0, lost - layout_.data());
    STRETTO_RETURN_IF_ERROR(Combine(
        task,
        {map, sources, lost, block_bytes, parity + block * block_bytes,
         progress_.done.data() + stripe * pieces, progress_.checksums.data() + block * pieces}));
  }
  return absl::OkStatus();
}

}  // namespace stretto::snapshot_internal
