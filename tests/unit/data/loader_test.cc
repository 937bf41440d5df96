#include "stretto/data/loader.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <set>
#include <thread>

#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int64_t kLength = 5;
constexpr int64_t kSamples = 23;

class LoaderTest : public Scratch {
 protected:
  void SetUp() override {
    // Token i is i, so that a sample's first id tells which it is.
    std::vector<uint16_t> ids;
    for (int i = 0; i <= kSamples * kLength; ++i) ids.push_back(static_cast<uint16_t>(i));
    DatasetOptions options;
    options.sequence_length = kLength;
    auto dataset = TokenDataset::Open(WriteTokens16("a.bin", ids), options);
    ASSERT_TRUE(dataset.ok()) << dataset.status();
    dataset_ = std::move(dataset).value();
    ASSERT_EQ(dataset_->samples(), kSamples);
  }

  std::unique_ptr<Loader> Make(const LoaderOptions& options) const {
    auto loader = Loader::Create(*dataset_, options);
    EXPECT_TRUE(loader.ok()) << loader.status();
    return std::move(loader).value();
  }

  // The samples of a step, in order, and how the micro-batches cut them.
  static std::vector<int64_t> Indices(Loader& loader, int64_t step,
                                      std::vector<int64_t>* cuts = nullptr) {
    auto batches = loader.Step(step);
    EXPECT_TRUE(batches.ok()) << batches.status();
    std::vector<int64_t> indices;
    for (const PackedBatch& batch : **batches) {
      EXPECT_EQ(batch.tokens() % kLength, 0);
      EXPECT_LE(batch.tokens(), loader.micro_batch_capacity());
      if (cuts != nullptr) cuts->push_back(batch.tokens() / kLength);
      for (int64_t t = 0; t < batch.tokens(); t += kLength) {
        EXPECT_EQ(batch.ids[t] % kLength, 0);
        indices.push_back(batch.ids[t] / kLength);
      }
    }
    return indices;
  }

  std::unique_ptr<TokenDataset> dataset_;
};

