#include "src/comm/cuda/copy_engines.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "src/comm/cuda/sum_parts.h"
#include "src/comm/world_internal.h"
#include "src/core/start_thread.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

constexpr auto kFarewell = std::chrono::seconds(10);  // until others have finished with a window
constexpr auto kFarewellOfFew = std::chrono::seconds(1);  // ... after an error
constexpr auto kTrial = std::chrono::seconds(20);  // of a new channel, unless set-up has less
constexpr auto kLook = std::chrono::milliseconds(1);
constexpr size_t kFlagBytes = 4096;
// Behind the cells of the rounds: whether a rank has unmapped what belongs to the others.
constexpr int kUnmapped = CopyEngines::kMostRanks * CopyEngines::kMostRanks;
static_assert((kUnmapped + CopyEngines::kMostRanks) * sizeof(uint32_t) <= kFlagBytes);
// A round that has not begun and yet is ahead of all that has, as flags compare.
constexpr uint32_t kFarAhead = uint32_t{1} << 30;

absl::Status Called(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // an error that is no kernel's
  return absl::InternalError(absl::StrCat("CUDA: ", call, " failed: ", cudaGetErrorName(error),
                                          " (", cudaGetErrorString(error), ")"));
}

}  // namespace

std::byte* CopyEngines::Slot(std::byte* window, uint32_t round) {
  return window + round % kSlots * kSlotBytes;
}

int64_t CopyEngines::Room(const Operation& o) {
  if (o.op == CommOp::kAllGather) return kSlotBytes;
  return kSlotBytes / (o.group->size() - 1) / CopyRounds::kAlignment * CopyRounds::kAlignment;
}

bool CopyEngines::InPlace(const Operation& o, const Operation::Item& item) {
  return item.input == item.output + o.group->index * item.elements * SizeOf(o.dtype);
}

const CopyEngines::Region* CopyEngines::SharedBy(const Channel& c, const Operation& o) {
  if (o.op != CommOp::kAllGather) return nullptr;
  for (const Region& region : c.regions) {
    const std::byte* const begin = region.own.data();
    const std::byte* const end = begin + region.own.size();
    const bool all = std::all_of(o.items.begin(), o.items.end(), [&](const Operation::Item& item) {
      int64_t bytes = item.elements * SizeOf(o.dtype);
      const std::byte* from = item.input;
      if (InPlace(o, item)) {  // the others' are beside it
        from = item.output;
        bytes *= c.group.size();
      }
      return bytes == 0 || (from >= begin && from < end && bytes <= end - from);
    });
    if (all) return &region;
  }
  return nullptr;
}

CopyEngines::Channel* CopyEngines::Of(const Group& group) {
  for (Channel& c : channels_) {
    if (c.group.id == group.id) return &c;
  }
  return nullptr;
}

int64_t CopyEngines::Launches(const Operation& o) {
  const bool can =
      o.op == CommOp::kAllGather || (o.op == CommOp::kReduceScatter && CanSumParts(o.dtype));
  const Channel* const c = can ? Of(*o.group) : nullptr;
  if (c == nullptr) return 0;
  if (SharedBy(*c, o) != nullptr) {
    const int64_t launches = 3 + static_cast<int64_t>(o.items.size()) * o.group->size();
    return launches <= kMostLaunches ? launches : 0;
  }
  // A copy for each piece and other rank, and of an all-gather two within the rank.
  const int64_t of_piece = o.group->size() - 1 + (o.op == CommOp::kAllGather ? 2 : 0);
  const int64_t of_round = 4;  // flags, a sum, and a wait and an event around it
  int64_t launches = 0;
  CopyRounds rounds(o.items, SizeOf(o.dtype), Room(o));
  while (rounds.Next(&pieces_)) {
    launches += of_round + static_cast<int64_t>(pieces_.size()) * of_piece;
  }
  return launches <= kMostLaunches ? launches : 0;
}

void CopyEngines::Write(const Channel& c, int cell, uint32_t value) {
  CUstreamBatchMemOpParams& p = signals_.emplace_back();
  p = {};
  p.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  p.writeValue.address = c.device_flags + static_cast<CUdeviceptr>(cell) * sizeof(uint32_t);
  p.writeValue.value = value;
  p.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;  // after all that the stream wrote before
}

