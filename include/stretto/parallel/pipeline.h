// Runs one rank's part of a program: actions in the program's order, and what travels between
// stages.
#ifndef STRETTO_PARALLEL_PIPELINE_H_
#define STRETTO_PARALLEL_PIPELINE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/communicator.h"
#include "stretto/core/arena.h"
#include "stretto/core/budget.h"
#include "stretto/core/phase_timer.h"
#include "stretto/core/stream.h"
#include "stretto/plan/program.h"

namespace stretto {

// What goes from a stage to its neighbour on another rank: activations up, their gradients down.
struct BoundaryMessage {
  int64_t order = 0;  // of the action that makes it; both ends submit their messages in this order
  int peer = 0;       // rank
  bool receive = false;
  bool forward = true;
  int stage = 0;  // that makes it
  int item = 0;
  int action = 0;  // index of this rank's action that makes or takes it
};
// One rank's messages, ascending in order. The message's way up ends at stage + 1, down at
// stage - 1.
std::vector<BoundaryMessage> MessagesOf(const Program& program, int rank);

// Buffers that suffice for a rank in any case: the most messages that have been made and not yet
// been taken when actions run in the program's order. With fewer a rank could wait for one that is
// given back only by what comes after.
struct BoundaryBuffers {
  int sends = 0, receives = 0;
  int kept = 0;  // between two stages that lie on this rank
  // As many as either of two programs needs: with fewer items a program may need more.
  void Include(const BoundaryBuffers& other);
};
BoundaryBuffers BuffersOf(const Program& program, int rank);

// A program as one rank runs it: what its actions take from others and make for them. Made once,
// run in as many steps as one likes without taking memory.
class RankProgram {
 public:
  RankProgram(Program program, int rank);
  const Program& program() const { return program_; }
  int rank() const { return rank_; }
  const std::vector<ProgramAction>& actions() const {
    return program_.of_rank[static_cast<size_t>(rank_)];
  }

 private:
  friend class PipelineExecutor;
  // Of an action. Indices, -1: none.
  struct Ends {
    int takes = -1, makes = -1;  // messages
    int takes_kept = -1;         // the action of this rank that made its input
    bool keeps = false;          // what it makes stays on this rank
  };
  Program program_;
  int rank_;
  std::vector<BoundaryMessage> messages_;
  std::vector<std::string> labels_;  // of the messages
  std::vector<Ends> ends_;           // by action
};

// What a rank does in an action. All that it does it enqueues on the stream.
class StageWorker {
 public:
  virtual ~StageWorker() = default;
  // Rows of this rank's share of an item.
  virtual int64_t Tokens(int item) const = 0;
  // Whether this rank's pipeline has no such item where others have one: nothing travels then, and
  // Run is called with both tensors absent.
  virtual bool Empty(int /*item*/) const { return false; }
  // This rank's number of the item in the step, for timelines.
  virtual int64_t MicroBatch(int item) const { return item; }
  // Forward: `in` [tokens, width] is what the stage before made (absent on the first), `out` what
  // this one makes (absent on the last). Backward and its input half: `in` is the gradient of what
  // this stage made (absent on the last), `out` that of what it took (absent on the first). Weight
  // half: both absent.
  virtual absl::Status Run(const ProgramAction& action, Tensor in, Tensor out) = 0;
};

class PipelineExecutor {
 public:
  // For items of at most `token_capacity` rows on this rank, and programs that need at most these
  // buffers, which are reserved from `budget`. A program's ranks are the members of `group`, by
  // index.
  static absl::StatusOr<std::unique_ptr<PipelineExecutor>> Create(
      Communicator& comm, const Group& group, Stream& stream, const BoundaryBuffers& buffers,
      int64_t token_capacity, int64_t width, DType dtype, Budget& budget);
  ~PipelineExecutor();
  // Bytes that Create takes on a rank.
  static int64_t Bytes(const BoundaryBuffers& buffers, int64_t token_capacity, int64_t width,
                       DType dtype);

  // Runs the program's actions of this rank. All ranks of the group call it with the same program.
  // FAILED_PRECONDITION when it needs more buffers or rows than it was created for. Work may still
  // be under way on the stream and messages in flight when it returns; the next Run and Finish wait
  // for them.
  absl::Status Run(const RankProgram& program, StageWorker& worker);
  // Waits for the messages in flight.
  absl::Status Finish();
  // Told of waits for other stages (StepPhase::kExposedPipeline); null: nobody is. Outlives the
  // runs.
  void SetTimer(PhaseTimer* timer) { timer_ = timer; }

  int64_t bytes() const { return arena_.bytes(); }

 private:
  struct Buffer {
    Tensor memory;      // [capacity, width]
    Ticket ticket = 0;  // of the send that reads it
    Event free;         // the work that read it last
    bool taken = false;
  };
  struct Pool {
    std::vector<Buffer> buffers;
    size_t next = 0;
  };
  PipelineExecutor(Communicator& comm, const Group& group, Stream& stream)
      : comm_(comm), group_(group), stream_(stream) {}
  absl::StatusOr<Buffer*> Take(Pool& pool);
  // Submits the receives in front of `order`.
  absl::Status ReceiveUntil(const RankProgram& program, int64_t order, const StageWorker& worker);
  Tensor View(const Buffer& buffer, int64_t tokens) const;

  absl::Status Wait(Ticket ticket);
  // What the worker does, in the trace if there is one.
  absl::Status RunTraced(StageWorker& worker, const ProgramAction& action, Tensor in, Tensor out);

  Communicator& comm_;
  Group group_;
  Stream& stream_;
  PhaseTimer* timer_ = nullptr;
  Arena arena_;
  int64_t token_capacity_ = 0;
  Pool sends_, receives_, kept_;
  // Of the run under way.
  size_t submitted_ = 0;           // messages of which this rank's end has been submitted
  std::vector<Buffer*> arriving_;  // by message
  std::vector<Ticket> tickets_;
  std::vector<Buffer*> kept_by_;  // by the action that made it
};

}  // namespace stretto

#endif  // STRETTO_PARALLEL_PIPELINE_H_
