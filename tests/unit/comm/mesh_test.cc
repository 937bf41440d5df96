#include "stretto/comm/mesh.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Mesh, AxesAndGroups) {
  const auto mesh = Mesh::Create(12, 7, {{"pp", 2}, {"dp", 3}, {"tp", 2}});
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  // 7 = 1 * 6 + 0 * 2 + 1
  EXPECT_EQ(mesh->Coord("pp"), 1);
  EXPECT_EQ(mesh->Coord("dp"), 0);
  EXPECT_EQ(mesh->Coord("tp"), 1);
  EXPECT_EQ(mesh->Coord("ep"), 0);
  EXPECT_EQ(mesh->Size("ep"), 1);
  EXPECT_EQ(mesh->size(), 12);
  EXPECT_THAT(mesh->Along({"pp"}), ElementsAre(1, 7));
  EXPECT_THAT(mesh->Along({"dp"}), ElementsAre(7, 9, 11));
  EXPECT_THAT(mesh->Along({"dp", "tp"}), ElementsAre(6, 7, 8, 9, 10, 11));
  EXPECT_THAT(mesh->Along({"tp", "dp"}), ElementsAre(6, 7, 8, 9, 10, 11));
  EXPECT_THAT(mesh->Along({"pp", "tp"}), ElementsAre(0, 1, 6, 7));
  EXPECT_THAT(mesh->Along({"ep"}), ElementsAre(7));
  EXPECT_THAT(mesh->Along({}), ElementsAre(7));
  EXPECT_THAT(mesh->Describe(), HasSubstr("dp: size 3, coordinate 0, ranks 7 9 11"));
}

TEST(Mesh, DescribesWhoTalksToWhomAndOverWhat) {
  // Two machines of four ranks.
  const std::vector<int> machines = {0, 0, 0, 0, 1, 1, 1, 1};
  const auto mesh = Mesh::Create(8, 6, {{"pp", 2}, {"ep", 1}, {"dp", 2}, {"tp", 2}});
  ASSERT_TRUE(mesh.ok()) << mesh.status();
  EXPECT_EQ(mesh->Describe(machines, "mpi"),
            "pp: size 2, coordinate 1, ranks 2 6, between machines 0 1, over mpi\n"
            "ep: size 1, coordinate 0, ranks 6\n"
            "dp: size 2, coordinate 1, ranks 4 6, on machine 1, over mpi\n"
            "tp: size 2, coordinate 0, ranks 6 7, on machine 1, over mpi\n");
}

// Axes may come in any order, and a view names the same ranks in another way.
TEST(Mesh, AxesInAnyOrder) {
  const std::vector<Axis> axes = {{"pp", 2}, {"dp", 3}, {"tp", 4}};
  std::vector<int> order = {0, 1, 2};
  do {
    std::vector<Axis> permuted;
    for (int i : order) permuted.push_back(axes[static_cast<std::size_t>(i)]);
    for (int rank = 0; rank < 24; ++rank) {
      const auto mesh = Mesh::Create(24, rank, permuted);
      ASSERT_TRUE(mesh.ok());
      const auto view = Mesh::Create(24, rank, {{"all", 24}})->View(permuted);
      ASSERT_TRUE(view.ok());
      for (const Axis& axis : axes) {
        const RankList group = mesh->Along({axis.name});
        ASSERT_EQ(group.size(), static_cast<std::size_t>(axis.size));
        EXPECT_EQ(view->Along({axis.name}), group);
        // Its ranks differ in this coordinate alone, ascending.
        for (std::size_t i = 0; i < group.size(); ++i) {
          for (const Axis& other : axes) {
            EXPECT_EQ(mesh->CoordOf(group[i], other.name),
                      other == axis ? static_cast<int>(i) : mesh->Coord(other.name));
          }
        }
      }
    }
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(Mesh, GroupsPartitionTheRanks) {
  for (const std::vector<std::string>& axes :
       {std::vector<std::string>{"a"}, {"b"}, {"c"}, {"a", "c"}, {"a", "b", "c"}}) {
    for (int rank = 0; rank < 30; ++rank) {
      const auto mesh = Mesh::Create(30, rank, {{"a", 5}, {"b", 3}, {"c", 2}});
      ASSERT_TRUE(mesh.ok());
      const RankList mine = mesh->Along(axes);
      EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
      for (int other : mine) {
        const auto theirs = Mesh::Create(30, other, {{"a", 5}, {"b", 3}, {"c", 2}});
        EXPECT_EQ(theirs->Along(axes), mine);
        EXPECT_EQ(mesh->CoordOf(other, "a"), theirs->Coord("a"));
      }
    }
  }
}

TEST(Mesh, ViewKeepsTheRanks) {
  const auto mesh = Mesh::Create(8, 5, {{"dp", 4}, {"tp", 2}});
  const auto view = mesh->View({{"edp", 2}, {"ep", 4}});
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->rank(), 5);
  EXPECT_THAT(view->Along({"ep"}), ElementsAre(4, 5, 6, 7));
  EXPECT_FALSE(mesh->View({{"ep", 3}}).ok());
}

TEST(Mesh, RefusesNonsense) {
  EXPECT_THAT(std::string(Mesh::Create(8, 0, {{"dp", 3}, {"tp", 2}}).status().message()),
              HasSubstr("dp=3 x tp=2 does not multiply to the 8 ranks"));
  EXPECT_FALSE(Mesh::Create(8, 8, {{"dp", 8}}).ok());
  EXPECT_FALSE(Mesh::Create(8, -1, {{"dp", 8}}).ok());
  EXPECT_FALSE(Mesh::Create(1, 0, {{"dp", 0}}).ok());
  EXPECT_FALSE(Mesh::Create(1, 0, {{"dp", -1}, {"tp", -1}}).ok());
  EXPECT_THAT(std::string(Mesh::Create(4, 0, {{"dp", 2}, {"dp", 2}}).status().message()),
              HasSubstr("'dp' twice"));
  EXPECT_FALSE(Mesh::Create(4, 0, {{"a", 1 << 30}, {"b", 1 << 30}, {"c", 1 << 30}}).ok());
  EXPECT_TRUE(Mesh::Create(1, 0, {}).ok());
}

}  // namespace
}  // namespace stretto
