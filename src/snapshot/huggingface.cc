#include "stretto/snapshot/huggingface.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/snapshot/convert.h"
#include "src/snapshot/file_io.h"
#include "src/snapshot/json.h"
#include "src/snapshot/read_converted.h"
#include "src/snapshot/safetensors_writer.h"

namespace stretto {
namespace {

using nlohmann::json;
using snapshot_internal::DataBytes;
using snapshot_internal::DumpJson;
using snapshot_internal::Member;
using snapshot_internal::ParseJson;

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
constexpr int64_t kMaxIndexBytes = 256 << 20;

std::string ShardName(int64_t shard, int64_t shards) {
  return absl::StrFormat("model-%05d-of-%05d.safetensors", shard, shards);
}

// The names "model-00001-of-00004.safetensors" and so on.
bool IsShardName(const std::string& name) {
  const std::string start = "model-", end = ".safetensors";
  if (name.size() <= start.size() + end.size() || name.compare(0, start.size(), start) != 0 ||
      name.compare(name.size() - end.size(), end.size(), end) != 0) {
    return false;
  }
  const std::string middle = name.substr(start.size(), name.size() - start.size() - end.size());
  const size_t of = middle.find("-of-");
  if (of == std::string::npos || of == 0 || of + 4 == middle.size()) return false;
  const std::string digits = middle.substr(0, of) + middle.substr(of + 4);
  return digits.find_first_not_of("0123456789") == std::string::npos;
}

// What an earlier export left and this one did not write.
void RemoveStale(const std::string& directory, const std::set<std::string>& written) {
  const absl::StatusOr<std::vector<std::string>> names =
      snapshot_internal::ListDirectory(directory);
  if (!names.ok()) return;
  for (const std::string& name : *names) {
    if ((name == kSingleFile || name == kIndexFile || IsShardName(name)) &&
        written.count(name) == 0) {
      std::error_code ignored;
      std::filesystem::remove(directory + "/" + name, ignored);
    }
  }
}

}  // namespace

absl::StatusOr<HfWeights> HfWeights::Open(const std::string& directory) {
  HfWeights weights;
  weights.directory_ = directory;
  const std::string single = directory + "/" + kSingleFile;
  std::error_code error;
  if (std::filesystem::exists(single, error)) {
    STRETTO_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(single));
    for (const SafetensorsEntry& entry : file.entries()) weights.tensors_[entry.name] = 0;
    weights.files_.push_back(std::move(file));
    return weights;
  }

  const std::string index_path = directory + "/" + kIndexFile;
  if (!std::filesystem::exists(index_path, error)) {
    return absl::NotFoundError(absl::StrCat("no weights in ", directory, ": neither ", kSingleFile,
                                            " nor ", kIndexFile, " is there"));
  }
  STRETTO_ASSIGN_OR_RETURN(const std::string text,
                           snapshot_internal::ReadWholeFile(index_path, kMaxIndexBytes));
  STRETTO_ASSIGN_OR_RETURN(const json index, ParseJson(text, index_path));
  const json* map = Member(index, "weight_map", json::value_t::object);
  if (map == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": \"weight_map\" is missing or no object"));
  }
  std::map<std::string, int> opened;
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string()) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": tensor \"", name, "\" is not mapped to a file name"));
    }
    const std::string& file_name = file.get_ref<const std::string&>();
    // The index may come from anywhere: it must not reach outside its directory.
    if (file_name.empty() || file_name == "." || file_name == ".." ||
        file_name.find('/') != std::string::npos) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": tensor \"", name,
                                                     "\" is mapped to \"", file_name,
                                                     "\", which is no plain file name"));
    }
    const auto [it, is_new] = opened.emplace(file_name, weights.files_.size());
    if (is_new) {
      STRETTO_ASSIGN_OR_RETURN(SafetensorsFile shard,
                               SafetensorsFile::Open(directory + "/" + file_name));
      weights.files_.push_back(std::move(shard));
    }
    if (weights.files_[it->second].Find(name) == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": tensor \"", name,
                                                     "\" is mapped to ", file_name,
                                                     ", which does not hold it"));
    }
    weights.tensors_[name] = it->second;
  }
  return weights;
}

