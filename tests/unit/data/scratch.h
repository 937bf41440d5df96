// A folder for one test's files, removed at its end.
#ifndef STRETTO_TESTS_UNIT_DATA_SCRATCH_H_
#define STRETTO_TESTS_UNIT_DATA_SCRATCH_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "stretto/data/token_file.h"

namespace stretto {

class Scratch : public ::testing::Test {
 protected:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "stretto-XXXXXX").string();
    folder_ = mkdtemp(name.data());
  }
  ~Scratch() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }

  std::string WriteText(const std::string& name, const std::string& text) const {
    std::ofstream(Path(name), std::ios::binary) << text;
    return Path(name);
  }
  static std::string ReadText(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  }
  // Byte by byte, so that a test of reading does not rest on the writer.
  std::string WriteTokens16(const std::string& name, const std::vector<uint16_t>& ids) const {
    std::string bytes(1024, '\0');
    const int32_t header[3] = {20240520, 1, static_cast<int32_t>(ids.size())};
    bytes.replace(0, sizeof(header), reinterpret_cast<const char*>(header), sizeof(header));
    bytes.append(reinterpret_cast<const char*>(ids.data()), ids.size() * 2);
    return WriteText(name, bytes);
  }
  std::string WriteTokens32(const std::string& name, const std::vector<uint32_t>& ids) const {
    std::string bytes(1024, '\0');
    const int32_t header[3] = {20240801, 7, static_cast<int32_t>(ids.size())};
    bytes.replace(0, sizeof(header), reinterpret_cast<const char*>(header), sizeof(header));
    bytes.append(reinterpret_cast<const char*>(ids.data()), ids.size() * 4);
    return WriteText(name, bytes);
  }

  std::string folder_;
};

// A message is one sentence on one line: no full stop followed by more, no line break.
inline void ExpectOneSentence(const absl::Status& status) {
  const std::string message(status.message());
  EXPECT_FALSE(message.empty());
  EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  EXPECT_EQ(message.find(". "), std::string::npos) << message;
}

}  // namespace stretto

#endif  // STRETTO_TESTS_UNIT_DATA_SCRATCH_H_