TEST_F(LoaderTest, WithoutShuffleSamplesComeInOrderAndWrap) {
  LoaderOptions options;
  options.shuffle = false;
  options.global_batch = 10;
  options.micro_batch = 4;
  auto loader = Make(options);
  std::vector<int64_t> cuts;
  EXPECT_EQ(Indices(*loader, 0, &cuts), (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
  EXPECT_EQ(cuts, (std::vector<int64_t>{4, 4, 2}));
  EXPECT_EQ(Indices(*loader, 2), (std::vector<int64_t>{20, 21, 22, 0, 1, 2, 3, 4, 5, 6}));
}

TEST_F(LoaderTest, ABatchBeyondAnyMemoryIsRefused) {
  LoaderOptions options;
  options.global_batch = std::numeric_limits<int64_t>::max();
  const auto loader = Loader::Create(*dataset_, options);
  EXPECT_EQ(loader.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(loader.status().message()), HasSubstr("smaller global batch"));
}

TEST_F(LoaderTest, EachEpochIsAPermutationAndTheyDiffer) {
  LoaderOptions options;
  options.seed = 7;
  options.global_batch = kSamples;
  options.micro_batch = 6;
  auto loader = Make(options);
  std::set<std::vector<int64_t>> orders;
  for (int64_t epoch = 0; epoch < 4; ++epoch) {
    std::vector<int64_t> order = Indices(*loader, epoch);
    orders.insert(order);
    std::sort(order.begin(), order.end());
    for (int64_t i = 0; i < kSamples; ++i) ASSERT_EQ(order[i], i);
  }
  EXPECT_THAT(orders, SizeIs(4));
  options.seed = 8;
  EXPECT_EQ(orders.count(Indices(*Make(options), 0)), 0);
}

// The ranks' samples laid end to end are the same whatever their number, so a run continues exactly
// on other numbers of ranks.
TEST_F(LoaderTest, AnyNumberOfRanksReadsTheSameSteps) {
  for (const int64_t global_batch : {1, 3, 8, 13, 50}) {
    LoaderOptions options;
    options.seed = 3;
    options.global_batch = global_batch;
    options.micro_batch = 2;
    auto alone = Make(options);
    for (const int ranks : {1, 2, 3, 4, 8}) {
      std::vector<std::unique_ptr<Loader>> loaders;
      for (int rank = 0; rank < ranks; ++rank) {
        options.rank = rank;
        options.ranks = ranks;
        options.micro_batch = 1 + rank % 3;
        loaders.push_back(Make(options));
      }
      for (const int64_t step : {0, 1, 2, 9, 4}) {
        std::vector<int64_t> all;
        int64_t least = INT64_MAX, most = 0, next = step * global_batch;
        for (auto& loader : loaders) {
          const auto [first, last] = loader->Range(step);
          EXPECT_EQ(first, next);
          next = last;
          const std::vector<int64_t> mine = Indices(*loader, step);
          EXPECT_EQ(static_cast<int64_t>(mine.size()), last - first);
          least = std::min<int64_t>(least, mine.size());
          most = std::max<int64_t>(most, mine.size());
          all.insert(all.end(), mine.begin(), mine.end());
        }
        EXPECT_EQ(next, (step + 1) * global_batch);
        EXPECT_LE(most - least, 1);
        EXPECT_EQ(all, Indices(*alone, step)) << ranks << " ranks, step " << step;
      }
    }
  }
}

TEST_F(LoaderTest, ARankWithoutSamplesGetsNoBatches) {
  LoaderOptions options;
  options.global_batch = 2;
  options.rank = 2;
  options.ranks = 3;
  auto loader = Make(options);
  auto batches = loader->Step(0);
  ASSERT_TRUE(batches.ok());
  EXPECT_THAT(**batches, SizeIs(0));
}

TEST_F(LoaderTest, PrefetchChangesNothing) {
  LoaderOptions options;
  options.seed = 11;
  options.global_batch = 7;
  options.micro_batch = 3;
  auto with = Make(options);
  options.prefetch = false;
  auto without = Make(options);
  for (const int64_t step : {0, 1, 2, 3, 3, 10, 11, 2, 3, 0, 40, 41, 42}) {
    auto a = with->Step(step), b = without->Step(step);
    ASSERT_TRUE(a.ok() && b.ok());
    ASSERT_EQ((*a)->size(), (*b)->size());
    for (size_t i = 0; i < (*a)->size(); ++i) {
      const PackedBatch &x = (**a)[i], &y = (**b)[i];
      EXPECT_EQ(x.ids, y.ids);
      EXPECT_EQ(x.targets, y.targets);
      EXPECT_EQ(x.weights, y.weights);
      EXPECT_EQ(x.positions, y.positions);
      EXPECT_EQ(x.cu_seqlens, y.cu_seqlens);
      EXPECT_EQ(x.max_length, y.max_length);
    }
  }
}

// A batch stays as it is while the next one is read.
TEST_F(LoaderTest, WhatWasHandedOutDoesNotChange) {
  LoaderOptions options;
  options.global_batch = 4;
  auto loader = Make(options);
  for (int64_t step = 0; step < 50; ++step) {
    auto batches = loader->Step(step);
    ASSERT_TRUE(batches.ok());
    const std::vector<int32_t> before = (**batches)[3].ids;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
    EXPECT_EQ((**batches)[3].ids, before);
  }
}

TEST_F(LoaderTest, AnErrorBelongsToItsStepAndGoesAwayWithItsCause) {
  for (const bool prefetch : {true, false}) {
    const std::string path = Path("a.bin");
    const std::string whole = ReadText(path);
    LoaderOptions options;
    options.shuffle = false;
    options.global_batch = 10;
    options.prefetch = prefetch;
    auto loader = Make(options);
    EXPECT_TRUE(loader->Step(0).ok());
    ASSERT_EQ(truncate(path.c_str(), 1024 + 20 * kLength * 2 + 2), 0);
    EXPECT_TRUE(loader->Step(1).ok());
    const absl::Status status = loader->Step(2).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
    EXPECT_THAT(std::string(status.message()), HasSubstr("a.bin"));
    EXPECT_FALSE(loader->Step(2).ok());
    // The same file again, under the open descriptor.
    std::ofstream(path, std::ios::binary | std::ios::in) << whole;
    EXPECT_EQ(Indices(*loader, 2), (std::vector<int64_t>{20, 21, 22, 0, 1, 2, 3, 4, 5, 6}));
    EXPECT_EQ(Indices(*loader, 3), (std::vector<int64_t>{7, 8, 9, 10, 11, 12, 13, 14, 15, 16}));
  }
}

TEST_F(LoaderTest, RefusesBadOptions) {
  const auto code = [&](auto change) {
    LoaderOptions options;
    change(options);
    return Loader::Create(*dataset_, options).status().code();
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](LoaderOptions& o) { o.global_batch = 0; }), kInvalid);
  EXPECT_EQ(code([](LoaderOptions& o) { o.micro_batch = 0; }), kInvalid);
  EXPECT_EQ(code([](LoaderOptions& o) { o.ranks = 0; }), kInvalid);
  EXPECT_EQ(code([](LoaderOptions& o) { o.rank = 1; }), kInvalid);
  EXPECT_EQ(code([](LoaderOptions& o) { o.rank = -1; }), kInvalid);
  auto loader = Make(LoaderOptions());
  EXPECT_EQ(loader->Step(-1).status().code(), kInvalid);
  EXPECT_EQ(loader->Step(INT64_MAX).status().code(), kInvalid);
}

}  // namespace
}  // namespace stretto