void CopyEngines::Wait(const Channel& c, int cell, uint32_t value) {
  CUstreamBatchMemOpParams& p = signals_.emplace_back();
  p = {};
  p.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
  p.waitValue.address = c.device_flags + static_cast<CUdeviceptr>(cell) * sizeof(uint32_t);
  p.waitValue.value = value;
  p.waitValue.flags = CU_STREAM_WAIT_VALUE_GEQ;  // cyclic: rounds may pass 2^32
}

absl::Status CopyEngines::Signal() {
  const CUresult result =
      batch_mem_op_(native(), static_cast<unsigned>(signals_.size()), signals_.data(), 0);
  signals_.clear();
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("CUDA: cuStreamBatchMemOp failed with error ", static_cast<int>(result)));
}

void CopyEngines::Copy(std::byte* to, const std::byte* from, int64_t bytes) {
  if (to == from) return;
  to_.push_back(to);
  from_.push_back(from);
  bytes_.push_back(static_cast<size_t>(bytes));
}

absl::Status CopyEngines::CopyAll(Stream& stream) {
  cudaError_t error = cudaSuccess;
  if (!to_.empty()) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    error = cudaMemcpyBatchAsync(to_.data(), from_.data(), bytes_.data(), to_.size(), &attributes,
                                 &first, 1, Native(stream));
  }
  to_.clear();
  from_.clear();
  bytes_.clear();
  return Called("cudaMemcpyBatchAsync", error);
}

absl::Status CopyEngines::AddParts(const Channel& c, const Operation& o, const std::byte* slot) {
  static_assert(SumTable::kMost >= CopyRounds::kMostPieces);
  const int64_t size = SizeOf(o.dtype);
  SumTable table;
  table.ranks = c.group.size();
  table.index = c.group.index;
  table.stride = Room(o);
  table.adds = o.adds;
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    table.pieces[table.count++] = {
        item.input + (c.group.index * item.elements + piece.begin) * size, slot + piece.at,
        item.output + piece.begin * size, piece.elements};
  }
  return Called("the addition of a reduce-scatter",
                SumParts(table, o.dtype, multiprocessors_, Native(*aside_)));
}

absl::Status CopyEngines::Meet(const Channel& c) {
  const int n = c.group.size(), me = c.group.index;
  for (int p = 0; p < n; ++p) {
    if (p != me) Write(c, Cell(p, me), c.rounds);
  }
  for (int p = 0; p < n; ++p) {
    if (p != me) Wait(c, Cell(me, p), c.rounds);
  }
  return Signal();
}

