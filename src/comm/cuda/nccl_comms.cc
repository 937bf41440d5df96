// The environment of the process is left alone (NCCL_NVLS_ENABLE and the like stay the user's).
#include "src/comm/cuda/nccl_comms.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/comm/world_internal.h"
#include "src/core/start_thread.h"
#include "stretto/core/arena.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

// NCCL chooses an algorithm by size, and connects it when it is first chosen. Beyond the largest of
// these it takes rings, which broadcasts take at every size.
constexpr int64_t kSmallestWarmUp = 256;                 // bytes
constexpr int64_t kLargestWarmUp = 16 << 20;             // ... also taken from the device meanwhile
constexpr auto kLook = std::chrono::milliseconds(250);   // between looks at the other ranks
constexpr auto kUntilKnown = std::chrono::seconds(3);    // of a death, on all ranks
constexpr auto kFarewell = std::chrono::seconds(10);     // for the end of a healthy communicator
constexpr auto kLastKernels = std::chrono::seconds(10);  // ... of kernels that were aborted

absl::Status CudaFailed(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: ", call, " failed: ", cudaGetErrorName(error),
                                          " (", cudaGetErrorString(error), ")"));
}

}  // namespace

absl::Status NcclComms::SelectDevice() const {
  return CudaFailed("cudaSetDevice", cudaSetDevice(device_.index));
}

absl::Status NcclComms::Failed(const char* call, ncclResult_t result, ncclComm_t comm) const {
  if (result == ncclSuccess || result == ncclInProgress) return absl::OkStatus();
  const char* detail = nccl_->GetLastError(comm);
  std::string text = absl::StrCat("NCCL: ", call, " failed: ", nccl_->GetErrorString(result));
  if (detail != nullptr && *detail != '\0') absl::StrAppend(&text, ": ", detail);
  while (!text.empty() && text.back() == '\n') text.pop_back();
  absl::StrAppend(&text, " (NCCL_DEBUG=WARN shows more)");
  if (result == ncclRemoteError || result == ncclSystemError) return absl::UnavailableError(text);
  return absl::InternalError(text);
}

bool NcclComms::OthersGaveUp() {
  return world_.store().TryGet(failed_key_).ok() || !world_.DeadRanks().empty();
}

