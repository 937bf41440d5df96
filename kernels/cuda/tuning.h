// Which of cuBLASLt's algorithms runs each matrix product: chosen by cuBLASLt's heuristic, or
// measured in tuning mode, and kept for the whole process. Everything here may be called from any
// thread.
//
// An algorithm decides in which order a product adds up, so runs that should agree bit by bit must
// agree on the table: leave tuning off, or tune once and import the same text everywhere.
#ifndef STRETTO_KERNELS_CUDA_TUNING_H_
#define STRETTO_KERNELS_CUDA_TUNING_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "stretto/core/status.h"

namespace stretto::cuda {

// In tuning mode the first use of a product times several algorithms on the operands that it was
// called with, and keeps the fastest; so do ways to do the same with fewer or more kernels. That
// use waits for the stream, so it must not be captured into a graph. Results are right in tuning
// mode too, but elements of an accumulating output that are about 0 may change by about 1e-35.
void SetTuning(bool on);
bool Tuning();

// The measured entries, one line of text for each.
std::string ExportTuning();
// Adds such entries; they replace those of the same product. Lines from another version of cuBLASLt
// or another model of GPU are kept but never used. INVALID_ARGUMENT names the first line that is no
// entry; the lines before it have been added.
absl::Status ImportTuning(const std::string& text);

// A product as the table knows it. Only integers of one width: compared, hashed and written as an
// array.
struct ProductKey {
  int64_t version = 0;  // of cuBLASLt
  int64_t gpu = 0;      // a hash of the GPU's model
  int64_t m = 0, n = 0, k = 0;
  int64_t type = 0, output_type = 0;  // cudaDataType_t; of a and b unless type_b differs, of d
  int64_t trans_a = 0, trans_b = 0;
  int64_t ld_a = 0, ld_b = 0, ld_d = 0, ld_aux = 0;
  int64_t alignments = 0;  // of the pointers
  int64_t acc = 0;
  int64_t epilogue = 0;
  int64_t workspace = 0;  // bytes that an algorithm may use
  // From here on missing in tables of earlier versions, which had one type for a and b.
  int64_t type_b = 0;
  int64_t fast_accumulation = 0;

  bool operator==(const ProductKey&) const = default;
};

struct ProductPlan {
  std::array<uint64_t, 8> algorithm = {};  // cublasLtMatmulAlgo_t
  bool separate = false;  // not to be used: the epilogue is done better by kernels of its own
  bool tuned = false;     // measured, here or where it was imported from
  bool checked = false;   // cuBLASLt has accepted the algorithm in this process
};

// Never allocates.
std::optional<ProductPlan> FindPlan(const ProductKey& key);
// Allocates for a new key. A full table forgets nothing and takes nothing.
void StorePlan(const ProductKey& key, const ProductPlan& plan);

}  // namespace stretto::cuda

#endif  // STRETTO_KERNELS_CUDA_TUNING_H_
