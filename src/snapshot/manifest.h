// stretto.json: what a checkpoint directory holds.
#ifndef STRETTO_SRC_SNAPSHOT_MANIFEST_H_
#define STRETTO_SRC_SNAPSHOT_MANIFEST_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/snapshot/file_io.h"
#include "stretto/core/dtype.h"
#include "stretto/core/state.h"
#include "stretto/core/status.h"

namespace stretto::snapshot_internal {

inline constexpr char kManifestName[] = "stretto.json";
inline constexpr int kManifestVersion = 1;

struct ManifestFile {
  std::string name;  // in the step directory
  int64_t bytes = 0;
  uint64_t digest = 0;
};

// Rows of a tensor that lie in one file.
struct Piece {
  int file = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
};

struct ManifestTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // global
  std::vector<Piece> pieces;   // by first_row; together all rows, none twice
};

struct Manifest {
  int64_t step = 0;
  int world_size = 0;
  std::vector<ManifestFile> files;  // by rank
  std::map<std::string, ManifestTensor> tensors;
  std::string trainer_state = "{}";  // a JSON object
};

// "shard-00001-model-00001-of-00001.safetensors" for rank 0: the name that torch's distributed
// checkpoint gives it.
std::string ShardFileName(int rank);

// The __metadata__ of a rank's shard: DCP_SHARDING_INFO with the offsets of its slices, and all
// tensors of the registry with their global shapes.
absl::StatusOr<std::map<std::string, std::string>> ShardMetadata(const StateRegistry& registry);

// Rows of `entry` that this rank owns.
int64_t OwnedRows(const StateEntry& entry);

// Reads the headers of the shards in `directory` and builds the rest of `manifest` (its files are
// set). Fails when the shards disagree on a tensor, or when some row of a tensor is owned by no
// rank or by two.
absl::Status IndexShards(const std::string& directory, Manifest* manifest);

// Ends in a digest of everything before it, so that a damaged file is noticed.
absl::StatusOr<std::string> ManifestToJson(const Manifest& manifest);
absl::StatusOr<Manifest> ParseManifest(const std::string& text, const std::string& source);
absl::StatusOr<Manifest> ReadManifest(const std::string& step_path);

// "[5, 3]"
std::string ShapeText(const std::vector<int64_t>& shape);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_MANIFEST_H_
