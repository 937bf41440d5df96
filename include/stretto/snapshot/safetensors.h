// Reading and writing safetensors files (https://huggingface.co/docs/safetensors, format 1.0).
#ifndef STRETTO_SNAPSHOT_SAFETENSORS_H_
#define STRETTO_SNAPSHOT_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stretto/core/dtype.h"
#include "stretto/core/status.h"

namespace stretto {

struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as in the file: "F32", "BF16", ...
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  // byte range inside the data section
  int64_t elements() const;
};

// "F32" -> kF32; INVALID_ARGUMENT for a type that no Tensor can hold.
absl::StatusOr<DType> FromSafetensorsType(const std::string& dtype);
const char* SafetensorsType(DType dtype);

// A parsed header; data stays on disk and is read on demand. Every defect the format's reference
// reader refuses is refused here, with the file, the tensor and the reason.
class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);
  // Checks a header alone, as Open does. `file_bytes` is the size of the whole file.
  static absl::StatusOr<SafetensorsFile> Parse(const std::string& source, const void* head,
                                               int64_t head_bytes, int64_t file_bytes);

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }  // by data offset
  const SafetensorsEntry* Find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // Reads `bytes` bytes of a tensor's data from `offset` within it.
  absl::Status Read(const SafetensorsEntry& entry, int64_t offset, int64_t bytes, void* out) const;

 private:
  std::string path_;
  int64_t data_begin_ = 0;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, int> index_;
  std::shared_ptr<const void> file_;  // keeps the descriptor open
};

// A tensor to be written: contiguous bytes.
struct SafetensorsItem {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const void* data = nullptr;
};

// Writes one file in the reference writer's order (type by decreasing alignment, then name), synced
// to disk. A failed write leaves no file behind.
absl::Status WriteSafetensors(const std::string& path, std::vector<SafetensorsItem> items,
                              const std::map<std::string, std::string>& metadata);

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_SAFETENSORS_H_
