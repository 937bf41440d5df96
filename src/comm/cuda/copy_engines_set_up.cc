// How the ranks of a group come to reach each other's memory, before their first operation.
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "src/comm/cuda/copy_engines.h"
#include "src/comm/world_internal.h"
#include "stretto/core/copy.h"

namespace stretto {
namespace {

constexpr auto kTrial = std::chrono::seconds(20);  // of a new channel, unless set-up has less

}  // namespace

absl::Status CopyEngines::Called(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // an error that is no kernel's
  return absl::InternalError(absl::StrCat("CUDA: ", call, " failed: ", cudaGetErrorName(error),
                                          " (", cudaGetErrorString(error), ")"));
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
  if (std::find(groups_.begin(), groups_.end(), group.id) != groups_.end()) return std::string();
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
    groups_.push_back(group.id);
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
