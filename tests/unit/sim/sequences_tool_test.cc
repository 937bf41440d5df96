// stretto-sequences, run as users run it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>

namespace stretto {
namespace {

using ::testing::HasSubstr;

#ifdef STRETTO_SEQUENCES

struct Result {
  int code;
  std::string output;  // both streams
};

Result Sequences(const std::string& arguments) {
  std::FILE* pipe = popen((STRETTO_SEQUENCES " " + arguments + " 2>&1").c_str(), "r");
  std::string output;
  std::array<char, 4096> buffer;
  for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    output.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

class SequencesTool : public ::testing::Test {
 protected:
  void SetUp() override { std::filesystem::create_directories(folder_); }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string Write(const std::string& name, const std::string& text) const {
    std::ofstream(folder_ + "/" + name) << text;
    return folder_ + "/" + name;
  }
  const std::string folder_ = ::testing::TempDir() + "sequences_" +
                              ::testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(SequencesTool, PlansAFileOfLengths) {
  const std::string file = Write("lengths.txt", "16000\n8000\n3000\n5000\n");
  const Result r = Sequences("--file " + file + " --pipelines 4 --method unbalanced --list");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("4 documents of 32000 tokens in 3 items on 4 pipelines"));
  EXPECT_THAT(r.output, HasSubstr("item 0 level 0 pipelines 0-2, 16000 tokens in 1 documents"));
  EXPECT_THAT(r.output, HasSubstr("8000 tokens in 2 documents"));
  EXPECT_THAT(r.output, HasSubstr("\ncosts of ByteScale's figures\n"));
}

TEST_F(SequencesTool, ComparesMethodsAsJsonAndPictures) {
  const std::string batch = "--tokens 1000000 --longest 65536 --pipelines 16 ";
  const Result r = Sequences(batch + "--json --svg " + folder_ + "/p.svg");
  EXPECT_EQ(r.code, 0) << r.output;
  const auto json = nlohmann::json::parse(r.output, nullptr, /*allow_exceptions=*/false);
  ASSERT_EQ(json.size(), 6u) << r.output;
  EXPECT_EQ(json[0]["method"], "static");
  EXPECT_EQ(json[0]["speedup"], 1.0);
  EXPECT_EQ(json[4]["method"], "balanced");
  EXPECT_GE(json[4]["simulated_seconds"], json[4]["bound_seconds"]);
  EXPECT_EQ(Sequences(batch + "--json").output, r.output);
  std::stringstream picture;
  picture << std::ifstream(folder_ + "/p_balanced.svg").rdbuf();
  EXPECT_THAT(picture.str(), HasSubstr("</svg>"));
}

TEST_F(SequencesTool, SaysInOneSentenceWhatIsWrong) {
  const auto error = [](const std::string& arguments) {
    const Result r = Sequences(arguments);
    EXPECT_EQ(r.code, 2) << arguments;
    EXPECT_EQ(std::count(r.output.begin(), r.output.end(), '\n'), 1) << r.output;
    return r.output;
  };
  EXPECT_THAT(error("--file " + Write("bad.txt", "12\nx\n")), HasSubstr("line 2: 'x'"));
  EXPECT_THAT(error("--file /nowhere"), HasSubstr("'/nowhere' could not be read"));
  ASSERT_EQ(mkfifo((folder_ + "/pipe").c_str(), 0600), 0);
  EXPECT_THAT(error("--file " + folder_ + "/pipe"), HasSubstr("no regular file but a pipe"));
  EXPECT_THAT(error("--fit " + folder_ + "/pipe"), HasSubstr("no regular file but a pipe"));
  EXPECT_THAT(error("--method balanced --svg " + folder_ + "/pipe"),
              HasSubstr("is a pipe, which nobody"));
  EXPECT_THAT(error("--file /dev/zero"), HasSubstr("no regular file but a device"));
  EXPECT_THAT(error("--pipelines 0"), HasSubstr("--pipelines must be 1 to 32768, not 0"));
  EXPECT_THAT(error("--pipelines 4"), HasSubstr("4 ranks"));
  EXPECT_THAT(error("--context 3"), HasSubstr("rings of 3 do not divide 512"));
  EXPECT_THAT(error("--layers 3"), HasSubstr("--layers goes with --fit"));
  EXPECT_THAT(error("--median 3"), HasSubstr("--lengths log-normal"));
  EXPECT_THAT(error("--compute 0"), HasSubstr("--compute"));
  EXPECT_THAT(error("--file x --tokens 3"), HasSubstr("--tokens does not go with --file"));
  EXPECT_THAT(error("--fit " + Write("fit.json", "{}")), HasSubstr("fit.json"));
}

#endif

}  // namespace
}  // namespace stretto
