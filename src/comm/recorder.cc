#include "stretto/comm/recorder.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace stretto {
namespace {

static_assert(std::is_trivially_copyable_v<FlightRecord>);
constexpr std::size_t kWords = (sizeof(FlightRecord) + 7) / 8;
constexpr std::size_t kStartedWord = offsetof(FlightRecord, started_us) / 8;
constexpr std::size_t kFinishedWord = offsetof(FlightRecord, finished_us) / 8;
static_assert(offsetof(FlightRecord, started_us) % 8 == 0);
static_assert(offsetof(FlightRecord, finished_us) % 8 == 0);

int64_t NowMicroseconds() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

const char* Name(CommOp op) {
  switch (op) {
    case CommOp::kAllReduce:
      return "all_reduce";
    case CommOp::kReduceScatter:
      return "reduce_scatter";
    case CommOp::kAllGather:
      return "all_gather";
    case CommOp::kBroadcast:
      return "broadcast";
    case CommOp::kAllToAll:
      return "all_to_all";
    case CommOp::kSend:
      return "send";
    case CommOp::kReceive:
      return "receive";
    case CommOp::kBarrier:
      return "barrier";
  }
  return "unknown";
}

std::string Describe(CommOp op, const std::string& group, int64_t sequence, int peer,
                     const std::string& label) {
  std::string text = absl::StrCat(Name(op), "(", group, ") seq ", sequence);
  if (op == CommOp::kSend) absl::StrAppend(&text, " to rank ", peer);
  if (op == CommOp::kReceive) absl::StrAppend(&text, " from rank ", peer);
  if (!label.empty()) absl::StrAppend(&text, " [", label, "]");
  return text;
}

// A sequence lock per slot. The words are atomics, stored with release and loaded with acquire, so
// that a reader who sees any word of a newer record also sees the version that went before it;
// plain fences would do, but ThreadSanitizer does not know them.
struct FlightRecorder::Ring {
  struct Slot {
    std::atomic<uint64_t> version = 0;  // odd while the slot is being written
    std::array<std::atomic<uint64_t>, kWords> words = {};
    int64_t handle = -1;  // writer only
  };
  explicit Ring(std::size_t capacity) : slots(capacity) {}

  Slot* Find(int64_t handle) {
    if (handle < 0) return nullptr;
    Slot& slot = slots[static_cast<std::size_t>(handle) % slots.size()];
    return slot.handle == handle ? &slot : nullptr;  // overwritten by a newer record: forgotten
  }

  bool Load(int64_t handle, FlightRecord* record) const {
    const Slot& slot = slots[static_cast<std::size_t>(handle) % slots.size()];
    std::array<uint64_t, kWords> words;
    const uint64_t before = slot.version.load(std::memory_order_acquire);
    if (before != VersionOf(handle)) return false;
    for (std::size_t i = 0; i < kWords; ++i) {
      words[i] = slot.words[i].load(std::memory_order_acquire);
    }
    if (slot.version.load(std::memory_order_relaxed) != before) return false;
    std::memcpy(static_cast<void*>(record), words.data(), sizeof(FlightRecord));
    return true;
  }

  uint64_t VersionOf(int64_t handle) const {
    return 2 * (static_cast<uint64_t>(handle) / slots.size() + 1);
  }

  std::string NameOf(int group) const {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = names.find(group);
    return found == names.end() ? absl::StrCat("group ", group) : found->second;
  }
  std::string Text(const FlightRecord& r) const {
    return Describe(r.op, NameOf(r.group), r.sequence, r.peer, r.label);
  }

