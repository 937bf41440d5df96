// All-gathers and reduce-scatters of one machine's GPUs by their copy engines, which leave the
// multiprocessors to the products beside them; docs/decisions/019 says why not by NCCL's.
#ifndef STRETTO_SRC_COMM_CUDA_COPY_ENGINES_H_
#define STRETTO_SRC_COMM_CUDA_COPY_ENGINES_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/comm/collectives.h"
#include "src/comm/copy_rounds.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/world.h"
#include "stretto/core/arena.h"
#include "stretto/core/device.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

namespace stretto {

// Each rank of a group has a window: memory of its GPU, kSlots slots, that the others' processes
// map. An operation passes through it in rounds, which all ranks of the group count alike; round c
// uses slot c % kSlots:
//
//   all-gather:      copy the own part into the own slot
//   reduce-scatter:  copy part p into the slot of rank p, for each other rank p
//   tell every rank "round c has arrived", and wait until every rank has said so
//   all-gather:      copy the parts from the others' slots to the output
//   reduce-scatter:  add what lies in the own slot to the own part, in the order of the ranks
//
// Who says that round c has arrived has left round c - 1 behind. So nobody writes to a slot that is
// still read: before round c everybody has said that of c - 1, and left c - 2 behind.
//
// An all-gather whose inputs lie in shared memory (Share) takes two rounds without a slot: "the
// input is there", then copies from the others' inputs to the output, then "they are read".
//
// Other tensors need not be mapped, nor lie at the same place on all ranks. All of it is
// enqueued on the communication stream; the host waits for nothing. Flags lie in host memory that
// the processes share, so whoever gives up ends its stream's waits by plain stores: that works
// while another thread is in a call of CUDA that does not return.
//
// Copies between GPUs are the copy engines'. Copies within a GPU and sums are kernels (so is
// cudaMemcpyAsync there): beside a product that holds all multiprocessors they wait for its end. A
// batch that has both waits as a whole, so they go apart. Where an operation ends in one, that is
// on a stream aside, and the operations behind it go on; those that touch the same tensors wait.
// Before a rank says that a round with a slot has arrived, it has added what lay in the slots of
// the rounds before. Rounds without one come in pairs, so those with one use the slots in turn: who
// writes to a slot has heard of the round in between, and with it that the slot was added.
class CopyEngines {
 public:
  using Clock = std::chrono::steady_clock;

  static constexpr int kSlots = 2;
  static constexpr int kMostRanks = 16;
  static constexpr int64_t kSlotBytes = int64_t{32} << 20;
  static constexpr int64_t kWindowBytes = kSlots * kSlotBytes;
  static_assert(kWindowBytes == Communicator::kCopyEngineBytes);
  // What one operation may enqueue: a queue of the device takes about 1024 launches, and a launch
  // into a full one would not return.
  static constexpr int64_t kMostLaunches = 512;

  // `stream` is the communication stream, with the calling thread on its device wherever functions
  // below are called. Both outlive the object. `multiprocessors`: the device's. The kernels of
  // sum_parts.h are loaded.
  CopyEngines(World& world, Stream& stream, int multiprocessors)
      : world_(world), stream_(stream), multiprocessors_(multiprocessors) {}
  // After operations that have ended well: waits, within a deadline, until no other rank touches
  // the windows any more.
  ~CopyEngines();

  // Connects this group, in which the calling rank is; all ranks of the world call it in the same
  // order, while nothing is in flight. Empty: it is connected, or was before. Otherwise why it
  // cannot be, the same on all ranks, and nothing has changed.
  absl::StatusOr<std::string> Add(const Group& group);
  // From now on all-gathers of this connected group read inputs in `memory`, device memory of this
  // rank, where they are. All ranks of the world call it in the same order, while nothing is in
  // flight, and keep the memory until the object is gone. The ranks of a group have tensors at the
  // same places in it, which equal `layout` vouches for. The answer is Add's.
  absl::StatusOr<std::string> Share(const Group& group, std::span<std::byte> memory,
                                    uint64_t layout);
  // Decides how Issue carries this operation out (sets `region`), and returns what that enqueues at
  // most; 0: it does not carry it out. The same on all ranks of its group.
  int64_t Plan(Operation* o);
  // Returns the stream on which the operation ends.
  absl::StatusOr<Stream*> Issue(const Operation& o);
  // What is enqueued on the communication stream from now on comes after all that was issued.
  void Join();
  // From any thread: ends what waits on the stream for other ranks, and waits for the stream's end
  // until `end`. False: it has not come. Nothing but the destructor follows.
  bool End(Clock::time_point end);

