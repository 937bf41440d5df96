// One NCCL communicator spans the world; groups that are not the whole world have one of their own,
// split from it. Sends, receives and all-to-alls always run on the world's, so connections between
// two ranks are made once. Communicators do not block: whatever may wait for another rank (set-up,
// the first use of a connection, the end) is polled here, with a deadline. The environment of the
// process is left alone (NCCL_NVLS_ENABLE and the like stay the user's).
#include "src/comm/cuda/nccl.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/cuda/nccl_library.h"
#include "src/comm/world_internal.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kWarmUpPart = 256;  // bytes
constexpr int kLargestFullMesh = 8;   // ranks; up to here every pair is connected in advance
constexpr auto kLook = std::chrono::milliseconds(250);   // between looks at the other ranks
constexpr auto kFarewell = std::chrono::seconds(10);     // for the end of a healthy communicator
constexpr auto kLastKernels = std::chrono::seconds(10);  // ... of kernels that were aborted

ncclDataType_t TypeOf(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return ncclFloat64;
    case DType::kF32:
      return ncclFloat32;
    case DType::kBF16:
      return ncclBfloat16;
    case DType::kI32:
      return ncclInt32;
    case DType::kI64:
      return ncclInt64;
    default:
      return ncclUint8;  // moved as bytes; reductions of it are refused before
  }
}

ncclRedOp_t ReductionOf(ReduceOp op) {
  return op == ReduceOp::kSum ? ncclSum : op == ReduceOp::kMax ? ncclMax : ncclMin;
}

absl::Status CudaFailed(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", call, " failed: ", cudaGetErrorName(error),
                                          " (", cudaGetErrorString(error), ")"));
}

class Nccl final : public DeviceCollectives {
 public:
  Nccl(World& world, Device device) : world_(world), device_(device) {}
  ~Nccl() override;

  absl::Status Connect();

  // Without a device a thread would make itself a context on the first one.
  void EnterThread() override { cudaSetDevice(device_.index); }
  Stream& stream() override { return *stream_; }
  absl::Status AddGroup(const Group& group) override;
  absl::Status Issue(std::span<Operation* const> batch) override;
  absl::StatusOr<bool> Issued() override;
  absl::Status Check() override;
  void Abort() override;

 private:
  absl::Status Open(std::string* gpu);
  absl::Status Failed(const char* call, ncclResult_t result, ncclComm_t comm);
  // Waits until `comm` has done what it was asked for. ABORTED: another rank has given up.
  absl::Status Settle(const char* call, ncclComm_t comm, Clock::time_point end);
  bool OthersGaveUp();
  // Ends a phase of set-up on all ranks; aborts when one of them failed.
  absl::Status Conclude(const std::string& phase, absl::Status mine);
  // Uses the connections of a communicator of `size` ranks once.
  absl::Status WarmUp(ncclComm_t comm, int size, Clock::time_point end);
  ncclComm_t parent() const { return comms_.empty() ? nullptr : comms_.front(); }
  ncclComm_t CommOf(const Group& group) const;
  cudaStream_t native() const { return static_cast<cudaStream_t>(stream_->native()); }
  absl::Status CopyOwn(const Operation& o);
  absl::Status CopyMessagesToOneself(std::span<Operation* const> batch);
  void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
    if (to != from) CopyBytes(*stream_, to, from, bytes);
  }

  World& world_;
  const Device device_;
  const NcclLibrary* nccl_ = nullptr;  // null in a world of one
  std::unique_ptr<Stream> stream_;
  std::string failed_key_;                            // exists when a rank failed in set-up
  std::vector<ncclComm_t> comms_;                     // the world's first, then in order of making
  std::vector<std::pair<int, ncclComm_t>> of_group_;  // by group id; null: a group of one rank
  ncclComm_t busy_ = nullptr;                         // what Issue handed work to last
};

absl::Status Nccl::Failed(const char* call, ncclResult_t result, ncclComm_t comm) {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  const char* detail = nccl_->GetLastError(comm);
  std::string text = absl::StrCat("NCCL: ", call, " failed: ", nccl_->GetErrorString(result));
  if (detail != nullptr && *detail != '\0') absl::StrAppend(&text, ": ", detail);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  absl::StrAppend(&text, " (NCCL_DEBUG=WARN shows more)");
  if (result == ncclRemoteError || result == ncclSystemError) return absl::UnavailableError(text);
  return absl::InternalError(text);
}

bool Nccl::OthersGaveUp() {
  return world_.store().TryGet(failed_key_).ok() || !world_.DeadRanks().empty();
}

