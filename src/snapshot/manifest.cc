#include "src/snapshot/manifest.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "src/snapshot/json.h"
#include "stretto/snapshot/safetensors.h"

namespace stretto::snapshot_internal {
namespace {

using nlohmann::json;
using Type = json::value_t;

constexpr char kShardingInfo[] = "DCP_SHARDING_INFO";  // torch's key
constexpr char kTensorList[] = "STRETTO_TENSORS";
constexpr int64_t kMaxManifestBytes = int64_t{1} << 30;

bool ReadShape(const json& value, std::vector<int64_t>* shape) {
  if (!value.is_array()) return false;
  shape->clear();
  for (const json& item : value) {
    int64_t dimension = 0;
    if (!ReadCount(item, &dimension)) return false;
    shape->push_back(dimension);
  }
  return true;
}

bool ReadMember(const json& object, const char* key, int64_t* out) {
  return object.is_object() && object.contains(key) && ReadCount(object[key], out);
}

// Type and shape of a tensor, as "STRETTO_TENSORS" and stretto.json write it.
bool ReadTensor(const json& value, ManifestTensor* tensor) {
  const json* dtype = Member(value, "dtype", Type::string);
  const json* shape = Member(value, "shape", Type::array);
  if (dtype == nullptr || shape == nullptr || !ReadShape(*shape, &tensor->shape)) return false;
  const absl::StatusOr<DType> type = FromSafetensorsType(dtype->get_ref<const std::string&>());
  if (!type.ok()) return false;
  tensor->dtype = *type;
  return !tensor->shape.empty();
}

// The tensors that a shard's metadata lists, merged into `tensors`.
absl::Status MergeTensorList(const SafetensorsFile& shard, int rank,
                             std::map<std::string, ManifestTensor>* tensors) {
  const auto it = shard.metadata().find(kTensorList);
  if (it == shard.metadata().end()) {
    return absl::DataLossError(
        absl::StrCat(shard.path(), ": no ", kTensorList, " in its metadata"));
  }
  STRETTO_ASSIGN_OR_RETURN(const json list, ParseJson(it->second, shard.path()));
  if (!list.is_object()) {
    return absl::DataLossError(absl::StrCat(shard.path(), ": ", kTensorList, " is no object"));
  }
  for (const auto& [name, value] : list.items()) {
    ManifestTensor tensor;
    if (!ReadTensor(value, &tensor)) {
      return absl::DataLossError(
          absl::StrCat(shard.path(), ": tensor \"", name, "\" is badly described"));
    }
    const auto [known, is_new] = tensors->emplace(name, tensor);
    if (is_new) continue;
    if (known->second.shape != tensor.shape || known->second.dtype != tensor.dtype) {
      return absl::FailedPreconditionError(absl::StrCat(
          "rank ", rank, " registered tensor \"", name, "\" as ", SafetensorsType(tensor.dtype),
          ShapeText(tensor.shape), ", a lower rank as ", SafetensorsType(known->second.dtype),
          ShapeText(known->second.shape), "; register the same global tensor on all ranks"));
    }
  }
  return absl::OkStatus();
}

// Adds the slices of one shard as pieces.
absl::Status AddPieces(const SafetensorsFile& shard, int rank,
                       std::map<std::string, ManifestTensor>* tensors) {
  const auto it = shard.metadata().find(kShardingInfo);
  json info = json::object();
  if (it != shard.metadata().end()) {
    STRETTO_ASSIGN_OR_RETURN(info, ParseJson(it->second, shard.path()));
  }
  for (const SafetensorsEntry& entry : shard.entries()) {
    const auto tensor = tensors->find(entry.name);
    const json* place = Member(info, entry.name.c_str(), Type::object);
    const json* saved = place == nullptr ? nullptr : Member(*place, "saved_offsets", Type::array);
    std::vector<int64_t> offsets;
    if (tensor == tensors->end() || saved == nullptr || !ReadShape(*saved, &offsets) ||
        offsets.size() != entry.shape.size() || offsets.size() != tensor->second.shape.size() ||
        entry.dtype != SafetensorsType(tensor->second.dtype)) {
      return absl::DataLossError(
          absl::StrCat(shard.path(), ": tensor \"", entry.name, "\" is badly described"));
    }
    for (size_t d = 1; d < offsets.size(); ++d) {
      if (offsets[d] != 0 || entry.shape[d] != tensor->second.shape[d]) {
        return absl::DataLossError(absl::StrCat(shard.path(), ": tensor \"", entry.name,
                                                "\" is not a range of whole rows"));
      }
    }
    tensor->second.pieces.push_back({rank, offsets[0], entry.shape[0]});
  }
  return absl::OkStatus();
}

// Sorts the pieces by row and finds gaps and repeats.
absl::Status CheckCoverage(const std::string& name, ManifestTensor* tensor) {
  std::sort(tensor->pieces.begin(), tensor->pieces.end(), [](const Piece& a, const Piece& b) {
    return std::tie(a.first_row, a.rows, a.file) < std::tie(b.first_row, b.rows, b.file);
  });
  int64_t next = 0;
  const Piece* last = nullptr;
  for (const Piece& piece : tensor->pieces) {
    if (piece.first_row > next) break;
    if (piece.first_row < next) {
      return absl::FailedPreconditionError(
          absl::StrCat("ranks ", last->file, " and ", piece.file, " both own row ", piece.first_row,
                       " of tensor \"", name, "\"; exactly one rank may own a row"));
    }
    if (piece.rows > tensor->shape[0] - piece.first_row) {
      return absl::FailedPreconditionError(absl::StrCat("rank ", piece.file,
                                                        " owns rows beyond the ", tensor->shape[0],
                                                        " of tensor \"", name, "\""));
    }
    next = piece.first_row + piece.rows;
    last = &piece;
  }
  const bool has_bytes =
      std::find(tensor->shape.begin(), tensor->shape.end(), 0) == tensor->shape.end();
  if (next != tensor->shape[0] && has_bytes) {
    return absl::FailedPreconditionError(
        absl::StrCat("row ", next, " of tensor \"", name, "\" ", ShapeText(tensor->shape),
                     " is owned by no rank; the slices of all ranks must cover a tensor"));
  }
  return absl::OkStatus();
}

absl::Status Malformed(const std::string& source, const std::string& what) {
  return absl::DataLossError(absl::StrCat(source, ": ", what, " is missing or makes no sense"));
}

}  // namespace

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

std::string ShardFileName(int rank) {
  return absl::StrFormat("shard-%05d-model-00001-of-00001.safetensors", rank + 1);
}

int64_t OwnedRows(const StateEntry& entry) {
  return entry.local.rank == 0 ? 0 : entry.local.rows();
}

absl::StatusOr<std::map<std::string, std::string>> ShardMetadata(const StateRegistry& registry) {
  json info = json::object();
  json list = json::object();
  for (const StateEntry& entry : registry.entries()) {
    list[entry.name] = {{"dtype", SafetensorsType(entry.dtype)}, {"shape", entry.global_shape}};
    if (OwnedRows(entry) == 0) continue;
    std::vector<int64_t> offsets(entry.global_shape.size(), 0);
    offsets[0] = entry.first_row;
    info[entry.name] = {{"saved_offsets", offsets}};
  }
  std::map<std::string, std::string> metadata = {{"DCP_VERSION", "1.0"}, {"format", "pt"}};
  STRETTO_ASSIGN_OR_RETURN(metadata[kShardingInfo], DumpJson(info));
  STRETTO_ASSIGN_OR_RETURN(metadata[kTensorList], DumpJson(list));
  return metadata;
}

absl::Status IndexShards(const std::string& directory, Manifest* manifest) {
  manifest->tensors.clear();
  for (size_t rank = 0; rank < manifest->files.size(); ++rank) {
    const ManifestFile& file = manifest->files[rank];
    const std::string path = directory + "/" + file.name;
    const absl::StatusOr<std::shared_ptr<const FileReader>> seen = FileReader::Open(path);
    if (!seen.ok() || (*seen)->size() != file.bytes) {
      return absl::FailedPreconditionError(absl::StrCat(
          "rank 0 does not find the ", file.bytes, " bytes of ", path, " that rank ", rank,
          " has written; the checkpoint directory must be on a file system that all ranks share"));
    }
    STRETTO_ASSIGN_OR_RETURN(const SafetensorsFile shard, SafetensorsFile::Open(path));
    STRETTO_RETURN_IF_ERROR(MergeTensorList(shard, rank, &manifest->tensors));
    STRETTO_RETURN_IF_ERROR(AddPieces(shard, rank, &manifest->tensors));
  }
  for (auto& [name, tensor] : manifest->tensors) {
    STRETTO_RETURN_IF_ERROR(CheckCoverage(name, &tensor));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ManifestToJson(const Manifest& manifest) {
  json document = {{"format", "stretto checkpoint"},
                   {"version", kManifestVersion},
                   {"step", manifest.step},
                   {"world_size", manifest.world_size}};
  json& files = document["files"] = json::array();
  for (const ManifestFile& file : manifest.files) {
    files.push_back({{"name", file.name}, {"bytes", file.bytes}, {"xxh3_64", ToHex(file.digest)}});
  }
  json& tensors = document["tensors"] = json::object();
  for (const auto& [name, tensor] : manifest.tensors) {
    json pieces = json::array();
    for (const Piece& piece : tensor.pieces) {
      pieces.push_back({piece.file, piece.first_row, piece.rows});
    }
    tensors[name] = {{"dtype", SafetensorsType(tensor.dtype)},
                     {"shape", tensor.shape},
                     {"pieces", std::move(pieces)}};
  }
  STRETTO_ASSIGN_OR_RETURN(document["trainer_state"],
                           ParseJson(manifest.trainer_state, "trainer state"));
  STRETTO_ASSIGN_OR_RETURN(const std::string body, DumpJson(document));
  document["xxh3_64"] = ToHex(Digest(body));
  STRETTO_ASSIGN_OR_RETURN(const std::string text, DumpJson(document, 1));
  return text + "\n";
}

absl::StatusOr<Manifest> ParseManifest(const std::string& text, const std::string& source) {
  STRETTO_ASSIGN_OR_RETURN(json document, ParseJson(text, source));
  const json* format = Member(document, "format", Type::string);
  if (format == nullptr || *format != "stretto checkpoint") return Malformed(source, "\"format\"");
  int64_t version = 0;
  if (!ReadMember(document, "version", &version)) return Malformed(source, "\"version\"");
  if (version != kManifestVersion) {
    return absl::UnimplementedError(absl::StrCat(source, ": checkpoint format version ", version,
                                                 ", this library reads version ", kManifestVersion,
                                                 "; use the library that wrote it"));
  }
  const json* digest_text = Member(document, "xxh3_64", Type::string);
  uint64_t digest = 0;
  if (digest_text == nullptr || !FromHex(digest_text->get_ref<const std::string&>(), &digest)) {
    return Malformed(source, "\"xxh3_64\"");
  }
  document.erase("xxh3_64");
  STRETTO_ASSIGN_OR_RETURN(const std::string body, DumpJson(document));
  if (Digest(body) != digest) {
    return absl::DataLossError(absl::StrCat(source, ": its content does not match its digest"));
  }

  Manifest manifest;
  int64_t world_size = 0;
  const json* files = Member(document, "files", Type::array);
  const json* tensors = Member(document, "tensors", Type::object);
  const json* state = Member(document, "trainer_state", Type::object);
  if (!ReadMember(document, "step", &manifest.step)) return Malformed(source, "\"step\"");
  if (files == nullptr) return Malformed(source, "\"files\"");
  if (tensors == nullptr) return Malformed(source, "\"tensors\"");
  if (state == nullptr) return Malformed(source, "\"trainer_state\"");
  if (!ReadMember(document, "world_size", &world_size) || world_size < 1 ||
      world_size != static_cast<int64_t>(files->size())) {
    return Malformed(source, "\"world_size\"");
  }
  manifest.world_size = static_cast<int>(world_size);
  for (const json& value : *files) {
    ManifestFile file;
    const json* name = Member(value, "name", Type::string);
    const json* hash = Member(value, "xxh3_64", Type::string);
    if (name == nullptr || hash == nullptr || !ReadMember(value, "bytes", &file.bytes) ||
        !FromHex(hash->get_ref<const std::string&>(), &file.digest)) {
      return Malformed(source, "a file's description");
    }
    file.name = name->get<std::string>();
    if (file.name != ShardFileName(static_cast<int>(manifest.files.size()))) {
      return Malformed(source, absl::StrCat("the file name \"", file.name, "\""));
    }
    manifest.files.push_back(std::move(file));
  }
  for (const auto& [name, value] : tensors->items()) {
    ManifestTensor tensor;
    const json* pieces = Member(value, "pieces", Type::array);
    if (pieces == nullptr || !ReadTensor(value, &tensor)) {
      return Malformed(source, absl::StrCat("tensor \"", name, "\""));
    }
    for (const json& item : *pieces) {
      std::vector<int64_t> numbers;
      if (!ReadShape(item, &numbers) || numbers.size() != 3 || numbers[0] >= world_size) {
        return Malformed(source, absl::StrCat("a piece of tensor \"", name, "\""));
      }
      tensor.pieces.push_back({static_cast<int>(numbers[0]), numbers[1], numbers[2]});
    }
    STRETTO_RETURN_IF_ERROR(CheckCoverage(name, &tensor));
    manifest.tensors.emplace(name, std::move(tensor));
  }
  STRETTO_ASSIGN_OR_RETURN(manifest.trainer_state, DumpJson(*state));
  return manifest;
}

absl::StatusOr<Manifest> ReadManifest(const std::string& step_path) {
  const std::string path = absl::StrCat(step_path, "/", kManifestName);
  STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(path, kMaxManifestBytes));
  return ParseManifest(text, path);
}

}  // namespace stretto::snapshot_internal
