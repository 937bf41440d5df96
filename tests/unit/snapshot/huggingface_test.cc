#include "stretto/snapshot/huggingface.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::vector<float> kA = {1, 2, 3, 4, 5, 6};
const std::vector<float> kB = {-1, 0.5f, 0.25f};
const std::vector<BFloat16> kC = {BFloat16(7), BFloat16(-8)};

std::vector<SafetensorsItem> Items() {
  return {{"a.weight", DType::kF32, {3, 2}, kA.data()},
          {"b.weight", DType::kF32, {3}, kB.data()},
          {"c.weight", DType::kBF16, {2, 1}, kC.data()}};
}

void ExpectAll(const HfWeights& weights) {
  EXPECT_THAT(weights.names(), ElementsAre("a.weight", "b.weight", "c.weight"));
  std::vector<float> a(6), c(2);
  ASSERT_TRUE(weights.Read("a.weight", DType::kF32, a.data()).ok());
  EXPECT_EQ(a, kA);
  ASSERT_TRUE(weights.Read("c.weight", DType::kF32, c.data()).ok());
  EXPECT_THAT(c, ElementsAre(7, -8));
  std::vector<double> rows(4);
  ASSERT_TRUE(weights.ReadRows("a.weight", 1, 2, DType::kF64, rows.data()).ok());
  EXPECT_THAT(rows, ElementsAre(3, 4, 5, 6));
}

TEST(HuggingFaceTest, OneFile) {
  TempDirectory dir;
  ASSERT_TRUE(WriteHfWeights(dir.File("m"), Items()).ok());
  EXPECT_THAT(dir.Names("m"), ElementsAre("model.safetensors"));
  const auto weights = HfWeights::Open(dir.File("m"));
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectAll(*weights);
}

TEST(HuggingFaceTest, ShardsWithAnIndex) {
  TempDirectory dir;
  ASSERT_TRUE(WriteHfWeights(dir.path(), Items(), 20).ok());
  EXPECT_THAT(dir.Names(),
              ElementsAre("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
                          "model.safetensors.index.json"));
  EXPECT_THAT(ReadText(dir.File("model.safetensors.index.json")), HasSubstr("\"total_size\": 40"));
  const auto weights = HfWeights::Open(dir.path());
  ASSERT_TRUE(weights.ok()) << weights.status();
  ExpectAll(*weights);
}

TEST(HuggingFaceTest, AnExportReplacesAnEarlierOne) {
  TempDirectory dir;
  WriteText(dir.File("config.json"), "{}");
  WriteText(dir.File("model-notes.safetensors"), "");
  ASSERT_TRUE(WriteHfWeights(dir.path(), Items(), 1).ok());
  EXPECT_EQ(dir.Names().size(), 6u);
  ASSERT_TRUE(WriteHfWeights(dir.path(), Items()).ok());
  EXPECT_THAT(dir.Names(),
              ElementsAre("config.json", "model-notes.safetensors", "model.safetensors"));
}

TEST(HuggingFaceTest, ReadsThatMakeNoSense) {
  TempDirectory dir;
  ASSERT_TRUE(WriteHfWeights(dir.path(), Items()).ok());
  const auto weights = HfWeights::Open(dir.path());
  float out[8];
  EXPECT_EQ(weights->Read("d", DType::kF32, out).code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(weights->Read("a.weight", DType::kI64, out).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(weights->ReadRows("a.weight", 2, 2, DType::kF32, out).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(weights->ReadRows("a.weight", -1, 2, DType::kF32, out).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(weights->Find("d"), nullptr);
}

TEST(HuggingFaceTest, BrokenDirectoriesAreRefused) {
  TempDirectory dir;
  EXPECT_EQ(HfWeights::Open(dir.path()).status().code(), absl::StatusCode::kNotFound);
  ASSERT_TRUE(WriteSafetensors(dir.File("s.safetensors"), Items(), {}).ok());
  const auto open_with = [&](const std::string& index) {
    WriteText(dir.File("model.safetensors.index.json"), index);
    return Message(HfWeights::Open(dir.path()).status());
  };
  EXPECT_EQ(open_with(R"({"weight_map":{"a.weight":"s.safetensors"},"metadata":{"x":[]}})"), "");
  EXPECT_THAT(open_with("{"), HasSubstr("not valid JSON: parse error at line 1"));
  EXPECT_THAT(open_with(R"({"metadata":{}})"), HasSubstr("weight_map"));
  EXPECT_THAT(open_with(R"({"weight_map":{"a":1}})"), HasSubstr("\"a\""));
  EXPECT_THAT(open_with(R"({"weight_map":{"x":"s.safetensors"}})"), HasSubstr("does not hold it"));
  EXPECT_THAT(open_with(R"({"weight_map":{"x":"../s.safetensors"}})"),
              HasSubstr("no plain file name"));
  EXPECT_THAT(open_with(R"({"weight_map":{"a":"missing.safetensors"}})"),
              HasSubstr("missing.safetensors"));
}

TEST(HuggingFaceTest, OnlyMappedTensorsAreSeen) {
  TempDirectory dir;
  ASSERT_TRUE(WriteSafetensors(dir.File("s.safetensors"), Items(), {}).ok());
  WriteText(dir.File("model.safetensors.index.json"),
            R"({"weight_map":{"b.weight":"s.safetensors"}})");
  const auto weights = HfWeights::Open(dir.path());
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_THAT(weights->names(), ElementsAre("b.weight"));
  EXPECT_EQ(weights->Find("a.weight"), nullptr);
}

}  // namespace
}  // namespace stretto
