// Finding, checking and loading checkpoints (stretto/snapshot/checkpoint.h).
#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "src/snapshot/checkpoint_directory.h"
#include "src/snapshot/convert.h"
#include "src/snapshot/manifest.h"
#include "src/snapshot/read_converted.h"
#include "stretto/core/copy.h"
#include "stretto/core/log.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/safetensors.h"

namespace stretto {
namespace {

using snapshot_internal::CanConvert;
using snapshot_internal::DigestFile;
using snapshot_internal::FileReader;
using snapshot_internal::ListSteps;
using snapshot_internal::Manifest;
using snapshot_internal::ManifestFile;
using snapshot_internal::ManifestTensor;
using snapshot_internal::Piece;
using snapshot_internal::ReadConverted;
using snapshot_internal::ReadManifest;
using snapshot_internal::ShapeText;
using snapshot_internal::StepPath;

// Who else writes there (a keeper that is late) may remove what was listed for a newer one.
constexpr int kMostLooks = 3;

CheckpointInfo InfoOf(const std::string& path, const Manifest& manifest) {
  CheckpointInfo info;
  info.path = path;
  info.step = manifest.step;
  info.world_size = manifest.world_size;
  info.trainer_state = manifest.trainer_state;
  return info;
}

// One file of a checkpoint against what stretto.json says of it.
absl::Status VerifyFile(const std::string& step_path, const ManifestFile& file, Verify verify) {
  const std::string path = absl::StrCat(step_path, "/", file.name);
  const absl::StatusOr<std::shared_ptr<const FileReader>> reader = FileReader::Open(path);
  if (absl::IsNotFound(reader.status())) {
    return absl::DataLossError(absl::StrCat(path, " is missing"));
  }
  STRETTO_RETURN_IF_ERROR(reader.status());
  if ((*reader)->size() != file.bytes) {
    return absl::DataLossError(absl::StrCat(path, " has ", (*reader)->size(), " bytes where ",
                                            file.bytes, " were written"));
  }
  if (verify == Verify::kDigests) {
    STRETTO_ASSIGN_OR_RETURN(const uint64_t digest, DigestFile(**reader));
    if (digest != file.digest) {
      return absl::DataLossError(
          absl::StrCat(path, " is damaged: its content does not match the digest in stretto.json"));
    }
  }
  return SafetensorsFile::Open(path).status();
}

// The manifest of the checkpoint of `step`, its name included.
absl::StatusOr<Manifest> ReadStep(const std::string& root, int64_t step) {
  const std::string path = StepPath(root, step);
  STRETTO_ASSIGN_OR_RETURN(Manifest manifest, ReadManifest(path));
  if (manifest.step != step) {
    return absl::DataLossError(
        absl::StrCat(path, " holds step ", manifest.step, "; the directory was renamed"));
  }
  return manifest;
}

absl::Status NoneIn(const std::string& directory) {
  return absl::NotFoundError(
      absl::StrCat("no whole checkpoint in ", directory, "; check the path"));
}

// Not "none": a new run in this directory would remove what may still be repaired.
absl::Status NoneWholeIn(const std::string& directory, size_t damaged) {
  return absl::DataLossError(absl::StrCat(
      "none of the ", damaged, damaged == 1 ? " checkpoint" : " checkpoints", " in ", directory,
      " is whole (the warnings of rank 0 say why); repair them, or move them away to start anew"));
}

// The first names of a list, and how many there are.
std::string FirstOf(const std::vector<std::string>& names) {
  constexpr size_t kShown = 3;
  const size_t shown = std::min(names.size(), kShown);
  std::string text = absl::StrJoin(names.begin(), names.begin() + shown, ", ");
  if (names.size() > shown) absl::StrAppend(&text, ", ...");
  return text;
}

bool IsOptimizer(const std::string& name) { return absl::StartsWith(name, "optim."); }

// FAILED_PRECONDITION with all that does not fit between a checkpoint and a registry.
absl::Status CheckSameModel(const std::string& path, const Manifest& manifest,
                            const StateRegistry& registry, const LoadOptions& options) {
  std::vector<std::string> missing, unused, shapes, types;
  std::map<std::string, bool> wanted;
  bool with_optimizer = false;
  for (const StateEntry& entry : registry.entries()) {
    if (!wanted.emplace(entry.name, true).second) continue;  // another box of the same tensor
    with_optimizer |= IsOptimizer(entry.name);
    const auto it = manifest.tensors.find(entry.name);
    if (it == manifest.tensors.end()) {
      missing.push_back(entry.name);
    } else if (it->second.shape != entry.global_shape) {
      shapes.push_back(absl::StrCat(entry.name, " ", ShapeText(it->second.shape), " there and ",
                                    ShapeText(entry.global_shape), " here"));
    } else if (!CanConvert(it->second.dtype, entry.dtype)) {
      types.push_back(absl::StrCat(entry.name, " ", Name(it->second.dtype), " there and ",
                                   Name(entry.dtype), " here"));
    }
  }
  for (const auto& [name, tensor] : manifest.tensors) {
    if (wanted.count(name) == 0 && !options.allow_unused &&
        (with_optimizer || !IsOptimizer(name))) {
      unused.push_back(name);
    }
  }
  std::vector<std::string> reasons;
  if (!missing.empty()) {
    reasons.push_back(
        absl::StrCat(missing.size(), " tensors are not in it (", FirstOf(missing), ")"));
  }
  if (!unused.empty()) {
    reasons.push_back(absl::StrCat(unused.size(), " of its tensors are not part of this model (",
                                   FirstOf(unused), ")"));
  }
  if (!shapes.empty()) {
    reasons.push_back(absl::StrCat(shapes.size(), " have another shape (", FirstOf(shapes), ")"));
  }
  if (!types.empty()) {
    reasons.push_back(
        absl::StrCat(types.size(), " have a type that is not converted (", FirstOf(types), ")"));
  }
  if (reasons.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "checkpoint ", path, " does not fit this model: ", absl::StrJoin(reasons, "; "),
      "; load it with the configuration that wrote it or choose another checkpoint directory"));
}

// Where an entry and a piece of its tensor overlap.
struct Box {
  int64_t first_row = 0, rows = 0;
  int64_t first_column = 0, columns = 0;
};

// The elements of `box` from a stored piece into the entry's place for them.
absl::Status ReadBox(const SafetensorsFile& file, const SafetensorsEntry& stored,
                     const ManifestTensor& tensor, const Piece& piece, const Box& box,
                     const StateEntry& entry) {
  const int64_t stored_row = tensor.ColumnsOf(piece), local_row = entry.local.row_elements();
  const bool whole_rows = box.columns == stored_row && box.columns == local_row;
  const int64_t from = box.first_column - piece.first_column;
  const int64_t to = box.first_column - entry.first_column;
  const Tensor target = entry.local.Rows(box.first_row - entry.first_row, box.rows);
  const int64_t first = box.first_row - piece.first_row;
  const Tensor columns = whole_rows ? target : target.Columns(to, box.columns);
  return FillFromHost(columns, [&](int64_t done, const Tensor& rows) -> absl::Status {
    if (whole_rows) {
      return ReadConverted(file, stored, (first + done) * stored_row, rows.elements(), rows.dtype,
                           rows.data);
    }
    for (int64_t r = 0; r < rows.rows(); ++r) {
      STRETTO_RETURN_IF_ERROR(ReadConverted(file, stored, (first + done + r) * stored_row + from,
                                            box.columns, rows.dtype, rows.Rows(r, 1).data));
    }
    return absl::OkStatus();
  });
}

// Calls `visit(piece, box)` for what `entry` has of each piece.
template <class Visit>
absl::Status ForEachOverlap(const StateEntry& entry, const ManifestTensor& tensor, Visit visit) {
  const int64_t end = entry.first_row + entry.local.rows();
  const int64_t end_column = entry.first_column + entry.local.row_elements();
  for (const Piece& piece : tensor.pieces) {
    const Box box = {
        .first_row = std::max(entry.first_row, piece.first_row),
        .rows = std::min(end, piece.first_row + piece.rows) -
                std::max(entry.first_row, piece.first_row),
        .first_column = std::max(entry.first_column, piece.first_column),
        .columns = std::min(end_column, piece.first_column + tensor.ColumnsOf(piece)) -
                   std::max(entry.first_column, piece.first_column),
    };
    if (box.rows > 0 && box.columns > 0) STRETTO_RETURN_IF_ERROR(visit(piece, box));
  }
  return absl::OkStatus();
}

// Whether a check failed because this process may not look, which says nothing about the files.
bool CannotRead(const absl::Status& status) {
  return absl::IsPermissionDenied(status) || absl::IsResourceExhausted(status);
}

}  // namespace

