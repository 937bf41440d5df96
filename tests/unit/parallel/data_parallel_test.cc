// How data parallelism cuts rows, buckets gradients and sizes storage: pure functions.
#include "stretto/parallel/data_parallel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<int64_t> Counts(int64_t rows, int ranks) {
  std::vector<int64_t> counts;
  for (int r = 0; r < ranks; ++r) counts.push_back(CutRows(rows, ranks, r).count);
  return counts;
}

TEST(CutRows, Examples) {
  EXPECT_THAT(Counts(10, 4), ElementsAre(3, 3, 3, 1));
  EXPECT_THAT(Counts(5, 4), ElementsAre(2, 2, 1, 0));  // the last has none
  EXPECT_THAT(Counts(3, 5), ElementsAre(1, 1, 1, 0, 0));
  EXPECT_THAT(Counts(7, 1), ElementsAre(7));
  EXPECT_THAT(Counts(0, 3), ElementsAre(0, 0, 0));
}

TEST(CutRows, ThePartsOfAllRanksAreTheRowsInOrder) {
  for (int64_t rows : {0, 1, 2, 3, 7, 16, 17, 31, 50257}) {
    for (int ranks = 1; ranks <= 19; ++ranks) {
      int64_t next = 0;
      const int64_t part = CutRows(rows, ranks, 0).part;
      for (int r = 0; r < ranks; ++r) {
        const RowCut cut = CutRows(rows, ranks, r);
        ASSERT_EQ(cut.part, part);
        ASSERT_EQ(cut.first, next) << rows << " rows, rank " << r << " of " << ranks;
        ASSERT_GE(cut.count, 0);
        ASSERT_LE(cut.count, part);
        // In storage rank r's part begins at row r * part: its real rows must be there.
        ASSERT_TRUE(cut.count == 0 || cut.first == r * part);
        next += cut.count;
      }
      EXPECT_EQ(next, rows);
      // No more padding than equal parts need.
      EXPECT_GE(part * ranks, rows);
      EXPECT_LT(part * ranks, rows + ranks);
    }
  }
}

ParameterInfo Parameter(std::vector<int64_t> shape, std::vector<int> layers) {
  ParameterInfo info;
  info.spec.shape = std::move(shape);
  info.layers = std::move(layers);
  return info;
}

// An embedding that the head shares, two blocks of a matrix and a vector each, a last norm.
Graph Tied(DType dtype) {
  Graph graph;
  graph.dtype = dtype;
  graph.parameters.push_back(Parameter({13, 5}, {0, 6}));
  graph.parameters.push_back(Parameter({7, 5}, {1}));
  graph.parameters.push_back(Parameter({7}, {1}));
  graph.parameters.push_back(Parameter({5, 7}, {3}));
  graph.parameters.push_back(Parameter({5}, {3}));
  graph.parameters.push_back(Parameter({5}, {5}));
  return graph;
}

TEST(MakeBuckets, OneForEachLayerAtLeast) {
  // From the last layer down; what a layer completes together stays together. The tied embedding is
  // complete when backward reaches the first of its layers.
  EXPECT_THAT(MakeBuckets(Tied(DType::kF32), 1),
              ElementsAre(ElementsAre(5), ElementsAre(3, 4), ElementsAre(1, 2), ElementsAre(0)));
}

TEST(MakeBuckets, CloseWhenTheSizeIsReached) {
  const Graph graph = Tied(DType::kF32);
  // Bytes of gradients in this order: 20, 140 + 20, 140 + 28, 260.
  EXPECT_THAT(MakeBuckets(graph, 20),
              ElementsAre(ElementsAre(5), ElementsAre(3, 4), ElementsAre(1, 2), ElementsAre(0)));
  EXPECT_THAT(MakeBuckets(graph, 21),
              ElementsAre(ElementsAre(5, 3, 4), ElementsAre(1, 2), ElementsAre(0)));
  EXPECT_THAT(MakeBuckets(graph, 180), ElementsAre(ElementsAre(5, 3, 4), ElementsAre(1, 2, 0)));
  EXPECT_THAT(MakeBuckets(graph, 181), ElementsAre(ElementsAre(5, 3, 4, 1, 2), ElementsAre(0)));
  EXPECT_THAT(MakeBuckets(graph, 1 << 30), ElementsAre(ElementsAre(5, 3, 4, 1, 2, 0)));
}

TEST(MakeBuckets, CountTheTypeOfGradients) {
  // bf16 parameters have f32 gradients, f64 ones have f64: twice as many bytes.
  EXPECT_EQ(MakeBuckets(Tied(DType::kBF16), 21), MakeBuckets(Tied(DType::kF32), 21));
  EXPECT_EQ(MakeBuckets(Tied(DType::kF64), 40), MakeBuckets(Tied(DType::kF32), 20));
  EXPECT_EQ(MakeBuckets(Tied(DType::kF64), 41), MakeBuckets(Tied(DType::kF32), 21));
}

TEST(MakeBuckets, NothingForNothing) { EXPECT_THAT(MakeBuckets(Graph(), 100), IsEmpty()); }

TEST(DataParallelStorage, PadsRowsAndAlignsTensors) {
  const auto storage = [](DType dtype, std::vector<int64_t> shape, int ranks) {
    Graph graph;
    graph.dtype = dtype;
    graph.parameters.push_back(Parameter(std::move(shape), {0}));
    const StorageBytes bytes = DataParallelStorage(graph, ranks);
    return std::pair<int64_t, int64_t>(bytes.parameters, bytes.gradients);
  };
  using Bytes = std::pair<int64_t, int64_t>;
  EXPECT_EQ(storage(DType::kF32, {5, 3}, 1), Bytes(64, 64));    // 60 bytes
  EXPECT_EQ(storage(DType::kF32, {5, 3}, 2), Bytes(128, 128));  // 6 rows, 72 bytes
  EXPECT_EQ(storage(DType::kBF16, {5, 3}, 2), Bytes(64, 128));  // gradients are f32
  EXPECT_EQ(storage(DType::kF64, {5, 3}, 2), Bytes(192, 192));  // 144 bytes
  EXPECT_EQ(storage(DType::kBF16, {3}, 40), Bytes(128, 192));   // a row for each of 40 ranks
  EXPECT_EQ(storage(DType::kF32, {50257, 8}, 3), Bytes(1608320, 1608320));  // 50259 rows
}

TEST(DataParallelStorage, IsTheSumOverParameters) {
  const Graph graph = Tied(DType::kBF16);
  for (int ranks : {1, 2, 3, 8, 17}) {
    int64_t parameters = 0, gradients = 0;
    for (const ParameterInfo& p : graph.parameters) {
      const int64_t elements = CutRows(p.rows(), ranks, 0).part * ranks * p.columns();
      parameters += (elements * 2 + 63) / 64 * 64;
      gradients += (elements * 4 + 63) / 64 * 64;
    }
    const StorageBytes bytes = DataParallelStorage(graph, ranks);
    EXPECT_EQ(bytes.parameters, parameters);
    EXPECT_EQ(bytes.gradients, gradients);
  }
}

}  // namespace
}  // namespace stretto
