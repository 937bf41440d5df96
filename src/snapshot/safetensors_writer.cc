#include "src/snapshot/safetensors_writer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "src/snapshot/json.h"
#include "src/snapshot/safetensors_types.h"

namespace stretto {
namespace snapshot_internal {

absl::StatusOr<int64_t> DataBytes(const SafetensorsItem& item) {
  int64_t bytes = SizeOf(item.dtype);
  for (const int64_t dimension : item.shape) {
    if (dimension < 0 || __builtin_mul_overflow(bytes, dimension, &bytes)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor \"", item.name, "\" has the shape [",
                                                     absl::StrJoin(item.shape, ", "),
                                                     "], which is negative or too large"));
    }
  }
  return bytes;
}

absl::StatusOr<WrittenFile> WriteSafetensorsFile(
    const std::string& path, std::vector<SafetensorsItem> items,
    const std::map<std::string, std::string>& metadata) {
  std::sort(items.begin(), items.end(), [](const SafetensorsItem& a, const SafetensorsItem& b) {
    const int type_a = SafetensorsTypeIndex(SafetensorsType(a.dtype));
    const int type_b = SafetensorsTypeIndex(SafetensorsType(b.dtype));
    return type_a != type_b ? type_a > type_b : a.name < b.name;
  });

  std::string header = "{";
  if (!metadata.empty()) {
    STRETTO_ASSIGN_OR_RETURN(const std::string json, DumpJson(nlohmann::json(metadata)));
    absl::StrAppend(&header, "\"__metadata__\":", json);
  }
  std::vector<int64_t> sizes;
  int64_t end = 0;
  std::map<std::string, bool> names;
  for (const SafetensorsItem& item : items) {
    STRETTO_ASSIGN_OR_RETURN(const int64_t bytes, DataBytes(item));
    if (item.name == "__metadata__" || !names.emplace(item.name, true).second) {
      return absl::InvalidArgumentError(absl::StrCat("cannot write ", path, ": the tensor name \"",
                                                     item.name,
                                                     "\" is used twice or reserved by the format"));
    }
    if (bytes > 0 && item.data == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("cannot write ", path, ": tensor \"", item.name, "\" has no data"));
    }
    STRETTO_ASSIGN_OR_RETURN(const std::string name, DumpJson(nlohmann::json(item.name)));
    absl::StrAppend(&header, header.size() > 1 ? "," : "", name, ":{\"dtype\":\"",
                    SafetensorsType(item.dtype), "\",\"shape\":[", absl::StrJoin(item.shape, ","),
                    "],\"data_offsets\":[", end, ",", end + bytes, "]}");
    sizes.push_back(bytes);
    if (__builtin_add_overflow(end, bytes, &end)) {
      return absl::InvalidArgumentError(absl::StrCat("cannot write ", path, ": too much data"));
    }
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  if (static_cast<int64_t>(header.size()) > kMaxSafetensorsHeader) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot write ", path, ": the names and shapes take ", header.size(),
                     " bytes where the format allows ", kMaxSafetensorsHeader,
                     "; spread the tensors over several files"));
  }

  STRETTO_ASSIGN_OR_RETURN(auto writer,
                           FileWriter::Create(path, 8 + static_cast<int64_t>(header.size()) + end));
  const uint64_t length = header.size();
  char length_bytes[8];
  std::memcpy(length_bytes, &length, sizeof(length));
  STRETTO_RETURN_IF_ERROR(writer->Append(length_bytes, sizeof(length_bytes)));
  STRETTO_RETURN_IF_ERROR(writer->Append(header.data(), header.size()));
  for (size_t i = 0; i < items.size(); ++i) {
    STRETTO_RETURN_IF_ERROR(writer->Append(items[i].data, sizes[i]));
  }
  return writer->Commit();
}

}  // namespace snapshot_internal

absl::Status WriteSafetensors(const std::string& path, std::vector<SafetensorsItem> items,
                              const std::map<std::string, std::string>& metadata) {
  return snapshot_internal::WriteSafetensorsFile(path, std::move(items), metadata).status();
}

}  // namespace stretto