  std::vector<Slot> slots;
  std::atomic<int64_t> next = 0;
  mutable std::mutex mutex;
  std::map<int, std::string> names;  // guarded by mutex
};

FlightRecorder::FlightRecorder(int capacity)
    : ring_(std::make_unique<Ring>(static_cast<std::size_t>(std::max(capacity, 1)))) {}
FlightRecorder::~FlightRecorder() = default;

void FlightRecorder::NameGroup(int id, const std::string& name) {
  const std::lock_guard<std::mutex> lock(ring_->mutex);
  ring_->names[id] = name;
}

int64_t FlightRecorder::Begin(const FlightRecord& record) {
  const int64_t handle = ring_->next.load(std::memory_order_relaxed);
  Ring::Slot& slot = ring_->slots[static_cast<std::size_t>(handle) % ring_->slots.size()];
  std::array<uint64_t, kWords> words = {};
  FlightRecord copy = record;
  if (copy.enqueued_us == 0) copy.enqueued_us = NowMicroseconds();
  std::memcpy(words.data(), &copy, sizeof(copy));
  const uint64_t version = ring_->VersionOf(handle);
  slot.version.store(version - 1, std::memory_order_relaxed);
  for (std::size_t i = 0; i < kWords; ++i) {
    slot.words[i].store(words[i], std::memory_order_release);
  }
  slot.handle = handle;
  slot.version.store(version, std::memory_order_release);
  ring_->next.store(handle + 1, std::memory_order_release);
  return handle;
}

void FlightRecorder::Started(int64_t handle) {
  if (Ring::Slot* slot = ring_->Find(handle)) {
    slot->words[kStartedWord].store(static_cast<uint64_t>(NowMicroseconds()),
                                    std::memory_order_release);
  }
}

void FlightRecorder::Finished(int64_t handle) {
  if (Ring::Slot* slot = ring_->Find(handle)) {
    slot->words[kFinishedWord].store(static_cast<uint64_t>(NowMicroseconds()),
                                     std::memory_order_release);
  }
}

std::vector<FlightRecord> FlightRecorder::Snapshot() const {
  const int64_t end = ring_->next.load(std::memory_order_acquire);
  const int64_t capacity = static_cast<int64_t>(ring_->slots.size());
  std::vector<FlightRecord> records;
  records.reserve(static_cast<std::size_t>(std::min(end, capacity)));
  for (int64_t handle = std::max<int64_t>(0, end - capacity); handle < end; ++handle) {
    FlightRecord record;
    if (ring_->Load(handle, &record)) records.push_back(record);
  }
  return records;
}

std::string FlightRecorder::Summary() const {
  constexpr int64_t kLookBack = 256;
  const int64_t end = ring_->next.load(std::memory_order_acquire);
  const int64_t capacity = static_cast<int64_t>(ring_->slots.size());
  const int64_t begin = std::max<int64_t>({0, end - capacity, end - kLookBack});
  FlightRecord last;
  bool any_finished = false;
  std::string in_flight;
  int flying = 0;
  for (int64_t handle = begin; handle < end; ++handle) {
    FlightRecord record;
    if (!ring_->Load(handle, &record)) continue;
    if (record.finished_us == 0) {
      if (++flying <= 3)
        absl::StrAppend(&in_flight, in_flight.empty() ? "" : ", ", ring_->Text(record));
    } else if (!any_finished || record.finished_us >= last.finished_us) {
      last = record;
      any_finished = true;
    }
  }
  std::string text =
      any_finished ? absl::StrCat("last finished: ", ring_->Text(last)) : "none finished";
  if (flying > 0) absl::StrAppend(&text, "; in flight: ", in_flight);
  if (flying > 3) absl::StrAppend(&text, " and ", flying - 3, " more");
  return text;
}

std::string FlightRecorder::ToJson(int rank, int world_size) const {
  nlohmann::json records = nlohmann::json::array();
  for (const FlightRecord& r : Snapshot()) {
    const char* state = r.finished_us != 0  ? "completed"
                        : r.started_us != 0 ? "started"
                                            : "scheduled";
    records.push_back({{"sequence", r.sequence},
                       {"group", r.group},
                       {"group_name", ring_->NameOf(r.group)},
                       {"op", Name(r.op)},
                       {"dtype", Name(r.dtype)},
                       {"count", r.count},
                       {"peer", r.peer},
                       {"label", r.label},
                       {"state", state},
                       {"enqueued_us", r.enqueued_us},
                       {"started_us", r.started_us},
                       {"finished_us", r.finished_us}});
  }
  const nlohmann::json document = {{"version", 1},
                                   {"rank", rank},
                                   {"world_size", world_size},
                                   {"dumped_us", NowMicroseconds()},
                                   {"records", std::move(records)}};
  // Labels come from the user and may be cut inside a UTF-8 sequence.
  return document.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);
}

absl::Status FlightRecorder::Dump(const std::string& directory, int rank, int world_size) const {
  const std::string path = absl::StrCat(directory, "/flight-rank", rank, ".json");
  const std::string partial = absl::StrCat(path, ".partial");
  {
    std::ofstream file(partial, std::ios::binary | std::ios::trunc);
    file << ToJson(rank, world_size) << "\n";
    file.close();
    if (!file) {
      return absl::UnavailableError(absl::StrCat("cannot write the flight record ", partial,
                                                 ": check that the directory exists and has room"));
    }
  }
  if (std::rename(partial.c_str(), path.c_str()) != 0) {
    return absl::UnavailableError(absl::StrCat("cannot rename ", partial, " to ", path));
  }
  return absl::OkStatus();
}

}  // namespace stretto
