// Operations of the communicator as calls of NCCL; nccl_comms.h has what they run on.
#include "src/comm/cuda/nccl.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "src/comm/cuda/copy_engines.h"
#include "src/comm/cuda/nccl_comms.h"
#include "src/comm/cuda/sum_parts.h"
#include "stretto/core/copy.h"

namespace stretto {
namespace {

constexpr auto kLastCopies = std::chrono::seconds(10);  // for their end after an error

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

// Calls message(is_send, rank of the world, data, bytes) for what a message or an all-to-all moves
// between this rank and others.
template <class Call>
void EachMessage(const Operation& o, const Call& message) {
  const int64_t size = SizeOf(o.dtype);
  const auto one = [&](bool send, int index, std::byte* data, int64_t elements) {
    if (elements == 0 || index == o.group->index) return;
    message(send, o.group->ranks[static_cast<std::size_t>(index)], data,
            static_cast<std::size_t>(elements * size));
  };
  if (o.items.empty()) return;
  const Operation::Item& item = o.items[0];
  if (o.op == CommOp::kSend) one(true, o.peer, item.input, item.elements);
  if (o.op == CommOp::kReceive) one(false, o.peer, item.output, item.elements);
  if (o.op != CommOp::kAllToAll) return;
  for (int i = 0; i < o.group->size(); ++i) {
    const auto peer = static_cast<std::size_t>(i);
    one(true, i, item.input + o.send_begins[peer] * size, o.send_counts[peer]);
    one(false, i, item.output + o.receive_begins[peer] * size, o.receive_counts[peer]);
  }
}

// Of a reduce-scatter's input.
std::byte* OwnPart(const Operation& o, const Operation::Item& item) {
  return item.input + o.group->index * item.elements * SizeOf(o.dtype);
}

bool Pairwise(const Operation& o) { return o.point_to_point() || o.op == CommOp::kAllToAll; }

class Nccl final : public DeviceCollectives {
 public:
  Nccl(World& world, Device device) : world_(world), comms_(world, device) {}

  absl::Status Connect() {
    STRETTO_RETURN_IF_ERROR(comms_.Connect());
    return world_.Agree("loading the additions", LoadAdditions());
  }

  // Without a device a thread would make itself a context on the first one.
  void EnterThread() override { comms_.SelectDevice().IgnoreError(); }
  Stream& stream() override { return comms_.stream(); }
  absl::Status AddGroup(const Group& group) override { return comms_.AddGroup(group); }
  absl::StatusOr<std::string> UseCopyEngines(const Group& group) override;
  absl::StatusOr<std::string> Share(const Group& group, std::span<std::byte> memory,
                                    uint64_t layout) override {
    if (copies_ == nullptr) return "copy engines are not in use";
    STRETTO_RETURN_IF_ERROR(comms_.SelectDevice());
    return copies_->Share(group, memory, layout);
  }
  int64_t Prepare(Operation* o) override {
    const int64_t copies = copies_ == nullptr ? 0 : copies_->Plan(o);
    o->copied = copies > 0;
    if (o->copied) return copies;
    return o->adds ? 2 + static_cast<int64_t>(o->items.size()) / SumTable::kMost : 1;
  }
  absl::StatusOr<Stream*> Issue(std::span<Operation* const> batch) override;
  absl::Status Check() override;
  void Abort() override;

 private:
  absl::Status LoadAdditions();
  absl::Status CopyOwn(const Operation& o);
  // The last of a reduce-scatter that adds, whose sum lies in the own part of the input.
  absl::Status AddOwn(const Operation& o);
  absl::Status CopyMessagesToOneself(std::span<Operation* const> batch);
  void Copy(std::byte* to, const std::byte* from, int64_t bytes) {
    if (to != from) CopyBytes(stream(), to, from, bytes);
  }
  // What is no copy engine's.
  absl::Status HandToNccl(std::span<Operation* const> batch);
  // In one group of NCCL, on `comm`.
  absl::Status HandOver(std::span<Operation* const> batch, ncclComm_t comm);