absl::Status CopyEngines::EnqueueRound(Channel* channel, const Operation& o) {
  Channel& c = *channel;
  const int n = c.group.size(), me = c.group.index;
  const bool gathers = o.op == CommOp::kAllGather;
  const int64_t size = SizeOf(o.dtype);
  std::byte* const window = c.windows[static_cast<size_t>(me)];
  // Everybody begins with another rank.
  const auto other = [&](int i) { return (me + i) % n; };
  const auto window_of = [&](int p) { return c.windows[static_cast<size_t>(p)]; };

  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    const std::byte* const input = item.input + piece.begin * size;
    const int64_t bytes = piece.elements * size;
    if (gathers) Copy(Slot(window, c.rounds) + piece.at, input, bytes);
    for (int i = 1; !gathers && i < n; ++i) {
      const int p = other(i);
      const int place = me < p ? me : me - 1;  // among the ranks other than p
      Copy(Slot(window_of(p), c.rounds) + place * Room(o) + piece.at,
           input + p * item.elements * size, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  stream_.Wait(c.added);
  STRETTO_RETURN_IF_ERROR(Meet(c));
  if (!gathers) {
    Follow(*aside_, stream_);
    STRETTO_RETURN_IF_ERROR(AddParts(c, o, Slot(window, c.rounds)));
    c.added = aside_->Record();
    return aside_->status();
  }
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    std::byte* const output = item.output + piece.begin * size;
    const int64_t bytes = piece.elements * size;
    for (int i = 1; i < n; ++i) {
      const int p = other(i);
      Copy(output + p * item.elements * size, Slot(window_of(p), c.rounds) + piece.at, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    Copy(item.output + (me * item.elements + piece.begin) * size, item.input + piece.begin * size,
         piece.elements * size);
  }
  return CopyAll(*aside_);
}

absl::Status CopyEngines::EnqueueShared(Channel* c, const Region& region, const Operation& o) {
  const int n = c->group.size(), me = c->group.index;
  // Needs no other rank.
  for (const Operation::Item& item : o.items) {
    const int64_t bytes = item.elements * SizeOf(o.dtype);
    if (bytes > 0) Copy(item.output + me * bytes, item.input, bytes);
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(*aside_));
  ++c->rounds;
  STRETTO_RETURN_IF_ERROR(Meet(*c));
  for (const Operation::Item& item : o.items) {
    const int64_t bytes = item.elements * SizeOf(o.dtype);
    if (bytes == 0) continue;
    // In place each rank's part is at another place.
    const bool in_place = InPlace(o, item);
    for (int i = 1; i < n; ++i) {
      const int p = (me + i) % n;
      const std::ptrdiff_t at = item.input - region.own.data() + (in_place ? (p - me) * bytes : 0);
      Copy(item.output + p * bytes, region.bases[static_cast<size_t>(p)] + at, bytes);
    }
  }
  STRETTO_RETURN_IF_ERROR(CopyAll(stream_));
  ++c->rounds;
  return Meet(*c);
}

absl::StatusOr<Stream*> CopyEngines::Enqueue(Channel* c, const Operation& o) {
  Order(o);
  const Region* const region = SharedBy(*c, o);
  if (region != nullptr && std::all_of(o.items.begin(), o.items.end(), [&](const auto& item) {
        return item.elements == 0 || InPlace(o, item);
      })) {
    STRETTO_RETURN_IF_ERROR(EnqueueShared(c, *region, o));
    return &stream_;
  }
  // What is aside begins when the operation does.
  Follow(*aside_, stream_);
  if (region != nullptr) {
    STRETTO_RETURN_IF_ERROR(EnqueueShared(c, *region, o));
  } else {
    CopyRounds rounds(o.items, SizeOf(o.dtype), Room(o));
    while (rounds.Next(&pieces_)) {
      ++c->rounds;
      STRETTO_RETURN_IF_ERROR(EnqueueRound(c, o));
    }
  }
  Follow(*aside_, stream_);
  const Event done = aside_->Record();
  EachTensor(o, [&](std::span<const std::byte> tensor) { ends_.push_back({done, tensor}); });
  STRETTO_RETURN_IF_ERROR(aside_->status());
  return aside_.get();
}

template <class Call>
void CopyEngines::EachTensor(const Operation& o, const Call& touches) {
  const bool gathers = o.op == CommOp::kAllGather;
  for (const Operation::Item& item : o.items) {
    const auto part = static_cast<size_t>(item.elements * SizeOf(o.dtype));
    const size_t whole = part * static_cast<size_t>(o.group->size());
    if (part == 0) continue;
    touches(std::span<const std::byte>(item.input, gathers ? part : whole));
    touches(std::span<const std::byte>(item.output, gathers ? whole : part));
  }
}

void CopyEngines::Order(const Operation& o) {
  ends_.erase(ends_.begin(), std::find_if(ends_.begin(), ends_.end(),
                                          [](const Aside& end) { return !end.done.Done(); }));
  const auto meet = [](std::span<const std::byte> a, std::span<const std::byte> b) {
    return a.data() < b.data() + b.size() && b.data() < a.data() + a.size();
  };
  // The last one that meets comes after the ones before it.
  for (auto end = ends_.rbegin(); end != ends_.rend(); ++end) {
    bool meets = false;
    EachTensor(
        o, [&](std::span<const std::byte> tensor) { meets = meets || meet(tensor, end->tensor); });
    if (!meets) continue;
    stream_.Wait(end->done);
    return;
  }
}

void CopyEngines::Join() {
  if (!ends_.empty()) stream_.Wait(ends_.back().done);
  ends_.clear();
}

absl::StatusOr<Stream*> CopyEngines::Issue(const Operation& o) { return Enqueue(Of(*o.group), o); }

bool CopyEngines::Busy() const {
  return cudaStreamQuery(native()) == cudaErrorNotReady ||
         (aside_ != nullptr && cudaStreamQuery(Native(*aside_)) == cudaErrorNotReady);
}

bool CopyEngines::Idle(Clock::time_point end) {
  while (Busy()) {
    if (Clock::now() > end) return false;
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

void CopyEngines::EndWaits(const Channel& c) {
  for (int p = 0; c.flags != nullptr && p < c.group.size(); ++p) {
    std::atomic_ref<uint32_t>(c.flags[Cell(c.group.index, p)]).store(c.rounds + kFarAhead);
  }
}

bool CopyEngines::End(Clock::time_point end) {
  ended_ = true;
  return IdleWhile(end, [this] {
    for (const Channel& c : channels_) EndWaits(c);
  });
}

bool CopyEngines::IdleWhile(Clock::time_point end, const std::function<void()>& end_waits) {
  end_waits();
  // Again and again, since a rank that has not given up yet goes on to write its flags; and in a
  // thread that makes no call of CUDA, which another call might hold up.
  std::atomic<bool> done = false;
  absl::StatusOr<std::thread> again = StartThread("the end of copies", [&] {
    for (; !done; std::this_thread::sleep_for(kLook)) end_waits();
  });
  cudaSetDevice(stream_.device().index);
  const bool idle = Idle(end);
  done = true;
  if (again.ok()) again->join();
  return idle;
}

CopyEngines::~CopyEngines() {
  cudaSetDevice(stream_.device().index);
  for (Channel& c : channels_) {
    ++c.rounds;  // a last one, of nothing
    if (!ended_ && !Meet(c).ok()) ended_ = true;
  }
  if (!channels_.empty() && !Idle(Clock::now() + kFarewell)) {
    LogWarning("other ranks have not finished with the windows of the copy engines");
    End(Clock::now() + kFarewell);
  }
  // What a rank frees afterwards nobody may have mapped any more.
  for (Channel& c : channels_) {
    Unmap(&c);
    if (c.flags != nullptr) {
      std::atomic_ref<uint32_t>(c.flags[kUnmapped + c.group.index]).store(1);
    }
  }
  // A rank that died never says so.
  const Clock::time_point end = Clock::now() + (ended_ ? kFarewellOfFew : kFarewell);
  for (const Channel& c : channels_) {
    for (int p = 0; c.flags != nullptr && p < c.group.size(); ++p) {
      while (std::atomic_ref<uint32_t>(c.flags[kUnmapped + p]).load() == 0 && Clock::now() < end) {
        std::this_thread::sleep_for(kLook);
      }
    }
  }
  for (Channel& c : channels_) Close(&c);
}

// What the GPU, the driver and this build need; once.
absl::Status CopyEngines::Prepare() {
  if (batch_mem_op_ != nullptr) return absl::OkStatus();
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaGetDriverEntryPointByVersion",
             cudaGetDriverEntryPointByVersion("cuStreamBatchMemOp", &function, 12000,
                                              cudaEnableDefault, &found)));
  int driver = 0;
  STRETTO_RETURN_IF_ERROR(Called("cudaDriverGetVersion", cudaDriverGetVersion(&driver)));
  if (found != cudaDriverEntryPointSuccess || function == nullptr || driver < 12080) {
    return absl::UnavailableError(absl::StrCat("the driver supports CUDA ", driver / 1000, ".",
                                               driver % 1000 / 10,
                                               ", and copies in batches need 12.8"));
  }
  void* range = nullptr;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaGetDriverEntryPointByVersion",
             cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &range, 12000,
                                              cudaEnableDefault, &found)));
  if (found != cudaDriverEntryPointSuccess || range == nullptr) {
    return absl::UnavailableError("the driver has no cuMemGetAddressRange");
  }
  address_range_ = reinterpret_cast<decltype(&cuMemGetAddressRange)>(range);
  STRETTO_ASSIGN_OR_RETURN(
      aside_, Stream::Create(stream_.device(), {.workspace_bytes = 0, .first_served = true}));
  batch_mem_op_ = reinterpret_cast<decltype(&cuStreamBatchMemOp)>(function);
  return absl::OkStatus();
}

