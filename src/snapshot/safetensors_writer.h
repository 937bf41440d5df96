// Writing safetensors files, with what a checkpoint wants to know about the result.
#ifndef STRETTO_SRC_SNAPSHOT_SAFETENSORS_WRITER_H_
#define STRETTO_SRC_SNAPSHOT_SAFETENSORS_WRITER_H_

#include <map>
#include <string>
#include <vector>

#include "src/snapshot/file_io.h"
#include "stretto/snapshot/safetensors.h"

namespace stretto::snapshot_internal {

// WriteSafetensors, returning size and digest.
absl::StatusOr<WrittenFile> WriteSafetensorsFile(
    const std::string& path, std::vector<SafetensorsItem> items,
    const std::map<std::string, std::string>& metadata);

// Bytes of data; INVALID_ARGUMENT for a negative dimension or an overflow.
absl::StatusOr<int64_t> DataBytes(const SafetensorsItem& item);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_SAFETENSORS_WRITER_H_
