#include "stretto/snapshot/slot.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/comm/wire.h"
#include "src/core/format.h"
#include "src/core/start_thread.h"
#include "src/core/touch_pages.h"
#include "src/snapshot/file_io.h"
#include "src/snapshot/mapping_guard.h"

namespace stretto {
namespace {

using snapshot_internal::IoError;

constexpr int64_t kPage = 4096;
constexpr int64_t kAlignment = 64;
constexpr int64_t kGrowth = int64_t{64} << 10;  // of the trainer's state
constexpr char kMagic[8] = {'S', 'T', 'R', 'S', 'L', 'O', 'T', '\n'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kContentsMagic = 0x43525453;  // "STRC"

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The header as it lies in memory; the checksum is of all before it.
struct RawHeader {
  char magic[8];
  uint32_t version;
  uint32_t state;
  uint64_t job, layout;
  int32_t rank, world_size;
  int64_t round, epoch;
  int64_t capacity, payload_bytes, contents_bytes;
  uint64_t contents_checksum;
  uint64_t checksum;
};
static_assert(sizeof(RawHeader) == 96);
static_assert(sizeof(RawHeader) <= kPage);

uint64_t ChecksumOf(const RawHeader& raw) {
  return XXH3_64bits(&raw, offsetof(RawHeader, checksum));
}

}  // namespace

uint64_t HashOf(const std::string& text) { return XXH3_64bits(text.data(), text.size()); }

SlotContents PlanContents(const StateRegistry& registry) {
  SlotContents contents;
  for (const StateEntry& entry : registry.entries()) {
    SlotEntry planned;
    planned.name = entry.name;
    planned.dtype = entry.dtype;
    planned.global_shape = entry.global_shape;
    planned.shape.assign(entry.local.dims.begin(), entry.local.dims.begin() + entry.local.rank);
    planned.first_row = entry.first_row;
    planned.first_column = entry.first_column;
    planned.offset = contents.data_bytes;
    planned.bytes = entry.owned ? entry.local.bytes() : 0;
    contents.data_bytes += Aligned(planned.bytes);
    contents.entries.push_back(std::move(planned));
  }
  return contents;
}

uint64_t LayoutHash(const SlotContents& contents, int rank, int world_size) {
  SlotContents layout = contents;
  layout.trainer_state.clear();
  for (SlotEntry& entry : layout.entries) entry.checksum = 0;
  return HashOf(absl::StrCat(rank, "/", world_size, " ") + EncodeContents(layout));
}

int64_t PayloadCapacity(const SlotContents& contents) {
  return contents.data_bytes +
         Aligned(static_cast<int64_t>(EncodeContents(contents).size()) + kGrowth);
}

int64_t RoomyCapacity(int64_t payload_bytes) { return Aligned(payload_bytes + kGrowth); }

std::string EncodeContents(const SlotContents& contents) {
  wire::Writer out;
  out.Int(kContentsMagic).Int(contents.data_bytes).Text(contents.trainer_state);
  out.Int(static_cast<uint32_t>(contents.entries.size()));
  const auto shape = [&out](const std::vector<int64_t>& dims) {
    out.Int(static_cast<uint32_t>(dims.size()));
    for (const int64_t d : dims) out.Int(d);
  };
  for (const SlotEntry& entry : contents.entries) {
    out.Text(entry.name).Int(entry.dtype);
    shape(entry.global_shape);
    shape(entry.shape);
    out.Int(entry.first_row).Int(entry.first_column).Int(entry.offset).Int(entry.bytes);
    out.Int(entry.checksum);
  }
  return out.Frame().substr(sizeof(uint32_t));
}

absl::StatusOr<SlotContents> DecodeContents(const std::string& text, const std::string& source) {
  wire::Reader in(text.data(), text.size());
  SlotContents contents;
  bool sound = in.Int<uint32_t>() == kContentsMagic;
  contents.data_bytes = in.Int<int64_t>();
  contents.trainer_state = in.Text();
  const auto shape = [&](std::vector<int64_t>* dims) {
    const uint32_t rank = in.Int<uint32_t>();
    sound = sound && rank >= 1 && rank <= Tensor::kMaxRank;
    for (uint32_t i = 0; sound && i < rank; ++i) {
      dims->push_back(in.Int<int64_t>());
      sound = sound && dims->back() >= 0;
    }
  };
  for (uint32_t left = in.Int<uint32_t>(); sound && in.ok() && left > 0; --left) {
    SlotEntry entry;
    entry.name = in.Text();
    entry.dtype = in.Int<DType>();
    sound = sound && entry.dtype <= DType::kU8;
    shape(&entry.global_shape);
    shape(&entry.shape);
    entry.first_row = in.Int<int64_t>();
    entry.first_column = in.Int<int64_t>();
    entry.offset = in.Int<int64_t>();
    entry.bytes = in.Int<int64_t>();
    entry.checksum = in.Int<uint64_t>();
    sound = sound && entry.bytes >= 0 && entry.offset >= 0 &&
            entry.offset <= contents.data_bytes - entry.bytes;
    contents.entries.push_back(std::move(entry));
  }
  if (!sound || !in.ok()) {
    return absl::DataLossError(absl::StrCat(source, " has a damaged table of contents"));
  }
  return contents;
}

// Memory.

SlotMemory::SlotMemory(std::string name, std::byte* base, int64_t capacity)
    : name_(std::move(name)),
      base_(base),
      capacity_(capacity),
      guard_(std::make_unique<snapshot_internal::MappingGuard>(base, kPage + capacity)) {}

SlotMemory::~SlotMemory() {
  guard_.reset();
  munmap(base_, static_cast<size_t>(kPage + capacity_));
}

int64_t SlotMemory::mapped_bytes() const {
  return (kPayloadOffset + capacity_ + kPage - 1) / kPage * kPage;
}

void SlotMemory::Unlink() { shm_unlink(name_.c_str()); }

absl::Status SlotMemory::Whole() const {
  const std::string path = "/dev/shm" + name_;
  struct stat info = {};
  const bool cut = stat(path.c_str(), &info) == 0 && info.st_size < kPage + capacity_;
  if (!cut && !guard_->lost()) return absl::OkStatus();
  return absl::DataLossError(absl::StrCat(path, " was cut short by somebody else"));
}

absl::StatusOr<std::shared_ptr<SlotMemory>> SlotMemory::Create(const std::string& name,
                                                               int64_t capacity) {
  const std::string path = "/dev/shm" + name;
  const int64_t bytes = kPage + capacity;
  shm_unlink(name.c_str());
  const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return IoError(errno, "create", path);
  struct statvfs room = {};
  absl::Status status;
  if (fstatvfs(fd, &room) == 0 &&
      static_cast<double>(room.f_bavail) * static_cast<double>(room.f_frsize) <
          static_cast<double>(bytes)) {
    status = absl::ResourceExhaustedError(absl::StrCat(
        "/dev/shm has ", HumanBytes(static_cast<int64_t>(room.f_bavail * room.f_frsize)),
        " free and a slot of a snapshot needs ", HumanBytes(bytes),
        "; enlarge it (mount -o remount,size=...) or do without snapshots"));
  } else if (ftruncate(fd, bytes) != 0) {
    status = IoError(errno, "enlarge", path);
  }
  void* base = MAP_FAILED;
  if (status.ok()) {
    base = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) status = IoError(errno, "map", path);
  }
  close(fd);
  if (!status.ok()) {
    shm_unlink(name.c_str());
    return status;
  }
  return std::shared_ptr<SlotMemory>(new SlotMemory(name, static_cast<std::byte*>(base), capacity));
}

absl::StatusOr<std::shared_ptr<SlotMemory>> SlotMemory::Open(const std::string& name) {
  const std::string path = "/dev/shm" + name;
  const int fd = shm_open(name.c_str(), O_RDWR | O_CLOEXEC, 0);
  if (fd < 0) return IoError(errno, "open", path);
  struct stat info = {};
  void* base = MAP_FAILED;
  absl::Status status;
  if (fstat(fd, &info) != 0) {
    status = IoError(errno, "examine", path);
  } else if (info.st_size < kPage) {
    status = absl::DataLossError(absl::StrCat(path, " is too short for a slot"));
  } else {
    base =
        mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) status = IoError(errno, "map", path);
  }
  close(fd);
  STRETTO_RETURN_IF_ERROR(status);
  return std::shared_ptr<SlotMemory>(
      new SlotMemory(name, static_cast<std::byte*>(base), info.st_size - kPage));
}

