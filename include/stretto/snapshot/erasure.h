// Reed-Solomon codes over GF(2^8) (ISA-L): from k data blocks, m parity blocks, such that any k of
// the k + m blocks give the others back. With m = 1 the parity block is the XOR of the data blocks.
#ifndef STRETTO_SNAPSHOT_ERASURE_H_
#define STRETTO_SNAPSHOT_ERASURE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

// A linear map from some blocks of equal size to others: what encoding and rebuilding both are.
// Blocks need no alignment and may have any size. Thread-safe.
class ErasureMap {
 public:
  int inputs() const { return inputs_; }
  int outputs() const { return outputs_; }
  // All at once: outputs[o][0, bytes) from inputs[i][0, bytes).
  void Apply(const std::byte* const* inputs, std::byte* const* outputs, int64_t bytes) const;
  // Adds the part of one input to outputs that were zero before the first. Inputs may come in any
  // order, each byte of each once.
  void Accumulate(int input, const std::byte* block, std::byte* const* outputs,
                  int64_t bytes) const;

 private:
  friend class ErasureCode;
  ErasureMap(int inputs, int outputs, const std::vector<uint8_t>& coefficients);
  int inputs_, outputs_;
  std::vector<uint8_t> tables_;  // of ISA-L, 32 bytes a coefficient
};

// Members of a stripe are numbered: data 0 to k - 1, then parity k to k + m - 1.
class ErasureCode {
 public:
  // INVALID_ARGUMENT unless 1 <= data, 0 <= parity and data + parity <= 255.
  static absl::StatusOr<ErasureCode> Create(int data, int parity);

  int data() const { return data_; }
  int parity() const { return parity_; }
  // Data blocks to parity blocks.
  const ErasureMap& encode() const { return encode_; }
  // From `sources` (`data` different members, in the order of the map's inputs) to `lost` ones, in
  // their order. INVALID_ARGUMENT for another number of sources or members that do not exist.
  absl::StatusOr<ErasureMap> Rebuild(const std::vector<int>& sources,
                                     const std::vector<int>& lost) const;

 private:
  ErasureCode(int data, int parity, std::vector<uint8_t> generator);
  int data_, parity_;
  std::vector<uint8_t> generator_;  // [data + parity, data]: a member from the data blocks
  ErasureMap encode_;
};

}  // namespace stretto

#endif  // STRETTO_SNAPSHOT_ERASURE_H_
