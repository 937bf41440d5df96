// Points in time that the streams of one device pass, on the device's own clock.
#ifndef STRETTO_SRC_CORE_TIME_MARKS_H_
#define STRETTO_SRC_CORE_TIME_MARKS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "src/core/device_runtime.h"
#include "stretto/core/stream.h"
#include "stretto/core/trace_recorder.h"

namespace stretto {

class TimeMarks {
 public:
  // For streams of `stream`'s device; room for marks 0 to `count` - 1 from the start. A device that
  // cannot give them fails the stream.
  TimeMarks(Stream& stream, size_t count);
  ~TimeMarks();

  // `stream` passes `mark` when its work comes to here. Takes memory, and on the CPU waits for the
  // stream, where there is no room for the number yet; with room, marks of several streams may be
  // set from several threads.
  void Mark(Stream& stream, size_t mark);
  // Between two marks that their streams have passed; negative when that is not known.
  double SecondsBetween(size_t from, size_t to) const;

  // Ties the device's clock to the host's, so that HostTime can answer, by waiting for the stream a
  // few times. `mark` is for its use. Returns the error in nanoseconds at most, 0 on the CPU.
  int64_t Tie(Stream& stream, size_t mark);
  // When `mark` was passed, in SteadyNanoseconds; negative when that is not known.
  int64_t HostTime(size_t mark) const;

 private:
  std::vector<int64_t> times_;           // on the CPU
  std::unique_ptr<DeviceMarks> device_;  // elsewhere
  size_t tie_mark_ = 0;
  int64_t tie_time_ = -1;
};

}  // namespace stretto

#endif  // STRETTO_SRC_CORE_TIME_MARKS_H_