absl::Status SlotMemory::Prefault(int threads) {
  const int64_t bytes = kPage + capacity_;
  // The guard notices a file system that is short where the kernel does not say so.
  int error = TouchPages(base_, bytes, threads);
  if (error == 0 && guard_->lost()) error = ENOSPC;
  if (error == 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("no memory for a slot of a snapshot of ",
                                                   HumanBytes(bytes), ": ", std::strerror(error),
                                                   "; enlarge /dev/shm or do without snapshots"));
}

void SlotMemory::WriteHeader(const SlotHeader& header) {
  RawHeader raw = {};
  std::memcpy(raw.magic, kMagic, sizeof(kMagic));
  raw.version = kVersion;
  raw.state = static_cast<uint32_t>(header.state);
  raw.job = header.job;
  raw.layout = header.layout;
  raw.rank = header.rank;
  raw.world_size = header.world_size;
  raw.round = header.id.round;
  raw.epoch = header.id.epoch;
  raw.capacity = capacity_;
  raw.payload_bytes = header.payload_bytes;
  raw.contents_bytes = header.contents_bytes;
  raw.contents_checksum = header.contents_checksum;
  raw.checksum = ChecksumOf(raw);
  std::memcpy(base_, &raw, sizeof(raw));
}

absl::StatusOr<SlotHeader> SlotMemory::ReadHeader() const {
  RawHeader raw;
  std::memcpy(&raw, base_, sizeof(raw));
  if (std::memcmp(raw.magic, kMagic, sizeof(kMagic)) != 0) {
    return absl::DataLossError(absl::StrCat("/dev/shm", name_, " is no slot of a snapshot"));
  }
  // Else a bit has flipped in it.
  if (raw.version != kVersion && raw.checksum == ChecksumOf(raw)) {
    return absl::FailedPreconditionError(
        absl::StrCat("/dev/shm", name_, " has version ", raw.version, ", this program reads ",
                     kVersion, "; use keepers and trainers of one version"));
  }
  const bool sane =
      raw.version == kVersion && raw.checksum == ChecksumOf(raw) && raw.capacity == capacity_ &&
      raw.state <= static_cast<uint32_t>(SlotState::kCommitted) && raw.contents_bytes >= 0 &&
      raw.payload_bytes >= raw.contents_bytes && raw.payload_bytes <= capacity_;
  if (!sane) {
    return absl::DataLossError(absl::StrCat("/dev/shm", name_, " has a damaged header"));
  }
  SlotHeader header;
  header.job = raw.job;
  header.layout = raw.layout;
  header.rank = raw.rank;
  header.world_size = raw.world_size;
  header.state = static_cast<SlotState>(raw.state);
  header.id = {raw.round, raw.epoch};
  header.payload_bytes = raw.payload_bytes;
  header.contents_bytes = raw.contents_bytes;
  header.contents_checksum = raw.contents_checksum;
  return header;
}

