// The inside of a Communicator: submission is in communicator.cc, what becomes of operations in
// communicator_progress.cc, and what only operations on a device need in communicator_device.cc.
#ifndef STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_
#define STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "src/comm/collectives.h"
#include "src/comm/device_operations.h"
#include "src/comm/watchdog.h"
#include "stretto/comm/communicator.h"

namespace stretto {

struct Communicator::Impl {
  struct GroupState {
    Group group;
    int64_t submitted = 0;   // collectives
    int64_t next_start = 1;  // sequence of the collective that starts next
    int active = 0;
    int64_t bytes_sent = 0, bytes_copied = 0;
    std::string send_row, receive_row;  // of a trace
  };

  explicit Impl(World& w);
  ~Impl();

  World& world;
  FlightRecorder recorder;
  TraceRecorder* trace = nullptr;
  Engine engine;
  Watchdog watchdog;
  std::deque<GroupState> groups;  // operations point into it
  std::vector<std::unique_ptr<Operation>> pool;
  std::vector<Operation*> free;
  std::vector<Operation*> in_flight;  // in order of submission
  Ticket last_ticket = 0;
  absl::Status error;
  uint64_t delays = 0;
  Operation room;  // has the room that any operation object ever needed

  // Operations on a device go on while this rank's thread does something else, and that may be to
  // wait for the device, which waits for a rank that is gone. So a guard looks after them: it hands
  // over the next one in time, and gives them up when they cannot finish. It has nothing to do
  // while none is in flight, and runs after UseDevice only.
  //
  // What the guard touches is used under `mutex`, by it or by the one thread that calls the
  // communicator; a wait holds the mutex, since it does all that the guard would do. The watchdog
  // never takes it. The transport and the world's meetings belong to the caller's thread.
  std::mutex mutex;
  std::unique_ptr<DeviceOperations> device;  // after UseDevice
  std::vector<Stream*> dependent;            // streams that wait for operations in flight
  std::thread guard;
  std::condition_variable guard_wake;
  bool guard_stop = false;
  bool abandon = false;  // the guard failed, but the transport is none of its business

  // Whose turn it is to move operations on.
  enum class Turn { kSubmit, kWait, kGuard };
  // What every public call begins with, except those that only read what never changes.
  std::unique_lock<std::mutex> Lock();
  void Guard();
  absl::Status UseDevice(Device d);
  bool AdvanceDevice(Turn turn);
  const Operation* FirstOnDevice() const;
  // Until the ticket is done, or, for an operation on a device, in the order of its stream.
  absl::Status WaitUntil(Ticket ticket, bool queued);
  absl::Status Wait(Stream& stream, Ticket ticket);

  void Delay();
  std::function<void(const Operation&)> BeforePost();
  GroupState* Find(const Group& g);
  // The sum over all groups of this name.
  int64_t Count(const std::string& name, int64_t GroupState::*bytes);
  GroupState& AddGroup(const std::string& name, const RankList& ranks);
  // Checks the group and makes an operation; null after an error.
  Operation* New(CommOp op, const Group& g, const std::string& label, const Event& after,
                 DType dtype, Device where);
  Ticket Submit(Operation* o, int64_t count);
  Ticket SubmitParts(CommOp op, const Group& g, std::span<const Tensor> outputs,
                     std::span<const Tensor> inputs, const std::string& label, const Event& after,
                     bool adds = false);
  Ticket Refuse(CommOp op, const Group& g, const std::string& label, const std::string& why);
  bool Usable(CommOp op, const Group& g, const std::string& label, const Tensor& t);
  bool SameDevice(CommOp op, const Group& g, const std::string& label, const Tensor& a,
                  const Tensor& b);
  bool Step(Turn turn);  // one round over what is in flight; true when something moved
  void Advance();        // what Progress does
  void Finish(Operation& o);
  // `own`: this rank found it out; otherwise it gives up because of ranks in trouble.
  void Fail(absl::Status status, bool own);
  void FailOperation(const Operation& o, const absl::Status& status);
  void LookForTrouble();
  // Why `o` cannot finish; OK when no rank in trouble is known, or it is not yet time to give up.
  absl::Status BlameTrouble(const Operation& o, const Watchdog::News& trouble);
  std::string What(const Operation& o) const;
  Operation* Flying(Ticket ticket);
  void TimedOut(const Operation& o, std::chrono::steady_clock::time_point since);
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_
