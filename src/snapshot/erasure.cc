#include "stretto/snapshot/erasure.h"

#include <isa-l/erasure_code.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

constexpr int kMostMembers = 255;             // elements of GF(2^8) without 0
constexpr int64_t kPiece = int64_t{1} << 20;  // ISA-L counts bytes in an int, and caches are small

unsigned char* Bytes(const std::byte* data) {
  return reinterpret_cast<unsigned char*>(const_cast<std::byte*>(data));
}

}  // namespace

ErasureMap::ErasureMap(int inputs, int outputs, const std::vector<uint8_t>& coefficients)
    : inputs_(inputs), outputs_(outputs), tables_(size_t{32} * inputs * outputs) {
  if (tables_.empty()) return;
  ec_init_tables(inputs, outputs, const_cast<uint8_t*>(coefficients.data()), tables_.data());
}

void ErasureMap::Apply(const std::byte* const* inputs, std::byte* const* outputs,
                       int64_t bytes) const {
  if (outputs_ == 0) return;
  std::array<unsigned char*, kMostMembers> in, out;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    for (int i = 0; i < inputs_; ++i) in[i] = Bytes(inputs[i]) + at;
    for (int o = 0; o < outputs_; ++o) out[o] = Bytes(outputs[o]) + at;
    ec_encode_data(static_cast<int>(std::min(kPiece, bytes - at)), inputs_, outputs_,
                   const_cast<uint8_t*>(tables_.data()), in.data(), out.data());
  }
}

void ErasureMap::Accumulate(int input, const std::byte* block, std::byte* const* outputs,
                            int64_t bytes) const {
  if (outputs_ == 0) return;
  std::array<unsigned char*, kMostMembers> out;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    for (int o = 0; o < outputs_; ++o) out[o] = Bytes(outputs[o]) + at;
    ec_encode_data_update(static_cast<int>(std::min(kPiece, bytes - at)), inputs_, outputs_, input,
                          const_cast<uint8_t*>(tables_.data()), Bytes(block) + at, out.data());
  }
}

ErasureCode::ErasureCode(int data, int parity, std::vector<uint8_t> generator)
    : data_(data),
      parity_(parity),
      generator_(std::move(generator)),
      encode_(data, parity,
              std::vector<uint8_t>(generator_.begin() + int64_t{data} * data, generator_.end())) {}

absl::StatusOr<ErasureCode> ErasureCode::Create(int data, int parity) {
  if (data < 1 || parity < 0 || data > kMostMembers - parity) {
    return absl::InvalidArgumentError(
        absl::StrCat("an erasure code needs at least one data block and at most ", kMostMembers,
                     " blocks together, not ", data, " and ", parity, " of parity"));
  }
  std::vector<uint8_t> generator(static_cast<size_t>(data + parity) * data);
  // Any square part of a Cauchy matrix can be inverted, so any k members give the rest back.
  gf_gen_cauchy1_matrix(generator.data(), data + parity, data);
  // One row of ones does as well, and says XOR.
  if (parity == 1) std::fill(generator.end() - data, generator.end(), uint8_t{1});
  return ErasureCode(data, parity, std::move(generator));
}

absl::StatusOr<ErasureMap> ErasureCode::Rebuild(const std::vector<int>& sources,
                                                const std::vector<int>& lost) const {
  const auto member = [this](int i) { return i >= 0 && i < data_ + parity_; };
  const std::set<int> different(sources.begin(), sources.end());
  if (static_cast<int>(sources.size()) != data_ || different.size() != sources.size() ||
      !std::all_of(sources.begin(), sources.end(), member) ||
      !std::all_of(lost.begin(), lost.end(), member)) {
    return absl::InvalidArgumentError(absl::StrCat("rebuilding needs ", data_,
                                                   " different members of the ", data_ + parity_,
                                                   ", and was given ", different.size()));
  }
  const size_t k = static_cast<size_t>(data_);
  const auto row = [&](int i) { return generator_.data() + k * static_cast<size_t>(i); };
  std::vector<uint8_t> of_sources(k * k), inverse(k * k);
  for (size_t i = 0; i < k; ++i) std::memcpy(&of_sources[i * k], row(sources[i]), k);
  if (gf_invert_matrix(of_sources.data(), inverse.data(), data_) != 0) {
    return absl::InternalError("these members of an erasure code do not determine the others");
  }
  // A lost member from the sources: its row of the generator times the inverse.
  std::vector<uint8_t> coefficients(k * lost.size());
  for (size_t l = 0; l < lost.size(); ++l) {
    for (size_t j = 0; j < k; ++j) {
      uint8_t sum = 0;
      for (size_t i = 0; i < k; ++i) sum ^= gf_mul(row(lost[l])[i], inverse[i * k + j]);
      coefficients[l * k + j] = sum;
    }
  }
  return ErasureMap(data_, static_cast<int>(lost.size()), coefficients);
}

}  // namespace stretto
