#include "src/comm/copy_rounds.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace stretto {
namespace {

std::vector<Operation::Item> Items(const std::vector<int64_t>& elements) {
  std::vector<Operation::Item> items;
  for (const int64_t e : elements) items.push_back({nullptr, nullptr, e});
  return items;
}

// Every element of every item travels once, in order, and nothing lies over anything else.
TEST(CopyRoundsTest, RoundsHoldAllOnceAndFitTheirRoom) {
  std::vector<int64_t> many(3 * CopyRounds::kMostPieces + 5, 7);
  for (const std::vector<int64_t>& elements : std::vector<std::vector<int64_t>>{
           {1}, {0, 5, 0, 0, 1000, 3, 0}, {4096, 4096}, {100001}, many}) {
    for (const int64_t size : {1, 2, 4, 8}) {
      for (const int64_t room : {int64_t{16}, int64_t{48}, int64_t{4096}}) {
        const std::vector<Operation::Item> items = Items(elements);
        CopyRounds rounds(items, size, room);
        std::vector<CopyPiece> pieces;
        std::vector<int64_t> seen(elements.size(), 0);
        size_t last = 0;
        while (rounds.Next(&pieces)) {
          ASSERT_FALSE(pieces.empty());
          ASSERT_LE(pieces.size(), static_cast<size_t>(CopyRounds::kMostPieces));
          int64_t free = 0;
          for (const CopyPiece& p : pieces) {
            ASSERT_GE(p.item, last);
            last = p.item;
            ASSERT_EQ(p.begin, seen[p.item]);
            ASSERT_GT(p.elements, 0);
            seen[p.item] += p.elements;
            ASSERT_GE(p.at, free);
            ASSERT_EQ(p.at % CopyRounds::kAlignment, 0);
            ASSERT_EQ(p.begin * size % CopyRounds::kAlignment, 0);
            free = p.at + p.elements * size;
            ASSERT_LE(free, room);
          }
        }
        EXPECT_TRUE(pieces.empty());
        EXPECT_EQ(seen, elements);
      }
    }
  }
}

TEST(CopyRoundsTest, RoundsAreAsFewAsTheRoomAllows) {
  const std::vector<Operation::Item> items = Items({1000, 24, 1000});
  std::vector<CopyPiece> pieces;
  int count = 0;
  for (CopyRounds rounds(items, 4, 4096); rounds.Next(&pieces); ++count) {
  }
  EXPECT_EQ(count, 2);  // 8096 bytes
}

TEST(CopyRoundsTest, NothingTakesNoRound) {
  std::vector<CopyPiece> pieces(1);
  EXPECT_FALSE(CopyRounds({}, 4, 4096).Next(&pieces));
  EXPECT_TRUE(pieces.empty());
  const std::vector<Operation::Item> items = Items({0, 0});
  EXPECT_FALSE(CopyRounds(items, 4, 4096).Next(&pieces));
}

}  // namespace
}  // namespace stretto
