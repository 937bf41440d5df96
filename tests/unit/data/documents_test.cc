#include "stretto/data/documents.h"

#include <gmock/gmock.h>

#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int32_t kEnd = 99;

DatasetOptions Options(int64_t longest, int64_t end_of_text) {
  DatasetOptions options;
  options.sequence_length = longest;
  options.vocabulary = 100;
  options.end_of_text = end_of_text;
  return options;
}

std::vector<int64_t> Lengths(const DocumentDataset& dataset) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < dataset.documents(); ++i) lengths.push_back(dataset.length(i));
  return lengths;
}

std::pair<std::vector<int32_t>, std::vector<int32_t>> Read(const DocumentDataset& dataset,
                                                           int64_t document, Range range) {
  std::vector<int32_t> ids(static_cast<size_t>(range.count)), targets(ids.size());
  const absl::Status status = dataset.Read(document, range, ids.data(), targets.data());
  EXPECT_TRUE(status.ok()) << status;
  return {ids, targets};
}
std::pair<std::vector<int32_t>, std::vector<int32_t>> Whole(const DocumentDataset& dataset,
                                                            int64_t document) {
  return Read(dataset, document, {0, dataset.length(document)});
}

class DocumentsTest : public Scratch {};

TEST_F(DocumentsTest, LieBetweenSeparators) {
  const auto dataset = DocumentDataset::Open(
      WriteTokens16("a.bin", {10, 11, kEnd, 12, kEnd, kEnd, 13, 14, 15}), Options(100, kEnd));
  ASSERT_TRUE(dataset.ok()) << dataset.status();
  // The empty one is left out, and the last token of all predicts nothing.
  EXPECT_THAT(Lengths(**dataset), ElementsAre(2, 2, 3));
  EXPECT_EQ((*dataset)->tokens(), 7);
  EXPECT_THAT(Whole(**dataset, 0).first, ElementsAre(10, 11));
  EXPECT_THAT(Whole(**dataset, 0).second, ElementsAre(11, kEnd));
  EXPECT_THAT(Whole(**dataset, 1).first, ElementsAre(kEnd, 12));
  EXPECT_THAT(Whole(**dataset, 1).second, ElementsAre(12, kEnd));
  EXPECT_THAT(Whole(**dataset, 2).first, ElementsAre(kEnd, 13, 14));
  EXPECT_THAT(Whole(**dataset, 2).second, ElementsAre(13, 14, 15));
  EXPECT_THAT(Read(**dataset, 2, {1, 1}).first, ElementsAre(13));
  EXPECT_THAT(Read(**dataset, 2, {1, 1}).second, ElementsAre(14));
  EXPECT_THAT(Read(**dataset, 2, {3, 0}).first, IsEmpty());
}

TEST_F(DocumentsTest, LongOnesAreCutIntoPieces) {
  const auto dataset = DocumentDataset::Open(
      WriteTokens16("a.bin", {kEnd, 1, 2, 3, 4, 5, 6, kEnd, 7, kEnd}), Options(3, kEnd));
  ASSERT_TRUE(dataset.ok());
  EXPECT_THAT(Lengths(**dataset), ElementsAre(3, 3, 1, 2));
  EXPECT_THAT(Whole(**dataset, 1).first, ElementsAre(3, 4, 5));
  EXPECT_THAT(Whole(**dataset, 1).second, ElementsAre(4, 5, 6));
  EXPECT_THAT(Whole(**dataset, 2).second, ElementsAre(kEnd));
}

// One document, in pieces, because nothing ends it: worth a warning.
TEST_F(DocumentsTest, KnowTextWithoutSeparators) {
  const std::string path = WriteTokens16("a.bin", {1, 2, 3, 4, 5, 6, 7});
  const auto unseparated = [&](const DatasetOptions& options) {
    const auto dataset = DocumentDataset::Open(path, options);
    EXPECT_TRUE(dataset.ok()) << dataset.status();
    return dataset.ok() && (*dataset)->unseparated();
  };
  EXPECT_TRUE(unseparated(Options(3, kEnd)));
  EXPECT_FALSE(unseparated(Options(3, 4)));
  EXPECT_FALSE(unseparated(Options(3, -1)));  // files are documents
  DatasetOptions joined = Options(3, kEnd);
  joined.mask_across_documents = false;  // all text is meant to be one
  EXPECT_FALSE(unseparated(joined));
}

// A file's end ends a document only where there is no separator.
TEST_F(DocumentsTest, SpanFiles) {
  WriteTokens16("1.bin", {1, 2, 3});
  WriteTokens16("2.bin", {4, kEnd, 5, 6});
  const auto separated = DocumentDataset::Open(Path("*.bin"), Options(100, kEnd));
  ASSERT_TRUE(separated.ok());
  EXPECT_THAT(Lengths(**separated), ElementsAre(4, 2));
  EXPECT_THAT(Whole(**separated, 0).second, ElementsAre(2, 3, 4, kEnd));
  const auto files = DocumentDataset::Open(Path("*.bin"), Options(100, -1));
  ASSERT_TRUE(files.ok());
  EXPECT_THAT(Lengths(**files), ElementsAre(2, 3));
  EXPECT_THAT(Whole(**files, 1).first, ElementsAre(4, kEnd, 5));
  DatasetOptions through = Options(4, kEnd);
  through.mask_across_documents = false;
  const auto samples = DocumentDataset::Open(Path("*.bin"), through);
  ASSERT_TRUE(samples.ok());
  EXPECT_THAT(Lengths(**samples), ElementsAre(4, 2));
  EXPECT_THAT(Whole(**samples, 1).first, ElementsAre(kEnd, 5));
}

