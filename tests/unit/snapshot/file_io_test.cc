#include "src/snapshot/file_io.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "unit/snapshot/testing.h"

namespace stretto::snapshot_internal {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(FileIoTest, AFileAppearsUnderItsNameOnlyWhenCommitted) {
  TempDirectory dir;
  auto writer = FileWriter::Create(dir.File("a"), 6);
  ASSERT_TRUE(writer.ok()) << writer.status();
  ASSERT_TRUE((*writer)->Append("abc", 3).ok());
  EXPECT_THAT(dir.Names(), ElementsAre("a.partial"));
  ASSERT_TRUE((*writer)->Append("def", 3).ok());
  const auto written = (*writer)->Commit();
  ASSERT_TRUE(written.ok()) << written.status();
  EXPECT_THAT(dir.Names(), ElementsAre("a"));
  EXPECT_EQ(ReadText(dir.File("a")), "abcdef");
  EXPECT_EQ(written->bytes, 6);
  EXPECT_EQ(written->digest, Digest("abcdef"));
  const auto reader = FileReader::Open(dir.File("a"));
  ASSERT_TRUE(reader.ok());
  EXPECT_EQ(*DigestFile(**reader), written->digest);
}

TEST(FileIoTest, AnAbandonedFileLeavesNothing) {
  TempDirectory dir;
  {
    auto writer = FileWriter::Create(dir.File("a"), 6);
    ASSERT_TRUE((*writer)->Append("abc", 3).ok());
    EXPECT_EQ((*writer)->Commit().status().code(), absl::StatusCode::kInternal);
  }
  EXPECT_THAT(dir.Names(), IsEmpty());
}

TEST(FileIoTest, AFullDiskIsReportedWithWhatIsMissing) {
  TempDirectory dir;
  WriteText(dir.File("a"), "old");
  absl::Status status;
  {
    FileSizeLimit limit(1000);
    status = WriteWholeFile(dir.File("a"), std::string(4096, 'x')).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(status), HasSubstr("after 1000 of 4096 bytes, 3096 bytes are missing"));
  EXPECT_THAT(dir.Names(), ElementsAre("a"));
  EXPECT_EQ(ReadText(dir.File("a")), "old");
}

TEST(FileIoTest, ReadsNameTheFileAndTheReason) {
  TempDirectory dir;
  EXPECT_EQ(FileReader::Open(dir.File("none")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(FileReader::Open(dir.path()).status()), HasSubstr("not a regular file"));
  ASSERT_EQ(mkfifo(dir.File("fifo").c_str(), 0600), 0);
  EXPECT_THAT(Message(FileReader::Open(dir.File("fifo")).status()),
              HasSubstr("not a regular file"));  // and does not hang
  WriteText(dir.File("a"), "abc");
  const auto reader = FileReader::Open(dir.File("a"));
  char buffer[8];
  const absl::Status status = (*reader)->Read(1, 5, buffer);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(status), HasSubstr(dir.File("a")));
  EXPECT_EQ(ReadWholeFile(dir.File("a"), 2).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(FileIoTest, HexadecimalDigests) {
  uint64_t value = 0;
  EXPECT_EQ(ToHex(0xfedcba9876543210u), "fedcba9876543210");
  EXPECT_TRUE(FromHex("fedcba9876543210", &value));
  EXPECT_EQ(value, 0xfedcba9876543210u);
  EXPECT_FALSE(FromHex("fedcba987654321", &value));
  EXPECT_FALSE(FromHex("fedcba987654321X", &value));
}

}  // namespace
}  // namespace stretto::snapshot_internal
