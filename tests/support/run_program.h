// Runs a program as a user would, in a folder of its own.
#ifndef STRETTO_TESTS_SUPPORT_RUN_PROGRAM_H_
#define STRETTO_TESTS_SUPPORT_RUN_PROGRAM_H_

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace stretto::testing {

class Programs : public ::testing::Test {
 protected:
  struct Result {
    int code;
    std::string output;
  };

  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "stretto-run-XXXXXX").string();
    folder_ = mkdtemp(name.data());
  }
  void TearDown() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }

  std::string Path(const std::string& name) const { return folder_ + "/" + name; }
  void WriteText(const std::string& name, const std::string& text) const {
    std::ofstream(Path(name)) << text;
  }
  std::string ReadText(const std::string& name) const {
    std::stringstream text;
    text << std::ifstream(Path(name), std::ios::binary).rdbuf();
    return text.str();
  }
  // A shell command in the folder; its standard output.
  Result Run(const std::string& command) const {
    std::FILE* pipe = popen(("cd '" + folder_ + "' && " + command).c_str(), "r");
    std::string output;
    std::array<char, 4096> buffer;
    for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
      output.append(buffer.data(), n);
    }
    const int status = pclose(pipe);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
  }

  std::string folder_;
};

// One line, which ends with a newline.
inline bool IsOneSentence(const std::string& output) {
  return output.size() > 1 && output.find('\n') == output.size() - 1;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_RUN_PROGRAM_H_
