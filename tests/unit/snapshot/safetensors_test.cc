#include "stretto/snapshot/safetensors.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string FileOf(const std::string& header, const std::string& data = "") {
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + data;
}

absl::StatusOr<SafetensorsFile> ParseAll(const std::string& file) {
  return SafetensorsFile::Parse("file.safetensors", file.data(), file.size(), file.size());
}

std::string Repeat(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

// One tensor "a" with the given fields and 4 bytes of data.
std::string Tensor1(const std::string& fields) {
  return FileOf("{\"a\":{" + fields + "}}", "1234");
}
const char kSound[] = R"("dtype":"F32","shape":[1],"data_offsets":[0,4])";

struct Defect {
  const char* name;
  std::string file;
  const char* reason;  // part of the message
};

std::vector<Defect> Defects() {
  const std::string sound = std::string("{") + kSound + "}";
  std::string longer = FileOf("{}");
  longer[0] = 3;  // the header would end after the file
  std::string huge = FileOf("{}");
  huge[3] = 0x7f;
  std::string negative = FileOf("{}");
  negative[7] = '\xff';
  return {
      {"Empty", "", "not even a header length"},
      {"SevenBytes", std::string(7, '\0'), "not even a header length"},
      {"NoHeader", std::string(8, '\0'), "does not start with {"},
      {"HeaderPastTheEnd", longer, "the file ends after 2"},
      {"HeaderTooLarge", huge, "at most 100000000 are allowed"},
      {"HeaderLengthAboveInt64", negative, "at most 100000000 are allowed"},
      {"LeadingSpace", FileOf(" {}"), "does not start with {"},
      {"NotAnObject", FileOf("[]"), "does not start with {"},
      {"CutJson", FileOf("{\"a\":"), "not valid JSON at byte 6: parse error"},
      {"BytesAfterJson", FileOf("{}x"), "not valid JSON"},
      {"NulAfterJson", FileOf(std::string("{}\0x", 4)), "NUL byte"},
      {"Comment", FileOf("{/* */}"), "not valid JSON"},
      {"BadUtf8", FileOf("{\"__metadata__\":{\"a\":\"\xff\"}}"), "not valid JSON"},
      {"LoneSurrogate", FileOf("{\"__metadata__\":{\"a\":\"\\ud800\"}}"), "not valid JSON"},
      {"BytesAfterData", FileOf("{\"a\":" + sound + "}", "12345"), "the file has 5 bytes of data"},
      {"DataCutOff", FileOf("{\"a\":" + sound + "}", "123"), "the file has 3 bytes of data"},
      {"DataWithoutTensors", FileOf("{}", "1"), "the file has 1 bytes of data"},
      {"TensorTwice", FileOf("{\"a\":" + sound + ",\"a\":" + sound + "}", "1234"),
       "tensor \"a\" appears twice"},
      {"TensorTwiceEscaped", FileOf("{\"a\":" + sound + ",\"\\u0061\":" + sound + "}", "1234"),
       "tensor \"a\" appears twice"},
      {"MetadataTwice", FileOf("{\"__metadata__\":{},\"__metadata__\":{}}"),
       "__metadata__ appears twice"},
      {"MetadataKeyTwice", FileOf(R"({"__metadata__":{"k":"1","k":"2"}})"),
       "__metadata__ has \"k\" twice"},
      {"FieldTwice", Tensor1(std::string(kSound) + R"(,"dtype":"F32")"), "has dtype twice"},
      {"MetadataNumber", FileOf(R"({"__metadata__":{"k":1}})"), "__metadata__ has a number"},
      {"MetadataNested", FileOf(R"({"__metadata__":{"k":{}}})"), "__metadata__ has an object"},
      {"MetadataList", FileOf(R"({"__metadata__":[]})"), "__metadata__ has a list"},
      {"MetadataNull", FileOf(R"({"__metadata__":{"k":null}})"), "__metadata__ has a null"},
      {"TensorIsString", FileOf(R"({"a":"F32"})"), "tensor \"a\" has a string"},
      {"TensorIsNull", FileOf(R"({"a":null})"), "tensor \"a\" has a null"},
      {"TensorIsList", FileOf(R"({"a":["F32",[1],[0,4]]})", "1234"), "tensor \"a\" has a list"},
      {"NoDType", Tensor1(R"("shape":[1],"data_offsets":[0,4])"), "has no dtype"},
      {"NoShape", Tensor1(R"("dtype":"F32","data_offsets":[0,4])"), "has no shape"},
      {"NoOffsets", Tensor1(R"("dtype":"F32","shape":[1])"), "has no data_offsets"},
      {"UnknownDType", Tensor1(R"("dtype":"F31","shape":[1],"data_offsets":[0,4])"),
       "unknown dtype \"F31\""},
      {"DTypeIsNumber", Tensor1(R"("dtype":32,"shape":[1],"data_offsets":[0,4])"),
       "number where none is allowed"},
      {"DTypeIsBoolean", Tensor1(R"("dtype":true,"shape":[1],"data_offsets":[0,4])"), "boolean"},
      {"ShapeIsNumber", Tensor1(R"("dtype":"F32","shape":1,"data_offsets":[0,4])"),
       "number where none is allowed"},
      {"ShapeNested", Tensor1(R"("dtype":"F32","shape":[[1]],"data_offsets":[0,4])"), "list"},
      {"ShapeHoldsObject", Tensor1(R"("dtype":"F32","shape":[{}],"data_offsets":[0,4])"), "object"},
      {"ShapeHoldsString", Tensor1(R"("dtype":"F32","shape":["1"],"data_offsets":[0,4])"),
       "string"},
      {"NegativeDimension", Tensor1(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])"),
       "negative number -1"},
      {"FractionalDimension", Tensor1(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])"),
       "1.0 where a whole number"},
      {"DimensionAboveInt64",
       Tensor1(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,4])"),
       "out of range"},
      {"DimensionAboveUint64",
       Tensor1(R"("dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4])"),
       "whole number is needed"},
      {"TooManyDimensions",
       Tensor1("\"dtype\":\"F32\",\"shape\":[1" + Repeat(",1", 64) + "],\"data_offsets\":[0,4]"),
       "more than 64 dimensions"},
      {"OneOffset", Tensor1(R"("dtype":"F32","shape":[1],"data_offsets":[0])"),
       "does not have two data_offsets"},
      {"ThreeOffsets", Tensor1(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,4])"),
       "more than two data_offsets"},
      {"EndsBeforeItBegins", Tensor1(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])"),
       "before it begins"},
      {"FirstBeginsLate", Tensor1(R"("dtype":"U8","shape":[3],"data_offsets":[1,4])"), "a hole"},
      {"Hole",
       FileOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
              "123"),
       "tensor \"b\" begins at 2 where 1 is due: the data has a hole"},
      {"Overlap",
       FileOf(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
              "123"),
       "tensor \"b\" begins at 1 where 2 is due: the data has an overlap"},
      {"SameBytesTwice",
       FileOf(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
              "12"),
       "an overlap"},
      {"SizeDoesNotFitShape", Tensor1(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"),
       "4 bytes of data where its shape and dtype ask for 8"},
      {"ShapeOverflows",
       Tensor1(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4])"),
       "product overflows"},
      {"ShapeWrapsToZero",  // 2^63 * 2 is 0 in 64 bits
       Tensor1(R"("dtype":"U8","shape":[4611686018427387904,4],"data_offsets":[0,4])"),
       "product overflows"},
      {"SizeOverflows",
       Tensor1(R"("dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4])"),
       "size overflows"},
      {"HalfAByte", Tensor1(R"("dtype":"F4","shape":[7],"data_offsets":[0,4])"),
       "whole number of bytes"},
      {"DeepUnknownField",
       Tensor1(std::string(kSound) + ",\"x\":" + Repeat("[", 100000) + Repeat("]", 100000)),
       "nested too deeply"},
      {"DeepEverywhere", FileOf(Repeat("{\"a\":", 1000000)), "nested too deeply"},
  };
}

