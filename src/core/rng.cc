#include "stretto/core/rng.h"

#include <array>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>

namespace stretto {
namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64-bit words.
uint64_t Mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  x ^= x >> 31;
  return x;
}

// Box-Muller. u in (0, 1], so that the logarithm is finite; the largest result is sqrt(64 ln 2) =
// 6.66.
double NormalOf(uint32_t low, uint32_t high) {
  const double u = (static_cast<double>(low) + 1.0) * 0x1p-32;
  const double v = static_cast<double>(high) * 0x1p-32;
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio

}  // namespace

std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  constexpr int kRounds = 10;
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{0xd2511f53u} * counter[0];
    const uint64_t p1 = uint64_t{0xcd9e8d57u} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(p0)};
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return counter;
}

uint64_t StableHash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (char c : text) {
    hash ^= static_cast<unsigned char>(c);
    hash *= 0x100000001b3u;
  }
  return Mix(hash);
}

Rng::Rng(uint64_t seed, const std::string& purpose, uint64_t index) {
  // For one purpose, different seeds give different keys, and the other way round.
  const uint64_t key = Mix(Mix(seed + kGolden) ^ StableHash(purpose));
  key_[0] = static_cast<uint32_t>(key);
  key_[1] = static_cast<uint32_t>(key >> 32);
  index_[0] = static_cast<uint32_t>(index);
  index_[1] = static_cast<uint32_t>(index >> 32);
}

std::array<uint32_t, 4> Rng::Words(uint64_t counter) const {
  return Philox4x32(
      {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), index_[0], index_[1]},
      {key_[0], key_[1]});
}

uint64_t Rng::Bits(uint64_t element) const {
  const std::array<uint32_t, 4> words = Words(element / 2);
  const int at = static_cast<int>(element % 2) * 2;
  return uint64_t{words[at]} | uint64_t{words[at + 1]} << 32;
}

double Rng::Uniform(uint64_t element) const {
  return static_cast<double>(Bits(element) >> 11) * 0x1p-53;
}

double Rng::Normal(uint64_t element) const {
  const uint64_t bits = Bits(element);
  return NormalOf(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32));
}

void Rng::Normals(uint64_t first, int64_t n, double* out) const {
  int64_t i = 0;
  if (n > 0 && first % 2 == 1) out[i++] = Normal(first);
  for (; i + 2 <= n; i += 2) {
    const std::array<uint32_t, 4> words = Words((first + static_cast<uint64_t>(i)) / 2);
    out[i] = NormalOf(words[0], words[1]);
    out[i + 1] = NormalOf(words[2], words[3]);
  }
  if (i < n) out[i] = Normal(first + static_cast<uint64_t>(i));
}

uint64_t Rng::Below(uint64_t element, uint64_t n) const {
  assert(n > 0);
  return static_cast<uint64_t>((static_cast<unsigned __int128>(Bits(element)) * n) >> 64);
}

Permutation::Permutation(uint64_t n, uint64_t seed, uint64_t epoch) : n_(n), half_bits_(1) {
  while (half_bits_ < 32 && (uint64_t{1} << (2 * half_bits_)) < n) ++half_bits_;
  const Rng rng(seed, "permutation", epoch);
  for (std::size_t i = 0; i < keys_.size(); ++i) keys_[i] = rng.Bits(i);
}

uint64_t Permutation::operator()(uint64_t i) const {
  assert(i < n_);
  const uint64_t mask = (uint64_t{1} << half_bits_) - 1;
  // The domain holds fewer than 4 n + 4 values, so the walk takes four steps on average at most. It
  // ends since the cycle of i comes back to i, which is below n.
  do {
    uint64_t left = i >> half_bits_;
    uint64_t right = i & mask;
    for (uint64_t key : keys_) {
      const uint64_t next = left ^ (Mix(right + key) & mask);
      left = right;
      right = next;
    }
    i = left << half_bits_ | right;
  } while (i >= n_);
  return i;
}

}  // namespace stretto
