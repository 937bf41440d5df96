// Checkpoints on disk that load under any layout.
//
// Layout of a checkpoint directory (docs/formats.md):
//   <root>/step-00000100/
//     stretto.json                          format version, step, world size, trainer state
//     shard-00001-model-00001-of-00001.safetensors   rank 0's slices (torch DCP's safetensors
//     dialect: shard-00002-...                                DCP_SHARDING_INFO in __metadata__)
// A checkpoint is written under a name that ends in ".tmp" and committed by one rename, after all
// ranks' files are on disk. Anything that ends in ".tmp" is no checkpoint.
#ifndef STRETTO_SNAPSHOT_CHECKPOINT_H_
#define STRETTO_SNAPSHOT_CHECKPOINT_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stretto/comm/world.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"

namespace stretto {

struct CheckpointOptions {
  std::string directory;  // root, on a file system that all ranks share; created when absent
  int keep = 2;           // newest committed checkpoints that stay; <= 0: all (see Distrust)
  bool async = true;      // write from a background thread
  // How long a rank waits for another one's part before the save fails. A rank that died or left is
  // noticed within a second.
  std::chrono::milliseconds timeout = std::chrono::hours(1);
};

// Writes checkpoints of one registry. Save() copies the owned slices into a staging buffer of fixed
// size (allocated by the first Save; none when `async` is off) and returns; a background thread
// writes, agrees with the other ranks over the control plane (it never touches the transport), and
// rank 0 commits. All ranks create their writers in the same order and call them alike.
class CheckpointWriter {
 public:
  CheckpointWriter(World& world, CheckpointOptions options);
  ~CheckpointWriter();  // finishes a write in progress

  // Steps of the directory that are known to be damaged (CheckpointInfo::passed_over): `keep`
  // counts them last, so that they never push out a checkpoint that a restart could use. Rank 0's
  // list matters. A later save of the same step ends that.
  void Distrust(const std::vector<int64_t>& steps);

  // All ranks, same step. `trainer_state` is a JSON object (rank 0's is stored). Waits first for a
  // write still in progress and returns that write's error, if any; the new write is started all
  // the same. With `async` off, writes before it returns.
  absl::Status Save(int64_t step, const StateRegistry& registry, const std::string& trainer_state);
  // Waits until nothing is in progress; the first error since the last call (disk full, ...), the
  // same on all ranks, with the number of the rank that failed. A failed write leaves no checkpoint
  // and the older ones untouched.
  absl::Status Finish();
  int64_t last_committed_step() const;  // -1: none

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct CheckpointInfo {
  std::string path;  // the step directory
  int64_t step = 0;
  int world_size = 0;         // that wrote it
  std::string trainer_state;  // JSON; member order and spacing may differ from what was saved
  bool verified = false;      // the digests of all files were checked: loading need not
  std::vector<int64_t> passed_over;  // newer steps beside it that the search found damaged
};

enum class Verify : uint8_t {
  kHeaders,  // all files are there, with the right size and a sound header
  kDigests,  // and every byte is as written
};

// The newest committed checkpoint whose files are all there and whole; NOT_FOUND when there is
// none, DATA_LOSS when there are damaged ones only. Damaged ones are passed over with a warning
// that says why.
absl::StatusOr<CheckpointInfo> FindNewestCheckpoint(const std::string& directory,
                                                    Verify verify = Verify::kHeaders);
// The same for all ranks together: each checks the digests of a part of the files, and all return
// the same checkpoint. The way to restart.
absl::StatusOr<CheckpointInfo> FindNewestCheckpoint(World& world, const std::string& directory);
absl::StatusOr<CheckpointInfo> ReadCheckpointInfo(const std::string& step_path);
// DATA_LOSS names the first file that is missing or damaged.
absl::Status VerifyCheckpoint(const CheckpointInfo& info, Verify verify);

struct LoadOptions {
  // The checkpoint may hold tensors that the registry lacks. Without it that is another model, save
  // that a registry without "optim." tensors may leave those of the checkpoint (weights only).
  bool allow_unused = false;
};

// Fills every entry's local box from the files that hold it, whatever the layout that wrote
// them. Every entry must be found with the same global shape; floating types are converted.
// FAILED_PRECONDITION lists what does not fit (a checkpoint of another model names the first
// differing tensors of each side); DATA_LOSS names a damaged file. Nothing is changed before all
// that was checked. The digests of the files read are checked unless info.verified.
absl::Status LoadCheckpoint(const CheckpointInfo& info, const StateRegistry& registry,
                            const LoadOptions& options = {});

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_CHECKPOINT_H_
