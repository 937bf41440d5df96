// The flight recorder: every communication of a rank, in a ring, always on.
#ifndef STRETTO_COMM_RECORDER_H_
#define STRETTO_COMM_RECORDER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/dtype.h"
#include "stretto/core/status.h"

namespace stretto {

enum class CommOp : uint8_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kAllToAll,
  kSend,
  kReceive,
  kBarrier,
};
const char* Name(CommOp op);
// An operation as messages name it: "send(pp) seq 3 to rank 1 [label]". `group` is the group's
// name, `peer` the other rank of a send or receive.
std::string Describe(CommOp op, const std::string& group, int64_t sequence, int peer,
                     const std::string& label);

// One operation. Times are microseconds of the steady clock; 0: not yet.
struct FlightRecord {
  int64_t sequence = 0;  // per group, starting at 1; the same on all its ranks
  int group = 0;
  CommOp op = CommOp::kBarrier;
  DType dtype = DType::kF32;
  int64_t count = 0;        // elements of the operation (per rank for all-gather)
  int peer = -1;            // point to point
  char label[56] = {};      // who asked, e.g. "grad bucket 3"
  int64_t enqueued_us = 0;  // handed to the scheduler
  int64_t started_us = 0;   // first message posted
  int64_t finished_us = 0;
};

class FlightRecorder {
 public:
  explicit FlightRecorder(int capacity = 4096);
  ~FlightRecorder();

  // What records of this group call it from now on; "group <id>" before.
  void NameGroup(int id, const std::string& name);
  // Lock-free; one writer.
  int64_t Begin(const FlightRecord& record);  // returns a handle
  void Started(int64_t handle);
  void Finished(int64_t handle);

  // The newest records, oldest first. Safe while the writer runs.
  std::vector<FlightRecord> Snapshot() const;
  // "last finished: reduce_scatter(dp) seq 41 [grad bucket 2]; in flight: ..." for the watchdog.
  std::string Summary() const;
  std::string ToJson(int rank, int world_size) const;
  // Writes ToJson to `directory`/flight-rank<r>.json.
  absl::Status Dump(const std::string& directory, int rank, int world_size) const;

 private:
  struct Ring;
  std::unique_ptr<Ring> ring_;
};

}  // namespace stretto

#endif  // STRETTO_COMM_RECORDER_H_
