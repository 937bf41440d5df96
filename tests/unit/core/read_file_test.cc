#include "stretto/core/read_file.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>

namespace stretto {
namespace {

using ::testing::HasSubstr;

class ReadFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = ::testing::TempDir() + "/read_file_test";
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name, std::ios::binary) << text;
    return folder_ + "/" + name;
  }
  std::string folder_;
};

TEST_F(ReadFileTest, ReadsAllBytes) {
  std::string text(100000, 'x');
  text[5] = '\0';
  const auto read = ReadRegularFile("the file", Write("a", text));
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(*read, text);
  EXPECT_EQ(*ReadRegularFile("the file", Write("empty", "")), "");
}

TEST_F(ReadFileTest, RefusesWhatMayNeverBeginOrEnd) {
  const std::string pipe = folder_ + "/pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  const auto refused = [](const std::string& path) {
    const absl::Status status = ReadRegularFile("the file", path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_EQ(CheckRegularFile("the file", path), status);
    return std::string(status.message());
  };
  EXPECT_THAT(refused(pipe), HasSubstr("'" + pipe + "' is no regular file but a pipe"));
  EXPECT_THAT(refused(folder_), HasSubstr("no regular file but a directory"));
  EXPECT_THAT(refused("/dev/zero"), HasSubstr("no regular file but a device"));
}

TEST_F(ReadFileTest, NamesWhatCannotBeRead) {
  const absl::Status absent = ReadRegularFile("the plan", folder_ + "/none").status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(absent.message(),
            "the plan '" + folder_ + "/none' could not be read: No such file or directory");
  EXPECT_TRUE(CheckRegularFile("the plan", folder_ + "/none").ok());
  const std::string path = Write("large", std::string((1 << 20) + 1, 'x'));
  EXPECT_THAT(std::string(ReadRegularFile("the plan", path, 1 << 20).status().message()),
              HasSubstr("larger than 1 MiB"));
  EXPECT_TRUE(ReadRegularFile("the plan", path, (1 << 20) + 1).ok());
}

}  // namespace
}  // namespace stretto
