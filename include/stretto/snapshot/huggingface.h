// The weights of a Hugging Face model directory: model.safetensors, or the shards that
// model.safetensors.index.json lists. Which tensor belongs to which parameter is the model's
// affair.
#ifndef STRETTO_SNAPSHOT_HUGGINGFACE_H_
#define STRETTO_SNAPSHOT_HUGGINGFACE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "stretto/core/dtype.h"
#include "stretto/core/status.h"
#include "stretto/snapshot/safetensors.h"

namespace stretto {

// All shards' headers are read by Open; data is read on demand. Reads may run in several threads.
class HfWeights {
 public:
  // model.safetensors wins over an index, as in transformers. Of the index only "weight_map"
  // counts: a tensor of a shard that it does not map is not seen. NOT_FOUND when there is neither
  // file; INVALID_ARGUMENT names a tensor that the index maps to a shard without it.
  static absl::StatusOr<HfWeights> Open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  std::vector<std::string> names() const;  // sorted
  // Shape and stored type; null when there is no such tensor.
  const SafetensorsEntry* Find(const std::string& name) const;
  // The whole tensor as `dtype`; `out` holds elements() * SizeOf(dtype) bytes. Types f64, f32, bf16
  // and f16 are converted into each other, any other must be the stored one (INVALID_ARGUMENT).
  absl::Status Read(const std::string& name, DType dtype, void* out) const;
  // Rows [first_row, first_row + rows) of the first dimension.
  absl::Status ReadRows(const std::string& name, int64_t first_row, int64_t rows, DType dtype,
                        void* out) const;

 private:
  absl::Status ReadElements(const std::string& name, int64_t first, int64_t count, DType dtype,
                            void* out) const;
  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, int> tensors_;  // name -> index in files_
};

// Writes `items` in their order into shards of at most `max_shard_bytes` of data (a larger tensor
// has a shard of its own): model.safetensors when one is enough, else model-00001-of-0000N with
// model.safetensors.index.json. Creates the directory; replaces the weights of an earlier export.
absl::Status WriteHfWeights(const std::string& directory, const std::vector<SafetensorsItem>& items,
                            int64_t max_shard_bytes = 5'000'000'000);

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_HUGGINGFACE_H_
