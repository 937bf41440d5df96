// Lifetimes in, offsets out: nothing is allocated while a step runs.
#ifndef STRETTO_CORE_MEMORY_PLAN_H_
#define STRETTO_CORE_MEMORY_PLAN_H_

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// One buffer with one lifetime: it holds data from action `first` to action `last`, both included.
struct BufferSpec {
  std::string name;
  int64_t bytes = 0;
  int first = 0;
  int last = 0;
};

using BufferId = int;

// Where each buffer lies inside one arena. Buffers whose lifetimes overlap do not overlap in
// memory.
struct MemoryPlan {
  std::vector<BufferSpec> buffers;
  std::vector<int64_t> offsets;  // by BufferId; multiples of the alignment
  int64_t arena_bytes = 0;       // size of the arena that holds them all
  int64_t peak_live_bytes = 0;   // lower bound: the largest sum of live buffers over all actions

  // A table of the largest `most` buffers with their lifetimes and offsets, and the totals.
  std::string Report(int most = 20) const;
};

// Collects buffers and lays them out: greedy by decreasing size, each at the lowest offset that is
// free during its whole lifetime. Deterministic.
class MemoryPlanner {
 public:
  explicit MemoryPlanner(int64_t alignment = 64) : alignment_(alignment) {}
  BufferId Add(BufferSpec spec);
  // INVALID_ARGUMENT when a size is negative or a lifetime ends before it starts.
  absl::StatusOr<MemoryPlan> Solve() const;

 private:
  int64_t alignment_;
  std::vector<BufferSpec> buffers_;
};

}  // namespace stretto

#endif  // STRETTO_CORE_MEMORY_PLAN_H_
