// A trace of a few steps of a run, of all ranks on one time axis, in one file for Perfetto and
// chrome://tracing.
#ifndef STRETTO_OBSERVE_STEP_TRACE_H_
#define STRETTO_OBSERVE_STEP_TRACE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "stretto/comm/clock.h"
#include "stretto/comm/communicator.h"
#include "stretto/core/trace_recorder.h"

namespace stretto {

struct StepTraceOptions {
  std::string file;        // rank 0 writes it
  std::string process;     // this rank's name in it, e.g. "rank 3, pp 1, tp 1"
  int64_t first_step = 1;  // the first step of a run is 1
  int64_t steps = 1;       // how many
  int capacity = 1 << 15;  // actions of a rank; more are counted and left out
  // What ranks compare before the first of these steps (tests plant offsets).
  std::function<int64_t()> clock = SteadyNanoseconds;
};

// All ranks of the communicator make one and call BeginStep, EndStep and Close alike; nothing is
// recorded outside of steps. Both outlive the trace.
class StepTrace {
 public:
  // An error on rank 0 when the file cannot be written.
  static absl::StatusOr<std::unique_ptr<StepTrace>> Create(Communicator& comm, Stream& stream,
                                                           const StepTraceOptions& options);
  ~StepTrace();
  // Host memory that a trace takes at most: for each action what is recorded, and its text.
  static int64_t Bytes(const StepTraceOptions& options) { return int64_t{1024} * options.capacity; }

  // The recorder for this step; null when it is outside of the window. In front of the first step
  // of the window clocks are aligned and the communicator is told.
  absl::StatusOr<TraceRecorder*> BeginStep(int64_t step);
  // Whether the window is over, so that Close may follow.
  bool EndStep();
  // Writes what was seen, if anything was and is not yet written: the ranks send theirs to rank 0.
  // Operations of the steps are done, and the stream is synchronized. The file is there as a whole
  // or not at all.
  absl::Status Close();
  // For the end of a run that failed: writes what this rank saw, if that is not yet written, beside
  // the file as <file>.rank<r>.json.
  absl::Status CloseAlone();

 private:
  StepTrace(Communicator& comm, Stream& stream, StepTraceOptions options)
      : comm_(comm), stream_(stream), options_(std::move(options)) {}
  // Ends recording; this rank's part of the file.
  std::string Take(int64_t* lost);

  Communicator& comm_;
  Stream& stream_;
  StepTraceOptions options_;
  std::unique_ptr<TraceRecorder> recorder_;  // until it is written
  bool open_ = false;                        // the window has begun
  int64_t last_step_ = 0;
  int step_action_ = -1;
  int64_t origin_ns_ = 0;  // of the time axis, on this rank's clock
  ClockOffset clock_;
  int64_t error_ns_ = 0;  // of both clocks
};

}  // namespace stretto

#endif  // STRETTO_OBSERVE_STEP_TRACE_H_
