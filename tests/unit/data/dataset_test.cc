#include "stretto/data/dataset.h"

#include <gmock/gmock.h>

#include "stretto/data/documents.h"
#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int32_t kEnd = 99;

class DatasetTest : public Scratch {
 protected:
  static DatasetOptions Options(int64_t length, int64_t end_of_text) {
    DatasetOptions options;
    options.sequence_length = length;
    options.vocabulary = 100;
    options.end_of_text = end_of_text;
    return options;
  }
  // Sample `index` alone.
  static PackedBatch Sample(const TokenDataset& dataset, int64_t index) {
    PackedBatch batch;
    batch.Clear();
    const absl::Status status = dataset.Append(index, &batch);
    EXPECT_TRUE(status.ok()) << status;
    return batch;
  }
};

TEST_F(DatasetTest, SamplesOverlapByOneTarget) {
  auto dataset =
      TokenDataset::Open(WriteTokens16("a.bin", {0, 1, 2, 3, 4, 5, 6, 7}), Options(3, -1));
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  EXPECT_EQ((*dataset)->samples(), 2);  // token 7 is no whole sample's
  EXPECT_EQ((*dataset)->tokens(), 8);
  const PackedBatch a = Sample(**dataset, 0), b = Sample(**dataset, 1);
  EXPECT_THAT(a.ids, ElementsAre(0, 1, 2));
  EXPECT_THAT(a.targets, ElementsAre(1, 2, 3));
  EXPECT_THAT(b.ids, ElementsAre(3, 4, 5));
  EXPECT_THAT(b.targets, ElementsAre(4, 5, 6));
  EXPECT_THAT(b.positions, ElementsAre(0, 1, 2));
  EXPECT_THAT(b.cu_seqlens, ElementsAre(0, 3));
  EXPECT_THAT(b.weights, Each(1.0f));
  EXPECT_EQ(b.max_length, 3);
}

// The example of dataset.h.
TEST_F(DatasetTest, SeparatorEndsOneDocumentAndStartsTheNext) {
  auto dataset = TokenDataset::Open(WriteTokens16("a.bin", {10, 11, kEnd, 12, 13, kEnd, 14}),
                                    Options(6, kEnd));
  ASSERT_TRUE(dataset.ok());
  const PackedBatch s = Sample(**dataset, 0);
  EXPECT_THAT(s.ids, ElementsAre(10, 11, kEnd, 12, 13, kEnd));
  EXPECT_THAT(s.targets, ElementsAre(11, kEnd, 12, 13, kEnd, 14));
  EXPECT_THAT(s.positions, ElementsAre(0, 1, 0, 1, 2, 0));
  EXPECT_THAT(s.cu_seqlens, ElementsAre(0, 2, 5, 6));
  EXPECT_THAT(s.weights, Each(1.0f));
  EXPECT_EQ(s.max_length, 3);
}

// No counted target may belong to another document than an id before it in its sequence, other than
// the separator itself.
TEST_F(DatasetTest, NoLossCrossesDocuments) {
  // Documents are runs of one id, so each id tells its document.
  std::vector<uint16_t> ids;
  for (uint16_t document = 0; document < 60; ++document) {
    ids.insert(ids.end(), document % 7, document);  // also empty documents
    ids.push_back(kEnd);
  }
  auto dataset = TokenDataset::Open(WriteTokens16("a.bin", ids), Options(11, kEnd));
  ASSERT_TRUE(dataset.ok());
  int64_t masked = 0, counted = 0;
  for (int64_t i = 0; i < (*dataset)->samples(); ++i) {
    const PackedBatch s = Sample(**dataset, i);
    ASSERT_EQ(s.cu_seqlens.back(), 11);
    for (int64_t q = 0; q < s.sequences(); ++q) {
      int32_t document = -1;
      for (int32_t t = s.cu_seqlens[q]; t < s.cu_seqlens[q + 1]; ++t) {
        EXPECT_EQ(s.positions[t], t - s.cu_seqlens[q]);
        EXPECT_EQ(s.targets[t], ids[i * 11 + t + 1]);
        if (s.ids[t] == kEnd) {
          EXPECT_EQ(s.positions[t], 0);
        } else {
          EXPECT_TRUE(document == -1 || document == s.ids[t]);
          document = s.ids[t];
        }
        if (s.weights[t] == 0) {
          ++masked;
          EXPECT_TRUE(s.ids[t] == kEnd && s.targets[t] == kEnd);
          continue;
        }
        ++counted;
        if (s.targets[t] != kEnd && document != -1) {
          EXPECT_EQ(s.targets[t], document);
        }
      }
    }
  }
  EXPECT_GT(masked, 0);
  EXPECT_EQ(masked + counted, (*dataset)->samples() * 11);
}

