#include "src/snapshot/slot_copies.h"

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstring>
#include <numeric>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/core/start_thread.h"
#include "stretto/core/copy.h"

namespace stretto::snapshot_internal {
namespace {

// A slot is registered in pieces: the driver holds up other calls of the process while it works on
// one.
constexpr int64_t kChunksOfRegistration = 16;

void WaitOnHost(const Event& event) {
  while (!event.Done()) std::this_thread::sleep_for(std::chrono::microseconds(100));
}

// Calls piece(offset, bytes) for stretches of [begin, begin + bytes) that cross no multiple of
// `size`.
template <class Body>
void ForPieces(int64_t begin, int64_t bytes, int64_t size, const Body& piece) {
  for (const int64_t end = begin + bytes; begin < end;) {
    const int64_t n = std::min(end, (begin / size + 1) * size) - begin;
    piece(begin, n);
    begin += n;
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<SlotCopies>> SlotCopies::Create(const StateRegistry& registry,
                                                               const SlotContents& planned,
                                                               const SlotCopyOptions& options) {
  std::unique_ptr<SlotCopies> copies(new SlotCopies(registry, options));
  copies->CutIntoPieces(planned);
  const bool cpu = options.device.kind == DeviceKind::kCpu;
  STRETTO_ASSIGN_OR_RETURN(copies->side_, Stream::Create(options.device, {.mode = StreamMode::kFifo,
                                                                          .workspace_bytes = 0}));
  if (!cpu || !options.direct) {
    STRETTO_ASSIGN_OR_RETURN(copies->ring_,
                             Arena::CreateHost(options.device, "ring of snapshots",
                                               options.chunks * options.chunk_bytes));
  }
  return copies;
}

SlotCopies::~SlotCopies() { side_.reset(); }  // before what its copies write

void SlotCopies::CutIntoPieces(const SlotContents& planned) {
  const std::vector<StateEntry>& entries = registry_.entries();
  int last = 0;
  for (const StateEntry& entry : entries) last = std::max(last, entry.update_part);
  const auto part_of = [&](size_t i) {
    return entries[i].update_part < 0 ? last + 1 : entries[i].update_part;
  };
  std::vector<size_t> order(entries.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return part_of(a) < part_of(b); });
  unfinished_ = std::vector<std::atomic<int32_t>>(entries.size());
  part_end_.assign(static_cast<size_t>(last) + 2, 0);
  for (const size_t i : order) {
    const SlotEntry& entry = planned.entries[i];
    // Registrations begin where the slot's memory does.
    ForPieces(SlotMemory::kPayloadOffset + entry.offset, entry.bytes, options_.chunk_bytes,
              [&](int64_t at, int64_t bytes) {
                const int64_t offset = at - SlotMemory::kPayloadOffset;
                pieces_.push_back({i, part_of(i), entries[i].local.data + (offset - entry.offset),
                                   offset, bytes});
              });
    part_end_[static_cast<size_t>(part_of(i))] = pieces_.size();
  }
  // A part of which this rank owns nothing ends where the one before it does.
  for (size_t p = 1; p < part_end_.size(); ++p) {
    part_end_[p] = std::max(part_end_[p], part_end_[p - 1]);
  }
  events_.resize(pieces_.size());
  emptied_.resize(pieces_.size());
}

bool SlotCopies::Direct(const SlotMemory& slot) const {
  if (!options_.direct) return false;
  if (options_.device.kind == DeviceKind::kCpu) return true;
  return std::any_of(registered_.begin(), registered_.end(),
                     [&](const Registered& r) { return r.memory.get() == &slot; });
}

bool SlotCopies::WantsRegistration(const std::shared_ptr<SlotMemory>& slot) const {
  return options_.direct && !refused_ && !Direct(*slot);
}

absl::Status SlotCopies::Register(const std::shared_ptr<SlotMemory>& slot) {
  // A keeper has so many at a time: the oldest is one that it has given up.
  if (registered_.size() >= kSlots) registered_.pop_front();
  Registered made = {slot, {}};
  absl::Status status;
  ForPieces(0, slot->mapped_bytes(), kChunksOfRegistration * options_.chunk_bytes,
            [&](int64_t offset, int64_t bytes) {
              if (!status.ok()) return;
              absl::StatusOr<HostRegistration> piece =
                  HostRegistration::Create(options_.device, slot->mapping() + offset, bytes);
              status = piece.status();
              if (piece.ok()) made.pieces.push_back(*std::move(piece));
            });
  refused_ = !status.ok();
  if (status.ok()) registered_.push_back(std::move(made));
  return status;
}

void SlotCopies::Begin(const Event& after) {
  const std::lock_guard<std::mutex> lock(mutex_);
  side_->Wait(after);
  enqueued_ = 0;
  under_way_.store(true, std::memory_order_release);
}

void SlotCopies::End() {
  const std::lock_guard<std::mutex> lock(mutex_);
  under_way_.store(false, std::memory_order_release);
  changed_.notify_all();
}

void SlotCopies::WaitForPart(Stream& stream, int part) {
  const size_t last = part_end_.size() - 1;
  const size_t end = part_end_[part < 0 ? last : std::min(last, static_cast<size_t>(part))];
  if (end == 0) return;
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return !under_way() || enqueued_ >= end; });
  if (!under_way()) return;
  const Event event = events_[end - 1];
  lock.unlock();
  stream.Wait(event);
}

void SlotCopies::Enqueue(const SlotMemory& slot, bool direct, SlotContents* contents) {
  int part = -1;
  size_t told = 0;
  for (size_t i = 0; i < pieces_.size(); ++i) {
    const Piece& piece = pieces_[i];
    if (options_.before_part && piece.part != part) options_.before_part(piece.part);
    part = piece.part;
    std::byte* to = slot.payload() + piece.offset;
    if (!direct) {
      const auto chunks = static_cast<size_t>(options_.chunks);
      // The system may have given no thread that empties the ring.
      for (size_t next = next_; helpers_ == 0 && next < i && i >= next + chunks; next = next_) {
        if (next_.compare_exchange_strong(next, next + 1)) Finish(next, slot, direct, contents);
      }
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return i < chunks || emptied_[i - chunks]; });
      to = Chunk(i % chunks);
    }
    CopyBytes(*side_, to, piece.from, piece.bytes);
    if (direct && i + 1 != part_end_[static_cast<size_t>(part)]) continue;
    const Event event = side_->Record();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (; told <= i; ++told) events_[told] = event;
    enqueued_ = i + 1;
    changed_.notify_all();
  }
}

