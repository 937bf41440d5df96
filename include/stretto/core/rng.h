// Counter-based random numbers keyed by meaning (contract 7): a value depends on what it is for and
// never on which rank draws it or in which order.
#ifndef STRETTO_CORE_RNG_H_
#define STRETTO_CORE_RNG_H_

#include <array>
#include <cstdint>
#include <string>

namespace stretto {

// One block of Philox 4x32-10. Kernels that draw per element (dropout) compute the same function.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// A stream of random numbers with random access. Philox 4x32-10 (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011).
class Rng {
 public:
  // `purpose` names what the numbers are for, e.g. "init/h.0.attn.c_attn.weight"; `index` is any
  // further number of that meaning, e.g. the step.
  Rng(uint64_t seed, const std::string& purpose, uint64_t index = 0);

  // For kernels that draw the same words: Words(counter) is Philox4x32 of {counter, counter >> 32,
  // index, index >> 32} with this key.
  std::array<uint32_t, 2> key() const { return {key_[0], key_[1]}; }
  // Four independent 32-bit words for element group `counter`.
  std::array<uint32_t, 4> Words(uint64_t counter) const;
  uint64_t Bits(uint64_t element) const;
  // Uniform in [0, 1), 53 bits.
  double Uniform(uint64_t element) const;
  // Standard normal (Box-Muller on the element's own two words).
  double Normal(uint64_t element) const;
  // out[i] = Normal(first + i), drawing once for the two elements of a block.
  void Normals(uint64_t first, int64_t n, double* out) const;
  // Uniform in [0, n); n > 0. Bias below 2^-64 * n.
  uint64_t Below(uint64_t element, uint64_t n) const;

 private:
  uint32_t key_[2];
  uint32_t index_[2];
};

// A pseudo-random bijection of [0, n), computed without a table (Feistel network over the smallest
// even-bit domain that holds n, with cycle walking). The same (seed, epoch, n) gives the same order
// on every rank.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed, uint64_t epoch);
  uint64_t size() const { return n_; }
  uint64_t operator()(uint64_t i) const;  // i < size()

 private:
  uint64_t n_;
  int half_bits_;
  std::array<uint64_t, 8> keys_;
};

// FNV-1a of the bytes, finished with a mixing step; stable across platforms and versions.
uint64_t StableHash(const std::string& text);

}  // namespace stretto

#endif  // STRETTO_CORE_RNG_H_
