#include "stretto/data/token_file.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <sys/stat.h>

#include <numeric>

#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenFileTest : public Scratch {};

std::vector<int32_t> ReadAll(const TokenFile& file) {
  std::vector<int32_t> ids(file.tokens());
  EXPECT_TRUE(file.Read(0, file.tokens(), 0, ids.data()).ok());
  return ids;
}

TEST_F(TokenFileTest, ReadsBothWidths) {
  auto narrow = TokenFile::Open(WriteTokens16("a.bin", {0, 1, 65535}));
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  EXPECT_EQ(narrow->token_bytes(), 2);
  EXPECT_THAT(ReadAll(*narrow), ElementsAre(0, 1, 65535));
  auto wide = TokenFile::Open(WriteTokens32("b.bin", {0, 65536, 2147483647u}));
  ASSERT_TRUE(wide.ok()) << wide.status();
  EXPECT_EQ(wide->token_bytes(), 4);
  EXPECT_THAT(ReadAll(*wide), ElementsAre(0, 65536, 2147483647));
}

TEST_F(TokenFileTest, ReadsPartsLongerThanItsBuffer) {
  std::vector<uint16_t> ids(20011);
  std::iota(ids.begin(), ids.end(), uint16_t{3});
  for (const bool keep_open : {true, false}) {
    auto file = TokenFile::Open(WriteTokens16("a.bin", ids), keep_open);
    ASSERT_TRUE(file.ok());
    std::vector<int32_t> part(17777);
    ASSERT_TRUE(file->Read(1111, 17777, 0, part.data()).ok());
    for (size_t i = 0; i < part.size(); ++i) ASSERT_EQ(part[i], ids[1111 + i]) << i;
  }
}

TEST_F(TokenFileTest, WriterAndReaderAgreeAndChooseTheWidth) {
  for (const int64_t vocabulary : {257, 65536, 65537, 200000}) {
    std::vector<int32_t> ids = {0, 5, 256, static_cast<int32_t>(vocabulary - 1)};
    const std::string path = Path("w.bin");
    ASSERT_TRUE(WriteTokenFile(path, ids, vocabulary).ok());
    auto file = TokenFile::Open(path);
    ASSERT_TRUE(file.ok()) << file.status();
    EXPECT_EQ(file->token_bytes(), vocabulary <= 65536 ? 2 : 4);
    EXPECT_EQ(ReadAll(*file), ids);
  }
  // Byte for byte what llm.c expects.
  ASSERT_TRUE(WriteTokenFile(Path("w.bin"), {7, 300}, 50257).ok());
  EXPECT_EQ(ReadText(Path("w.bin")), ReadText(WriteTokens16("x.bin", {7, 300})));
}