std::vector<std::string> HfWeights::names() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : tensors_) names.push_back(name);
  return names;
}

const SafetensorsEntry* HfWeights::Find(const std::string& name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : files_[it->second].Find(name);
}

absl::Status HfWeights::ReadElements(const std::string& name, int64_t first, int64_t count,
                                     DType dtype, void* out) const {
  const SafetensorsFile& file = files_[tensors_.at(name)];
  return snapshot_internal::ReadConverted(file, *file.Find(name), first, count, dtype, out);
}

absl::Status HfWeights::Read(const std::string& name, DType dtype, void* out) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat("no tensor \"", name, "\" in ", directory_));
  }
  return ReadElements(name, 0, entry->elements(), dtype, out);
}

absl::Status HfWeights::ReadRows(const std::string& name, int64_t first_row, int64_t rows,
                                 DType dtype, void* out) const {
  const SafetensorsEntry* entry = Find(name);
  if (entry == nullptr) {
    return absl::NotFoundError(absl::StrCat("no tensor \"", name, "\" in ", directory_));
  }
  const int64_t all = entry->shape.empty() ? 1 : entry->shape[0];
  if (first_row < 0 || rows < 0 || first_row > all || rows > all - first_row) {
    return absl::OutOfRangeError(absl::StrCat("rows ", first_row, " to ", first_row + rows,
                                              " are outside tensor \"", name, "\" of ", all,
                                              " rows in ", directory_));
  }
  const int64_t row_elements = all == 0 ? 0 : entry->elements() / all;
  return ReadElements(name, first_row * row_elements, rows * row_elements, dtype, out);
}

absl::Status WriteHfWeights(const std::string& directory, const std::vector<SafetensorsItem>& items,
                            int64_t max_shard_bytes) {
  STRETTO_RETURN_IF_ERROR(snapshot_internal::MakeDirectories(directory));
  std::vector<std::vector<SafetensorsItem>> shards(1);
  std::set<std::string> names;
  int64_t total = 0, in_shard = 0;
  for (const SafetensorsItem& item : items) {
    if (!names.insert(item.name).second) {
      return absl::InvalidArgumentError(absl::StrCat("cannot write the weights to ", directory,
                                                     ": two tensors are called \"", item.name,
                                                     "\""));
    }
    STRETTO_ASSIGN_OR_RETURN(const int64_t bytes, DataBytes(item));
    if (!shards.back().empty() && bytes > max_shard_bytes - in_shard) {
      shards.emplace_back();
      in_shard = 0;
    }
    shards.back().push_back(item);
    in_shard += bytes;
    total += bytes;
  }

  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  std::set<std::string> written;
  if (shards.size() == 1) {
    STRETTO_RETURN_IF_ERROR(WriteSafetensors(directory + "/" + kSingleFile, shards[0], metadata));
    written.insert(kSingleFile);
  } else {
    json map = json::object();
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string name = ShardName(i + 1, shards.size());
      STRETTO_RETURN_IF_ERROR(WriteSafetensors(directory + "/" + name, shards[i], metadata));
      written.insert(name);
      for (const SafetensorsItem& item : shards[i]) map[item.name] = name;
    }
    const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(map)}};
    STRETTO_ASSIGN_OR_RETURN(const std::string text, DumpJson(index, 2));
    STRETTO_RETURN_IF_ERROR(
        snapshot_internal::WriteWholeFile(directory + "/" + kIndexFile, text + "\n").status());
    written.insert(kIndexFile);
  }
  RemoveStale(directory, written);
  return snapshot_internal::SyncDirectory(directory);
}

}  // namespace stretto