absl::Status Nccl::Settle(const char* call, ncclComm_t comm, Clock::time_point end) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point look = begin + kLook;
  while (true) {
    ncclResult_t state = ncclSuccess;
    STRETTO_RETURN_IF_ERROR(
        Failed("ncclCommGetAsyncError", nccl_->CommGetAsyncError(comm, &state), comm));
    if (state != ncclInProgress) return Failed(call, state, comm);
    const Clock::time_point now = Clock::now();
    if (now > end) {
      return absl::DeadlineExceededError(absl::StrFormat(
          "NCCL: %s did not end within %.1f s; NCCL_DEBUG=INFO shows what it waits for", call,
          std::chrono::duration<double>(now - begin).count()));
    }
    if (now > look) {
      if (OthersGaveUp()) return absl::AbortedError("another rank gave up");
      look = now + kLook;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

absl::Status Nccl::Conclude(const std::string& phase, absl::Status mine) {
  // Who only noticed that another rank failed leaves it to that one to say why.
  const bool noticed = absl::IsAborted(mine);
  if (!mine.ok() && !noticed) world_.store().Set(failed_key_, "1").IgnoreError();
  absl::Status agreed = world_.Agree(phase, noticed ? absl::OkStatus() : mine);
  if (agreed.ok()) agreed = mine;
  if (!agreed.ok()) Abort();
  return agreed;
}

absl::Status Nccl::Open(std::string* gpu) {
  STRETTO_RETURN_IF_ERROR(DescribeDevice(device_).status());
  STRETTO_RETURN_IF_ERROR(CudaFailed("cudaSetDevice", cudaSetDevice(device_.index)));
  cudaDeviceProp properties;
  STRETTO_RETURN_IF_ERROR(
      CudaFailed("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, device_.index)));
  char bus[32] = {};
  STRETTO_RETURN_IF_ERROR(
      CudaFailed("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(bus, sizeof(bus), device_.index)));
  *gpu = absl::StrCat(bus, ", UUID ",
                      absl::BytesToHexString(absl::string_view(properties.uuid.bytes, 16)));
  // The workspace serves the warm-up only.
  STRETTO_ASSIGN_OR_RETURN(
      stream_,
      // A product of thousands of blocks would otherwise hold back the few of an exchange that is
      // to travel under it.
      Stream::Create(device_, {.workspace_bytes = 2 * kWarmUpPart * std::max(2, world_.size()),
                               .first_served = true}));
  if (world_.size() == 1) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(nccl_, NcclLibrary::Open());
  return absl::OkStatus();
}

absl::Status Nccl::Connect() {
  std::string gpu;
  STRETTO_RETURN_IF_ERROR(world_.Agree("opening the GPU and NCCL", Open(&gpu)));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> gpus, world_.AllGather("GPU", gpu));
  for (int r = 0; r < world_.size(); ++r) {
    const auto first = std::find(gpus.begin(), gpus.end(), gpus[static_cast<std::size_t>(r)]);
    if (first - gpus.begin() == r) continue;
    return absl::FailedPreconditionError(absl::StrCat(
        "ranks ", first - gpus.begin(), " and ", r, " share one GPU (", *first,
        "), which NCCL cannot do; start one rank for each GPU, check CUDA_VISIBLE_DEVICES, or use "
        "runtime.device=cpu"));
  }
  if (world_.size() == 1) return absl::OkStatus();

  ncclUniqueId id = {};
  absl::Status mine;
  if (world_.rank() == 0) {
    mine = Failed("ncclGetUniqueId", nccl_->GetUniqueId(&id), nullptr);
  }
  STRETTO_ASSIGN_OR_RETURN(
      const std::vector<std::string> ids,
      world_.AllGather("NCCL id", world_.rank() == 0 && mine.ok()
                                      ? absl::BytesToHexString(
                                            absl::string_view(id.internal, sizeof(id.internal)))
                                      : ""));
  STRETTO_RETURN_IF_ERROR(world_.Agree("asking NCCL for an id", mine));
  const std::string bytes = absl::HexStringToBytes(ids[0]);
  std::memcpy(id.internal, bytes.data(), std::min(bytes.size(), sizeof(id.internal)));
  failed_key_ = absl::StrCat("nccl failed/", ids[0]);

  const Clock::time_point end = Clock::now() + SetupTimeout(world_.options());
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t comm = nullptr;
  mine = Failed("ncclCommInitRankConfig",
                nccl_->CommInitRankConfig(&comm, world_.size(), id, world_.rank(), &config), comm);
  if (comm != nullptr) comms_.push_back(comm);
  if (mine.ok()) mine = Settle("ncclCommInitRankConfig", comm, end);
  if (mine.ok()) mine = WarmUp(comm, world_.size(), end);
  return Conclude("connecting the GPUs", mine);
}

absl::Status Nccl::AddGroup(const Group& group) {
  // Ascending, so that whole worlds in rank order share one communicator.
  bool whole = group.size() == world_.size();
  for (int r = 0; whole && r < group.size(); ++r) {
    whole = group.ranks[static_cast<std::size_t>(r)] == r;
  }
  if (nccl_ == nullptr || whole) {
    of_group_.emplace_back(group.id, parent());
    return absl::OkStatus();
  }
  if (parent() == nullptr) {
    return absl::FailedPreconditionError("NCCL was given up after an error");
  }
  STRETTO_RETURN_IF_ERROR(CudaFailed("cudaSetDevice", cudaSetDevice(device_.index)));
  const Clock::time_point end = Clock::now() + SetupTimeout(world_.options());
  // The groups made at one time are disjoint, so a member's rank names one of them.
  const int color = group.size() == 1 ? NCCL_SPLIT_NOCOLOR
                                      : *std::min_element(group.ranks.begin(), group.ranks.end());
  ncclComm_t child = nullptr;
  absl::Status mine = Failed(
      "ncclCommSplit", nccl_->CommSplit(parent(), color, group.index, &child, nullptr), parent());
  // NCCL fills in `child` before the parent has settled.
  if (mine.ok()) mine = Settle("ncclCommSplit", parent(), end);
  if (child != nullptr) comms_.push_back(child);
  of_group_.emplace_back(group.id, child);
  if (mine.ok() && child != nullptr) mine = Settle("ncclCommSplit", child, end);
  if (mine.ok() && child != nullptr) mine = WarmUp(child, group.size(), end);
  return Conclude(absl::StrCat("connecting the GPUs of group '", group.name, "'"), mine);
}

absl::Status Nccl::WarmUp(ncclComm_t comm, int size, Clock::time_point end) {
  std::byte* const memory = stream_->workspace().data;
  std::byte* const own = memory + kWarmUpPart * size;
  constexpr auto kFloats = static_cast<std::size_t>(kWarmUpPart) / sizeof(float);
  const auto settled = [&](const char* call, ncclResult_t result) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(Failed(call, result, comm));
    return Settle(call, comm, end);
  };
  STRETTO_RETURN_IF_ERROR(
      settled("ncclAllReduce",
              nccl_->AllReduce(memory, memory, kFloats, ncclFloat32, ncclSum, comm, native())));
  STRETTO_RETURN_IF_ERROR(
      settled("ncclReduceScatter",
              nccl_->ReduceScatter(memory, own, kFloats, ncclFloat32, ncclSum, comm, native())));
  STRETTO_RETURN_IF_ERROR(settled(
      "ncclAllGather", nccl_->AllGather(own, memory, kFloats, ncclFloat32, comm, native())));
  if (comm == parent() && size <= kLargestFullMesh) {
    STRETTO_RETURN_IF_ERROR(Failed("ncclGroupStart", nccl_->GroupStart(), comm));
    absl::Status called;
    for (int peer = 0; peer < size; ++peer) {
      if (peer == world_.rank()) continue;
      called.Update(
          Failed("ncclSend", nccl_->Send(own, kFloats, ncclFloat32, peer, comm, native()), comm));
      called.Update(Failed(
          "ncclRecv",
          nccl_->Recv(memory + peer * kWarmUpPart, kFloats, ncclFloat32, peer, comm, native()),
          comm));
    }
    const ncclResult_t ended = nccl_->GroupEnd();
    STRETTO_RETURN_IF_ERROR(called);
    STRETTO_RETURN_IF_ERROR(settled("ncclSend and ncclRecv", ended));
  }
  const Event done = stream_->Record();
  const Clock::time_point begin = Clock::now();
  for (Clock::time_point look = begin + kLook; !done.Done();) {
    const Clock::time_point now = Clock::now();
    if (now > end) {
      return absl::DeadlineExceededError(absl::StrFormat(
          "NCCL: the first small collectives did not end within %.1f s; check the links between "
          "the GPUs (NCCL_DEBUG=INFO shows those in use)",
          std::chrono::duration<double>(now - begin).count()));
    }
    if (now > look) {
      if (OthersGaveUp()) return absl::AbortedError("another rank gave up");
      look = now + kLook;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return Check();
}

ncclComm_t Nccl::CommOf(const Group& group) const {
  for (const auto& [id, comm] : of_group_) {
    if (id == group.id) return comm;
  }
  return nullptr;
}

// What an operation moves within this rank, as far as NCCL does not do that.
absl::Status Nccl::CopyOwn(const Operation& o) {
  const int64_t size = SizeOf(o.dtype);
  if (o.op == CommOp::kAllToAll) {
    const auto me = static_cast<std::size_t>(o.group->index);
    Copy(o.items[0].output + o.receive_begins[me] * size,
         o.items[0].input + o.send_begins[me] * size, o.send_counts[me] * size);
  } else if (o.group->size() == 1 && !o.point_to_point()) {
    for (const Operation::Item& item : o.items) Copy(item.output, item.input, item.elements * size);
  }
  return stream_->status();
}

absl::Status Nccl::CopyMessagesToOneself(std::span<Operation* const> batch) {
  const auto next = [&](CommOp op, std::size_t from) {
    while (from < batch.size() &&
           (batch[from]->op != op || batch[from]->peer != batch[from]->group->index)) {
      ++from;
    }
    return from;
  };
  std::size_t send = next(CommOp::kSend, 0), receive = next(CommOp::kReceive, 0);
  while (send < batch.size() || receive < batch.size()) {
    if (send == batch.size() || receive == batch.size()) {
      return absl::InvalidArgumentError(
          "a message of a rank to itself on a GPU needs its send and its receive one after the "
          "other, with no wait, Progress() or collective in between");
    }
    const Operation &from = *batch[send], &to = *batch[receive];
    const int64_t bytes = from.items[0].elements * SizeOf(from.dtype);
    const int64_t room = to.items[0].elements * SizeOf(to.dtype);
    if (bytes != room) {
      return absl::InvalidArgumentError(
          absl::StrCat("a message to oneself has ", bytes, " bytes, its receive ", room));
    }
    Copy(to.items[0].output, from.items[0].input, bytes);
    send = next(CommOp::kSend, send + 1);
    receive = next(CommOp::kReceive, receive + 1);
  }
  return stream_->status();
}

absl::Status Nccl::Issue(std::span<Operation* const> batch) {
  if (nccl_ != nullptr && comms_.empty()) {
    return absl::FailedPreconditionError("NCCL was given up after an error");
  }
  STRETTO_RETURN_IF_ERROR(CudaFailed("cudaSetDevice", cudaSetDevice(device_.index)));
  for (const Operation* o : batch) STRETTO_RETURN_IF_ERROR(CopyOwn(*o));
  STRETTO_RETURN_IF_ERROR(CopyMessagesToOneself(batch));
  const Operation& first = *batch.front();
  const bool pairwise = first.point_to_point() || first.op == CommOp::kAllToAll;
  const ncclComm_t comm = pairwise ? parent() : CommOf(*first.group);
  if (comm == nullptr || (!pairwise && first.group->size() == 1)) return absl::OkStatus();

  ncclResult_t result = nccl_->GroupStart();
  if (result != ncclSuccess) return Failed("ncclGroupStart", result, comm);
  const cudaStream_t queue = native();
  absl::Status called;
  const auto send = [&](const Operation& o, int peer, const std::byte* from, int64_t count) {
    if (count == 0 || peer == o.group->index) return;
    called.Update(
        Failed("ncclSend",
               nccl_->Send(from, static_cast<std::size_t>(count * SizeOf(o.dtype)), ncclUint8,
                           o.group->ranks[static_cast<std::size_t>(peer)], comm, queue),
               comm));
  };
  const auto receive = [&](const Operation& o, int peer, std::byte* to, int64_t count) {
    if (count == 0 || peer == o.group->index) return;
    called.Update(
        Failed("ncclRecv",
               nccl_->Recv(to, static_cast<std::size_t>(count * SizeOf(o.dtype)), ncclUint8,
                           o.group->ranks[static_cast<std::size_t>(peer)], comm, queue),
               comm));
  };
  for (const Operation* p : batch) {
    const Operation& o = *p;
    const ncclDataType_t type = TypeOf(o.dtype);
    if (o.op == CommOp::kAllToAll) {
      const Operation::Item& item = o.items[0];
      const int64_t size = SizeOf(o.dtype);
      for (int i = 0; i < o.group->size(); ++i) {
        const auto peer = static_cast<std::size_t>(i);
        send(o, i, item.input + o.send_begins[peer] * size, o.send_counts[peer]);
        receive(o, i, item.output + o.receive_begins[peer] * size, o.receive_counts[peer]);
      }
      continue;
    }
    for (const Operation::Item& item : o.items) {
      const auto count = static_cast<std::size_t>(item.elements);
      const std::size_t bytes = count * static_cast<std::size_t>(SizeOf(o.dtype));
      if (count == 0) continue;
      switch (o.op) {
        case CommOp::kAllReduce:
          result = nccl_->AllReduce(item.input, item.output, count, type, ReductionOf(o.reduce),
                                    comm, queue);
          break;
        case CommOp::kReduceScatter:
          result = nccl_->ReduceScatter(item.input, item.output, count, type, ncclSum, comm, queue);
          break;
        case CommOp::kAllGather:
          result = nccl_->AllGather(item.input, item.output, bytes, ncclUint8, comm, queue);
          break;
        case CommOp::kBroadcast:
          result = nccl_->Broadcast(item.input, item.output, bytes, ncclUint8, o.peer, comm, queue);
          break;
        case CommOp::kSend:
          send(o, o.peer, item.input, item.elements);
          break;
        case CommOp::kReceive:
          receive(o, o.peer, item.output, item.elements);
          break;
        default:
          break;
      }
      called.Update(Failed(Name(o.op), result, comm));
    }
  }
  result = nccl_->GroupEnd();
  STRETTO_RETURN_IF_ERROR(called);
  STRETTO_RETURN_IF_ERROR(Failed("ncclGroupEnd", result, comm));
  busy_ = comm;
  return absl::OkStatus();
}

absl::StatusOr<bool> Nccl::Issued() {
  if (busy_ == nullptr) return true;
  ncclResult_t state = ncclSuccess;
  STRETTO_RETURN_IF_ERROR(
      Failed("ncclCommGetAsyncError", nccl_->CommGetAsyncError(busy_, &state), busy_));
  if (state == ncclInProgress) return false;
  STRETTO_RETURN_IF_ERROR(Failed("enqueueing an operation", state, busy_));
  busy_ = nullptr;
  return true;
}

absl::Status Nccl::Check() {
  const cudaError_t error = cudaStreamQuery(native());
  if (error != cudaErrorNotReady) {
    STRETTO_RETURN_IF_ERROR(CudaFailed("an operation between GPUs, or work before it,", error));
  }
  for (ncclComm_t comm : comms_) {
    ncclResult_t state = ncclSuccess;
    STRETTO_RETURN_IF_ERROR(
        Failed("ncclCommGetAsyncError", nccl_->CommGetAsyncError(comm, &state), comm));
    STRETTO_RETURN_IF_ERROR(Failed("an operation", state, comm));
  }
  return absl::OkStatus();
}

void Nccl::Abort() {
  busy_ = nullptr;
  if (comms_.empty()) return;
  cudaSetDevice(device_.index);
  // In one group: all are told before the kernels of any is waited for, since those of another may
  // be ahead of them in the stream.
  nccl_->GroupStart();
  for (auto comm = comms_.rbegin(); comm != comms_.rend(); ++comm) nccl_->CommAbort(*comm);
  nccl_->GroupEnd();
  comms_.clear();
  of_group_.clear();
  // From here on nobody touches the tensors.
  const Clock::time_point end = Clock::now() + kLastKernels;
  while (cudaStreamQuery(native()) == cudaErrorNotReady && Clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Nccl::~Nccl() {
  if (comms_.empty()) return;
  cudaSetDevice(device_.index);
  const Clock::time_point end = Clock::now() + kFarewell;
  // Children first, in the same order on all ranks.
  while (!comms_.empty()) {
    const ncclComm_t comm = comms_.back();
    absl::Status ended = Failed("ncclCommFinalize", nccl_->CommFinalize(comm), comm);
    if (ended.ok()) ended = Settle("ncclCommFinalize", comm, end);
    if (!ended.ok()) {
      LogWarning(
          absl::StrCat("the GPUs are disconnected by force: ", std::string(ended.message())));
      Abort();
      return;
    }
    comms_.pop_back();
    nccl_->CommDestroy(comm);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceCollectives>> ConnectNccl(World& world, Device device) {
  auto nccl = std::make_unique<Nccl>(world, device);
  STRETTO_RETURN_IF_ERROR(nccl->Connect());
  return nccl;
}

}  // namespace stretto
