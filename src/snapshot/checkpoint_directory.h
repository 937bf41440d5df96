// Names, commits and removals inside a checkpoint root.
#ifndef STRETTO_SRC_SNAPSHOT_CHECKPOINT_DIRECTORY_H_
#define STRETTO_SRC_SNAPSHOT_CHECKPOINT_DIRECTORY_H_

#include <cstdint>
#include <filesystem>
#include <set>
#include <string>
#include <vector>

#include "stretto/core/status.h"

namespace stretto::snapshot_internal {

// Trainers and keepers may write into one root at the same time, also the same step: each under
// temporary names of its own, which the other leaves alone.
enum class StepWriter : uint8_t { kTrainer, kKeeper };

// <root>/step-00000100 and the name that it is written under.
std::string StepPath(const std::string& root, int64_t step);
std::string TemporaryPath(const std::string& root, int64_t step,
                          StepWriter writer = StepWriter::kTrainer);

// Steps of the directories called step-<digits>, descending. NOT_FOUND when `root` does not exist.
absl::StatusOr<std::vector<int64_t>> ListSteps(const std::string& root);

// An empty temporary directory for `step`; what an earlier attempt left in it is removed.
absl::Status PrepareTemporary(const std::string& root, int64_t step,
                              StepWriter writer = StepWriter::kTrainer);

// Renames the temporary directory to its final name and makes that durable. A checkpoint of the
// same step is replaced (by one exchange where the file system can).
absl::Status CommitTemporary(const std::string& root, int64_t step,
                             StepWriter writer = StepWriter::kTrainer);

// Removes a directory; what is committed is first renamed to a temporary name, so that nothing half
// removed looks like a checkpoint.
absl::Status RemoveTemporary(const std::string& root, int64_t step,
                             StepWriter writer = StepWriter::kTrainer);

// After `step` was committed: removes all but the `keep` highest steps (never `step` itself; all
// stay when keep <= 0), and this writer's temporary directories of lower steps or last changed
// before `started`. Steps in `damaged` are no use to a restart, so any other step is kept before
// them. Failures are logged: they must not fail a save.
void Prune(const std::string& root, int64_t step, int keep, std::filesystem::file_time_type started,
           const std::set<int64_t>& damaged = {}, StepWriter writer = StepWriter::kTrainer);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_CHECKPOINT_DIRECTORY_H_
