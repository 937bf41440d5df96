// The operations between devices that one rank has in flight.
#ifndef STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_
#define STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "src/comm/collectives.h"
#include "src/comm/device_collectives.h"
#include "stretto/comm/recorder.h"

namespace stretto {

// Hands operations to the device one after the other, on its one communication stream. Sends and
// receives that follow each other proceed together: on a stream a receive would otherwise hold
// back the send that the other rank waits for before it sends.
class DeviceOperations {
 public:
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
  // Moves the operations on; true when something happened. Sends and receives at the end of the
  // line stay, unless `all`: more of them may follow. Never blocks. After an error, failed() is the
  // operation that it concerns.
  absl::StatusOr<bool> Advance(bool all);
  const Operation* failed() const { return failed_; }
  // Whether Advance(false) can soon do something.
  bool busy() const;
  // Forgets all of them, and ends what runs on the device.
  void Abort();

 private:
  std::unique_ptr<DeviceCollectives> collectives_;
  FlightRecorder& recorder_;
  TraceRecorder* trace_ = nullptr;
  std::function<void(const Operation&)> before_issue_;
  std::vector<Operation*> waiting_;  // in order of submission
  std::vector<Operation*> batch_;    // handed over, but not yet known to be in the stream
  const Operation* failed_ = nullptr;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_DEVICE_OPERATIONS_H_