TEST(SafetensorsTest, EveryDefectIsRefusedWithItsReason) {
  for (const Defect& defect : Defects()) {
    const auto file = ParseAll(defect.file);
    ASSERT_FALSE(file.ok()) << defect.name;
    EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument) << defect.name;
    EXPECT_THAT(Message(file.status()), HasSubstr(defect.reason)) << defect.name;
    EXPECT_THAT(Message(file.status()), HasSubstr("file.safetensors")) << defect.name;
    // And the same from disk.
    TempDirectory dir;
    WriteText(dir.File("file.safetensors"), defect.file);
    const auto opened = SafetensorsFile::Open(dir.File("file.safetensors"));
    ASSERT_FALSE(opened.ok()) << defect.name;
    EXPECT_THAT(Message(opened.status()), HasSubstr(defect.reason)) << defect.name;
  }
}

// The control of the test above: its files without the defect are accepted.
TEST(SafetensorsTest, LegalOddities) {
  const std::vector<std::pair<const char*, std::string>> files = {
      {"no tensors", FileOf("{}")},
      {"padding", FileOf("{}      ")},
      {"null metadata", FileOf(R"({"__metadata__":null})")},
      {"one tensor", Tensor1(kSound)},
      {"rank 0", Tensor1(R"("dtype":"F32","shape":[],"data_offsets":[0,4])")},
      {"unknown field", Tensor1(std::string(kSound) + R"(,"x":[{"y":[1,-1,1.5,null,true,"z"]}])")},
      {"unknown field first", Tensor1(R"("x":{},)" + std::string(kSound))},
      {"half bytes that add up", Tensor1(R"("dtype":"F4","shape":[8],"data_offsets":[0,4])")},
      {"64 dimensions",
       Tensor1("\"dtype\":\"F32\",\"shape\":[1" + Repeat(",1", 63) + "],\"data_offsets\":[0,4]")},
      {"zero size between others",
       FileOf(R"({"z":{"dtype":"F32","shape":[0,5],"data_offsets":[2,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]},)"
              R"("a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
              "1234")},
      {"zero size with large dimensions",
       FileOf(R"({"a":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})")},
  };
  for (const auto& [name, file] : files) {
    const auto parsed = ParseAll(file);
    EXPECT_TRUE(parsed.ok()) << name << ": " << parsed.status();
  }
}