absl::StatusOr<SlotContents> SlotMemory::ReadContents(const SlotIdentity& expected,
                                                      SlotHeader* header_out) const {
  const std::string where = "/dev/shm" + name_;
  STRETTO_ASSIGN_OR_RETURN(const SlotHeader header, ReadHeader());
  if (header_out != nullptr) *header_out = header;
  if (header.job != HashOf(expected.job)) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, " belongs to another job than \"", expected.job, "\""));
  }
  if (header.state < SlotState::kSealed) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, " is ", Name(header.state), ", so it holds no whole snapshot"));
  }
  if (header.rank != expected.rank || (expected.layout != 0 && header.layout != expected.layout)) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, " was written by rank ", header.rank, " of ", header.world_size,
                     " under another layout than rank ", expected.rank, " has now"));
  }
  const auto* at = payload() + header.payload_bytes - header.contents_bytes;
  const std::string text(reinterpret_cast<const char*>(at),
                         static_cast<size_t>(header.contents_bytes));
  if (HashOf(text) != header.contents_checksum) {
    return absl::DataLossError(absl::StrCat(where, " has a damaged table of contents"));
  }
  STRETTO_ASSIGN_OR_RETURN(SlotContents contents, DecodeContents(text, where));
  if (contents.data_bytes > header.payload_bytes - header.contents_bytes) {
    return absl::DataLossError(absl::StrCat(where, " has a damaged table of contents"));
  }
  return contents;
}

absl::Status SlotMemory::VerifyData(const SlotContents& contents, int threads) const {
  // The largest first, so that threads end together.
  std::vector<const SlotEntry*> order;
  for (const SlotEntry& entry : contents.entries) {
    if (entry.bytes > 0) order.push_back(&entry);
  }
  std::stable_sort(order.begin(), order.end(),
                   [](const SlotEntry* a, const SlotEntry* b) { return a->bytes > b->bytes; });
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  const SlotEntry* damaged = nullptr;
  OnThreads(std::max(1, threads), "checksums of snapshots", [&](int) {
    for (size_t i = next.fetch_add(1); i < order.size(); i = next.fetch_add(1)) {
      const SlotEntry& entry = *order[i];
      if (DataChecksum(entry) == entry.checksum) continue;
      const std::lock_guard<std::mutex> lock(mutex);
      if (damaged == nullptr || &entry < damaged) damaged = &entry;
    }
  });
  STRETTO_RETURN_IF_ERROR(Whole());
  return damaged == nullptr ? absl::OkStatus() : Damaged(*damaged);
}

uint64_t SlotMemory::DataChecksum(const SlotEntry& entry) const {
  return XXH3_64bits(payload() + entry.offset, static_cast<size_t>(entry.bytes));
}

absl::Status SlotMemory::Damaged(const SlotEntry& entry) const {
  return absl::DataLossError(absl::StrCat("/dev/shm", name_, ": the bytes of ", entry.name,
                                          " are not those that were written"));
}

absl::Status FinishSlot(const SlotContents& contents, SlotMemory& slot, SlotHeader* header) {
  const std::string text = EncodeContents(contents);
  const auto size = static_cast<int64_t>(text.size());
  if (size > slot.capacity() - contents.data_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the table of contents of a snapshot has outgrown its slot by ",
        size - (slot.capacity() - contents.data_bytes), " bytes: the trainer's state has grown"));
  }
  std::memcpy(slot.payload() + contents.data_bytes, text.data(), text.size());
  header->payload_bytes = contents.data_bytes + size;
  header->contents_bytes = size;
  header->contents_checksum = HashOf(text);
  return absl::OkStatus();
}

}  // namespace stretto
