// Collectives and point-to-point over groups of ranks, issued in one order and progressed without
// blocking.
#ifndef STRETTO_COMM_COMMUNICATOR_H_
#define STRETTO_COMM_COMMUNICATOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/mesh.h"
#include "stretto/comm/recorder.h"
#include "stretto/comm/world.h"
#include "stretto/core/stream.h"
#include "stretto/core/tensor.h"
#include "stretto/core/trace_recorder.h"

namespace stretto {

enum class ReduceOp : uint8_t { kSum, kMax, kMin };

// A group known to the communicator; ids are the same on all its ranks. Copyable value.
struct Group {
  int id = -1;
  std::string name;  // "dp"; appears in messages
  RankList ranks;    // ring order
  int index = 0;     // this rank's place in `ranks`
  int size() const { return static_cast<int>(ranks.size()); }
};

// An operation in flight. Tickets count up from 1; 0 is "already done".
using Ticket = int64_t;

// The one door to other ranks (contracts 3 and 4). Operations are submitted in the same order by
// all ranks of a group; they are posted when `after` has happened and proceed whenever Progress()
// or Wait() runs, several at a time. Reductions add in group order 0, 1, ..., n-1, in f64 for f64
// and in f32 for f32 and bf16 (rounded once at the end), so that the bits depend neither on timing
// nor on the transport. Tensors are contiguous and stay untouched until the ticket is done. After
// the first operations of a shape nothing is allocated.
//
// An error (peer gone, time-out) is sticky: every later call returns it. A time-out asks the
// control plane who is missing and says "rank 3 never entered reduce_scatter(dp) seq 17 [grad
// bucket 2]; its last finished operation was ...".
//
// Tensors on a GPU travel through NCCL, after UseDevice. The device waits for `after` by itself,
// and Wait(Stream&, ticket) returns at once: the host need not be there. What differs:
// - NCCL chooses the order of additions: a layout gives the same bits again, not the CPU's. It adds
//   bf16 in bf16, rounding at every step; maxima and minima need not carry NaN.
// - Operations run in the order of submission, one after the other, and only a send or receive
//   proceeds together with those submitted directly before and after it, until a wait, Done,
//   Progress or a collective. Two ranks that send to each other submit both directions before that.
// - Sends and receives of all groups between two ranks match in one order.
// - An error also fails the streams that were given to Wait and not yet synchronized, and ends the
//   kernels that wait for other ranks, so no host thread hangs in a synchronization.
class Communicator {
 public:
  // `world` outlives the communicator. Several on one world do not disturb each other. Without the
  // thread that it needs its status() is RESOURCE_EXHAUSTED from the start.
  explicit Communicator(World& world);
  ~Communicator();

  World& world();
  // From now on tensors on `device` may be given too (one device for each communicator; nothing
  // happens for the CPU). All ranks call this in the same order, each with a GPU of its own; ends
  // in an agreement of all ranks. Connects the ranks, so that the first operations need not.
  // UNAVAILABLE, in one sentence, when there is no NCCL or it is too old, FAILED_PRECONDITION when
  // two ranks share a GPU.
  absl::Status UseDevice(Device device);
  // Makes a group known; all ranks of the world call this in the same order with their own list
  // (groups along one mesh axis partition the world; a rank outside passes any list it is in).
  absl::StatusOr<Group> MakeGroup(const std::string& name, const RankList& ranks);
  const Group& all() const;  // every rank, by rank; id 0
  // From now on all-gathers of this group, and reduce-scatters of f32 and bf16, travel through the
  // copy engines of its GPUs, which leaves the multiprocessors to whatever computes meanwhile:
  // between processes on one machine whose GPUs reach each other's memory. Those reduce-scatters
  // add as on the CPU, bit for bit. After UseDevice; all ranks call this in the same order, each
  // with its group of that name; again for the same group does nothing. Takes kCopyEngineBytes of
  // the device. Returns an empty string, or, the same on all ranks, why it cannot be and everything
  // goes on as before.
  absl::StatusOr<std::string> UseCopyEngines(const Group& g);
  static constexpr int64_t kCopyEngineBytes = int64_t{64} << 20;  // for each group
  // From now on the copy engines of this group, which are used already, read the inputs of
  // all-gathers where they are, if all of an operation's lie in `memory`: contiguous, on the
  // device, of this rank, at least until the communicator is gone. In the other ranks' `memory`
  // theirs must lie at the same places, for which equal `layout` on all ranks of the group vouches.
  // All ranks call this in the same order. Returns as UseCopyEngines.
  absl::StatusOr<std::string> ShareMemory(const Group& g, Tensor memory, uint64_t layout);