absl::StatusOr<CheckpointInfo> ReadCheckpointInfo(const std::string& step_path) {
  STRETTO_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(step_path));
  return InfoOf(step_path, manifest);
}

absl::Status VerifyCheckpoint(const CheckpointInfo& info, Verify verify) {
  STRETTO_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(info.path));
  for (const ManifestFile& file : manifest.files) {
    STRETTO_RETURN_IF_ERROR(VerifyFile(info.path, file, verify));
  }
  return absl::OkStatus();
}

absl::StatusOr<CheckpointInfo> FindNewestCheckpoint(const std::string& directory, Verify verify) {
  std::vector<int64_t> steps, damaged;
  for (int look = 0; look < kMostLooks; ++look) {
    STRETTO_ASSIGN_OR_RETURN(std::vector<int64_t> listed, ListSteps(directory));
    if (look > 0 && listed == steps) break;
    steps = std::move(listed);
    damaged.clear();
    for (const int64_t step : steps) {
      const std::string path = StepPath(directory, step);
      const absl::StatusOr<Manifest> manifest = ReadStep(directory, step);
      absl::Status status = manifest.status();
      if (status.ok()) {
        CheckpointInfo info = InfoOf(path, *manifest);
        status = VerifyCheckpoint(info, verify);
        info.verified = verify == Verify::kDigests;
        info.passed_over = damaged;
        if (status.ok()) return info;
      }
      if (CannotRead(status)) return status;
      damaged.push_back(step);
      LogWarning(
          absl::StrCat("checkpoint ", path, " is passed over: ", std::string(status.message())));
    }
  }
  return damaged.empty() ? NoneIn(directory) : NoneWholeIn(directory, damaged.size());
}

