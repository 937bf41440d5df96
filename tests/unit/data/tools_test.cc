// stretto-tokenize and stretto-ngram, run as users run them.
#include <gmock/gmock.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>

#include "stretto/data/tokenizer.h"
#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

#ifdef STRETTO_TOKENIZE

struct Result {
  int code;
  std::string output;  // both streams
};

Result RunProgram(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  std::array<char, 4096> buffer;
  for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    output.append(buffer.data(), n);
  }
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

class ToolsTest : public Scratch {
 protected:
  Result Tokenize(const std::string& arguments) const {
    return RunProgram("cd '" + folder_ + "' && " STRETTO_TOKENIZE " " + arguments);
  }
  std::vector<int32_t> Tokens(const std::string& name) const {
    auto file = TokenFile::Open(Path(name));
    if (!file.ok()) {
      ADD_FAILURE() << file.status();
      return {};
    }
    std::vector<int32_t> ids(file->tokens());
    EXPECT_TRUE(file->Read(0, file->tokens(), 0, ids.data()).ok());
    return ids;
  }
  // Bytes as they are, separators as '|'.
  std::string Shown(const std::string& name) const {
    std::string text;
    for (const int32_t id : Tokens(name)) text += id == 256 ? '|' : static_cast<char>(id);
    return text;
  }
};

TEST_F(ToolsTest, BlankLinesSplitDocumentsAndDisappear) {
  WriteText("a.txt", "\none\ntwo\n\n \nthree\n\n");
  WriteText("b.txt", "four\n\nfive");
  const Result r = Tokenize("--output o --validation-fraction 0.35 a.txt b.txt");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("o.train.bin: 16 tokens, 2 documents"));
  EXPECT_THAT(r.output, HasSubstr("o.validation.bin: 11 tokens, 2 documents"));
  EXPECT_EQ(Shown("o.train.bin"), "one\ntwo\n|three\n|");
  EXPECT_EQ(Shown("o.validation.bin"), "four\n|five|");
  EXPECT_EQ(Tokenize("--decode o.train.bin").output, "one\ntwo\nthree\n");
}

TEST_F(ToolsTest, FilesOrNothingSplitDocuments) {
  WriteText("a.txt", "one\n\ntwo\n");
  WriteText("b.txt", "three\nfour\n");
  ASSERT_EQ(
      Tokenize("--output f --split-documents file --validation-fraction 0.25 a.txt b.txt").code, 0);
  EXPECT_EQ(Shown("f.train.bin"), "one\n\ntwo\n|three\n|");  // cut at a line
  EXPECT_EQ(Shown("f.validation.bin"), "four\n|");
  ASSERT_EQ(Tokenize("--output n --split-documents=none --validation-fraction=0 a.txt b.txt").code,
            0);
  EXPECT_EQ(Shown("n.train.bin"), "one\n\ntwo\nthree\nfour\n");
  EXPECT_FALSE(std::filesystem::exists(Path("n.validation.bin")));
}

// Inputs larger than the part that is encoded at once come out as if encoded whole.
TEST_F(ToolsTest, PartsEncodeLikeTheWhole) {
  std::string vocabulary;
  auto add = [&, rank = 0](const std::string& base64) mutable {
    vocabulary += base64 + " " + std::to_string(rank++) + "\n";
  };
  const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (int b = 0; b < 256; ++b) add(std::string{digits[b >> 2], digits[(b & 3) << 4], '=', '='});
  add("Cgo=");  // "\n\n"
  add("YQo=");  // "a\n", which no piece holds
  add("YWE=");  // "aa"
  WriteText("v.tiktoken", vocabulary);
  std::string text;
  for (int i = 0; text.size() < (size_t{9} << 20); ++i) {
    text += i % 3 == 0 ? "aaa b\n\n\n" : i % 3 == 1 ? "aa\n \xff\n" : "a1\n";
  }
  WriteText("a.txt", text);
  const Result r = Tokenize(
      "--tokenizer v.tiktoken --output o --split-documents none "
      "--validation-fraction 0 a.txt");
  ASSERT_EQ(r.code, 0) << r.output;
  auto tokenizer = OpenTokenizer(Path("v.tiktoken"));
  ASSERT_TRUE(tokenizer.ok());
  std::vector<int32_t> whole;
  ASSERT_TRUE((*tokenizer)->Encode(text, &whole).ok());
  EXPECT_TRUE(Tokens("o.train.bin") == whole);
  EXPECT_TRUE(Tokenize("--tokenizer v.tiktoken --decode o.train.bin").output == text);
}

TEST_F(ToolsTest, RefusesInOneLineAndLeavesNothingBehind) {
  WriteText("a.txt", "one document\n");
  WriteText("empty.txt", "");
  const struct {
    const char* arguments;
    const char* says;
  } kCases[] = {
      {"a.txt", "needs --output"},
      {"--output o", "needs at least one text file"},
      {"--output o none.txt", "cannot find 'none.txt'"},
      {"--output o empty.txt", "are empty"},
      {"--output o .", "no regular file"},
      {"--output o a.txt", "nothing is left for validation"},
      {"--output o --validation-fraction 1 a.txt", "must be in [0, 1)"},
      {"--output o --split-documents word a.txt", "one of blank|file|none"},
      {"--output o --tokenizer x a.txt", "there is no tokenizer 'x'"},
      {"--output a.txt/o a.txt", "cannot create the directory"},
      {"--decode a.txt", "shorter than a token file's header"},
      {"--outptu o a.txt", "did you mean --output?"},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.arguments);
    const Result r = Tokenize(c.arguments);
    // A disk may be full today; what was asked for stays wrong.
    const bool written = std::string(c.says).find("cannot create") == std::string::npos;
    EXPECT_EQ(r.code, written ? 2 : 1);
    EXPECT_THAT(r.output, HasSubstr(c.says));
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      EXPECT_EQ(entry.path().extension(), ".txt") << entry.path();
    }
  }
  EXPECT_EQ(Tokenize("--help").code, 0);
}

TEST_F(ToolsTest, NgramPrintsTheHeldOutLoss) {
  std::string text;
  for (int i = 0; i < 2000; ++i) text += "ab";
  WriteText("a.txt", text + "\n" + text + "\n");
  ASSERT_EQ(Tokenize("--output o --split-documents none --validation-fraction 0.5 a.txt").code, 0);
  Result r = RunProgram(STRETTO_NGRAM " --train " + Path("o.train.bin") + " --validation " +
                        Path("o.validation.bin"));
  EXPECT_EQ(r.code, 0);
  EXPECT_THAT(r.output, HasSubstr("ngram-3 held-out loss: 0.00"));
  EXPECT_THAT(r.output, HasSubstr(" nats/byte"));
  r = RunProgram(STRETTO_NGRAM " --train " + Path("o.train.bin") + " --validation " +
                 Path("none.bin"));
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.output, HasSubstr("no file matches"));
  EXPECT_EQ(RunProgram(STRETTO_NGRAM).code, 2);
}

#else

TEST(ToolsTest, NeedsThePrograms) {
  GTEST_SKIP() << "the programs are not built; configure with STRETTO_BUILD_PROGRAMS=ON";
}

#endif  // STRETTO_TOKENIZE

}  // namespace
}  // namespace stretto
