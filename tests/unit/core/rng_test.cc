#include "stretto/core/rng.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace stretto {
namespace {

using Block = std::array<uint32_t, 4>;

// The known answers of the Random123 distribution for philox4x32 with 10 rounds.
TEST(PhiloxTest, KnownAnswers) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Block{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Block{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Block{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// Initial weights and data order depend on these: a change here breaks every stored run.
TEST(RngTest, ValuesArePinned) {
  EXPECT_EQ(StableHash(""), 17665956581633026203u);
  EXPECT_EQ(StableHash("init/h.0.attn.c_attn.weight"), 4287313502169966495u);
  const Rng rng(1234, "init/h.0.attn.c_attn.weight", 5);
  EXPECT_EQ(rng.Bits(0), 17615608463369931840u);
  EXPECT_EQ(rng.Bits(7), 4787353112732441995u);
  const Permutation permutation(1000003, 1234, 2);
  EXPECT_EQ(permutation(0), 786156u);
  EXPECT_EQ(permutation(999999), 735978u);
}

TEST(RngTest, ElementsShareTheWordsOfTheirBlock) {
  const Rng rng(1, "x");
  const Block words = rng.Words(10);
  EXPECT_EQ(rng.Bits(20), uint64_t{words[0]} | uint64_t{words[1]} << 32);
  EXPECT_EQ(rng.Bits(21), uint64_t{words[2]} | uint64_t{words[3]} << 32);
}

TEST(RngTest, EveryPartOfTheKeyMatters) {
  std::set<uint64_t> seen;
  int drawn = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (const char* purpose : {"", "a", "b", "ab", "ba"}) {
      for (uint64_t index : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32}) {
        for (uint64_t element : {uint64_t{0}, uint64_t{1}, uint64_t{2}, uint64_t{1} << 33}) {
          seen.insert(Rng(seed, purpose, index).Bits(element));
          ++drawn;
        }
      }
    }
  }
  EXPECT_EQ(static_cast<int>(seen.size()), drawn);
}

TEST(RngTest, UniformMoments) {
  const Rng rng(7, "uniform");
  constexpr int kDraws = 200000;
  double sum = 0;
  double squares = 0;
  double neighbours = 0;
  double last = 0.5;
  for (int i = 0; i < kDraws; ++i) {
    const double u = rng.Uniform(i);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    sum += u;
    squares += u * u;
    neighbours += (u - 0.5) * (last - 0.5);
    last = u;
  }
  // Five standard deviations of each estimate.
  EXPECT_NEAR(sum / kDraws, 0.5, 5 * std::sqrt(1.0 / 12 / kDraws));
  EXPECT_NEAR(squares / kDraws, 1.0 / 3, 5 * std::sqrt(4.0 / 45 / kDraws));
  EXPECT_NEAR(neighbours / kDraws, 0, 5.0 / 12 / std::sqrt(kDraws));
}

TEST(RngTest, NormalsAreTheSameInOneCall) {
  const Rng rng(3, "normals");
  for (const uint64_t first : {0, 1, 6, 1001}) {
    for (const int64_t n : {0, 1, 2, 3, 8, 17}) {
      std::vector<double> all(static_cast<size_t>(n + 1), -7.0);
      rng.Normals(first, n, all.data());
      for (int64_t i = 0; i < n; ++i) {
        EXPECT_EQ(all[static_cast<size_t>(i)], rng.Normal(first + static_cast<uint64_t>(i)));
      }
      EXPECT_EQ(all.back(), -7.0);
    }
  }
}

TEST(RngTest, NormalMoments) {
  const Rng rng(7, "normal");
  constexpr int kDraws = 200000;
  double moments[5] = {};
  int outside = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = rng.Normal(i);
    ASSERT_TRUE(std::isfinite(x));
    for (int m = 1; m <= 4; ++m) moments[m] += std::pow(x, m) / kDraws;
    outside += std::fabs(x) > 1.959964;
  }
  const double sd = 1 / std::sqrt(kDraws);
  EXPECT_NEAR(moments[1], 0, 5 * sd);
  EXPECT_NEAR(moments[2], 1, 5 * std::sqrt(2) * sd);
  EXPECT_NEAR(moments[3], 0, 5 * std::sqrt(15) * sd);
  EXPECT_NEAR(moments[4], 3, 5 * std::sqrt(96) * sd);
  EXPECT_NEAR(outside / double{kDraws}, 0.05, 5 * std::sqrt(0.05 * 0.95) * sd);
}

TEST(RngTest, BelowIsUniform) {
  const Rng rng(7, "below");
  constexpr int kDraws = 70000;
  constexpr int kCells = 7;
  int counts[kCells] = {};
  for (int i = 0; i < kDraws; ++i) {
    const uint64_t v = rng.Below(i, kCells);
    ASSERT_LT(v, uint64_t{kCells});
    ++counts[v];
  }
  double chi2 = 0;
  for (int c : counts) chi2 += (c - 10000.0) * (c - 10000.0) / 10000.0;
  EXPECT_LT(chi2, 27.9);  // 6 degrees of freedom, p = 1e-4
  EXPECT_EQ(rng.Below(3, 1), 0u);
  const uint64_t big = (uint64_t{1} << 63) + 12345;
  for (int i = 0; i < 100; ++i) EXPECT_LT(rng.Below(i, big), big);
}

TEST(PermutationTest, IsABijection) {
  for (uint64_t n : {1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 255, 257, 1000, 4096, 65537}) {
    for (uint64_t epoch : {0, 1}) {
      const Permutation p(n, 42, epoch);
      EXPECT_EQ(p.size(), n);
      std::vector<bool> hit(n, false);
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t v = p(i);
        ASSERT_LT(v, n);
        ASSERT_FALSE(hit[v]) << "n " << n << " hits " << v << " twice";
        hit[v] = true;
      }
    }
  }
}

