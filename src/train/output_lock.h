// One run at a time in an output directory.
#ifndef STRETTO_SRC_TRAIN_OUTPUT_LOCK_H_
#define STRETTO_SRC_TRAIN_OUTPUT_LOCK_H_

#include <string>
#include <utility>

#include "stretto/core/status.h"

namespace stretto {

// Held by rank 0 of a run from set-up to the end; the system gives it back when the process ends,
// however it ends. Movable, not copyable.
class OutputLock {
 public:
  OutputLock() = default;
  // Makes `directory` when it is absent. FAILED_PRECONDITION when another process holds it. A file
  // system without locks is no error: then nobody is kept out.
  static absl::StatusOr<OutputLock> Take(const std::string& directory);
  ~OutputLock();
  OutputLock(OutputLock&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  OutputLock& operator=(OutputLock&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }

 private:
  explicit OutputLock(int descriptor) : descriptor_(descriptor) {}
  int descriptor_ = -1;
};

}  // namespace stretto

#endif  // STRETTO_SRC_TRAIN_OUTPUT_LOCK_H_