absl::Status CopyEngines::Export(const std::byte* memory, std::string* handle) {
  const auto address = reinterpret_cast<CUdeviceptr>(memory);
  CUdeviceptr base = 0;
  size_t bytes = 0;
  const CUresult found = address_range_(&base, &bytes, address);
  if (found != CUDA_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("CUDA: cuMemGetAddressRange failed with error ", static_cast<int>(found)));
  }
  cudaIpcMemHandle_t exported;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&exported, reinterpret_cast<void*>(base))));
  *handle = absl::StrCat(absl::BytesToHexString(absl::string_view(
                             reinterpret_cast<const char*>(&exported), sizeof(exported))),
                         "+", address - base);
  return absl::OkStatus();
}

absl::Status CopyEngines::Import(absl::string_view handle, Channel* c, std::byte** memory) {
  const std::vector<std::string> parts = absl::StrSplit(handle, '+');
  cudaIpcMemHandle_t imported;
  int64_t offset = 0;
  std::string bytes;
  if (parts.size() == 2) bytes = absl::HexStringToBytes(parts[0]);
  if (bytes.size() != sizeof(imported) || !absl::SimpleAtoi(parts[1], &offset)) {
    return absl::InternalError("a handle is cut");
  }
  std::memcpy(&imported, bytes.data(), sizeof(imported));
  void* allocation = nullptr;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaIpcOpenMemHandle",
             cudaIpcOpenMemHandle(&allocation, imported, cudaIpcMemLazyEnablePeerAccess)));
  c->mapped.push_back(allocation);
  *memory = static_cast<std::byte*>(allocation) + offset;
  return absl::OkStatus();
}