TEST_F(DatasetTest, AnEmptyDocumentCountsNothing) {
  auto dataset =
      TokenDataset::Open(WriteTokens16("a.bin", {kEnd, kEnd, 5, kEnd, kEnd}), Options(4, kEnd));
  ASSERT_TRUE(dataset.ok());
  const PackedBatch s = Sample(**dataset, 0);
  EXPECT_THAT(s.cu_seqlens, ElementsAre(0, 1, 3, 4));
  EXPECT_THAT(s.weights, ElementsAre(0.0f, 1.0f, 1.0f, 0.0f));
}

TEST_F(DatasetTest, WithoutMaskingASampleIsOneSequence) {
  DatasetOptions options = Options(4, kEnd);
  options.mask_across_documents = false;
  auto dataset = TokenDataset::Open(WriteTokens16("a.bin", {kEnd, kEnd, 5, kEnd, 6}), options);
  ASSERT_TRUE(dataset.ok());
  const PackedBatch s = Sample(**dataset, 0);
  EXPECT_THAT(s.cu_seqlens, ElementsAre(0, 4));
  EXPECT_THAT(s.positions, ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(s.weights, Each(1.0f));
}

TEST_F(DatasetTest, FilesAreDocumentsWhereThereIsNoSeparator) {
  WriteTokens16("s_0.bin", {0, 1, 2});
  WriteTokens16("s_1.bin", {10});
  WriteTokens16("s_2.bin", {20, 21, 22, 23});
  auto dataset = TokenDataset::Open(Path("s_*.bin"), Options(7, -1));
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  PackedBatch s = Sample(**dataset, 0);
  EXPECT_THAT(s.ids, ElementsAre(0, 1, 2, 10, 20, 21, 22));
  EXPECT_THAT(s.targets, ElementsAre(1, 2, 10, 20, 21, 22, 23));
  EXPECT_THAT(s.cu_seqlens, ElementsAre(0, 3, 4, 7));
  EXPECT_THAT(s.weights, ElementsAre(1.0f, 1.0f, 0.0f, 0.0f, 1.0f, 1.0f, 1.0f));
  // A sample that ends with a file masks the target that the next file holds.
  dataset = TokenDataset::Open(Path("s_*.bin"), Options(3, -1));
  ASSERT_TRUE(dataset.ok());
  EXPECT_THAT(Sample(**dataset, 0).weights, ElementsAre(1.0f, 1.0f, 0.0f));
  EXPECT_THAT(Sample(**dataset, 1).weights, ElementsAre(0.0f, 1.0f, 1.0f));
  // With a separator, shards are one text.
  dataset = TokenDataset::Open(Path("s_*.bin"), Options(7, kEnd));
  ASSERT_TRUE(dataset.ok());
  s = Sample(**dataset, 0);
  EXPECT_THAT(s.cu_seqlens, ElementsAre(0, 7));
  EXPECT_THAT(s.weights, Each(1.0f));
}

TEST_F(DatasetTest, AppendsBehindWhatIsThere) {
  auto dataset =
      TokenDataset::Open(WriteTokens16("a.bin", {1, kEnd, 2, 3, 4, kEnd, 5}), Options(3, kEnd));
  ASSERT_TRUE(dataset.ok());
  PackedBatch batch;  // never cleared: cu_seqlens is empty
  ASSERT_TRUE((*dataset)->Append(1, &batch).ok());
  ASSERT_TRUE((*dataset)->Append(0, &batch).ok());
  EXPECT_THAT(batch.ids, ElementsAre(3, 4, kEnd, 1, kEnd, 2));
  EXPECT_THAT(batch.targets, ElementsAre(4, kEnd, 5, kEnd, 2, 3));
  EXPECT_THAT(batch.cu_seqlens, ElementsAre(0, 2, 3, 4, 6));
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 0, 0, 0, 1));
  EXPECT_EQ(batch.max_length, 2);
}

