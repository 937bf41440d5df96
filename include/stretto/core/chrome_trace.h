// Timelines as files for chrome://tracing and Perfetto (trace-event JSON), simulated and measured
// ones alike.
#ifndef STRETTO_CORE_CHROME_TRACE_H_
#define STRETTO_CORE_CHROME_TRACE_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace stretto {

// What an action works on. Numbers below 0 are not known.
struct TraceTags {
  int64_t stage = -1, item = -1;  // of a program
  int64_t micro_batch = -1;       // of this rank's in the step
  int64_t order = -1;             // place in the program's one order of actions
  int64_t bucket = -1;            // of parameters or gradients
  int64_t peer = -1;              // rank at the other end of a message
  int64_t bytes = -1;             // that this rank sent, or received with a receive
};

// One box of a timeline: what a rank did between two times.
struct TraceSlice {
  std::string row;       // "compute", "dp", ...
  std::string category;  // "forward", "all_gather", ...
  std::string label;     // its name; empty: the category and the number of the micro-batch or item
  TraceTags tags;
  int64_t step = -1;
  int64_t begin_ns = 0, end_ns = 0;
  bool finished = true;  // false: it was still under way at its end here
};

// One rank as a process: `name`, `note` beside it, and a thread for each row, in the order in which
// they first appear; a row whose slices overlap has several. Events, separated by commas.
std::string ChromeTraceProcess(int rank, const std::string& name, const std::string& note,
                               const std::vector<TraceSlice>& slices);

// A file is Begin, the processes with kChromeTraceSeparator in between, and End. Values of `other`
// are JSON.
inline constexpr char kChromeTraceBegin[] = "{\"traceEvents\":[\n";
inline constexpr char kChromeTraceSeparator[] = ",\n";
std::string ChromeTraceEnd(const std::vector<std::pair<std::string, std::string>>& other);

// `text` as a JSON string, quotes included. What is not ASCII becomes '?'.
std::string JsonString(const std::string& text);

}  // namespace stretto

#endif  // STRETTO_CORE_CHROME_TRACE_H_