TEST(PermutationTest, StaysInRangeAndDistinctForLargeN) {
  for (uint64_t n : {(uint64_t{1} << 40) + 1, (uint64_t{1} << 62) + 1, ~uint64_t{0}}) {
    const Permutation p(n, 1, 1);
    std::set<uint64_t> seen;
    for (uint64_t i = 0; i < 2000; ++i) {
      const uint64_t v = p(n - 1 - i);
      ASSERT_LT(v, n);
      seen.insert(v);
    }
    EXPECT_EQ(seen.size(), 2000u);
  }
}

TEST(PermutationTest, OtherEpochsAndSeedsGiveOtherOrders) {
  constexpr uint64_t kN = 10007;
  const Permutation a(kN, 1, 0);
  const Permutation same(kN, 1, 0);
  for (const Permutation& b : {Permutation(kN, 1, 1), Permutation(kN, 2, 0)}) {
    int equal = 0;
    for (uint64_t i = 0; i < kN; ++i) {
      equal += a(i) == b(i);
      ASSERT_EQ(a(i), same(i));
    }
    EXPECT_LT(equal, 12);  // one is expected of two random orders
  }
}

// Each value should reach each place about equally often, over epochs.
TEST(PermutationTest, PlacesAreUniformOverEpochs) {
  constexpr int kN = 11;
  constexpr int kEpochs = 11000;
  std::vector<int> counts(kN * kN, 0);
  for (int epoch = 0; epoch < kEpochs; ++epoch) {
    const Permutation p(kN, 9, epoch);
    for (int i = 0; i < kN; ++i) ++counts[i * kN + p(i)];
  }
  double chi2 = 0;
  for (int c : counts) chi2 += (c - 1000.0) * (c - 1000.0) / 1000.0;
  EXPECT_LT(chi2, 160);  // (kN - 1)^2 = 100 degrees of freedom, p = 1e-4 at 161
}

}  // namespace
}  // namespace stretto