// The pairs of input and target are those that TokenDataset counts, across pieces that are read.
TEST_F(DocumentsTest, PairsAreThoseOfTheSamples) {
  const Rng rng(3, "test/documents");
  std::vector<uint16_t> ids;
  for (uint64_t i = 0; i < 3000; ++i) {
    ids.push_back(rng.Below(i, 9) == 0 ? kEnd : static_cast<uint16_t>(rng.Below(i + 10000, 90)));
  }
  const std::string path = WriteTokens16("a.bin", ids);
  std::map<std::pair<int32_t, int32_t>, int> samples, documents;
  DatasetOptions one = Options(static_cast<int64_t>(ids.size()) - 1, kEnd);
  const auto dataset = TokenDataset::Open(path, one);
  ASSERT_TRUE(dataset.ok());
  PackedBatch batch;
  batch.Clear();
  ASSERT_TRUE((*dataset)->Append(0, &batch).ok());
  for (size_t i = 0; i < batch.ids.size(); ++i) {
    if (batch.weights[i] != 0) ++samples[{batch.ids[i], batch.targets[i]}];
  }
  const auto cut = DocumentDataset::Open(path, Options(7, kEnd));
  ASSERT_TRUE(cut.ok());
  for (int64_t d = 0; d < (*cut)->documents(); ++d) {
    const auto [inputs, targets] = Whole(**cut, d);
    for (size_t i = 0; i < inputs.size(); ++i) ++documents[{inputs[i], targets[i]}];
  }
  EXPECT_EQ(documents, samples);
}

TEST_F(DocumentsTest, NamesWhatIsWrong) {
  const std::string path = WriteTokens16("a.bin", {1, 2, kEnd, 3});
  const auto dataset = DocumentDataset::Open(path, Options(100, kEnd));
  ASSERT_TRUE(dataset.ok());
  int32_t id = 0;
  const absl::Status outside = (*dataset)->Read(0, {1, 2}, &id, &id);
  EXPECT_THAT(outside.message(), HasSubstr("tokens [1, 3) of document 0"));
  EXPECT_THAT(outside.message(), HasSubstr("this one of 2 tokens"));
  ExpectOneSentence(outside);
  ExpectOneSentence((*dataset)->Read(7, {0, 1}, &id, &id));
  const absl::Status none =
      DocumentDataset::Open(WriteTokens16("b.bin", {kEnd, kEnd}), Options(9, kEnd)).status();
  EXPECT_THAT(none.message(), HasSubstr("no document among them"));
  ExpectOneSentence(none);
  ExpectOneSentence(DocumentDataset::Open(path, Options(0, kEnd)).status());
  const absl::Status unknown =
      DocumentDataset::Open(WriteTokens16("c.bin", {1, 200, kEnd}), Options(9, kEnd)).status();
  EXPECT_THAT(unknown.message(), HasSubstr("200"));
}

// Steps follow each other without a gap, epoch by epoch, and do not depend on who asked before.
TEST_F(DocumentsTest, StepsTakeTheNextOnes) {
  std::vector<uint16_t> ids;
  for (uint16_t d = 0; d < 30; ++d) {
    ids.insert(ids.end(), 1 + d * 7 % 11, d);
    ids.push_back(kEnd);
  }
  const auto dataset = DocumentDataset::Open(WriteTokens16("a.bin", ids), Options(8, kEnd));
  ASSERT_TRUE(dataset.ok());
  const int64_t all = (*dataset)->documents();
  for (const bool shuffle : {false, true}) {
    DocumentOrder order(**dataset, 5, shuffle, 20);
    std::vector<std::vector<int64_t>> steps(40);
    std::vector<int64_t> seen;
    for (int64_t s = 0; s < 40; ++s) {
      auto& step = steps[static_cast<size_t>(s)];
      ASSERT_TRUE(order.Step(s, &step).ok());
      int64_t tokens = 0;
      for (const int64_t d : step) tokens += (*dataset)->length(d);
      EXPECT_LE(tokens, 20);
      EXPECT_GT(tokens, 20 - 8);  // another one would not have fitted
      seen.insert(seen.end(), step.begin(), step.end());
    }
    ASSERT_GT(static_cast<int64_t>(seen.size()), 2 * all);
    for (int64_t epoch = 0; epoch < 2; ++epoch) {
      const std::set<int64_t> once(seen.begin() + epoch * all, seen.begin() + (epoch + 1) * all);
      EXPECT_EQ(static_cast<int64_t>(once.size()), all);
    }
    const bool same = std::equal(seen.begin(), seen.begin() + all, seen.begin() + all);
    EXPECT_EQ(same, !shuffle);
    for (const int64_t s : {int64_t{17}, int64_t{3}, int64_t{39}}) {
      DocumentOrder other(**dataset, 5, shuffle, 20);
      std::vector<int64_t> step;
      ASSERT_TRUE(other.Step(s, &step).ok());
      EXPECT_EQ(step, steps[static_cast<size_t>(s)]);
      ASSERT_TRUE(order.Step(s, &step).ok());
      EXPECT_EQ(step, steps[static_cast<size_t>(s)]);
    }
  }
}

TEST_F(DocumentsTest, AStepHasOneAtLeast) {
  const auto dataset =
      DocumentDataset::Open(WriteTokens16("a.bin", {1, 2, 3, 4, kEnd, 5}), Options(8, kEnd));
  ASSERT_TRUE(dataset.ok());
  DocumentOrder order(**dataset, 1, false, 2);
  std::vector<int64_t> step;
  ASSERT_TRUE(order.Step(0, &step).ok());
  EXPECT_THAT(step, ElementsAre(0));
  ASSERT_TRUE(order.Step(1, &step).ok());
  EXPECT_THAT(step, ElementsAre(1));
  ExpectOneSentence(order.Step(-1, &step));
}

}  // namespace
}  // namespace stretto
