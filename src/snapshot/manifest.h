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
// 1: each rank has one file, and pieces are whole rows. 2: any others.
inline constexpr int kManifestVersion = 2;

struct ManifestFile {
  std::string name;  // in the step directory
  int64_t bytes = 0;
  uint64_t digest = 0;
  int rank = 0;  // that wrote it
};

// A box of a tensor that lies in one file.
struct Piece {
  int file = 0;
  int64_t first_row = 0;
  int64_t rows = 0;
  int64_t first_column = 0;  // of a matrix
  int64_t columns = -1;      // -1: whole rows
};

struct ManifestTensor {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // global
  std::vector<Piece> pieces;   // by first row and column; together all elements, none twice

  // Of a piece, with whole rows written out.
  int64_t ColumnsOf(const Piece& piece) const;
};

struct Manifest {
  int64_t step = 0;
  int world_size = 0;
  std::vector<ManifestFile> files;  // by rank; several of a rank follow each other
  std::map<std::string, ManifestTensor> tensors;
  std::string trainer_state = "{}";  // a JSON object
};

// "shard-00001-model-00001-of-00001.safetensors" for rank 0: the name that torch's distributed
// checkpoint gives it. A rank that has several boxes of a tensor writes several files: a file holds
// one of each name.
std::string ShardFileName(int rank, int file = 0, int files = 1);

// The entries of a registry as files hold them: file k has the k-th box that this rank owns of each
// tensor. At least one file, be it without tensors.
std::vector<std::vector<const StateEntry*>> FilesOf(const StateRegistry& registry);

// The __metadata__ of a file with these entries: DCP_SHARDING_INFO with the offsets of the boxes,
// and all tensors of the registry with their global shapes.
absl::StatusOr<std::map<std::string, std::string>> ShardMetadata(
    const StateRegistry& registry, const std::vector<const StateEntry*>& entries);

// Reads the headers of the shards in `directory` and builds the rest of `manifest` (its files are
// set). Fails when the shards disagree on a tensor, or when some element of a tensor is owned by no
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