absl::Status NcclComms::Poll(const char* what, Clock::time_point end,
                             const std::function<absl::StatusOr<bool>()>& ready) {
  const Clock::time_point begin = Clock::now();
  Clock::time_point look = begin + kLook;
  while (true) {
    STRETTO_ASSIGN_OR_RETURN(const bool done, ready());
    if (done) return absl::OkStatus();
    const Clock::time_point now = Clock::now();
    if (now > end) {
      return absl::DeadlineExceededError(
          absl::StrFormat("NCCL: %s did not end within %.1f s; check the links between the GPUs "
                          "(NCCL_DEBUG=INFO shows those in use, and what it waits for)",
                          what, std::chrono::duration<double>(now - begin).count()));
    }
    if (now > look) {
      if (OthersGaveUp()) return absl::AbortedError("another rank gave up");
      look = now + kLook;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

absl::Status NcclComms::Settle(const char* call, Clock::time_point end) {
  return Poll(call, end, [&]() -> absl::StatusOr<bool> {
    ncclResult_t state = ncclSuccess;
    STRETTO_RETURN_IF_ERROR(
        Failed("ncclCommGetAsyncError", nccl_->CommGetAsyncError(parent_, &state), parent_));
    STRETTO_RETURN_IF_ERROR(Failed(call, state, parent_));
    return state != ncclInProgress;
  });
}

absl::Status NcclComms::Apart(const char* what, Clock::time_point end,
                              const std::function<absl::Status()>& work) {
  std::atomic<bool> done = false;
  absl::Status result;
  STRETTO_ASSIGN_OR_RETURN(std::thread thread, StartThread("NCCL's connections", [&] {
                             result = SelectDevice();
                             if (result.ok()) result = work();
                             done.store(true, std::memory_order_release);
                           }));
  const absl::Status waited = Poll(what, end, [&] { return done.load(std::memory_order_acquire); });
  // NCCL looks for that wherever it waits.
  if (!waited.ok()) Tell();
  thread.join();
  return waited.ok() ? result : waited;
}

absl::Status NcclComms::Conclude(const std::string& phase, absl::Status mine) {
  // Who only noticed that another rank failed leaves it to that one to say why.
  bool noticed = absl::IsAborted(mine);
  // A rank that died breaks NCCL's connections before the control plane knows of its death.
  const Clock::time_point end = Clock::now() + kUntilKnown;
  while (!mine.ok() && !noticed && Clock::now() < end) {
    noticed = OthersGaveUp();
    if (!noticed) std::this_thread::sleep_for(kLook);
  }
  if (!mine.ok() && !noticed) world_.store().Set(failed_key_, "1").IgnoreError();
  absl::Status agreed = world_.Agree(phase, noticed ? absl::OkStatus() : mine);
  if (agreed.ok()) agreed = mine;
  if (!agreed.ok()) Abort();
  return agreed;
}

absl::Status NcclComms::Open(std::string* gpu) {
  STRETTO_RETURN_IF_ERROR(DescribeDevice(device_).status());
  STRETTO_RETURN_IF_ERROR(SelectDevice());
  cudaDeviceProp properties;
  STRETTO_RETURN_IF_ERROR(
      CudaFailed("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, device_.index)));
  char bus[32] = {};
  STRETTO_RETURN_IF_ERROR(
      CudaFailed("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(bus, sizeof(bus), device_.index)));
  *gpu = absl::StrCat(bus, ", UUID ",
                      absl::BytesToHexString(absl::string_view(properties.uuid.bytes, 16)));
  STRETTO_ASSIGN_OR_RETURN(stream_,
                           // A product of thousands of blocks would otherwise hold back the few of
                           // an exchange that is to travel under it.
                           Stream::Create(device_, {.workspace_bytes = 0, .first_served = true}));
  if (world_.size() == 1) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(nccl_, NcclLibrary::Open());
  return absl::OkStatus();
}

absl::Status NcclComms::Connect() {
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
  sent_.assign(static_cast<std::size_t>(world_.size()), false);
  received_ = sent_;

  const Clock::time_point end = Clock::now() + SetupTimeout(world_.options());
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  // Every channel costs memory, and here none is used.
  config.minCTAs = config.maxCTAs = 1;
  mine = Failed("ncclCommInitRankConfig",
                nccl_->CommInitRankConfig(&parent_, world_.size(), id, world_.rank(), &config),
                parent_);
  if (mine.ok()) mine = Settle("ncclCommInitRankConfig", end);
  if (mine.ok()) {
    const absl::StatusOr<ncclComm_t> comm = Split(0, world_.rank(), world_.size(), end);
    mine = comm.status();
    if (comm.ok()) world_comm_ = *comm;
  }
  if (mine.ok()) {
    RankList everyone;
    for (int r = 0; r < world_.size(); ++r) everyone.push_back(r);
    if (world_.size() <= kLargestFullMesh) mine = WarmUpPairs(everyone, end);
  }
  return Conclude("connecting the GPUs", mine);
}

absl::Status NcclComms::AddGroup(const Group& group) {
  // Ascending, so that whole worlds in rank order share one communicator.
  bool whole = group.size() == world_.size();
  for (int r = 0; whole && r < group.size(); ++r) {
    whole = group.ranks[static_cast<std::size_t>(r)] == r;
  }
  if (nccl_ == nullptr || (whole && group.size() <= kLargestFullMesh)) {
    of_group_.emplace_back(group.id, world_comm_);
    return absl::OkStatus();
  }
  if (given_up()) return absl::FailedPreconditionError("NCCL was given up after an error");
  STRETTO_RETURN_IF_ERROR(SelectDevice());
  const Clock::time_point end = Clock::now() + SetupTimeout(world_.options());
  absl::StatusOr<ncclComm_t> comm = world_comm_;
  if (!whole) {
    // The groups made at one time are disjoint, so a member's rank names one of them.
    const int color = group.size() == 1 ? NCCL_SPLIT_NOCOLOR
                                        : *std::min_element(group.ranks.begin(), group.ranks.end());
    comm = Split(color, group.index, group.size(), end);
  }
  of_group_.emplace_back(group.id, comm.ok() ? *comm : nullptr);
  absl::Status mine = comm.status();
  if (mine.ok()) {
    RankList peers;
    for (int i = 0; i < group.size(); ++i) {
      const int ahead = (i - group.index + group.size()) % group.size();
      if (group.size() <= kLargestFullMesh || ahead == 1 || ahead == group.size() - 1) {
        peers.push_back(group.ranks[static_cast<std::size_t>(i)]);
      }
    }
    mine = WarmUpPairs(peers, end);
  }
  return Conclude(absl::StrCat("connecting the GPUs of group '", group.name, "'"), mine);
}

absl::StatusOr<ncclComm_t> NcclComms::Split(int color, int index, int size, Clock::time_point end) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 1;
  // NCCL fills in `child` before the parent has settled, and works as the parent does until then.
  ncclComm_t child = nullptr;
  absl::Status made =
      Failed("ncclCommSplit", nccl_->CommSplit(parent_, color, index, &child, &config), parent_);
  if (made.ok()) made = Settle("ncclCommSplit", end);
  if (!made.ok()) {
    Tell();  // ends the thread that may still fill in `child`
    if (child != nullptr) nccl_->CommAbort(child);
    return made;
  }
  if (child == nullptr) return child;
  comms_.push_back(child);
  STRETTO_RETURN_IF_ERROR(WarmUp(child, index, size, end));
  return child;
}

absl::Status NcclComms::UseOnce(const char* what, Clock::time_point end,
                                const std::function<absl::Status()>& work) {
  STRETTO_RETURN_IF_ERROR(Apart(what, end, work));
  const Event done = stream_->Record();
  STRETTO_RETURN_IF_ERROR(Poll(what, end, [&] { return done.Done(); }));
  return Check();
}

absl::Status NcclComms::WarmUp(ncclComm_t comm, int index, int size, Clock::time_point end) {
  const auto ranks = static_cast<std::size_t>(size);
  const int64_t most = std::max<int64_t>(kLargestWarmUp, size * int64_t{sizeof(float)});
  STRETTO_ASSIGN_OR_RETURN(const Arena arena, Arena::Create(device_, "NCCL's warm-up", most));
  std::byte* const all = arena.data();
  const auto use = [&]() -> absl::Status {
    ncclResult_t result = ncclSuccess;
    absl::Status used;
    const auto done = [&](const char* call) {
      if (result == ncclInProgress) {
        used.Update(absl::FailedPreconditionError(
            "NCCL_COMM_BLOCKING=0 is set, in the environment or in nccl.conf; unset it: "
            "operations are handed over in order only without it"));
      }
      used.Update(Failed(call, result, comm));
      return used.ok();
    };
    for (int64_t bytes = kSmallestWarmUp; bytes <= kLargestWarmUp; bytes *= 4) {
      const std::size_t part =
          std::max<std::size_t>(1, static_cast<std::size_t>(bytes) / sizeof(float) / ranks);
      std::byte* const own = all + static_cast<std::size_t>(index) * part * sizeof(float);
      // Multicast in the switches can add floats but not compare them.
      for (const ncclRedOp_t op : {ncclSum, ncclMax}) {
        result = nccl_->AllReduce(all, all, part * ranks, ncclFloat32, op, comm, native());
        if (!done("ncclAllReduce")) return used;
      }
      result = nccl_->ReduceScatter(all, own, part, ncclFloat32, ncclSum, comm, native());
      if (!done("ncclReduceScatter")) return used;
      result = nccl_->AllGather(own, all, part * sizeof(float), ncclUint8, comm, native());
      if (!done("ncclAllGather")) return used;
      result =
          nccl_->Broadcast(all, all, part * ranks * sizeof(float), ncclUint8, 0, comm, native());
      if (!done("ncclBroadcast")) return used;
    }
    return used;
  };
  return UseOnce("the first collectives", end, use);
}

absl::Status NcclComms::WarmUpPairs(const RankList& peers, Clock::time_point end) {
  constexpr int64_t kBytes = 256;
  std::vector<int> others;
  for (const int peer : peers) {
    if (peer == world_.rank()) continue;
    const bool sends = Meet(peer, true), receives = Meet(peer, false);
    // Pairs meet in both directions, and on both sides at once.
    if (!sends || !receives) others.push_back(peer);
  }
  if (others.empty()) return absl::OkStatus();
  STRETTO_ASSIGN_OR_RETURN(
      const Arena arena,
      Arena::Create(device_, "NCCL's warm-up", kBytes * (static_cast<int64_t>(peers.size()) + 1)));
  const auto use = [&]() -> absl::Status {
    STRETTO_RETURN_IF_ERROR(Failed("ncclGroupStart", nccl_->GroupStart(), world_comm_));
    absl::Status called;
    std::byte* to = arena.data();
    for (const int peer : others) {
      called.Update(Failed(
          "ncclSend", nccl_->Send(arena.data(), kBytes, ncclUint8, peer, world_comm_, native()),
          world_comm_));
      to += kBytes;
      called.Update(Failed("ncclRecv",
                           nccl_->Recv(to, kBytes, ncclUint8, peer, world_comm_, native()),
                           world_comm_));
    }
    const ncclResult_t ended = nccl_->GroupEnd();
    STRETTO_RETURN_IF_ERROR(called);
    return Failed("ncclSend and ncclRecv", ended, world_comm_);
  };
  return UseOnce("the first messages", end, use);
}

ncclComm_t NcclComms::Of(const Group& group) const {
  for (const auto& [id, comm] : of_group_) {
    if (id == group.id) return comm;
  }
  return nullptr;
}

bool NcclComms::Meet(int peer, bool send) {
  std::vector<bool>& met = send ? sent_ : received_;
  const auto p = static_cast<std::size_t>(peer);
  const bool before = met[p];
  met[p] = true;
  return before;
}

absl::Status NcclComms::Check() const {
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

void NcclComms::Tell() {
  if (told_ || parent_ == nullptr) return;
  told_ = true;
  // In a group that Abort ends, ncclCommAbort only raises the flags that kernels and waiting
  // threads look at; what it frees, it frees at the end of the group. Communicators that block and
  // that do not may share a group for that (group.cc, ncclAsyncLaunch).
  nccl_->GroupStart();
  for (auto comm = comms_.rbegin(); comm != comms_.rend(); ++comm) nccl_->CommAbort(*comm);
  nccl_->CommAbort(parent_);
}

void NcclComms::Abort() {
  if (parent_ == nullptr) return;
  SelectDevice().IgnoreError();
  // All are told before the kernels of any is waited for, since those of another may be ahead of
  // them in the stream.
  Tell();
  nccl_->GroupEnd();
  parent_ = world_comm_ = nullptr;
  comms_.clear();
  of_group_.clear();
  // From here on nobody touches the tensors.
  const Clock::time_point end = Clock::now() + kLastKernels;
  while (cudaStreamQuery(native()) == cudaErrorNotReady && Clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

NcclComms::~NcclComms() {
  if (parent_ == nullptr) return;
  SelectDevice().IgnoreError();
  const Clock::time_point end = Clock::now() + kFarewell;
  // Nothing that blocks is called before the kernels have ended. Children first, in the same order
  // on all ranks.
  absl::Status ended = Poll("the last operation", end,
                            [&] { return cudaStreamQuery(native()) != cudaErrorNotReady; });
  for (; ended.ok() && !comms_.empty(); comms_.pop_back()) {
    ended = Failed("ncclCommDestroy", nccl_->CommDestroy(comms_.back()), comms_.back());
  }
  if (ended.ok()) ended = Failed("ncclCommFinalize", nccl_->CommFinalize(parent_), parent_);
  if (ended.ok()) ended = Settle("ncclCommFinalize", end);
  if (ended.ok()) {
    nccl_->CommDestroy(parent_);
    return;
  }
  LogWarning(absl::StrCat("the GPUs are disconnected by force: ", std::string(ended.message())));
  Abort();
}

}  // namespace stretto
