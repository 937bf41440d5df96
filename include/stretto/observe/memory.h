// Memory that this process really uses, as the kernel counts it.
#ifndef STRETTO_OBSERVE_MEMORY_H_
#define STRETTO_OBSERVE_MEMORY_H_

#include <cstdint>

#include "stretto/core/status.h"

namespace stretto {

struct ProcessMemory {
  int64_t resident_bytes = 0;       // now (VmRSS)
  int64_t peak_resident_bytes = 0;  // since the start (VmHWM)
};

// Reads /proc/self/status into a buffer on the stack: allocates nothing. UNAVAILABLE where that
// file does not exist or lacks the fields.
absl::StatusOr<ProcessMemory> ReadProcessMemory();

// Bytes that the processes of this machine (or container) can still take, as the kernel estimates
// it; -1 when it does not say.
int64_t AvailableMemory();

}  // namespace stretto

#endif  // STRETTO_OBSERVE_MEMORY_H_
