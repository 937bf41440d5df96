// How far a rank is, in a file that outlives the rank: for who watches a job from outside, and asks
// afterwards where it was.
#ifndef STRETTO_OBSERVE_PROGRESS_H_
#define STRETTO_OBSERVE_PROGRESS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "stretto/core/status.h"

namespace stretto {

// The environment variable that names the directory of these files. A trainer that has it writes
// them; stretto-run sets it.
inline constexpr char kProgressVariable[] = "STRETTO_PROGRESS";

// What a rank has marked. Times are Unix seconds of its machine; 0: not yet.
struct RankProgress {
  double met = 0;              // it has found the other ranks; set-up begins
  double restored = 0;         // it holds the state after `restored_step` steps
  int64_t restored_step = -1;  // 0: a new run; -1: not yet
  double first_step = 0;       // the first step after that is done
  double beat = 0;             // last sign of life
  int64_t step = -1;           // steps of the run that were done then; -1: none is known of
  std::string doing;           // what it had done or begun then: "step", "evaluate", "save", ...
};

// One writer. A mark is one write of a line at its place: nothing is allocated and nothing waits
// for the disk, so that a step may do it. A mark that cannot be written is lost.
class ProgressFile {
 public:
  ProgressFile() = default;  // marks go nowhere
  // <directory>/rank-<rank>.progress, begun anew. The directory must exist.
  static absl::StatusOr<ProgressFile> Create(const std::string& directory, int rank);
  ~ProgressFile();
  ProgressFile(ProgressFile&& other) noexcept { *this = std::move(other); }
  ProgressFile& operator=(ProgressFile&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(stepped_, other.stepped_);
    return *this;
  }

  void Met();
  void Restored(int64_t step);
  // `step` steps are done.
  void Step(int64_t step);
  // A sign of life inside something long, `doing`, one word.
  void Beat(const char* doing, int64_t step);

 private:
  void Write(int line, const char* name, int64_t step);
  int descriptor_ = -1;
  bool stepped_ = false;
};

std::string ProgressPath(const std::string& directory, int rank);
// What the file says; lines that are missing or damaged are as if not yet marked.
RankProgress ParseProgress(const std::string& text);

// What the ranks of a job have in common, for who watches it: rank 0 writes it once it is known.
struct JobFacts {
  std::string output;  // directories, absolute
  std::string flight_directory;
  int64_t dp = 0, pp = 0, tp = 0, cp = 1;
  bool dp_fixed = false;  // the configuration names dp, so that no other number of ranks fits
};
// <directory>/job.json.
absl::Status WriteJobFacts(const std::string& directory, const JobFacts& facts);
// Nothing when the file is not there, or is none of these.
std::optional<JobFacts> ReadJobFacts(const std::string& directory);

}  // namespace stretto

#endif  // STRETTO_OBSERVE_PROGRESS_H_
