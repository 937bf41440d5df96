// What a kind of device other than the CPU provides to this layer: operations between devices of
// the ranks, enqueued on a stream. One implementation for each kind; src/comm/CMakeLists.txt lists
// those that are built.
#ifndef STRETTO_SRC_COMM_DEVICE_COLLECTIVES_H_
#define STRETTO_SRC_COMM_DEVICE_COLLECTIVES_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/comm/collectives.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/world.h"
#include "stretto/core/device.h"
#include "stretto/core/status.h"
#include "stretto/core/stream.h"

namespace stretto {

// Calls come from one thread at a time.
class DeviceCollectives {
 public:
  virtual ~DeviceCollectives() = default;
  // Called once by each thread that is going to call the functions below.
  virtual void EnterThread() = 0;
  // Everything is issued on this stream, in the order of the calls; the end of an operation may be
  // on another one.
  virtual Stream& stream() = 0;
  // Makes a group known. All ranks of the world call this in the same order, each with the group
  // that it is in, while nothing is in flight; ends in an agreement of all ranks.
  virtual absl::Status AddGroup(const Group& group) = 0;
  // From now on all-gathers and reduce-scatters of this group, which is known, leave the device's
  // multiprocessors alone, as far as its ranks can reach each other's memory. Called as AddGroup.
  // Empty: it is so; otherwise why it cannot be, the same on all ranks, and nothing has changed.
  virtual absl::StatusOr<std::string> UseCopyEngines(const Group& group) = 0;
  // From now on all-gathers of this group may read their inputs in `memory` where they are, on all
  // ranks of the group, which have tensors at the same places in it where `layout` is equal. Called
  // and answered as UseCopyEngines.
  virtual absl::StatusOr<std::string> Share(const Group& group, std::span<std::byte> memory,
                                            uint64_t layout) = 0;
  // Decides, once for each operation, what Issue does with it: sets `copied`, and returns how many
  // launches that takes at most.
  virtual int64_t Prepare(Operation* o) = 0;
  // Hands one collective, or any number of sends and receives that proceed together, to the device,
  // and returns the stream on which it ends: an event recorded there from then on comes after it.
  // Whatever is issued later finds its results. Waits for no other rank, except for the first
  // message between two ranks that AddGroup has not connected, and then no longer than the world's
  // time-out.
  virtual absl::StatusOr<Stream*> Issue(std::span<Operation* const> batch) = 0;
  // An error that was noticed since, e.g. that a connection broke. Never blocks.
  virtual absl::Status Check() = 0;
  // Ends what still runs on the device, as far as it waits for other ranks. Nothing but the
  // destructor follows. Called by the thread that met the error.
  virtual void Abort() = 0;
};

// Connects the devices of all ranks, each of which calls this with its own. Ends in an agreement of
// all ranks. UNIMPLEMENTED when the build has nothing for this kind of device.
absl::StatusOr<std::unique_ptr<DeviceCollectives>> ConnectDevices(World& world, Device device);

// Opens the libraries that ConnectDevices needs for this kind of device and says what it found.
std::vector<LibraryInfo> DescribeCollectives(DeviceKind kind);

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_DEVICE_COLLECTIVES_H_
