// The collectives as state machines over point-to-point messages.
#ifndef STRETTO_SRC_COMM_COLLECTIVES_H_
#define STRETTO_SRC_COMM_COLLECTIVES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/comm/transport.h"

namespace stretto {

// Buffers for data that arrive before they can be added. Grows at first use, then reuses.
// Collectives of one group under way at a time: bounds the staging memory. Ranks of a group start
// them in the same order, so the limit cannot make two ranks wait for each other.
constexpr int kActiveInGroup = 4;

class StagingPool {
 public:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  struct Buffer {
    std::unique_ptr<std::byte, Free> data;
    int64_t bytes = 0;
  };
  // `at_a_time` buffers of one size are in use at most, as a rule.
  explicit StagingPool(int at_a_time) : at_a_time_(at_a_time) { idle_.reserve(64); }
  Buffer Take(int64_t bytes);
  void Return(Buffer buffer);

 private:
  int at_a_time_;
  std::vector<Buffer> idle_;
};

// What a phase of an operation does with its messages.
enum class Pattern : uint8_t {
  kReduceScatter,  // my part p goes to rank p; parts of mine come from all, and are added
  kAllGather,      // my part goes to all; theirs come
  kGatherReduce,   // everything goes to all, and all add everything: short all-reduces
  kScatter,        // the root's part p goes to rank p
  kFan,            // the root's everything goes to all
  kAllToAll,
  kSend,
  kReceive,
};

// One operation in flight. Objects are reused, so their vectors keep their capacity.
//
// The data of a phase are cut into segments of a fixed size. At each step one segment travels on
// each lane (a lane is one other rank); up to `window` steps are under way, which bounds the
// staging memory and lets adding overlap the transfer. Messages between two ranks carry one tag and
// match in order, so the two sides need to agree on the order of segments only, not on their
// number.
struct Operation {
  struct Item {
    std::byte* input = nullptr;
    std::byte* output = nullptr;
    int64_t elements = 0;  // of one part; of the whole for all-reduce, broadcast, send and receive
  };
  struct Part {
    int64_t begin = 0;
    int64_t count = 0;
  };
  struct Cursor {
    std::size_t item = 0;
    int64_t offset = 0;  // elements, inside a part
    int64_t step = 0;
  };
  struct Span {
    std::byte* data = nullptr;
    int64_t elements = 0;
  };

  // Who and what.
  Ticket ticket = 0;
  CommOp op = CommOp::kBarrier;
  const Group* group = nullptr;
  int64_t sequence = 0;
  int tag = 0;
  int64_t record = -1;
  int trace = -1;  // in a TraceRecorder
  char label[56] = {};
  Event after;
  bool started = false;
  // Of an operation on tensors of a device: how far the device has been told of it.
  enum class OnDevice : uint8_t {
    kNo,       // on tensors in host memory
    kWaiting,  // for operations before it
    kQueued,   // handed over, in the order of the communication stream: `done` is valid
  };
  OnDevice device = OnDevice::kNo;
  bool ready = false;   // on a device: `after` has been seen
  bool copied = false;  // on a device: by its copy engines
  int region = -1;      // ... out of this memory that they share; -1: of no such
  int64_t launches = 0;
  int64_t together = 0;  // on a device: sends and receives of one number proceed together
  Event done;
  DType dtype = DType::kF32;
  ReduceOp reduce = ReduceOp::kSum;
  bool adds = false;  // a reduce-scatter on a device: to what its outputs hold
  int peer = -1;      // or the root
  std::vector<Item> items;
  std::vector<int64_t> send_counts, send_begins, receive_counts, receive_begins;  // all-to-all
  Pattern patterns[2] = {};
  int phases = 0;

  // How far.
  int phase = 0;
  int64_t segment = 0;  // elements
  int64_t window = 0;   // steps
  Cursor receive_next, receive_head, send_next, send_head;
  std::vector<Transport::Request> receives, sends;  // [window, lanes]; -1: none
  std::vector<const std::byte*> sources;            // of one addition
  StagingPool::Buffer staging;
  int64_t bytes_sent = 0;

  void Reset();
  // Makes room for whatever `other` has room for; true when something grew.
  bool ReserveLike(const Operation& other);
  bool point_to_point() const { return op == CommOp::kSend || op == CommOp::kReceive; }
};

// The bytes that Engine sends from this rank for `o`, whatever carries it out: the measure of
// Communicator::BytesSent.
int64_t BytesToSend(Operation& o);

// Runs operations over a transport.
class Engine {
 public:
  // `before_post` is called before each message is posted (tests inject delays and faults there).
  Engine(Transport& transport, std::function<void(const Operation&)> before_post)
      : transport_(transport), before_post_(std::move(before_post)) {}

  // Chooses the phases of an operation and copies what stays on this rank.
  void Start(Operation& o);
  // Moves it on; sets `advanced` when something happened. True when it has finished.
  absl::StatusOr<bool> Advance(Operation& o, bool* advanced);
  // Gives its staging back (also after an error).
  void Release(Operation& o);

 private:
  void BeginPhase(Operation& o);
  absl::StatusOr<bool> PostReceives(Operation& o);
  absl::StatusOr<bool> PostSends(Operation& o);
  absl::StatusOr<bool> TestStep(std::vector<Transport::Request>& requests, const Operation& o,
                                int64_t step);
  void Add(Operation& o);

  Transport& transport_;
  std::function<void(const Operation&)> before_post_;
  StagingPool pool_{kActiveInGroup};
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_COLLECTIVES_H_
