// Shared memory that somebody else cuts short (ftruncate) is gone under who has mapped it: the next
// access is a SIGBUS, and no look at the size beforehand can rule that out. Sealing is for memory
// without a name (memfd), which no other process could take over.
#ifndef STRETTO_SRC_SNAPSHOT_MAPPING_GUARD_H_
#define STRETTO_SRC_SNAPSHOT_MAPPING_GUARD_H_

#include <cstddef>
#include <cstdint>

namespace stretto::snapshot_internal {

// While it lives, pages of the mapping that are gone are replaced, from the first that is touched
// to the end, by zeroes of this process alone, and lost() says so: no process dies of what
// checksums find. The first guard sets the process's handler of SIGBUS, which leaves every other
// SIGBUS to the one before it.
class MappingGuard {
 public:
  // Of so many mappings at a time; more than these are not guarded.
  static constexpr int kMost = 1024;

  MappingGuard(std::byte* base, int64_t bytes);
  ~MappingGuard();  // before the mapping goes
  MappingGuard(const MappingGuard&) = delete;
  MappingGuard& operator=(const MappingGuard&) = delete;

  bool lost() const;

 private:
  int index_ = -1;
};

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_MAPPING_GUARD_H_
