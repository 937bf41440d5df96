// The communicators of NCCL of one rank: set up, warmed up and ended here.
#ifndef STRETTO_SRC_COMM_CUDA_NCCL_COMMS_H_
#define STRETTO_SRC_COMM_CUDA_NCCL_COMMS_H_

#include <nccl.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "src/comm/cuda/nccl_library.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/world.h"
#include "stretto/core/device.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

namespace stretto {

// One communicator spans the world; groups that are not the whole world have one of their own.
// Sends, receives and all-to-alls always run on the world's, so connections between two ranks are
// made once.
//
// These block: NCCL hands an operation over in the calling thread, where a non-blocking
// communicator starts a thread for each. So that no such call waits for another rank, all that an
// operation may use is connected in advance. What does wait for others, set-up and the first use of
// a connection, is polled with a deadline: all communicators are split from one that does not block
// and that carries no operations, and connections are made in a thread apart.
class NcclComms {
 public:
  // How far set-up connects pairs of ranks for messages: all pairs of a group that has no more
  // ranks than this, neighbours in larger ones.
  static constexpr int kLargestFullMesh = 8;

  using Clock = std::chrono::steady_clock;

  NcclComms(World& world, Device device) : world_(world), device_(device) {}
  // Ends a healthy communicator, within a deadline.
  ~NcclComms();

  // Refuses two ranks on one GPU. Both end in an agreement of all ranks.
  absl::Status Connect();
  absl::Status AddGroup(const Group& group);

  // For the calling thread.
  absl::Status SelectDevice() const;
  Stream& stream() { return *stream_; }
  // Null in a world of one.
  const NcclLibrary* nccl() const { return nccl_; }
  // All null, or unknown groups, before Connect and after Abort; null for a group of one rank.
  ncclComm_t world_comm() const { return world_comm_; }
  ncclComm_t Of(const Group& group) const;
  bool given_up() const { return nccl_ != nullptr && parent_ == nullptr; }

  // Whether messages to, or from, a rank of the world travel without a wait for it; from now on
  // they do.
  bool Meet(int peer, bool send);
  // Runs `work`, which hands operations to NCCL, in a thread of its own, and waits for its end.
  // DEADLINE_EXCEEDED and ABORTED, another rank has given up: Abort has to follow, in this thread.
  absl::Status Apart(const char* what, Clock::time_point end,
                     const std::function<absl::Status()>& work);

  // OK for ncclInProgress too, which only set-up returns.
  absl::Status Failed(const char* call, ncclResult_t result, ncclComm_t comm) const;
  // What NCCL noticed since. Never blocks.
  absl::Status Check() const;
  // Tells all kernels, and threads inside NCCL, to end, and waits for none of them. Abort has to
  // follow, in this thread.
  void Tell();
  // Ends the kernels of all of them, and forgets them.
  void Abort();

 private:
  absl::Status Open(std::string* gpu);
  // Until `ready` returns true; see Apart for errors.
  absl::Status Poll(const char* what, Clock::time_point end,
                    const std::function<absl::StatusOr<bool>()>& ready);
  // Waits until the parent has done what it was asked for.
  absl::Status Settle(const char* call, Clock::time_point end);
  bool OthersGaveUp();
  // Ends a phase of set-up on all ranks; aborts when one of them failed.
  absl::Status Conclude(const std::string& phase, absl::Status mine);
  // A communicator for the ranks of one color, warmed up. Null: NCCL_SPLIT_NOCOLOR.
  absl::StatusOr<ncclComm_t> Split(int color, int index, int size, Clock::time_point end);
  // Uses, of a communicator of `size` ranks, all that collectives may use.
  absl::Status WarmUp(ncclComm_t comm, int index, int size, Clock::time_point end);
  // A message to and from each of these ranks of the world.
  absl::Status WarmUpPairs(const RankList& peers, Clock::time_point end);
  // Apart, and then until what was handed over has run.
  absl::Status UseOnce(const char* what, Clock::time_point end,
                       const std::function<absl::Status()>& work);
  cudaStream_t native() const { return static_cast<cudaStream_t>(stream_->native()); }

  World& world_;
  const Device device_;
  const NcclLibrary* nccl_ = nullptr;  // null in a world of one
  std::unique_ptr<Stream> stream_;
  std::string failed_key_;         // exists when a rank failed in set-up
  ncclComm_t parent_ = nullptr;    // does not block; carries no operations
  std::vector<ncclComm_t> comms_;  // split from it, the world's first, then in order of making
  ncclComm_t world_comm_ = nullptr;
  std::vector<std::pair<int, ncclComm_t>> of_group_;  // by group id
  std::vector<bool> sent_, received_;                 // by rank of the world; see Meet
  bool told_ = false;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_CUDA_NCCL_COMMS_H_
