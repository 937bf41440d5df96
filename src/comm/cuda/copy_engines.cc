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
constexpr auto kTrial = std::chrono::seconds(20);     // of a new channel, unless set-up has less
constexpr auto kLook = std::chrono::milliseconds(1);
constexpr size_t kFlagBytes = 4096;
static_assert(CopyEngines::kMostRanks * CopyEngines::kMostRanks * sizeof(uint32_t) <= kFlagBytes);
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

CopyEngines::Channel* CopyEngines::Of(const Group& group) {
  for (Channel& c : channels_) {
    if (c.group.id == group.id) return &c;
  }
  return nullptr;
}

int64_t CopyEngines::Launches(const Operation& o) {
  const bool can =
      o.op == CommOp::kAllGather || (o.op == CommOp::kReduceScatter && CanSumParts(o.dtype));
  if (!can || Of(*o.group) == nullptr) return 0;
  // A copy for each piece and other rank, and of an all-gather two within the rank.
  const int64_t of_piece = o.group->size() - 1 + (o.op == CommOp::kAllGather ? 2 : 0);
  const int64_t of_round = 2;  // flags, and a sum
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

absl::Status CopyEngines::CopyAll() {
  cudaError_t error = cudaSuccess;
  if (!to_.empty()) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    error = cudaMemcpyBatchAsync(to_.data(), from_.data(), bytes_.data(), to_.size(), &attributes,
                                 &first, 1, native());
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
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    table.pieces[table.count++] = {
        item.input + (c.group.index * item.elements + piece.begin) * size, slot + piece.at,
        item.output + piece.begin * size, piece.elements};
  }
  return Called("the addition of a reduce-scatter", SumParts(table, o.dtype, native()));
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

absl::Status CopyEngines::EnqueueRound(const Channel& c, const Operation& o) {
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
  STRETTO_RETURN_IF_ERROR(CopyAll());
  STRETTO_RETURN_IF_ERROR(Meet(c));
  if (!gathers) return AddParts(c, o, Slot(window, c.rounds));
  for (const CopyPiece& piece : pieces_) {
    const Operation::Item& item = o.items[piece.item];
    std::byte* const output = item.output + piece.begin * size;
    const int64_t bytes = piece.elements * size;
    for (int i = 1; i < n; ++i) {
      const int p = other(i);
      Copy(output + p * item.elements * size, Slot(window_of(p), c.rounds) + piece.at, bytes);
    }
    Copy(output + me * item.elements * size, item.input + piece.begin * size, bytes);
  }
  return CopyAll();
}

absl::Status CopyEngines::Enqueue(Channel* c, const Operation& o) {
  CopyRounds rounds(o.items, SizeOf(o.dtype), Room(o));
  while (rounds.Next(&pieces_)) {
    ++c->rounds;
    STRETTO_RETURN_IF_ERROR(EnqueueRound(*c, o));
  }
  return absl::OkStatus();
}

absl::Status CopyEngines::Issue(const Operation& o) { return Enqueue(Of(*o.group), o); }

bool CopyEngines::Idle(Clock::time_point end) {
  while (cudaStreamQuery(native()) == cudaErrorNotReady) {
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
  STRETTO_RETURN_IF_ERROR(Called("loading the additions", LoadSumParts()));
  batch_mem_op_ = reinterpret_cast<decltype(&cuStreamBatchMemOp)>(function);
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
  cudaIpcMemHandle_t exported;
  STRETTO_RETURN_IF_ERROR(
      Called("cudaIpcGetMemHandle", cudaIpcGetMemHandle(&exported, c->window.data())));
  *handle = absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(&exported), sizeof(exported)));
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
    const std::string bytes = absl::HexStringToBytes(theirs[3]);
    cudaIpcMemHandle_t handle;
    if (bytes.size() != sizeof(handle)) return absl::InternalError("a handle is cut");
    std::memcpy(&handle, bytes.data(), sizeof(handle));
    void* mapped = nullptr;
    STRETTO_RETURN_IF_ERROR(
        Called("cudaIpcOpenMemHandle",
               cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess)));
    c->windows[static_cast<size_t>(p)] = static_cast<std::byte*>(mapped);
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
      used.Update(Enqueue(c, *o));
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

void CopyEngines::Close(Channel* c) {
  for (int p = 0; p < static_cast<int>(c->windows.size()); ++p) {
    void* const window = c->windows[static_cast<size_t>(p)];
    if (p == c->group.index || window == nullptr) continue;
    if (cudaIpcCloseMemHandle(window) != cudaSuccess) cudaGetLastError();
  }
  c->windows.clear();
  if (!c->flags_name.empty()) shm_unlink(c->flags_name.c_str());
  c->flags_name.clear();
  c->registration.reset();
  if (c->flags != nullptr) munmap(c->flags, kFlagBytes);
  c->flags = nullptr;
}

absl::StatusOr<std::string> CopyEngines::Add(const Group& group) {
  // Every rank says how far it came, and all go on or none.
  const auto agree = [&](const char* what, const absl::Status& mine, const std::string& value,
                         std::vector<std::string>* values) -> absl::StatusOr<std::string> {
    STRETTO_ASSIGN_OR_RETURN(
        *values, world_.AllGather(absl::StrCat("copy engines of group ", group.name, ", ", what),
                                  mine.ok() ? absl::StrCat("ok ", value)
                                            : absl::StrCat("no ", std::string(mine.message()))));
    for (int r = 0; r < world_.size(); ++r) {
      const std::string& text = (*values)[static_cast<size_t>(r)];
      if (text.starts_with("no ")) return absl::StrCat("rank ", r, ": ", text.substr(3));
    }
    return std::string();
  };
  Channel& c = channels_.emplace_back();
  c.group = group;
  c.windows.assign(static_cast<size_t>(group.size()), nullptr);
  const bool alone = group.size() == 1;
  std::string handle = "-";
  std::vector<std::string> values;
  const absl::Status opened = alone ? absl::OkStatus() : Open(&c, &handle);
  absl::StatusOr<std::string> why = agree(
      "windows", opened,
      absl::StrCat(world_.info().node, " ", getpid(), " ", handle, " ", c.flags_name), &values);
  if (why.ok() && why->empty()) why = agree("mapping", MapPeers(values, &c), "", &values);
  if (!c.flags_name.empty()) shm_unlink(c.flags_name.c_str());  // all have it, or none needs it
  c.flags_name.clear();
  if (why.ok() && why->empty()) {
    why = agree("trial", alone ? absl::OkStatus() : Try(&c), "", &values);
  }
  if (why.ok() && why->empty() && !alone) return why;
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