TEST_F(DatasetTest, LeavesTheBatchAloneOnError) {
  WriteTokens16("s_0.bin", {1, 2, 3, 4});
  WriteTokens16("s_1.bin", {5, 6, 100});
  auto dataset = TokenDataset::Open(Path("s_*.bin"), Options(3, kEnd));
  ASSERT_TRUE(dataset.ok());
  PackedBatch batch = Sample(**dataset, 0);
  const PackedBatch before = batch;
  // Sample 1 is tokens 3..5 and the target 6, which is id 100 of a vocabulary of 100.
  const absl::Status status = (*dataset)->Append(1, &batch);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("s_1.bin' holds id 100 at position 2"));
  EXPECT_EQ(batch.ids, before.ids);
  EXPECT_EQ(batch.targets, before.targets);
  EXPECT_EQ(batch.weights, before.weights);
  EXPECT_EQ(batch.cu_seqlens, before.cu_seqlens);
  EXPECT_EQ((*dataset)->Append(2, &batch).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ((*dataset)->Append(-1, &batch).code(), absl::StatusCode::kOutOfRange);
}

// More shards than stay open at once.
TEST_F(DatasetTest, ReadsManySmallShards) {
  for (int i = 0; i < 300; ++i) {
    char name[32];
    std::snprintf(name, sizeof(name), "s_%03d.bin", i);
    WriteTokens16(name, {static_cast<uint16_t>(i % 97)});
  }
  auto dataset = TokenDataset::Open(Path("s_*.bin"), Options(299, kEnd));
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  const PackedBatch s = Sample(**dataset, 0);
  ASSERT_THAT(s.ids, SizeIs(299));
  for (int i = 0; i < 299; ++i) ASSERT_EQ(s.ids[i], i % 97);
}

TEST_F(DatasetTest, RefusesInOneSentence) {
  WriteTokens16("a.bin", {1, 2, 3});
  WriteTokens32("b.bin", {1, 2, 3});
  std::filesystem::create_directory(Path("folder"));
  const struct {
    const char* name;
    DatasetOptions options;
    const char* says;
  } kCases[] = {
      {"none*.bin", Options(2, -1), "no file matches"},
      {"folder", Options(2, -1), "is a directory"},
      {"a.bin", Options(3, -1), "holds 3 tokens, fewer than the 4 of one sample"},
      {"[ab].bin", Options(2, -1), "hold ids of 2 and 4 bytes"},
      {"a.bin", Options(0, -1), "sequence length of a dataset is 0"},
      {"a.bin", Options(2, 100), "end-of-text id 100"},
      {"a.bin", Options(2, -2), "end-of-text id -2"},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.says);
    const absl::Status status = TokenDataset::Open(Path(c.name), c.options).status();
    EXPECT_FALSE(status.ok());
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
    ExpectOneSentence(status);
  }
  EXPECT_TRUE(TokenDataset::Open(Path("a.bin"), Options(2, -1)).ok());
}

// However they are cut into files; a change within the sample is noticed, and one more token.
TEST_F(DatasetTest, TokensHaveAFingerprint) {
  std::vector<uint16_t> ids(5000);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint16_t>(i * 31 % 97);
  const auto fingerprint = [&](const std::string& pattern) {
    const auto samples = TokenDataset::Open(pattern, Options(11, kEnd));
    const auto documents = DocumentDataset::Open(pattern, Options(11, kEnd));
    EXPECT_TRUE(samples.ok() && documents.ok());
    EXPECT_EQ(*(*samples)->TokenFingerprint(), *(*documents)->TokenFingerprint());
    return *(*samples)->TokenFingerprint();
  };
  const uint64_t first = fingerprint(WriteTokens16("a.bin", ids));
  WriteTokens16("s_0.bin", {ids.begin(), ids.begin() + 1234});
  WriteTokens16("s_1.bin", {ids.begin() + 1234, ids.end()});
  EXPECT_EQ(fingerprint(Path("s_*.bin")), first);
  for (const size_t at : {size_t{0}, size_t{2500}, ids.size() - 1}) {
    std::vector<uint16_t> other = ids;
    ++other[at];
    EXPECT_NE(fingerprint(WriteTokens16("b.bin", other)), first) << at;
  }
  ids.push_back(1);
  EXPECT_NE(fingerprint(WriteTokens16("b.bin", ids)), first);
}

}  // namespace
}  // namespace stretto