TEST(SafetensorsTest, EveryCutOfASoundFileIsRefused) {
  const std::string file = FileOf(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
      "1234");
  ASSERT_TRUE(ParseAll(file).ok());
  for (size_t length = 0; length < file.size(); ++length) {
    EXPECT_FALSE(ParseAll(file.substr(0, length)).ok()) << length;
  }
}

TEST(SafetensorsTest, WhatIsWrittenIsRead) {
  TempDirectory dir;
  const std::string path = dir.File("x.safetensors");
  const std::vector<float> w = {1, 2, 3, 4, 5, 6};
  const std::vector<int64_t> steps = {7};
  const std::vector<uint16_t> b = {0x3f80, 0xbf80, 0x4000};
  const std::vector<SafetensorsItem> items = {
      {"w", DType::kF32, {3, 2}, w.data()},
      {"bias \"\xc3\xa9\"\n", DType::kBF16, {3}, b.data()},
      {"steps", DType::kI64, {}, steps.data()},
      {"empty", DType::kF32, {0, 5}, nullptr},
  };
  ASSERT_TRUE(WriteSafetensors(path, items, {{"format", "pt"}, {"k", "v\t"}}).ok());
  EXPECT_THAT(dir.Names(), ElementsAre("x.safetensors"));

  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<std::string> order;
  for (const SafetensorsEntry& entry : file->entries()) order.push_back(entry.name);
  // Wide types first; the header's padding keeps the data aligned to 8 bytes.
  EXPECT_THAT(order, ElementsAre("steps", "empty", "w", "bias \"\xc3\xa9\"\n"));
  EXPECT_EQ((std::filesystem::file_size(path) - 38) % 8, 0u);
  EXPECT_EQ(file->metadata().at("k"), "v\t");
  EXPECT_EQ(file->Find("nothing"), nullptr);

  std::vector<float> read(2);
  const SafetensorsEntry* entry = file->Find("w");
  ASSERT_NE(entry, nullptr);
  EXPECT_THAT(entry->shape, ElementsAre(3, 2));
  EXPECT_EQ(entry->elements(), 6);
  ASSERT_TRUE(file->Read(*entry, 16, 8, read.data()).ok());
  EXPECT_THAT(read, ElementsAre(5, 6));
  EXPECT_EQ(file->Read(*entry, 20, 8, read.data()).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(file->Read(*entry, -4, 4, read.data()).code(), absl::StatusCode::kOutOfRange);
  EXPECT_TRUE(file->Read(*file->Find("empty"), 0, 0, nullptr).ok());
}

TEST(SafetensorsTest, AHeaderWithoutAFileCannotBeRead) {
  const auto file = ParseAll(Tensor1(kSound));
  char buffer[4];
  EXPECT_EQ(file->Read(file->entries()[0], 0, 4, buffer).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(SafetensorsTest, TheWriterRefusesWhatNoReaderTakes) {
  TempDirectory dir;
  const std::string path = dir.File("x.safetensors");
  const float w[2] = {1, 2};
  const auto write = [&](const std::vector<SafetensorsItem>& items) {
    return WriteSafetensors(path, items, {});
  };
  EXPECT_FALSE(write({{"w", DType::kF32, {2}, w}, {"w", DType::kF32, {2}, w}}).ok());
  EXPECT_FALSE(write({{"__metadata__", DType::kF32, {2}, w}}).ok());
  EXPECT_FALSE(write({{"w", DType::kF32, {-2}, w}}).ok());
  EXPECT_FALSE(write({{"w", DType::kF32, {int64_t{1} << 62, 4}, w}}).ok());
  EXPECT_FALSE(write({{"w", DType::kF32, {2}, nullptr}}).ok());
  EXPECT_FALSE(write({{"\xff", DType::kF32, {2}, w}}).ok());
  EXPECT_THAT(dir.Names(), IsEmpty());
  EXPECT_EQ(WriteSafetensors(dir.File("none/x"), {}, {}).code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsTest, AFullDiskLeavesNothingBehind) {
  TempDirectory dir;
  const std::vector<float> w(5000, 1.0f);
  absl::Status status;
  {
    FileSizeLimit limit(4096);
    status =
        WriteSafetensors(dir.File("x.safetensors"), {{"w", DType::kF32, {5000}, w.data()}}, {});
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(status), HasSubstr("bytes are missing"));
  EXPECT_THAT(dir.Names(), IsEmpty());
}

TEST(SafetensorsTest, FilesAboveTwoGibibytes) {
  // A sparse file: 3 GiB of zeros with four bytes at the far end.
  TempDirectory dir;
  const std::string path = dir.File("big.safetensors");
  const int64_t big = int64_t{3} << 30;
  std::string header =
      R"({"big":{"dtype":"U8","shape":[3221225472],"data_offsets":[0,3221225472]},)"
      R"("last":{"dtype":"U8","shape":[4],"data_offsets":[3221225472,3221225476]}})";
  WriteText(path, FileOf(header));
  const int descriptor = open(path.c_str(), O_WRONLY);
  ASSERT_EQ(pwrite(descriptor, "last", 4, 8 + header.size() + big), 4);
  close(descriptor);
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  char last[5] = {};
  ASSERT_TRUE(file->Read(*file->Find("last"), 0, 4, last).ok());
  EXPECT_STREQ(last, "last");
  char zero = 1;
  ASSERT_TRUE(file->Read(*file->Find("big"), big - 1, 1, &zero).ok());
  EXPECT_EQ(zero, 0);
}

TEST(SafetensorsTest, TypesMapBothWays) {
  for (const DType dtype : {DType::kF64, DType::kF32, DType::kBF16, DType::kF16, DType::kE4M3,
                            DType::kE5M2, DType::kI32, DType::kI64, DType::kU8}) {
    const auto back = FromSafetensorsType(SafetensorsType(dtype));
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(*back, dtype);
  }
  EXPECT_THAT(Message(FromSafetensorsType("C64").status()), HasSubstr("C64"));
}

}  // namespace
}  // namespace stretto
