// Our ids against those of tiktoken and Hugging Face's tokenizers, which generate.py wrote down.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "stretto/data/tokenizer.h"

namespace stretto {
namespace {

void ExpectParity(const Tokenizer& tokenizer, const std::string& expected_path) {
  std::ifstream file(expected_path);
  ASSERT_TRUE(file) << expected_path << " is missing; run generate.py";
  int cases = 0;
  for (std::string line; std::getline(file, line); ++cases) {
    const size_t tab = line.find('\t');
    ASSERT_NE(tab, std::string::npos);
    const std::string text = absl::HexStringToBytes(line.substr(0, tab));
    std::vector<int32_t> expected, ids;
    std::istringstream numbers(line.substr(tab + 1));
    for (int32_t id; numbers >> id;) expected.push_back(id);
    const absl::Status status = tokenizer.Encode(text, &ids);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(ids, expected) << absl::CEscape(text);
    EXPECT_EQ(*tokenizer.Decode(ids), text);
  }
  EXPECT_GT(cases, 100);
}

TEST(TokenizerParityTest, TinyTiktoken) {
  auto tokenizer = OpenTokenizer(STRETTO_CASES "/tiny.tiktoken");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  ExpectParity(**tokenizer, STRETTO_CASES "/tiny_expected.txt");
}

TEST(TokenizerParityTest, TinyVocabAndMerges) {
  auto tokenizer = OpenTokenizer(STRETTO_CASES "/tiny");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  auto same = OpenTokenizer(STRETTO_CASES "/tiny.tiktoken");
  EXPECT_EQ((*tokenizer)->vocabulary(), (*same)->vocabulary());
  EXPECT_EQ((*tokenizer)->end_of_text(), (*same)->end_of_text());
  ExpectParity(**tokenizer, STRETTO_CASES "/tiny_expected.txt");
}

TEST(TokenizerParityTest, Gpt2) {
  const char* variable = std::getenv("STRETTO_GPT2_VOCABULARY");
  const std::string path = variable != nullptr ? variable : STRETTO_DATA_CACHE "/gpt2.tiktoken";
  if (!std::filesystem::exists(path)) {
    GTEST_SKIP() << "GPT-2's vocabulary is not at " << path
                 << "; fetch it with scripts/fetch_gpt2_vocabulary.sh";
  }
  auto tokenizer = OpenTokenizer(path);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocabulary(), 50257);
  EXPECT_EQ((*tokenizer)->end_of_text(), 50256);
  ExpectParity(**tokenizer, STRETTO_CASES "/gpt2_expected.txt");
}

}  // namespace
}  // namespace stretto
