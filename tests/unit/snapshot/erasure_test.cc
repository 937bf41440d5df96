#include "stretto/snapshot/erasure.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <vector>

#include "stretto/snapshot/parity.h"

namespace stretto {
namespace {

using Block = std::vector<std::byte>;

std::vector<const std::byte*> Read(const std::vector<Block>& blocks) {
  std::vector<const std::byte*> pointers;
  for (const Block& block : blocks) pointers.push_back(block.data());
  return pointers;
}
std::vector<std::byte*> Write(std::vector<Block>& blocks) {
  std::vector<std::byte*> pointers;
  for (Block& block : blocks) pointers.push_back(block.data());
  return pointers;
}

// All members of a stripe of random data.
std::vector<Block> Stripe(const ErasureCode& code, int64_t bytes, std::mt19937& random) {
  std::vector<Block> data(code.data(), Block(bytes)), parity(code.parity(), Block(bytes));
  for (Block& block : data) {
    for (std::byte& b : block) b = static_cast<std::byte>(random());
  }
  code.encode().Apply(Read(data).data(), Write(parity).data(), bytes);
  data.insert(data.end(), parity.begin(), parity.end());
  return data;
}

struct Shape {
  int data, parity;
};
class EveryLoss : public ::testing::TestWithParam<Shape> {};

// Every set of at most m lost members, at sizes that no vector width divides, at once and block by
// block.
TEST_P(EveryLoss, ComesBack) {
  const auto [k, m] = GetParam();
  const ErasureCode code = *ErasureCode::Create(k, m);
  std::mt19937 random(7);
  for (const int64_t bytes : {1, 31, 33, 64, 100, 257, 4096, (1 << 20) + 77}) {
    const std::vector<Block> members = Stripe(code, bytes, random);
    for (unsigned set = 0; set < 1u << (k + m); ++set) {
      if (std::popcount(set) > m || (bytes > 5000 && std::popcount(set) != m)) continue;
      std::vector<int> lost, sources;
      for (int i = 0; i < k + m; ++i) {
        if ((set >> i & 1) != 0) {
          lost.push_back(i);
        } else {
          sources.push_back(i);
        }
      }
      std::shuffle(sources.begin(), sources.end(), random);
      sources.resize(k);
      const ErasureMap map = *code.Rebuild(sources, lost);
      std::vector<Block> given, rebuilt(lost.size(), Block(bytes)),
          added(lost.size(), Block(bytes));
      for (int i : sources) given.push_back(members[i]);
      map.Apply(Read(given).data(), Write(rebuilt).data(), bytes);
      for (int i = k; i-- > 0;) {
        map.Accumulate(i, given[i].data(), Write(added).data(), bytes);
      }
      for (size_t l = 0; l < lost.size(); ++l) {
        ASSERT_EQ(rebuilt[l], members[lost[l]]) << bytes << " bytes, lost set " << set;
        ASSERT_EQ(added[l], members[lost[l]]) << bytes << " bytes, lost set " << set;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Codes, EveryLoss,
                         ::testing::Values(Shape{3, 1}, Shape{4, 2}, Shape{6, 2}, Shape{1, 1},
                                           Shape{2, 3}, Shape{5, 0}));

TEST(Erasure, OneParityIsXor) {
  const ErasureCode code = *ErasureCode::Create(3, 1);
  std::mt19937 random(1);
  const std::vector<Block> members = Stripe(code, 99, random);
  for (int i = 0; i < 99; ++i) {
    EXPECT_EQ(members[3][i], members[0][i] ^ members[1][i] ^ members[2][i]);
  }
}

// The check above would notice a wrong byte: one flipped bit of a source changes what is rebuilt.
TEST(Erasure, ADamagedSourceShows) {
  const ErasureCode code = *ErasureCode::Create(4, 2);
  std::mt19937 random(3);
  std::vector<Block> members = Stripe(code, 65, random);
  const Block lost = members[1];
  std::vector<Block> given = {members[0], members[2], members[3], members[5]}, out(1, Block(65));
  given[2][64] ^= std::byte{1};
  code.Rebuild({0, 2, 3, 5}, {1})->Apply(Read(given).data(), Write(out).data(), 65);
  EXPECT_NE(out[0], lost);
}

TEST(Erasure, RefusesWhatCannotBe) {
  EXPECT_FALSE(ErasureCode::Create(0, 1).ok());
  EXPECT_FALSE(ErasureCode::Create(200, 56).ok());
  EXPECT_FALSE(ErasureCode::Create(3, -1).ok());
  const ErasureCode code = *ErasureCode::Create(3, 1);
  EXPECT_FALSE(code.Rebuild({0, 1}, {2}).ok());
  EXPECT_FALSE(code.Rebuild({0, 1, 1}, {2}).ok());
  EXPECT_FALSE(code.Rebuild({0, 1, 4}, {2}).ok());
  EXPECT_FALSE(code.Rebuild({0, 1, 2}, {4}).ok());
}

TEST(Parity, EveryNodeIsOneMemberOfEveryStripe) {
  for (const auto& [nodes, data, parity] :
       {std::array{3, 2, 1}, {4, 3, 1}, {12, 4, 2}, {8, 6, 2}, {2, 1, 1}, {5, 5, 0}, {1, 1, 0}}) {
    const ParityLayout layout = *ParityLayout::Create(nodes, data, parity);
    std::vector<int> seen(nodes);
    for (int group = 0; group < layout.groups(); ++group) {
      for (int node : layout.Members(group)) {
        ++seen[node];
        EXPECT_EQ(layout.GroupOf(node), group);
        EXPECT_EQ(layout.NodeAt(group, layout.PlaceOf(node)), node);
      }
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), nodes);
    const int size = layout.group_size();
    for (int stripe = 0; stripe < size; ++stripe) {
      std::vector<int> members(size);
      for (int place = 0; place < size; ++place) {
        const int member = layout.MemberOf(place, stripe);
        ++members[member];
        EXPECT_EQ(layout.StripeOf(place, member), stripe);
      }
      EXPECT_EQ(std::count(members.begin(), members.end(), 1), size);
    }
    for (int place = 0; place < size; ++place) {
      std::vector<int> blocks(size);
      for (int stripe = 0; stripe < size; ++stripe) ++blocks[layout.MemberOf(place, stripe)];
      EXPECT_EQ(std::count(blocks.begin(), blocks.end(), 1), size);
    }
  }
}

TEST(Parity, BlocksHoldTheData) {
  const ParityLayout layout = *ParityLayout::Create(4, 3, 1);
  EXPECT_EQ(layout.BlockBytes(0), 0);
  EXPECT_EQ(layout.BlockBytes(1), 64);
  EXPECT_EQ(layout.BlockBytes(192), 64);
  EXPECT_EQ(layout.BlockBytes(193), 128);
  for (int64_t bytes : {7, 1000, 1 << 20}) {
    EXPECT_GE(3 * layout.BlockBytes(bytes), bytes);
    EXPECT_LT(3 * layout.BlockBytes(bytes), bytes + 3 * 66);
  }
}

TEST(Parity, RefusesGroupsThatDoNotDivide) {
  EXPECT_FALSE(ParityLayout::Create(5, 2, 1).ok());
  EXPECT_FALSE(ParityLayout::Create(3, 4, 1).ok());
  EXPECT_FALSE(ParityLayout::Create(3, 0, 1).ok());
}

}  // namespace
}  // namespace stretto