  // In place: every rank ends with the reduction. f64, f32, bf16, i32, i64.
  Ticket AllReduce(const Group& g, Tensor data, ReduceOp op, const std::string& label,
                   Event after = {});
  // `input` has size() * output.elements() elements; rank i of the group receives the sum of
  // everybody's i-th part. `output` may be the i-th part of `input`.
  Ticket ReduceScatter(const Group& g, Tensor output, Tensor input, const std::string& label,
                       Event after = {});
  // `output` has size() * input.elements() elements, parts in group order. `input` may be this
  // rank's part of `output`.
  Ticket AllGather(const Group& g, Tensor output, Tensor input, const std::string& label,
                   Event after = {});
  Ticket Broadcast(const Group& g, Tensor data, int root_index, const std::string& label,
                   Event after = {});
  // Elements `send_counts[i]` from send_offsets[i] go to rank i of the group. Counts are host
  // values.
  Ticket AllToAll(const Group& g, Tensor output, const std::vector<int64_t>& receive_counts,
                  Tensor input, const std::vector<int64_t>& send_counts, const std::string& label,
                  Event after = {});
  // Point to point inside a group; `peer` is an index in the group. Several sends and receives in
  // flight between the same two ranks match in the order of submission.
  Ticket Send(const Group& g, Tensor data, int peer, const std::string& label, Event after = {});
  Ticket Receive(const Group& g, Tensor data, int peer, const std::string& label, Event after = {});

  // A bucket: several reduce-scatters (or all-gathers) as one recorded operation, e.g. one for each
  // parameter of a transformer block. `outputs[i]` and `inputs[i]` as in ReduceScatter / AllGather.
  Ticket ReduceScatterMany(const Group& g, const std::vector<Tensor>& outputs,
                           const std::vector<Tensor>& inputs, const std::string& label,
                           Event after = {});
  // ... whose sums, each rounded to its type, are added to `outputs`. Of f32 or bf16 on a device
  // that is not a CPU; outputs lie outside of the inputs, whose own part may be written to.
  Ticket ReduceScatterAddMany(const Group& g, const std::vector<Tensor>& outputs,
                              const std::vector<Tensor>& inputs, const std::string& label,
                              Event after = {});
  Ticket AllGatherMany(const Group& g, const std::vector<Tensor>& outputs,
                       const std::vector<Tensor>& inputs, const std::string& label,
                       Event after = {});

  // Advances whatever can advance; never blocks. Called between pieces of compute, and behind the
  // last of sends and receives on a device that are to proceed together.
  void Progress();
  // True also after an error, so that polling loops end; Wait or status() then says why.
  bool Done(Ticket ticket);
  // Blocks until the ticket is done, or fails: at once when a rank of the group died or failed, and
  // after WorldOptions::timeout otherwise.
  absl::Status Wait(Ticket ticket);
  // Work enqueued on `stream` from now on sees the result. For an operation on the stream's own
  // device the host does not wait, and `stream` outlives the communicator.
  absl::Status Wait(Stream& stream, Ticket ticket);
  absl::Status WaitAll();
  // The sticky error.
  absl::Status status() const;

  FlightRecorder& recorder();
  // From now on operations are recorded there, too: in the row of their group's name, from when
  // they start to when they are done, on a device as its stream comes to them. Sends and receives
  // have rows of their own. Null: not any more; no recorded operation is in flight then. The
  // recorder outlives the communicator, or its use.
  void SetTrace(TraceRecorder* trace);
  TraceRecorder* trace() const;
  // Payload bytes this rank sent for operations on groups called `name` since the start.
  int64_t BytesSent(const std::string& group_name) const;
  // ... of them by copy engines.
  int64_t BytesCopied(const std::string& group_name) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Dumps the flight recorders of this process when it receives SIGUSR2, to `directory`, from a
// thread that also works while the rank hangs in a wait. One per process.
absl::Status InstallFlightDumpOnSignal(Communicator& communicator, const std::string& directory);

}  // namespace stretto

#endif  // STRETTO_COMM_COMMUNICATOR_H_
