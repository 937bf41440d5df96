// Checkpoints of tensors that are cut in rows, in columns and in several pieces: any layout loads
// what any other wrote.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "stretto/snapshot/checkpoint.h"
#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Box {
  int64_t first_row, rows, first_column, columns;
};

constexpr int64_t kRows = 11, kColumns = 7;

// The boxes of rank `rank` of the matrix "w" [11, 7] under a layout of so many ranks, and who of
// the ranks that have a box saves it.
struct Layout {
  std::string name;
  int ranks;
  std::vector<Box> (*boxes)(int rank);
  bool (*owned)(int rank) = [](int) { return true; };
};

const Layout kLayouts[] = {
    {"whole", 1,
     [](int) -> std::vector<Box> {
       return {{0, kRows, 0, kColumns}};
     }},
    {"rows", 3,
     [](int r) -> std::vector<Box> {
       return {{4 * r, std::min<int64_t>(4, kRows - 4 * r), 0, kColumns}};
     }},
    {"columns", 4,
     [](int r) -> std::vector<Box> {
       return {{0, kRows, 2 * r, std::min<int64_t>(2, kColumns - 2 * r)}};
     }},
    // As queries, keys and values: rows 0..5, 6..8 and 9..10, of each a part.
    {"pieces", 2,
     [](int r) -> std::vector<Box> {
       if (r == 0) return {{0, 4, 0, kColumns}, {6, 2, 0, kColumns}, {9, 1, 0, kColumns}};
       return {{4, 2, 0, kColumns}, {8, 1, 0, kColumns}, {10, 1, 0, kColumns}};
     }},
    {"grid", 4,
     [](int r) -> std::vector<Box> {
       return {{r / 2 * 6, r / 2 == 0 ? 6 : 5, r % 2 * 3, r % 2 == 0 ? 3 : 4}};
     }},
    // Bands of rows whose columns are cut in different places, and a rank without anything.
    {"bricks", 4,
     [](int r) -> std::vector<Box> {
       if (r == 0) return {{0, 3, 0, 5}, {3, 8, 0, 2}};
       if (r == 1) return {{0, 3, 5, 2}, {3, 8, 2, 5}};
       return {};
     }},
    {"replicas", 3,
     [](int) -> std::vector<Box> {
       return {{0, kRows, 0, kColumns}};
     },
     [](int r) { return r == 1; }},
};

double Value(int64_t row, int64_t column) { return static_cast<double>(100 * row + column); }

class Part {
 public:
  Part(const Layout& layout, int rank, DType dtype) {
    const std::vector<Box> boxes = layout.boxes(rank);
    for (const Box& box : boxes) {
      memory_.emplace_back(static_cast<size_t>(box.rows * box.columns), -1.0);
      const Tensor local = Tensor::Of(memory_.back().data(), dtype, {box.rows, box.columns});
      Add({"w",
           dtype,
           {kRows, kColumns},
           box.first_row,
           local,
           0,
           box.first_column,
           layout.owned(rank)});
    }
    if (boxes.empty()) Add({.name = "w", .dtype = dtype, .global_shape = {kRows, kColumns}});
  }
  const StateRegistry& registry() const { return registry_; }
  void Fill() {
    ForEach([](double& v, double expected) { v = expected; });
  }
  int Wrong() {
    int wrong = 0;
    ForEach([&](double& v, double expected) { wrong += v != expected; });
    return wrong;
  }

 private:
  void Add(StateEntry entry) {
    const absl::Status added = registry_.Add(std::move(entry));
    EXPECT_TRUE(added.ok()) << added;
  }
  template <class Visit>
  void ForEach(Visit visit) {
    for (const StateEntry& e : registry_.entries()) {
      for (int64_t i = 0; i < e.local.elements(); ++i) {
        const int64_t row = i / e.local.dims[1], column = i % e.local.dims[1];
        double v = e.dtype == DType::kF64 ? e.local.as<double>(row)[column]
                                          : static_cast<double>(e.local.as<float>(row)[column]);
        visit(v, Value(e.first_row + row, e.first_column + column));
        if (e.dtype == DType::kF64) {
          e.local.as<double>(row)[column] = v;
        } else {
          e.local.as<float>(row)[column] = static_cast<float>(v);
        }
      }
    }
  }
  StateRegistry registry_;
  std::vector<std::vector<double>> memory_;
};