 private:
  // Memory that the ranks of a group share, by their index in it.
  struct Region {
    std::span<std::byte> own;
    std::vector<std::byte*> bases;  // where each rank's begins
  };
  struct Channel {
    Group group;
    Arena window;
    std::vector<std::byte*> windows;  // by index in the group
    std::vector<void*> mapped;        // allocations of other ranks, of windows and regions
    // [waiting rank, writing rank]: how many rounds have arrived. As the host and as the GPU sees
    // it.
    uint32_t* flags = nullptr;
    CUdeviceptr device_flags = 0;
    std::optional<HostRegistration> registration;
    std::string flags_name;  // while others may have to open it
    uint32_t rounds = 0;
    Event summed;  // what lay in the last slot that was used for a sum
    std::deque<Region> regions;
  };
  // A tensor that the end of an operation, aside, reads or writes.
  struct Aside {
    Event done;
    std::span<const std::byte> tensor;
  };
  static constexpr size_t kFlagBytes = 4096;
  // Behind the cells of the rounds: whether a rank has unmapped what belongs to the others.
  static constexpr int kUnmapped = kMostRanks * kMostRanks;
  static_assert((kUnmapped + kMostRanks) * sizeof(uint32_t) <= kFlagBytes);
  // A round that has not begun and yet is ahead of all that has, as flags compare.
  static constexpr uint32_t kFarAhead = uint32_t{1} << 30;

  static absl::Status Called(const char* call, cudaError_t error);
  static int Cell(int waiting, int writing) { return waiting * kMostRanks + writing; }
  static std::byte* Slot(std::byte* window, uint32_t round);
  // Of a slot, for one rank's part.
  static int64_t Room(const Operation& o);
  // Which region all inputs of this all-gather lie in; -1: none.
  static int RegionOf(const Channel& c, const Operation& o);

  Channel* Of(const Group& group);
  // Waits in, and writes to, the flags.
  void Write(const Channel& c, int cell, uint32_t value);
  void Wait(const Channel& c, int cell, uint32_t value);
  absl::Status Signal();
  void Copy(std::byte* to, const std::byte* from, int64_t bytes);
  absl::Status CopyAll(Stream& stream);
  absl::Status AddParts(const Channel& c, const Operation& o, const std::byte* slot);
  // Says on all ranks of the group that this one's data of the round have arrived, and waits until
  // all have said so.
  absl::Status Meet(const Channel& c);
  // The streams' orders: `later` goes on when `earlier` has come here.
  static void Follow(Stream& later, Stream& earlier) { later.Wait(earlier.Record()); }
  absl::Status EnqueueRound(Channel* c, const Operation& o);
  static bool InPlace(const Operation& o, const Operation::Item& item);
  absl::Status EnqueueShared(Channel* c, const Region& region, const Operation& o);
  absl::StatusOr<Stream*> Enqueue(Channel* c, const Operation& o);
  // Calls touches(tensor) for what an operation reads and writes.
  template <class Call>
  static void EachTensor(const Operation& o, const Call& touches);
  // The operation comes after the ends of those that touch the same tensors.
  void Order(const Operation& o);

  absl::Status Prepare();
  // Every rank says how far it came, and all go on (an empty string) or none.
  absl::StatusOr<std::string> Agree(const Group& group, const char* what, const absl::Status& mine,
                                    const std::string& value, std::vector<std::string>* values);
  // What another process needs to map this memory.
  absl::Status Export(const std::byte* memory, std::string* handle);
  static absl::Status Import(absl::string_view handle, Channel* c, std::byte** memory);
  absl::Status Open(Channel* c, std::string* handle);
  absl::Status MapFlags(bool create, Channel* c);
  absl::Status MapPeers(const std::vector<std::string>& handles, Channel* c);
  // Uses a channel once and looks at what arrived.
  absl::Status Try(Channel* c);
  // Unmaps the last of what belongs to other ranks, until `left` are there.
  static void Unmap(Channel* c, size_t left = 0);
  void Close(Channel* c);
  // Whether the stream came to its end.
  bool Idle(Clock::time_point end);
  // ... with waits ended again and again, as long as it takes.
  bool IdleWhile(Clock::time_point end, const std::function<void()>& end_waits);
  static void EndWaits(const Channel& c);
  static cudaStream_t Native(Stream& s) { return static_cast<cudaStream_t>(s.native()); }
  cudaStream_t native() const { return Native(stream_); }
  bool Busy() const;

  World& world_;
  Stream& stream_;
  const int multiprocessors_;
  std::unique_ptr<Stream> aside_;  // once something is connected
  std::vector<Aside> ends_;        // on it, in order
  decltype(&cuStreamBatchMemOp) batch_mem_op_ = nullptr;
  decltype(&cuMemGetAddressRange) address_range_ = nullptr;
  bool ended_ = false;
  std::deque<Channel> channels_;
  // Ids of the groups that were added, the same on all ranks; those of one rank have no channel.
  std::vector<int> groups_;
  // Of what is being enqueued.
  std::vector<CUstreamBatchMemOpParams> signals_;
  std::vector<CopyPiece> pieces_;
  std::vector<void*> to_;
  std::vector<const void*> from_;
  std::vector<size_t> bytes_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_COPY_ENGINES_H_