absl::Status CopyEngines::Open(Channel* c, std::string* handle) {
  STRETTO_RETURN_IF_ERROR(Prepare());
  const int ranks = c->group.size();
  if (ranks > kMostRanks) {
    return absl::UnimplementedError(
        absl::StrCat("the group has ", ranks, " ranks, more than ", kMostRanks));
  }
  STRETTO_ASSIGN_OR_RETURN(c->window, Arena::Create(stream_.device(), "copy window", kWindowBytes));
  c->windows[static_cast<size_t>(c->group.index)] = c->window.data();
  STRETTO_RETURN_IF_ERROR(Export(c->window.data(), handle));
  if (c->group.index > 0) return absl::OkStatus();
  // Containers may share memory and not the numbers of their processes.
  std::random_device random;
  c->flags_name =
      absl::StrCat("/stretto-flags-", getpid(), "-", absl::Hex(random()), "-", absl::Hex(random()));
  return MapFlags(/*create=*/true, c);
}

absl::Status CopyEngines::MapFlags(bool create, Channel* c) {
  const auto failed = [&](const char* call) {
    return absl::UnavailableError(
        absl::StrCat(call, " of shared memory ", c->flags_name, " failed: ", std::strerror(errno)));
  };
  const int file =
      shm_open(c->flags_name.c_str(), create ? O_CREAT | O_EXCL | O_RDWR : O_RDWR, 0600);
  if (file < 0) return failed("shm_open");
  void* memory = MAP_FAILED;
  const char* call = "ftruncate";
  if (!create || ftruncate(file, kFlagBytes) == 0) {
    call = "mmap";
    memory = mmap(nullptr, kFlagBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  const absl::Status mapped = memory == MAP_FAILED ? failed(call) : absl::OkStatus();
  close(file);
  STRETTO_RETURN_IF_ERROR(mapped);
  c->flags = static_cast<uint32_t*>(memory);
  STRETTO_ASSIGN_OR_RETURN(
      c->registration,
      HostRegistration::Create(stream_.device(), static_cast<std::byte*>(memory), kFlagBytes));
  void* device = nullptr;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaHostGetDevicePointer", cudaHostGetDevicePointer(&device, memory, 0)));
  c->device_flags = reinterpret_cast<CUdeviceptr>(device);
  return absl::OkStatus();
}

absl::Status CopyEngines::MapPeers(const std::vector<std::string>& handles, Channel* c) {
  const std::vector<std::string> mine =
      absl::StrSplit(handles[static_cast<size_t>(world_.rank())], ' ');
  for (int p = 0; p < c->group.size(); ++p) {
    if (p == c->group.index) continue;
    const int rank = c->group.ranks[static_cast<size_t>(p)];
    // "ok", the machine, the process, the window, and of the first rank the flags.
    const std::vector<std::string> theirs = absl::StrSplit(handles[static_cast<size_t>(rank)], ' ');
    if (theirs.size() != 5 || mine.size() != 5) return absl::InternalError("a handle is cut");
    if (theirs[1] != mine[1]) {
      return absl::UnavailableError(
          absl::StrCat("ranks ", world_.rank(), " and ", rank, " are on different machines"));
    }
    if (theirs[2] == mine[2]) {
      return absl::UnavailableError(
          absl::StrCat("ranks ", world_.rank(), " and ", rank, " are in one process"));
    }
    STRETTO_RETURN_IF_ERROR(Import(theirs[3], c, &c->windows[static_cast<size_t>(p)]));
    if (p == 0) {
      c->flags_name = theirs[4];
      const absl::Status shared = MapFlags(/*create=*/false, c);
      c->flags_name.clear();  // the first rank's to remove
      STRETTO_RETURN_IF_ERROR(shared);
    }
  }
  return absl::OkStatus();
}

absl::Status CopyEngines::Try(Channel* c) {
  // Sums stay below 2^24, which f32 holds exactly.
  constexpr int64_t kPart = 1021;
  const int64_t n = c->group.size(), me = c->group.index;
  STRETTO_ASSIGN_OR_RETURN(const Arena arena,
                           Arena::Create(stream_.device(), "trial", (2 * n + 1) * kPart * 4));
  const auto tensor = [&](int64_t from, int64_t parts) {
    return Tensor::Of(arena.data() + from * kPart * 4, DType::kF32, {parts * kPart},
                      stream_.device());
  };
  const Tensor input = tensor(0, n), sum = tensor(n, 1), all = tensor(n + 1, n);
  std::vector<float> host(static_cast<size_t>(n * kPart));
  for (int64_t i = 0; i < n * kPart; ++i) {
    host[static_cast<size_t>(i)] = static_cast<float>((me + 1) * i);
  }
  STRETTO_RETURN_IF_ERROR(CopyFromHost(input, host.data()));
  Operation reduce, gather;
  reduce.op = CommOp::kReduceScatter;
  reduce.items = {{input.data, sum.data, kPart}};
  gather.op = CommOp::kAllGather;
  gather.items = {{sum.data, all.data, kPart}};
  // A wait must be one that a store ends, before anything depends on that.
  Wait(*c, Cell(c->group.index, c->group.index), kFarAhead);
  absl::Status used = Signal();
  if (cudaStreamQuery(native()) != cudaErrorNotReady) {
    used.Update(absl::InternalError("the stream does not wait for a flag"));
  }
  std::atomic_ref<uint32_t>(c->flags[Cell(c->group.index, c->group.index)]).store(kFarAhead);
  // Often enough to come back to the first slot.
  for (int round = 0; round <= kSlots; ++round) {
    for (Operation* o : {&reduce, &gather}) {
      o->group = &c->group;
      used.Update(Enqueue(c, *o).status());
    }
  }
  const auto limit = std::min<std::chrono::milliseconds>(kTrial, SetupTimeout(world_.options()));
  if (!used.ok() || !Idle(Clock::now() + limit)) {
    // Before the arena's memory is freed, which waits for the device.
    IdleWhile(Clock::now() + kTrial, [c] { EndWaits(*c); });
    used.Update(absl::DeadlineExceededError("a first exchange by the copy engines did not end"));
    return used;
  }
  STRETTO_RETURN_IF_ERROR(CopyToHost(host.data(), all));
  for (int64_t i = 0; i < n * kPart; ++i) {
    if (host[static_cast<size_t>(i)] != static_cast<float>(n * (n + 1) / 2 * i)) {
      return absl::DataLossError("a first exchange by the copy engines brought other bytes");
    }
  }
  return absl::OkStatus();
}

void CopyEngines::Unmap(Channel* c, size_t left) {
  for (; c->mapped.size() > left; c->mapped.pop_back()) {
    if (cudaIpcCloseMemHandle(c->mapped.back()) != cudaSuccess) cudaGetLastError();
  }
}

void CopyEngines::Close(Channel* c) {
  Unmap(c);
  c->windows.clear();
  if (!c->flags_name.empty()) shm_unlink(c->flags_name.c_str());
  c->flags_name.clear();
  c->registration.reset();
  if (c->flags != nullptr) munmap(c->flags, kFlagBytes);
  c->flags = nullptr;
}

absl::StatusOr<std::string> CopyEngines::Agree(const Group& group, const char* what,
                                               const absl::Status& mine, const std::string& value,
                                               std::vector<std::string>* values) {
  STRETTO_ASSIGN_OR_RETURN(
      *values, world_.AllGather(absl::StrCat("copy engines of group ", group.name, ", ", what),
                                mine.ok() ? absl::StrCat("ok ", value)
                                          : absl::StrCat("no ", std::string(mine.message()))));
  for (int r = 0; r < world_.size(); ++r) {
    const std::string& text = (*values)[static_cast<size_t>(r)];
    if (text.starts_with("no ")) return absl::StrCat("rank ", r, ": ", text.substr(3));
  }
  return std::string();
}

absl::StatusOr<std::string> CopyEngines::Share(const Group& group, std::span<std::byte> memory,
                                               uint64_t layout) {
  Channel* const c = Of(group);
  if (c == nullptr) return absl::StrCat("group ", group.name, " has no copy engines");
  const size_t mapped = c->mapped.size();
  std::string handle = "-";
  std::vector<std::string> values;
  const absl::Status exported = memory.empty() ? absl::OkStatus() : Export(memory.data(), &handle);
  absl::StatusOr<std::string> why = Agree(
      group, "memory", exported, absl::StrCat(memory.size(), " ", layout, " ", handle), &values);
  Region region = {.own = memory, .bases = {}};
  const auto map = [&]() -> absl::Status {
    // "ok", bytes, the layout, the memory.
    const auto of = [&](int rank) {
      return std::vector<std::string>(absl::StrSplit(values[static_cast<size_t>(rank)], ' '));
    };
    const std::vector<std::string> mine = of(world_.rank());
    for (int p = 0; p < group.size(); ++p) {
      const int rank = group.ranks[static_cast<size_t>(p)];
      const std::vector<std::string> theirs = of(rank);
      std::byte*& base = region.bases.emplace_back(memory.data());
      if (theirs.size() != 4 || mine.size() != 4) return absl::InternalError("a handle is cut");
      if (theirs[1] != mine[1] || theirs[2] != mine[2]) {
        return absl::FailedPreconditionError(absl::StrCat("the memory of ranks ", world_.rank(),
                                                          " and ", rank, " is not laid out alike"));
      }
      if (p != group.index && !memory.empty()) {
        STRETTO_RETURN_IF_ERROR(Import(theirs[3], c, &base));
      }
    }
    return absl::OkStatus();
  };
  if (why.ok() && why->empty()) why = Agree(group, "mapping memory", map(), "", &values);
  if (why.ok() && why->empty()) {
    c->regions.push_back(std::move(region));
    return why;
  }
  Unmap(c, mapped);
  STRETTO_RETURN_IF_ERROR(why.status());
  // Nobody frees what another rank maps.
  STRETTO_RETURN_IF_ERROR(world_.Barrier("closing shared memory"));
  return why;
}

absl::StatusOr<std::string> CopyEngines::Add(const Group& group) {
  if (std::find(added_.begin(), added_.end(), group.id) != added_.end()) return std::string();
  Channel& c = channels_.emplace_back();
  c.group = group;
  c.windows.assign(static_cast<size_t>(group.size()), nullptr);
  const bool alone = group.size() == 1;
  std::string handle = "-";
  std::vector<std::string> values;
  const absl::Status opened = alone ? absl::OkStatus() : Open(&c, &handle);
  absl::StatusOr<std::string> why = Agree(
      group, "windows", opened,
      absl::StrCat(world_.info().node, " ", getpid(), " ", handle, " ", c.flags_name), &values);
  if (why.ok() && why->empty()) why = Agree(group, "mapping", MapPeers(values, &c), "", &values);
  if (!c.flags_name.empty()) shm_unlink(c.flags_name.c_str());  // all have it, or none needs it
  c.flags_name.clear();
  if (why.ok() && why->empty()) {
    why = Agree(group, "trial", alone ? absl::OkStatus() : Try(&c), "", &values);
  }
  if (why.ok() && why->empty()) {
    added_.push_back(group.id);
    if (alone) channels_.pop_back();  // it has nothing
    return why;
  }
  if (!Idle(Clock::now() + kTrial)) {  // no memory is freed then, which would wait for the device
    return absl::InternalError("the communication stream does not come out of a wait");
  }
  Close(&c);
  // Nobody frees a window that another rank maps, unless that one is gone.
  const absl::Status closed =
      why.ok() ? world_.Barrier("closing the copy engines") : absl::OkStatus();
  channels_.pop_back();
  STRETTO_RETURN_IF_ERROR(closed);
  return why;
}

}  // namespace stretto