TEST_F(TokenFileTest, WriterRefuses) {
  const absl::Status outside = WriteTokenFile(Path("w.bin"), {1, 2, 257}, 257);
  EXPECT_EQ(outside.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(outside.message()), HasSubstr("id 257 at position 2"));
  EXPECT_FALSE(WriteTokenFile(Path("w.bin"), {-1}, 257).ok());
  EXPECT_FALSE(WriteTokenFile(Path("w.bin"), {}, 257).ok());
  EXPECT_FALSE(WriteTokenFile(Path("w.bin"), {0}, 0).ok());
  EXPECT_EQ(WriteTokenFile(Path("no/such/w.bin"), {0}, 257).code(), absl::StatusCode::kNotFound);
  // Nothing half-made stays behind.
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

TEST_F(TokenFileTest, RefusesDamagedFilesInOneSentenceThatNamesThem) {
  const std::string good = ReadText(WriteTokens16("good.bin", {1, 2, 3}));
  const auto patched = [&](size_t at, int32_t value) {
    std::string bytes = good;
    bytes.replace(at, 4, reinterpret_cast<const char*>(&value), 4);
    return bytes;
  };
  const struct {
    const char* name;
    std::string bytes;
    const char* says;
  } kCases[] = {
      {"empty", "", "shorter than a token file's header"},
      {"header_cut", good.substr(0, 1023), "shorter than a token file's header"},
      {"header_only", good.substr(0, 1024), "cut short"},
      {"one_byte_short", good.substr(0, good.size() - 1), "cut short"},
      {"one_byte_long", good + "x", "not what was written"},
      {"magic", patched(0, 20240326), "is no token file"},
      {"version", patched(4, 2), "has version 2"},
      {"wide_version", patched(0, 20240801), "goes with version 7"},
      {"no_tokens", patched(8, 0), "holds 0 tokens"},
      {"negative", patched(8, -3), "holds -3 tokens"},
      {"huge", patched(8, 2147483647), "4294968318"},
      {"text", std::string(2000, 'a'), "is no token file"},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    const std::string path = WriteText(std::string(c.name) + ".bin", c.bytes);
    const absl::Status status = TokenFile::Open(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
    ExpectOneSentence(status);
  }
  EXPECT_TRUE(TokenFile::Open(Path("good.bin")).ok());
}

TEST_F(TokenFileTest, RefusesWhatIsNoFile) {
  EXPECT_EQ(TokenFile::Open(Path("none.bin")).status().code(), absl::StatusCode::kNotFound);
  const absl::Status directory = TokenFile::Open(folder_).status();
  EXPECT_THAT(std::string(directory.message()), HasSubstr("is a directory"));
  ASSERT_EQ(mkfifo(Path("pipe").c_str(), 0600), 0);
  EXPECT_THAT(std::string(TokenFile::Open(Path("pipe")).status().message()),
              HasSubstr("no regular file"));
}

TEST_F(TokenFileTest, NamesTheIdOutsideTheVocabulary) {
  auto file = TokenFile::Open(WriteTokens16("a.bin", {1, 2, 300, 4}));
  ASSERT_TRUE(file.ok());
  int32_t ids[4];
  EXPECT_TRUE(file->Read(0, 4, 301, ids).ok());
  EXPECT_TRUE(file->Read(0, 2, 300, ids).ok());
  const absl::Status status = file->Read(1, 3, 300, ids);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("a.bin' holds id 300 at position 2"));
  // Ids are int32 in memory: beyond that even a file without a known vocabulary is refused.
  auto wide = TokenFile::Open(WriteTokens32("b.bin", {1, 0x80000000u}));
  ASSERT_TRUE(wide.ok());
  EXPECT_FALSE(wide->Read(0, 2, 0, ids).ok());
}

TEST_F(TokenFileTest, ReportsAFileThatShrinksWhileOpen) {
  const std::string path = WriteTokens16("a.bin", {1, 2, 3, 4});
  auto file = TokenFile::Open(path);
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(truncate(path.c_str(), 1024 + 4), 0);
  int32_t ids[4];
  EXPECT_TRUE(file->Read(0, 2, 0, ids).ok());
  const absl::Status status = file->Read(0, 4, 0, ids);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("nothing at token 2"));
  EXPECT_EQ(file->Read(3, 2, 0, ids).code(), absl::StatusCode::kOutOfRange);
  EXPECT_EQ(file->Read(-1, 2, 0, ids).code(), absl::StatusCode::kOutOfRange);
}

// 2.4 GB that take no room on disk: places behind 2^31 bytes need 64-bit offsets.
TEST_F(TokenFileTest, ReadsBehindTwoGibibytes) {
  constexpr int64_t kTokens = 1200000000;
  const std::string path = WriteTokens16("big.bin", {1});
  const int fd = open(path.c_str(), O_RDWR);
  ASSERT_GE(fd, 0);
  const int32_t count = kTokens;
  const uint16_t marks[2] = {4242, 4243};
  const bool written = pwrite(fd, &count, 4, 8) == 4 && ftruncate(fd, 1024 + kTokens * 2) == 0 &&
                       pwrite(fd, &marks[0], 2, 1024 + 1100000001 * int64_t{2}) == 2 &&
                       pwrite(fd, &marks[1], 2, 1024 + (kTokens - 1) * 2) == 2;
  close(fd);
  if (!written) GTEST_SKIP() << "the file system does not take a sparse file of 2.4 GB";
  auto file = TokenFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->tokens(), kTokens);
  int32_t ids[3];
  ASSERT_TRUE(file->Read(1100000000, 3, 0, ids).ok());
  EXPECT_THAT(ids, ElementsAre(0, 4242, 0));
  ASSERT_TRUE(file->Read(kTokens - 3, 3, 0, ids).ok());
  EXPECT_THAT(ids, ElementsAre(0, 0, 4243));
}

TEST_F(TokenFileTest, ExpandsPatternsInByteOrder) {
  for (const char* name : {"b_10.bin", "b_02.bin", "B_1.bin", "other.txt", "odd[1].bin"}) {
    WriteText(name, "x");
  }
  auto found = ExpandFiles(Path("[bB]_*.bin"));
  ASSERT_TRUE(found.ok());
  EXPECT_THAT(*found, ElementsAre(Path("B_1.bin"), Path("b_02.bin"), Path("b_10.bin")));
  found = ExpandFiles(Path("odd[1].bin"));  // a file of that very name, not the glob
  ASSERT_TRUE(found.ok());
  EXPECT_THAT(*found, ElementsAre(Path("odd[1].bin")));
  const absl::Status none = ExpandFiles(Path("c_*.bin")).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(none.message()), HasSubstr("c_*.bin"));
}

}  // namespace
}  // namespace stretto