void SlotCopies::Work(const SlotMemory& slot, bool direct, SlotContents* contents) {
  while (true) {
    const size_t i = next_.fetch_add(1);
    if (i >= pieces_.size()) return;
    Finish(i, slot, direct, contents);
  }
}

void SlotCopies::Finish(size_t i, const SlotMemory& slot, bool direct, SlotContents* contents) {
  Event event;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return enqueued_ > i; });
    event = events_[i];
  }
  WaitOnHost(event);
  const Piece& piece = pieces_[i];
  if (!direct) {
    std::memcpy(slot.payload() + piece.offset, Chunk(i % static_cast<size_t>(options_.chunks)),
                static_cast<size_t>(piece.bytes));
    const std::lock_guard<std::mutex> lock(mutex_);
    emptied_[i] = true;
    changed_.notify_all();
  }
  if (unfinished_[piece.entry].fetch_sub(1) != 1) return;
  SlotEntry& entry = contents->entries[piece.entry];
  entry.checksum = slot.DataChecksum(entry);
}

absl::Status SlotCopies::Capture(const std::shared_ptr<SlotMemory>& slot, SlotContents* contents) {
  if (contents->data_bytes > slot->capacity()) {
    return absl::ResourceExhaustedError("the slot is smaller than the rank's state");
  }
  const bool direct = Direct(*slot);
  next_ = 0;
  helpers_ = 0;
  std::fill(emptied_.begin(), emptied_.end(), false);
  for (std::atomic<int32_t>& count : unfinished_) count = 0;
  for (const Piece& piece : pieces_) ++unfinished_[piece.entry];
  const auto start = std::chrono::steady_clock::now();
  absl::Status status;
  // One more than those that work, as the first is busy enqueueing.
  OnThreads(1 + options_.threads, "copies of snapshots", [&](int thread) {
    const absl::Status usable = UseDevice(options_.device);
    if (thread == 0) {
      status = usable;
      Enqueue(*slot, direct, contents);
      status.Update(side_->Synchronize());
      copy_seconds_ =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    } else {
      ++helpers_;
    }
    Work(*slot, direct, contents);
  });
  return status;
}

absl::Status SlotCopies::Restore(const SlotMemory& slot, const SlotContents& contents) {
  struct Stretch {
    std::byte* to;
    const std::byte* from;
    int64_t bytes;
  };
  const bool host = options_.device.kind == DeviceKind::kCpu;
  // Each thread has two places in the ring: it fills one while the device reads the other.
  constexpr int64_t kLeast = 4096;
  const int64_t ring = options_.chunks * options_.chunk_bytes;
  const auto most = host ? INT_MAX : static_cast<int>(ring / (2 * kLeast));
  const int threads = std::clamp(options_.restart_threads, 1, std::max(1, most));
  const int64_t piece = host ? options_.chunk_bytes : ring / (2 * threads) / kLeast * kLeast;
  std::vector<Stretch> all;
  for (size_t i = 0; i < registry_.entries().size(); ++i) {
    const Tensor& local = registry_.entries()[i].local;
    const SlotEntry& entry = contents.entries[i];
    if (entry.bytes == 0 || entry.bytes != local.bytes()) continue;
    ForPieces(0, entry.bytes, piece, [&](int64_t at, int64_t bytes) {
      all.push_back({local.data + at, slot.payload() + entry.offset + at, bytes});
    });
  }
  std::atomic<size_t> next = 0;
  absl::Status usable;
  OnThreads(threads, "restoring snapshots", [&](int thread) {
    const absl::Status used = UseDevice(options_.device);
    if (thread == 0) usable = used;
    Event copied[2];
    for (int64_t turn = 0;; ++turn) {
      const size_t i = next.fetch_add(1);
      if (i >= all.size()) return;
      const Stretch& s = all[i];
      if (host) {
        std::memcpy(s.to, s.from, static_cast<size_t>(s.bytes));
        continue;
      }
      std::byte* const place = ring_.data() + (2 * thread + turn % 2) * piece;
      if (turn >= 2) WaitOnHost(copied[turn % 2]);
      std::memcpy(place, s.from, static_cast<size_t>(s.bytes));
      const std::lock_guard<std::mutex> lock(mutex_);
      CopyBytes(*side_, s.to, place, s.bytes);
      copied[turn % 2] = side_->Record();
    }
  });
  usable.Update(side_->Synchronize());
  return usable;
}

}  // namespace stretto::snapshot_internal
