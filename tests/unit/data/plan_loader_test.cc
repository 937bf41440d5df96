#include "stretto/data/plan_loader.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <utility>

#include "stretto/core/rng.h"
#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int32_t kEnd = 999;
constexpr int kPlaces = 5;

// Documents in random packs on random rings.
absl::StatusOr<Program> Deal(const std::vector<int64_t>& lengths) {
  const Rng rng(lengths.size(), "test/deal");
  uint64_t n = 0;
  std::vector<PlanItem> items;
  for (size_t d = 0; d < lengths.size();) {
    PlanItem& item = items.emplace_back();
    for (uint64_t more = 1 + rng.Below(n++, 3); more > 0 && d < lengths.size(); --more, ++d) {
      item.documents.push_back(static_cast<int64_t>(d));
      item.lengths.push_back(lengths[d]);
      item.tokens += lengths[d];
    }
    std::vector<int> places = {0, 1, 2, 3, 4};
    for (size_t i = places.size(); i > 1; --i) std::swap(places[i - 1], places[rng.Below(n++, i)]);
    places.resize(1 + rng.Below(n++, kPlaces));
    item.pipelines = places;
  }
  return MakeProgram(ScheduleKind::kOneF1B, kPlaces, 1, 1, std::move(items));
}

class PlanLoaderTest : public Scratch {
 protected:
  void SetUp() override {
    const Rng rng(1, "test/text");
    std::vector<uint16_t> ids;
    for (uint16_t d = 0; d < 40; ++d) {
      for (uint64_t i = rng.Below(d, 60); i > 0; --i) {
        ids.push_back(static_cast<uint16_t>(rng.Below(100 * i + d, 900)));
      }
      ids.push_back(kEnd);
    }
    auto opened =
        DocumentDataset::Open(WriteTokens16("a.bin", ids),
                              {.sequence_length = 50, .vocabulary = 1000, .end_of_text = kEnd});
    ASSERT_TRUE(opened.ok()) << opened.status();
    dataset_ = *std::move(opened);
  }
  std::unique_ptr<PlanLoader> Make(int place, bool prefetch, DocumentPlanner planner = Deal) {
    auto loader =
        PlanLoader::Create(*dataset_, std::move(planner),
                           {.seed = 3, .step_tokens = 300, .place = place, .prefetch = prefetch});
    EXPECT_TRUE(loader.ok()) << loader.status();
    return *std::move(loader);
  }
  std::unique_ptr<DocumentDataset> dataset_;
};

TEST_F(PlanLoaderTest, SharesOfAllPlacesAreTheDocuments) {
  std::vector<std::unique_ptr<PlanLoader>> loaders;
  for (int place = 0; place < kPlaces; ++place) loaders.push_back(Make(place, place % 2 == 0));
  for (const int64_t step : {0, 1, 2, 7, 3}) {
    // By document and position: input and target.
    std::map<std::pair<int64_t, int32_t>, std::pair<int32_t, int32_t>> seen;
    int64_t tokens = 0;
    for (int place = 0; place < kPlaces; ++place) {
      const auto planned = loaders[static_cast<size_t>(place)]->Step(step);
      ASSERT_TRUE(planned.ok()) << planned.status();
      const PlannedStep& p = **planned;
      ASSERT_EQ(p.shares().size(), p.own.size());
      tokens = 0;
      for (const int64_t length : p.lengths) tokens += length;
      for (size_t k = 0; k < p.own.size(); ++k) {
        const PlanItem& item = p.program.items[p.own[k]];
        const PackedBatch& share = p.shares()[k];
        if (item.pipelines.size() > 1) {
          EXPECT_EQ(share.ring.ranks, item.pipelines);
          EXPECT_EQ(share.ring.lengths, item.lengths);
          EXPECT_EQ(share.ring.ranks[static_cast<size_t>(share.ring.index)], place);
        } else {
          EXPECT_EQ(item.pipelines[0], place);
          EXPECT_EQ(share.ring.size(), 1);
        }
        ASSERT_EQ(share.sequences(), static_cast<int64_t>(item.documents.size()));
        int64_t longest = 0;
        for (size_t d = 0; d < item.documents.size(); ++d) {
          longest = std::max<int64_t>(longest, share.cu_seqlens[d + 1] - share.cu_seqlens[d]);
          for (auto t = static_cast<size_t>(share.cu_seqlens[d]);
               t < static_cast<size_t>(share.cu_seqlens[d + 1]); ++t) {
            const int64_t document = p.documents[static_cast<size_t>(item.documents[d])];
            const auto [at, fresh] =
                seen.try_emplace({document, share.positions[t]}, share.ids[t], share.targets[t]);
            EXPECT_TRUE(fresh);
            EXPECT_EQ(share.weights[t], 1);
          }
        }
        EXPECT_EQ(share.max_length, longest);
        EXPECT_EQ(share.cu_seqlens.back(), share.tokens());
      }
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), tokens);
    EXPECT_LE(tokens, 300);
    for (const auto& [where, pair] : seen) {
      int32_t id = 0, target = 0;
      ASSERT_TRUE(dataset_->Read(where.first, {where.second, 1}, &id, &target).ok());
      EXPECT_EQ(pair, std::make_pair(id, target));
    }
  }
}

// A step can be looked at before it begins, and is then made once.
TEST_F(PlanLoaderTest, LooksAhead) {
  for (const bool prefetch : {false, true}) {
    std::atomic<int> calls = 0;
    const auto loader = Make(1, prefetch, [&](const std::vector<int64_t>& lengths) {
      ++calls;
      return Deal(lengths);
    });
    const auto plain = Make(1, prefetch);
    for (int64_t step = 4; step < 8; ++step) {
      const auto ahead = loader->Ahead(step);
      ASSERT_TRUE(ahead.ok()) << ahead.status();
      const auto expected = plain->Step(step);
      ASSERT_TRUE(expected.ok());
      EXPECT_EQ((*ahead)->hash, (*expected)->hash);
      const auto now = loader->Step(step);
      ASSERT_TRUE(now.ok());
      EXPECT_EQ(*now, *ahead);
      const std::vector<int64_t> documents = (*now)->documents;
      ASSERT_TRUE(loader->Ahead(step + 1).ok());
      EXPECT_EQ((*now)->documents, documents);  // stays as it was
      EXPECT_EQ((*loader->Ahead(step + 1))->hash, (*plain->Step(step + 1))->hash);
      EXPECT_EQ(calls, step + 2 - 4);
    }
    // Any other step may follow all the same.
    EXPECT_EQ((*loader->Step(2))->documents, (*plain->Step(2))->documents);
  }
}

TEST_F(PlanLoaderTest, ErrorsBelongToTheirStep) {
  for (const bool prefetch : {false, true}) {
    int calls = 0;
    const auto loader = Make(0, prefetch, [&](const std::vector<int64_t>& lengths) {
      if (++calls == 2) {
        return absl::StatusOr<Program>(absl::InternalError("no plan"));
      }
      return Deal(lengths);
    });
    ASSERT_TRUE(loader->Step(0).ok());
    EXPECT_THAT(loader->Step(1).status().message(), HasSubstr("no plan"));
    EXPECT_TRUE(loader->Step(1).ok());
    EXPECT_TRUE(loader->Step(2).ok());
  }
  ExpectOneSentence(PlanLoader::Create(*dataset_, Deal, {}).status());
}

}  // namespace
}  // namespace stretto