absl::Status Save(const Layout& layout, const std::string& directory) {
  return World::RunThreads(layout.ranks, [&](World& world) -> absl::Status {
    Part part(layout, world.rank(), DType::kF64);
    part.Fill();
    CheckpointWriter writer(world, {.directory = directory, .async = world.rank() != 0});
    STRETTO_RETURN_IF_ERROR(writer.Save(1, part.registry(), "{}"));
    return writer.Finish();
  });
}

TEST(Boxes, AnyLayoutLoadsUnderAnyOther) {
  for (const Layout& from : kLayouts) {
    const TempDirectory directory;
    const absl::Status saved = Save(from, directory.path());
    ASSERT_TRUE(saved.ok()) << from.name << ": " << saved;
    const auto info = FindNewestCheckpoint(directory.path(), Verify::kDigests);
    ASSERT_TRUE(info.ok()) << from.name << ": " << info.status();
    EXPECT_EQ(info->world_size, from.ranks);
    for (const Layout& to : kLayouts) {
      for (const DType dtype : {DType::kF64, DType::kF32}) {
        for (int rank = 0; rank < to.ranks; ++rank) {
          Part part(to, rank, dtype);
          const absl::Status loaded = LoadCheckpoint(*info, part.registry());
          ASSERT_TRUE(loaded.ok()) << from.name << " to " << to.name << ": " << loaded;
          EXPECT_EQ(part.Wrong(), 0) << from.name << " to " << to.name << " on rank " << rank;
        }
      }
    }
  }
}

TEST(Boxes, ARankWithSeveralPiecesWritesSeveralFiles) {
  const TempDirectory directory;
  ASSERT_TRUE(Save(kLayouts[3], directory.path()).ok());
  EXPECT_THAT(directory.Names("step-00000001"),
              ElementsAre("shard-00001-model-00001-of-00003.safetensors",
                          "shard-00001-model-00002-of-00003.safetensors",
                          "shard-00001-model-00003-of-00003.safetensors",
                          "shard-00002-model-00001-of-00003.safetensors",
                          "shard-00002-model-00002-of-00003.safetensors",
                          "shard-00002-model-00003-of-00003.safetensors", "stretto.json"));
  EXPECT_THAT(ReadText(directory.File("step-00000001/stretto.json")), HasSubstr("\"version\": 2"));
  // Whole rows and one file for each rank are what they always were.
  const TempDirectory rows;
  ASSERT_TRUE(Save(kLayouts[1], rows.path()).ok());
  EXPECT_THAT(ReadText(rows.File("step-00000001/stretto.json")), HasSubstr("\"version\": 1"));
}

TEST(Boxes, GapsAndRepeatsAreRefused) {
  const auto error = [](std::vector<Box> (*boxes)(int), int ranks) {
    const TempDirectory directory;
    return Message(Save({"wrong", ranks, boxes}, directory.path()));
  };
  EXPECT_THAT(error(
                  [](int r) -> std::vector<Box> {
                    return {{0, kRows, 3 * r, 3}};
                  },
                  2),
              HasSubstr("column 6 of row 0 of tensor \"w\" [11, 7] is owned by no rank"));
  EXPECT_THAT(error(
                  [](int r) -> std::vector<Box> {
                    return {{0, kRows, 3 * r, 4}};
                  },
                  2),
              HasSubstr("ranks 0 and 1 both own row 0"));
  EXPECT_THAT(error(
                  [](int r) -> std::vector<Box> {
                    return {{5 * r, 6, 0, kColumns}};
                  },
                  2),
              HasSubstr("ranks 0 and 1 both own row 5"));
  EXPECT_THAT(error(
                  [](int r) -> std::vector<Box> {
                    if (r == 0) return {{0, kRows, 0, 4}};
                    return {{0, 5, 4, 3}, {6, 5, 4, 3}};
                  },
                  2),
              HasSubstr("column 4 of row 5 of tensor \"w\" [11, 7] is owned by no rank"));
  EXPECT_THAT(error(
                  [](int) -> std::vector<Box> {
                    return {{0, kRows, 0, kColumns}};
                  },
                  2),
              HasSubstr("ranks 0 and 1 both own row 0"));
}

}  // namespace
}  // namespace stretto