  World& world_;
  NcclComms comms_;
  std::unique_ptr<CopyEngines> copies_;  // null: not asked for
  int multiprocessors_ = 0;
};

absl::Status Nccl::LoadAdditions() {
  STRETTO_RETURN_IF_ERROR(comms_.SelectDevice());
  STRETTO_ASSIGN_OR_RETURN(const DeviceInfo info, DescribeDevice(stream().device()));
  multiprocessors_ = info.multiprocessors;
  const cudaError_t loaded = LoadSumParts();
  if (loaded == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("CUDA: loading the additions of reduce-scatters failed: ",
                                          cudaGetErrorName(loaded)));
}

absl::StatusOr<std::string> Nccl::UseCopyEngines(const Group& group) {
  if (world_.size() == 1) return "there is one rank";
  if (comms_.given_up()) {
    return absl::FailedPreconditionError("NCCL was given up after an error");
  }
  STRETTO_RETURN_IF_ERROR(comms_.SelectDevice());
  if (copies_ == nullptr) {
    copies_ = std::make_unique<CopyEngines>(world_, stream(), multiprocessors_);
  }
  return copies_->Add(group);
}

absl::Status Nccl::Check() {
  const absl::Status status = comms_.Check();
  if (status.ok() || copies_ == nullptr) return status;
  // The memory of a rank that died may have gone under a copy, which the stream does not survive:
  // the control plane knows better. What NCCL found is no copy's.
  const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(stream().native()));
  if (error == cudaSuccess || error == cudaErrorNotReady) return status;
  return absl::UnavailableError(std::string(status.message()));
}

void Nccl::Abort() {
  if (copies_ != nullptr && !comms_.given_up()) {
    // Waits for flags stand between NCCL's kernels on the stream: both end before any is waited
    // for.
    comms_.Tell();
    copies_->End(CopyEngines::Clock::now() + kLastCopies);
  }
  comms_.Abort();
}

// What an operation moves within this rank, as far as NCCL does not do that.
absl::Status Nccl::CopyOwn(const Operation& o) {
  const int64_t size = SizeOf(o.dtype);
  if (o.op == CommOp::kAllToAll) {
    const auto me = static_cast<std::size_t>(o.group->index);
    Copy(o.items[0].output + o.receive_begins[me] * size,
         o.items[0].input + o.send_begins[me] * size, o.send_counts[me] * size);
  } else if (o.group->size() == 1 && !o.point_to_point() && !o.adds) {
    for (const Operation::Item& item : o.items) Copy(item.output, item.input, item.elements * size);
  }
  return stream().status();
}

absl::Status Nccl::AddOwn(const Operation& o) {
  SumTable table;
  table.ranks = 1;
  table.adds = true;
  cudaError_t error = cudaSuccess;
  for (std::size_t i = 0; i < o.items.size() && error == cudaSuccess; ++i) {
    const Operation::Item& item = o.items[i];
    table.pieces[table.count++] = {OwnPart(o, item), nullptr, item.output, item.elements};
    if (table.count < SumTable::kMost && i + 1 < o.items.size()) continue;
    error =
        SumParts(table, o.dtype, multiprocessors_, static_cast<cudaStream_t>(stream().native()));
    table.count = 0;
  }
  if (error == cudaSuccess) return stream().status();
  return absl::InternalError(
      absl::StrCat("CUDA: adding what a reduce-scatter brought failed: ", cudaGetErrorName(error)));
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
  return stream().status();
}

absl::StatusOr<Stream*> Nccl::Issue(std::span<Operation* const> batch) {
  if (comms_.given_up()) {
    return absl::FailedPreconditionError("NCCL was given up after an error");
  }
  STRETTO_RETURN_IF_ERROR(comms_.SelectDevice());
  if (copies_ != nullptr && !batch.front()->copied) copies_->Join();
  for (const Operation* o : batch) STRETTO_RETURN_IF_ERROR(CopyOwn(*o));
  STRETTO_RETURN_IF_ERROR(CopyMessagesToOneself(batch));
  const Operation& first = *batch.front();
  if (first.copied) return copies_->Issue(first);
  STRETTO_RETURN_IF_ERROR(HandToNccl(batch));
  return &stream();
}

absl::Status Nccl::HandToNccl(std::span<Operation* const> batch) {
  const Operation& first = *batch.front();
  if (!Pairwise(first)) {
    const ncclComm_t comm = comms_.Of(*first.group);
    if (comm != nullptr && first.group->size() > 1) {
      STRETTO_RETURN_IF_ERROR(HandOver(batch, comm));
    }
    return first.adds ? AddOwn(first) : absl::OkStatus();
  }
  const ncclComm_t comm = comms_.world_comm();
  if (comm == nullptr) return absl::OkStatus();
  bool all_met = true;
  for (const Operation* o : batch) {
    EachMessage(*o, [&](bool send, int peer, std::byte*, std::size_t) {
      all_met = comms_.Meet(peer, send) && all_met;
    });
  }
  if (all_met) return HandOver(batch, comm);
  const std::chrono::milliseconds limit = world_.options().timeout;
  const auto end =
      limit.count() > 0 ? NcclComms::Clock::now() + limit : NcclComms::Clock::time_point::max();
  const absl::Status met = comms_.Apart("the first message between two ranks", end,
                                        [&] { return HandOver(batch, comm); });
  // The control plane may know more about why than this rank saw.
  const bool late = absl::IsDeadlineExceeded(met) || absl::IsAborted(met);
  return late ? absl::UnavailableError(std::string(met.message())) : met;
}

absl::Status Nccl::HandOver(std::span<Operation* const> batch, ncclComm_t comm) {
  const NcclLibrary& nccl = *comms_.nccl();
  ncclResult_t result = nccl.GroupStart();
  if (result != ncclSuccess) return comms_.Failed("ncclGroupStart", result, comm);
  const auto queue = static_cast<cudaStream_t>(stream().native());
  absl::Status called;
  for (const Operation* p : batch) {
    const Operation& o = *p;
    if (Pairwise(o)) {
      EachMessage(o, [&](bool send, int peer, std::byte* data, std::size_t bytes) {
        result = send ? nccl.Send(data, bytes, ncclUint8, peer, comm, queue)
                      : nccl.Recv(data, bytes, ncclUint8, peer, comm, queue);
        called.Update(comms_.Failed(send ? "ncclSend" : "ncclRecv", result, comm));
      });
      continue;
    }
    const ncclDataType_t type = TypeOf(o.dtype);
    for (const Operation::Item& item : o.items) {
      const auto count = static_cast<std::size_t>(item.elements);
      const std::size_t bytes = count * static_cast<std::size_t>(SizeOf(o.dtype));
      if (count == 0) continue;
      switch (o.op) {
        case CommOp::kAllReduce:
          result = nccl.AllReduce(item.input, item.output, count, type, ReductionOf(o.reduce), comm,
                                  queue);
          break;
        case CommOp::kReduceScatter:
          result = nccl.ReduceScatter(item.input, o.adds ? OwnPart(o, item) : item.output, count,
                                      type, ncclSum, comm, queue);
          break;
        case CommOp::kAllGather:
          result = nccl.AllGather(item.input, item.output, bytes, ncclUint8, comm, queue);
          break;
        case CommOp::kBroadcast:
          result = nccl.Broadcast(item.input, item.output, bytes, ncclUint8, o.peer, comm, queue);
          break;
        default:
          break;
      }
      called.Update(comms_.Failed(Name(o.op), result, comm));
    }
  }
  result = nccl.GroupEnd();
  STRETTO_RETURN_IF_ERROR(called);
  return comms_.Failed("ncclGroupEnd", result, comm);
}

}  // namespace

absl::StatusOr<std::unique_ptr<DeviceCollectives>> ConnectNccl(World& world, Device device) {
  auto nccl = std::make_unique<Nccl>(world, device);
  STRETTO_RETURN_IF_ERROR(nccl->Connect());
  return nccl;
}

}  // namespace stretto