namespace {

// Rank 0's list counts: what other ranks see may lag behind on a network file system.
absl::StatusOr<std::vector<int64_t>> ListTogether(World& world, const std::string& directory) {
  std::string said;
  if (world.rank() == 0) {
    const absl::StatusOr<std::vector<int64_t>> listed = ListSteps(directory);
    if (listed.ok() || absl::IsNotFound(listed.status())) {
      said = "steps " + (listed.ok() ? absl::StrJoin(*listed, " ") : "");
    } else {
      said = std::string(listed.status().message());
    }
  }
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> lists,
                           world.AllGather("checkpoint candidates", said));
  if (!absl::StartsWith(lists[0], "steps ")) {
    return absl::UnavailableError(absl::StrCat("rank 0: ", lists[0]));
  }
  std::istringstream words(lists[0].substr(6));
  return std::vector<int64_t>(std::istream_iterator<int64_t>(words), {});
}

// The first of these steps that is whole; NOT_FOUND: none is.
absl::StatusOr<CheckpointInfo> FirstWhole(World& world, const std::string& directory,
                                          const std::vector<int64_t>& steps) {
  std::vector<int64_t> damaged;
  for (const int64_t step : steps) {
    const std::string path = StepPath(directory, step);
    absl::StatusOr<Manifest> manifest = ReadStep(directory, step);
    absl::Status status = manifest.status();
    for (size_t i = world.rank(); status.ok() && i < manifest->files.size(); i += world.size()) {
      status = VerifyFile(path, manifest->files[i], Verify::kDigests);
    }
    // Gathered rather than agreed on, to tell a damaged file (try the next one) from a control
    // plane that is gone (give up).
    STRETTO_ASSIGN_OR_RETURN(
        const std::vector<std::string> findings,
        world.AllGather(absl::StrCat("check of the checkpoint of step ", step),
                        status.ok() ? ""
                                    : absl::StrCat(CannotRead(status) ? "!" : "",
                                                   std::string(status.message()))));
    for (size_t rank = 0; rank < findings.size(); ++rank) {
      if (!absl::StartsWith(findings[rank], "!")) continue;
      return absl::UnavailableError(absl::StrCat(
          "rank ", rank, ": ", findings[rank].substr(1),
          "; the checkpoint may be sound: make it readable, or move it away to go on without it"));
    }
    const auto bad = std::find_if(findings.begin(), findings.end(),
                                  [](const std::string& finding) { return !finding.empty(); });
    if (bad == findings.end()) {
      CheckpointInfo info = InfoOf(path, *manifest);
      info.verified = true;
      info.passed_over = std::move(damaged);
      return info;
    }
    damaged.push_back(step);
    if (world.rank() == 0) {
      LogWarning(absl::StrCat("checkpoint ", path, " is passed over: rank ", bad - findings.begin(),
                              ": ", *bad));
    }
  }
  return NoneIn(directory);
}

}  // namespace

