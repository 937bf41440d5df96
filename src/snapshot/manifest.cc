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

// Adds the boxes of one file as pieces.
absl::Status AddPieces(const SafetensorsFile& shard, int file,
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
    Piece piece = {file, offsets[0], entry.shape[0]};
    const std::vector<int64_t>& whole = tensor->second.shape;
    for (size_t d = 1; d < offsets.size(); ++d) {
      if (offsets[d] == 0 && entry.shape[d] == whole[d]) continue;
      if (offsets.size() != 2 || entry.shape[1] > whole[1] ||
          offsets[1] > whole[1] - entry.shape[1]) {
        return absl::DataLossError(absl::StrCat(shard.path(), ": tensor \"", entry.name,
                                                "\" is not a range of whole rows, or of columns of "
                                                "a matrix"));
      }
      piece.first_column = offsets[1];
      piece.columns = entry.shape[1];
    }
    tensor->second.pieces.push_back(piece);
  }
  return absl::OkStatus();
}

absl::Status TwiceOwned(const Piece& a, const Piece& b, const std::vector<ManifestFile>& files,
                        int64_t row, const std::string& name) {
  return absl::FailedPreconditionError(
      absl::StrCat("ranks ", files[static_cast<size_t>(a.file)].rank, " and ",
                   files[static_cast<size_t>(b.file)].rank, " both own row ", row, " of tensor \"",
                   name, "\"; exactly one rank may own a row, or a column of one"));
}

// Sorts the pieces and finds gaps and repeats. From one row where pieces begin or end to the next
// the same pieces are there, and their columns have to follow each other.
absl::Status CheckCoverage(const std::string& name, const std::vector<ManifestFile>& files,
                           ManifestTensor* tensor) {
  std::vector<Piece>& pieces = tensor->pieces;
  std::sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
    return std::tie(a.first_row, a.first_column, a.rows, a.file) <
           std::tie(b.first_row, b.first_column, b.rows, b.file);
  });
  const int64_t rows = tensor->shape[0];
  for (const Piece& piece : pieces) {
    if (piece.first_row > rows || piece.rows > rows - piece.first_row) {
      return absl::FailedPreconditionError(
          absl::StrCat("rank ", files[static_cast<size_t>(piece.file)].rank,
                       " owns rows beyond the ", rows, " of tensor \"", name, "\""));
    }
  }
  const bool has_bytes =
      std::find(tensor->shape.begin(), tensor->shape.end(), 0) == tensor->shape.end();
  if (!has_bytes) return absl::OkStatus();
  const auto unowned = [&](int64_t row, const std::string& of) {
    return absl::FailedPreconditionError(
        absl::StrCat(of, "row ", row, " of tensor \"", name, "\" ", ShapeText(tensor->shape),
                     " is owned by no rank; the slices of all ranks must cover a tensor"));
  };
  const Piece whole_row = {};
  const int64_t columns = tensor->ColumnsOf(whole_row);
  std::vector<const Piece*> here;  // that have row `row`, by column
  size_t next = 0;
  for (int64_t row = 0; row < rows;) {
    std::erase_if(here, [&](const Piece* p) { return p->first_row + p->rows <= row; });
    for (; next < pieces.size() && pieces[next].first_row <= row; ++next) {
      if (pieces[next].rows > 0) here.push_back(&pieces[next]);
    }
    std::sort(here.begin(), here.end(), [](const Piece* a, const Piece* b) {
      return std::tie(a->first_column, a->first_row) < std::tie(b->first_column, b->first_row);
    });
    if (here.empty()) return unowned(row, "");
    int64_t column = 0;
    int64_t end = next < pieces.size() ? pieces[next].first_row : rows;
    for (size_t i = 0; i < here.size(); ++i) {
      const Piece& piece = *here[i];
      if (piece.first_column < column) {
        return TwiceOwned(*here[i == 0 ? 0 : i - 1], piece, files, row, name);
      }
      if (piece.first_column > column) return unowned(row, absl::StrCat("column ", column, " of "));
      column += tensor->ColumnsOf(piece);
      end = std::min(end, piece.first_row + piece.rows);
    }
    if (column != columns) return unowned(row, absl::StrCat("column ", column, " of "));
    row = end;
  }
  return absl::OkStatus();
}

// How many files the rank has whose file is called `name`; 1 when the name says nothing sensible.
int FilesOfRank(const std::string& name) {
  const std::string end = ".safetensors";
  constexpr size_t kDigits = 5;
  const size_t at = name.rfind("-of-");
  if (at == std::string::npos || name.size() < at + 4 + kDigits + end.size()) return 1;
  int files = 0;
  for (size_t i = at + 4; i < name.size() - end.size(); ++i) {
    if (name[i] < '0' || name[i] > '9' || files > 1 << 20) return 1;
    files = 10 * files + (name[i] - '0');
  }
  return std::max(1, files);
}

absl::Status Malformed(const std::string& source, const std::string& what) {
  return absl::DataLossError(absl::StrCat(source, ": ", what, " is missing or makes no sense"));
}

}  // namespace

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

std::string ShardFileName(int rank, int file, int files) {
  return absl::StrFormat("shard-%05d-model-%05d-of-%05d.safetensors", rank + 1, file + 1, files);
}

int64_t ManifestTensor::ColumnsOf(const Piece& piece) const {
  if (piece.columns >= 0) return piece.columns;
  int64_t n = 1;
  for (size_t d = 1; d < shape.size(); ++d) n *= shape[d];
  return n;
}

