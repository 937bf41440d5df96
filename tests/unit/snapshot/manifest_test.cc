#include "src/snapshot/manifest.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/snapshot/safetensors_writer.h"
#include "unit/snapshot/testing.h"

namespace stretto::snapshot_internal {
namespace {

using ::testing::HasSubstr;

Manifest Sample() {
  Manifest m;
  m.step = 100;
  m.world_size = 2;
  m.files = {{ShardFileName(0), 10, 0xfedcba9876543210u, 0}, {ShardFileName(1), 20, 5, 1}};
  m.tensors["w"] = {DType::kF32, {7, 3}, {{0, 0, 3}, {1, 3, 4}}};
  m.tensors["empty"] = {DType::kBF16, {0}, {}};
  m.trainer_state = R"({"tokens":123,"lr":0.1})";
  return m;
}

TEST(ManifestTest, WhatIsWrittenIsRead) {
  const auto text = ManifestToJson(Sample());
  ASSERT_TRUE(text.ok()) << text.status();
  const auto m = ParseManifest(*text, "stretto.json");
  ASSERT_TRUE(m.ok()) << m.status();
  EXPECT_EQ(m->step, 100);
  EXPECT_EQ(m->world_size, 2);
  EXPECT_EQ(m->files[0].digest, 0xfedcba9876543210u);
  EXPECT_EQ(m->files[1].bytes, 20);
  EXPECT_EQ(m->tensors.at("w").pieces[1].first_row, 3);
  EXPECT_EQ(m->tensors.at("empty").dtype, DType::kBF16);
  EXPECT_EQ(m->trainer_state, R"({"lr":0.1,"tokens":123})");
}

TEST(ManifestTest, EveryFlippedBitInContentIsNoticed) {
  const std::string text = *ManifestToJson(Sample());
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == ' ' || text[i] == '\n') continue;  // spacing carries nothing
    std::string damaged = text;
    damaged[i] ^= 1;
    EXPECT_FALSE(ParseManifest(damaged, "stretto.json").ok()) << i << ": " << text.substr(i, 10);
  }
  for (size_t length = 0; length + 2 < text.size(); ++length) {
    EXPECT_FALSE(ParseManifest(text.substr(0, length), "stretto.json").ok()) << length;
  }
}

TEST(ManifestTest, OtherDefects) {
  EXPECT_THAT(Message(ParseManifest("[]", "x").status()), HasSubstr("\"format\""));
  EXPECT_THAT(
      Message(ParseManifest(R"({"format":"stretto checkpoint","version":3})", "x").status()),
      HasSubstr("version 3"));
  std::string deep(1000000, '[');
  EXPECT_THAT(Message(ParseManifest(deep, "x").status()), HasSubstr("nested deeper"));
  Manifest m = Sample();
  m.files[1].name = "../elsewhere";
  EXPECT_THAT(Message(ParseManifest(*ManifestToJson(m), "x").status()), HasSubstr("elsewhere"));
  m = Sample();
  m.tensors["w"].pieces[1].rows = 3;
  EXPECT_THAT(Message(ParseManifest(*ManifestToJson(m), "x").status()),
              HasSubstr("owned by no rank"));
  m = Sample();
  m.trainer_state = "[1]";
  EXPECT_THAT(Message(ParseManifest(*ManifestToJson(m), "x").status()), HasSubstr("trainer_state"));
  m.trainer_state = "{";
  EXPECT_FALSE(ManifestToJson(m).ok());
}

// Shards of ranks that own rows [first, first + rows) of one tensor "w" of 7 rows.
class IndexShardsTest : public ::testing::Test {
 protected:
  void Write(int64_t first, int64_t rows, DType dtype = DType::kF32, int64_t width = 3) {
    StateRegistry registry;
    std::vector<char> data(7 * width * 8);
    ASSERT_TRUE(
        registry.Add({"w", dtype, {7, width}, first, Tensor::Of(data.data(), dtype, {rows, width})})
            .ok());
    std::vector<SafetensorsItem> items;
    if (rows > 0) items.push_back({"w", dtype, {rows, width}, data.data()});
    const int rank = static_cast<int>(manifest_.files.size());
    const auto written = WriteSafetensorsFile(dir_.File(ShardFileName(rank)), items,
                                              *ShardMetadata(registry, FilesOf(registry)[0]));
    ASSERT_TRUE(written.ok()) << written.status();
    manifest_.files.push_back({ShardFileName(rank), written->bytes, written->digest, rank});
  }
  std::string Index() { return Message(IndexShards(dir_.path(), &manifest_)); }

  TempDirectory dir_;
  Manifest manifest_;
};

TEST_F(IndexShardsTest, RowsInAnyOrder) {
  Write(5, 2);
  Write(0, 0);
  Write(0, 5);
  ASSERT_EQ(Index(), "");
  const ManifestTensor& w = manifest_.tensors.at("w");
  ASSERT_EQ(w.pieces.size(), 2u);
  EXPECT_EQ(w.pieces[0].file, 2);
  EXPECT_EQ(w.pieces[1].file, 0);
  EXPECT_EQ(w.pieces[1].first_row, 5);
}

TEST_F(IndexShardsTest, RowsThatNobodyOwns) {
  Write(0, 3);
  Write(4, 3);
  EXPECT_THAT(Index(), HasSubstr("row 3 of tensor \"w\" [7, 3] is owned by no rank"));
}

TEST_F(IndexShardsTest, LastRowsThatNobodyOwns) {
  Write(0, 3);
  Write(3, 3);
  EXPECT_THAT(Index(), HasSubstr("row 6 of tensor \"w\" [7, 3] is owned by no rank"));
}

TEST_F(IndexShardsTest, ATensorThatNobodyOwns) {
  Write(0, 0);
  EXPECT_THAT(Index(), HasSubstr("row 0 of tensor \"w\" [7, 3] is owned by no rank"));
}

TEST_F(IndexShardsTest, RowsOwnedTwice) {
  Write(0, 4);
  Write(3, 4);
  EXPECT_THAT(Index(), HasSubstr("ranks 0 and 1 both own row 3 of tensor \"w\""));
}

TEST_F(IndexShardsTest, RanksThatDisagree) {
  Write(0, 4);
  Write(4, 3, DType::kBF16);
  EXPECT_THAT(Index(), HasSubstr("rank 1 registered tensor \"w\" as BF16[7, 3]"));
}

TEST_F(IndexShardsTest, AFileThatRankZeroDoesNotSee) {
  Write(0, 4);
  Write(4, 3);
  std::filesystem::remove(dir_.File(ShardFileName(1)));
  EXPECT_THAT(Index(), HasSubstr("all ranks share"));
}

}  // namespace
}  // namespace stretto::snapshot_internal