absl::StatusOr<CheckpointInfo> FindNewestCheckpoint(World& world, const std::string& directory) {
  std::vector<int64_t> steps;
  for (int look = 0; look < kMostLooks; ++look) {
    STRETTO_ASSIGN_OR_RETURN(std::vector<int64_t> listed, ListTogether(world, directory));
    if (look > 0 && listed == steps) break;
    steps = std::move(listed);
    absl::StatusOr<CheckpointInfo> found = FirstWhole(world, directory, steps);
    if (found.ok() || !absl::IsNotFound(found.status())) return found;
  }
  return steps.empty() ? NoneIn(directory) : NoneWholeIn(directory, steps.size());
}

absl::Status LoadCheckpoint(const CheckpointInfo& info, const StateRegistry& registry,
                            const LoadOptions& options) {
  STRETTO_ASSIGN_OR_RETURN(const Manifest manifest, ReadManifest(info.path));
  STRETTO_RETURN_IF_ERROR(CheckSameModel(info.path, manifest, registry, options));

  // Files that hold wanted rows; the others are not touched.
  std::vector<std::unique_ptr<SafetensorsFile>> files(manifest.files.size());
  for (const StateEntry& entry : registry.entries()) {
    const ManifestTensor& tensor = manifest.tensors.at(entry.name);
    STRETTO_RETURN_IF_ERROR(
        ForEachOverlap(entry, tensor, [&](const Piece& piece, const Box&) -> absl::Status {
          std::unique_ptr<SafetensorsFile>& file = files[piece.file];
          const ManifestFile& described = manifest.files[piece.file];
          if (file == nullptr) {
            STRETTO_RETURN_IF_ERROR(VerifyFile(
                info.path, described, info.verified ? Verify::kHeaders : Verify::kDigests));
            STRETTO_ASSIGN_OR_RETURN(SafetensorsFile opened, SafetensorsFile::Open(absl::StrCat(
                                                                 info.path, "/", described.name)));
            file = std::make_unique<SafetensorsFile>(std::move(opened));
          }
          std::vector<int64_t> shape = tensor.shape;
          shape[0] = piece.rows;
          if (piece.columns >= 0) shape[1] = piece.columns;
          const SafetensorsEntry* stored = file->Find(entry.name);
          if (stored == nullptr || stored->shape != shape ||
              stored->dtype != SafetensorsType(tensor.dtype)) {
            return absl::DataLossError(absl::StrCat(file->path(), ": tensor \"", entry.name,
                                                    "\" is not as stretto.json says"));
          }
          return absl::OkStatus();
        }));
  }

  for (const StateEntry& entry : registry.entries()) {
    const ManifestTensor& tensor = manifest.tensors.at(entry.name);
    STRETTO_RETURN_IF_ERROR(ForEachOverlap(entry, tensor, [&](const Piece& piece, const Box& box) {
      const SafetensorsFile& file = *files[static_cast<size_t>(piece.file)];
      return ReadBox(file, *file.Find(entry.name), tensor, piece, box, entry);
    }));
  }
  return absl::OkStatus();
}

}  // namespace stretto