std::vector<std::vector<const StateEntry*>> FilesOf(const StateRegistry& registry) {
  std::vector<std::vector<const StateEntry*>> files(1);
  std::map<std::string, size_t> boxes;
  for (const StateEntry& entry : registry.entries()) {
    if (!entry.owned || entry.local.rows() == 0) continue;
    const size_t file = boxes[entry.name]++;
    if (file == files.size()) files.emplace_back();
    files[file].push_back(&entry);
  }
  return files;
}

absl::StatusOr<std::map<std::string, std::string>> ShardMetadata(
    const StateRegistry& registry, const std::vector<const StateEntry*>& entries) {
  json info = json::object();
  json list = json::object();
  for (const StateEntry& entry : registry.entries()) {
    list[entry.name] = {{"dtype", SafetensorsType(entry.dtype)}, {"shape", entry.global_shape}};
  }
  for (const StateEntry* entry : entries) {
    std::vector<int64_t> offsets(entry->global_shape.size(), 0);
    offsets[0] = entry->first_row;
    if (offsets.size() > 1) offsets[1] = entry->first_column;
    info[entry->name] = {{"saved_offsets", offsets}};
  }
  std::map<std::string, std::string> metadata = {{"DCP_VERSION", "1.0"}, {"format", "pt"}};
  STRETTO_ASSIGN_OR_RETURN(metadata[kShardingInfo], DumpJson(info));
  STRETTO_ASSIGN_OR_RETURN(metadata[kTensorList], DumpJson(list));
  return metadata;
}

absl::Status IndexShards(const std::string& directory, Manifest* manifest) {
  manifest->tensors.clear();
  for (size_t i = 0; i < manifest->files.size(); ++i) {
    const ManifestFile& file = manifest->files[i];
    const std::string path = directory + "/" + file.name;
    const absl::StatusOr<std::shared_ptr<const FileReader>> seen = FileReader::Open(path);
    if (!seen.ok() || (*seen)->size() != file.bytes) {
      return absl::FailedPreconditionError(absl::StrCat(
          "rank 0 does not find the ", file.bytes, " bytes of ", path, " that rank ", file.rank,
          " has written; the checkpoint directory must be on a file system that all ranks share"));
    }
    STRETTO_ASSIGN_OR_RETURN(const SafetensorsFile shard, SafetensorsFile::Open(path));
    STRETTO_RETURN_IF_ERROR(MergeTensorList(shard, file.rank, &manifest->tensors));
    STRETTO_RETURN_IF_ERROR(AddPieces(shard, static_cast<int>(i), &manifest->tensors));
  }
  for (auto& [name, tensor] : manifest->tensors) {
    STRETTO_RETURN_IF_ERROR(CheckCoverage(name, manifest->files, &tensor));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ManifestToJson(const Manifest& manifest) {
  bool rows_only = manifest.files.size() == static_cast<size_t>(manifest.world_size);
  for (const auto& [name, tensor] : manifest.tensors) {
    for (const Piece& piece : tensor.pieces) rows_only &= piece.columns < 0;
  }
  json document = {{"format", "stretto checkpoint"},
                   {"version", rows_only ? 1 : kManifestVersion},
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
      json item = {piece.file, piece.first_row, piece.rows};
      if (piece.columns >= 0) {
        item.push_back(piece.first_column);
        item.push_back(piece.columns);
      }
      pieces.push_back(std::move(item));
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
  if (version < 1 || version > kManifestVersion) {
    return absl::UnimplementedError(absl::StrCat(
        source, ": checkpoint format version ", version, ", this library reads versions up to ",
        kManifestVersion, "; use the library that wrote it"));
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
      world_size > static_cast<int64_t>(files->size())) {
    return Malformed(source, "\"world_size\"");
  }
  manifest.world_size = static_cast<int>(world_size);
  int rank = -1, part = 0, parts = 0;
  for (const json& value : *files) {
    ManifestFile file;
    const json* name = Member(value, "name", Type::string);
    const json* hash = Member(value, "xxh3_64", Type::string);
    if (name == nullptr || hash == nullptr || !ReadMember(value, "bytes", &file.bytes) ||
        !FromHex(hash->get_ref<const std::string&>(), &file.digest)) {
      return Malformed(source, "a file's description");
    }
    file.name = name->get<std::string>();
    // A rank's files follow each other, one at least.
    if (part == parts) {
      part = 0;
      parts = FilesOfRank(file.name);
      ++rank;
    }
    if (file.name != ShardFileName(rank, part, parts)) {
      return Malformed(source, absl::StrCat("the file name \"", file.name, "\""));
    }
    ++part;
    file.rank = rank;
    manifest.files.push_back(std::move(file));
  }
  if (part != parts || rank + 1 != world_size) return Malformed(source, "\"files\"");
  for (const auto& [name, value] : tensors->items()) {
    ManifestTensor tensor;
    const json* pieces = Member(value, "pieces", Type::array);
    if (pieces == nullptr || !ReadTensor(value, &tensor)) {
      return Malformed(source, absl::StrCat("tensor \"", name, "\""));
    }
    for (const json& item : *pieces) {
      std::vector<int64_t> numbers;
      const bool read = ReadShape(item, &numbers), box = numbers.size() == 5;
      if (!read || (!box && numbers.size() != 3) ||
          numbers[0] >= static_cast<int64_t>(manifest.files.size()) ||
          (box && (tensor.shape.size() != 2 || numbers[4] > tensor.shape[1] ||
                   numbers[3] > tensor.shape[1] - numbers[4]))) {
        return Malformed(source, absl::StrCat("a piece of tensor \"", name, "\""));
      }
      Piece piece = {static_cast<int>(numbers[0]), numbers[1], numbers[2]};
      if (box) piece.first_column = numbers[3], piece.columns = numbers[4];
      tensor.pieces.push_back(piece);
    }
    STRETTO_RETURN_IF_ERROR(CheckCoverage(name, manifest.files, &tensor));
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
