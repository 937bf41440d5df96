// What a rank does over a window of steps, with its times: work on streams by the device's clock,
// everything else by the host's.
#ifndef STRETTO_CORE_TRACE_RECORDER_H_
#define STRETTO_CORE_TRACE_RECORDER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/chrome_trace.h"
#include "stretto/core/stream.h"

namespace stretto {

class TimeMarks;  // src/core/time_marks.h

// Nanoseconds of the host's steady clock.
int64_t SteadyNanoseconds();

// Takes its memory when it is made and none afterwards; what does not fit is counted. Whoever
// records holds a pointer that is null while nothing is traced.
//
// Open, SetStep and scopes belong to the thread that drives the step; an action is begun and ended
// by one thread after the other.
class TraceRecorder {
 public:
  // For `capacity` actions on streams of `stream`'s device.
  TraceRecorder(Stream& stream, int capacity);
  ~TraceRecorder();

  // Actions opened from now on belong to `step`; below 0: they are not recorded.
  void SetStep(int64_t step) { step_ = step; }

  // An action that is about to come: its handle. What `tags` leaves open is the scope's. `category`
  // lives on, the other texts are copied as far as there is room (55 bytes of the label). Handles
  // of actions that are not recorded are below 0, and can be used as others.
  int Open(const char* row, const char* category, const char* label, const TraceTags& tags = {});
  // Now, or when the stream comes to here.
  void Begin(int action);
  void Begin(int action, Stream& stream) { Mark(action, 0, stream); }
  void End(int action);
  void End(int action, Stream& stream) { Mark(action, 1, stream); }
  void SetBytes(int action, int64_t bytes);

  // Ties the device's clock to the host's; waits for the stream. Returns the error in nanoseconds.
  int64_t Tie(Stream& stream);
  // Everything begun, in the order of Open, with times of the host's steady clock. The streams are
  // synchronized, or given up: what has not ended is marked so, with `now` as its end, and what the
  // device does not tell is left out and counted.
  std::vector<TraceSlice> Slices(int64_t now_ns);
  // Actions that found no room, or whose times are not known.
  int64_t lost() const { return lost_; }

 private:
  friend class TraceScope;
  static constexpr size_t kRow = 24, kLabel = 56;
  struct Record {
    const char* category = nullptr;
    char row[kRow] = {};
    char label[kLabel] = {};
    TraceTags tags;
    int64_t step = -1;
    int64_t times[2] = {0, 0};  // begin and end on the host; 0: not there
    bool marked[2] = {false, false};
  };
  void Mark(int action, int end, Stream& stream);
  // When the begin or end was; 0: not yet, negative: not known.
  int64_t TimeOf(size_t action, int end) const;

  std::vector<Record> records_;
  std::unique_ptr<TimeMarks> marks_;  // two for each record, and one to tie clocks
  int64_t step_ = -1;
  TraceTags scope_;
  int64_t lost_ = 0;
};

// Actions opened while it lives, and that do not say otherwise, have these tags; tags left open are
// those of the scope around it. Nothing with a null recorder.
class TraceScope {
 public:
  TraceScope(TraceRecorder* recorder, const TraceTags& tags);
  ~TraceScope() {
    if (recorder_ != nullptr) recorder_->scope_ = before_;
  }
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

 private:
  TraceRecorder* recorder_;
  TraceTags before_;
};

// An action from here to the end of the object's life, on the host's clock or, with `stream`, as
// the stream comes to both. Nothing with a null recorder.
class TraceSpan {
 public:
  TraceSpan(TraceRecorder* recorder, const char* row, const char* category,
            Stream* stream = nullptr);
  ~TraceSpan();
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  TraceRecorder* recorder_;
  Stream* stream_;
  int action_ = -1;
};

}  // namespace stretto

#endif  // STRETTO_CORE_TRACE_RECORDER_H_
