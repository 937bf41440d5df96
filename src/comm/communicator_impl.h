// The inside of a Communicator.
#ifndef STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_
#define STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/comm/collectives.h"
#include "src/comm/watchdog.h"
#include "stretto/comm/communicator.h"

namespace stretto {

struct Communicator::Impl {
  struct GroupState {
    Group group;
    int64_t submitted = 0;   // collectives
    int64_t next_start = 1;  // sequence of the collective that starts next
    int active = 0;
    int64_t bytes_sent = 0;
  };

  explicit Impl(World& w);

  World& world;
  FlightRecorder recorder;
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

  void Delay();
  GroupState* Find(const Group& g);
  GroupState& AddGroup(const std::string& name, const RankList& ranks);
  // Checks the group and makes an operation; null after an error.
  Operation* New(CommOp op, const Group& g, const std::string& label, const Event& after,
                 DType dtype);
  Ticket Submit(Operation* o, int64_t count);
  Ticket SubmitParts(CommOp op, const Group& g, std::span<const Tensor> outputs,
                     std::span<const Tensor> inputs, const std::string& label, const Event& after);
  Ticket Refuse(CommOp op, const Group& g, const std::string& label, const std::string& why);
  bool Usable(CommOp op, const Group& g, const std::string& label, const Tensor& t);
  bool Step();  // one round over what is in flight; true when something moved
  void Finish(Operation& o);
  void Fail(absl::Status status, bool publish);
  void FailOperation(const Operation& o, const absl::Status& status);
  void LookForTrouble();
  // Why `o` cannot finish; OK when no rank in trouble is known, or it is not yet time to give up.
  absl::Status BlameTrouble(const Operation& o, const Watchdog::Trouble& trouble);
  std::string What(const Operation& o) const;
  Operation* Flying(Ticket ticket);
  absl::Status Wait(Ticket ticket);
  void TimedOut(const Operation& o, std::chrono::steady_clock::time_point since);
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_COMMUNICATOR_IMPL_H_
