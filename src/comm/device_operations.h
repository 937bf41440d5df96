// The operations between devices that one rank has in flight.
#ifndef STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_
#define STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "src/comm/collectives.h"
#include "src/comm/device_collectives.h"
#include "stretto/comm/recorder.h"

namespace stretto {

// Hands operations to the device one after the other, on its one communication stream. Sends and
// receives that follow each other, with no Advance(true) in between, proceed together: on a stream
// a receive would otherwise hold back the send that the other rank waits for before it sends. More
// of them do not join when the stream is full: of what proceeds together a later message may wait
// for an earlier one's other end, and a rank that expects them apart for the later one.
//
// Only so many are in the stream at a time: a launch into a full queue does not return before the
// device has made room, which it never does when it waits for a rank that is gone. The rest waits
// here, where whoever waits for it can give up.
class DeviceOperations {
 public:
  // A queue of the device takes about 1024 launches.
  static constexpr int64_t kMostLaunches = 576;
  static constexpr int64_t kAround = 8;  // an operation's own: waits, times and events
  // ... in all of them. NCCL describes operations of many items in a ring of 1 MiB, 112 bytes each,
  // and frees it an eighth at a time.
  static constexpr int64_t kMostItems = 4096;

  // `before_issue` is called before each hand-over (tests inject delays and faults there).
  DeviceOperations(std::unique_ptr<DeviceCollectives> collectives, FlightRecorder& recorder,
                   std::function<void(const Operation&)> before_issue)
      : collectives_(std::move(collectives)),
        recorder_(recorder),
        before_issue_(std::move(before_issue)) {}

  DeviceCollectives& collectives() { return *collectives_; }
  Device device() { return collectives_->stream().device(); }

  // Null: nothing is traced.
  void SetTrace(TraceRecorder* trace) { trace_ = trace; }
  // `o` comes after whatever was added before.
  void Add(Operation* o);
  // Hands over what the stream has room for; true when something happened. Sends and receives at
  // the end of the line stay, since more of them may follow, until there was an Advance with `all`.
  // After an error, failed() is the operation that it concerns.
  absl::StatusOr<bool> Advance(bool all);
  const Operation* failed() const { return failed_; }
  // `o`, which was handed over, has left the stream.
  void Finished(const Operation& o);
  // Whether Advance(false) can soon do something.
  bool busy() const;
  // Forgets all of them, and ends what runs on the device.
  void Abort();

 private:
  bool HasRoom(std::span<Operation* const> batch) const;
  absl::Status Issue(std::span<Operation* const> batch);

  std::unique_ptr<DeviceCollectives> collectives_;
  FlightRecorder& recorder_;
  TraceRecorder* trace_ = nullptr;
  std::function<void(const Operation&)> before_issue_;
  std::vector<Operation*> waiting_;  // in order of submission
  int64_t together_ = 0;             // of what is added now
  int64_t queued_ = 0, queued_launches_ = 0, queued_items_ = 0;
  const Operation* failed_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_
