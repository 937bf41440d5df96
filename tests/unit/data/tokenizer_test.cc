#include "stretto/data/tokenizer.h"

#include <gmock/gmock.h>

#include <chrono>
#include <thread>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "src/data/bpe.h"
#include "src/data/split.h"
#include "stretto/core/rng.h"
#include "unit/data/scratch.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TokenizerTest : public Scratch {};

std::string Base64(const std::string& bytes) { return absl::Base64Escape(bytes); }

// The 256 bytes as ranks 0..255 and then `more`.
std::string TiktokenText(const std::vector<std::string>& more) {
  std::string text;
  for (int b = 0; b < 256; ++b) {
    absl::StrAppend(&text, Base64(std::string(1, static_cast<char>(b))), " ", b, "\n");
  }
  for (size_t i = 0; i < more.size(); ++i) {
    absl::StrAppend(&text, Base64(more[i]), " ", 256 + i, "\n");
  }
  return text;
}

std::vector<int32_t> Encode(const Tokenizer& tokenizer, const std::string& text) {
  std::vector<int32_t> ids;
  const absl::Status status = tokenizer.Encode(text, &ids);
  EXPECT_TRUE(status.ok()) << status;
  return ids;
}

std::vector<std::string> Split(const std::string& text) {
  auto splitter = Gpt2Splitter::Create();
  EXPECT_TRUE(splitter.ok()) << splitter.status();
  std::vector<std::string> pieces;
  Gpt2Splitter::Pieces all(**splitter, text);
  for (std::string_view piece; all.Next(&piece);) pieces.emplace_back(piece);
  EXPECT_TRUE(all.status().ok()) << all.status();
  return pieces;
}

TEST_F(TokenizerTest, BytesAreBytes) {
  const auto tokenizer = MakeByteTokenizer();
  EXPECT_EQ(tokenizer->vocabulary(), 257);
  EXPECT_EQ(tokenizer->end_of_text(), 256);
  std::string all;
  for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
  std::vector<int32_t> ids = Encode(*tokenizer, all);
  for (int b = 0; b < 256; ++b) EXPECT_EQ(ids[b], b);
  ids.push_back(256);
  EXPECT_EQ(*tokenizer->Decode(ids), all);
  for (const int32_t bad : {-1, 257}) {
    const absl::Status status = tokenizer->Decode({65, bad}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("at position 1"));
  }
}

TEST_F(TokenizerTest, SplitsAsGpt2Does) {
  EXPECT_THAT(Split("Hello world"), ElementsAre("Hello", " world"));
  EXPECT_THAT(Split("I'll, we've 'tis"), ElementsAre("I", "'ll", ",", " we", "'ve", " '", "tis"));
  EXPECT_THAT(Split("I'LL"), ElementsAre("I", "'", "LL"));
  EXPECT_THAT(Split("a1b 23!?"), ElementsAre("a", "1", "b", " 23", "!?"));
  EXPECT_THAT(Split("a   b"), ElementsAre("a", "  ", " b"));
  EXPECT_THAT(Split("a\n\n b\n"), ElementsAre("a", "\n\n", " b", "\n"));
  EXPECT_THAT(Split("a\n\nb"), ElementsAre("a", "\n", "\n", "b"));
  EXPECT_THAT(Split("a  "), ElementsAre("a", "  "));
  EXPECT_THAT(Split("été über 東京"), ElementsAre("été", " über", " 東京"));
  EXPECT_THAT(Split("x²½"), ElementsAre("x", "²½"));
  EXPECT_THAT(Split(""), ElementsAre());
  EXPECT_THAT(Split(std::string("a\0b", 3)), ElementsAre("a", std::string("\0", 1), "b"));
}

// U+180E is no white space, U+3000 is; U+31350 is a letter since Unicode 15, U+11BF0 a number
// since 16.
TEST_F(TokenizerTest, UnicodeClassesDoNotDependOnTheRegexLibrary) {
  EXPECT_THAT(Split("a\u180e!"), ElementsAre("a", "\u180e!"));
  EXPECT_THAT(Split("a\u3000\u3000!"), ElementsAre("a", "\u3000", "\u3000", "!"));
  EXPECT_THAT(Split("a\U00031350!"), ElementsAre("a\U00031350", "!"));
  EXPECT_THAT(Split("1\U00011bf0a"), ElementsAre("1\U00011bf0", "a"));
}

TEST_F(TokenizerTest, FindsWhereUtf8Ends) {
  const struct {
    std::string text;
    size_t valid;
  } kCases[] = {
      {"", 0},
      {"abc", 3},
      {"\u00e9", 2},
      {"\u20ac", 3},
      {"\U0001f600", 4},
      {"a\x80", 1},
      {"\xc0\x80", 0},
      {"\xc1\xbf", 0},
      {"\xc2", 0},
      {"\xe0\x9f\xbf", 0},
      {"\xe0\xa0\x80", 3},
      {"\xed\x9f\xbf", 3},
      {"\xed\xa0\x80", 0},
      {"\xf0\x8f\xbf\xbf", 0},
      {"\xf0\x90\x80\x80", 4},
      {"\xf4\x8f\xbf\xbf", 4},
      {"\xf4\x90\x80\x80", 0},
      {"\xf5\x80\x80\x80", 0},
      {"ab\xe2\x82", 2},
      {"\xff", 0},
  };
  for (const auto& c : kCases) EXPECT_EQ(ValidUtf8Prefix(c.text), c.valid) << absl::CEscape(c.text);
}

TEST_F(TokenizerTest, StrayBytesArePiecesOfTheirOwn) {
  EXPECT_THAT(Split("ab\xff\xfe cd"), ElementsAre("ab", "\xff\xfe", " cd"));
  EXPECT_THAT(Split("a\xe2\x82"), ElementsAre("a", "\xe2\x82"));
  EXPECT_THAT(Split("\xe2\x82z"), ElementsAre("\xe2\x82", "z"));
  // Text before a stray byte is split as if it ended there.
  EXPECT_THAT(Split("a  \xff"), ElementsAre("a", "  ", "\xff"));
}

TEST_F(TokenizerTest, MergesLowestRankFirstThenLeftmost) {
  auto t = ParseTiktoken(TiktokenText({"bc", "ab", "aa", "abc", "aaaa"}), "t");
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->vocabulary(), 262);
  EXPECT_EQ((*t)->end_of_text(), 261);
  EXPECT_THAT(Encode(**t, "bcd"), ElementsAre(256, 'd'));
  EXPECT_THAT(Encode(**t, "abd"), ElementsAre(257, 'd'));
  // bc goes before ab, then a + bc is abc.
  EXPECT_THAT(Encode(**t, "xabc"), ElementsAre('x', 259));
  EXPECT_THAT(Encode(**t, "aaa"), ElementsAre(258, 'a'));
  EXPECT_THAT(Encode(**t, "aaaaa"), ElementsAre(260, 'a'));
  EXPECT_THAT(Encode(**t, "xaaaaaaa"), ElementsAre('x', 260, 258, 'a'));
  EXPECT_EQ(*(*t)->Decode({260, 261, 257}), "aaaaab");
  EXPECT_FALSE((*t)->Decode({262}).ok());
}

// A whole piece that is a token is that token even where no merges lead to it, as in tiktoken; with
// merges.txt only merges count.
TEST_F(TokenizerTest, WholePieces) {
  auto t = ParseTiktoken(TiktokenText({"xyz"}), "t");
  ASSERT_TRUE(t.ok());
  EXPECT_THAT(Encode(**t, "xyz"), ElementsAre(256));
  EXPECT_THAT(Encode(**t, "xyza"), ElementsAre('x', 'y', 'z', 'a'));
}

// The scan for short pieces and the heap for long ones are one algorithm: each piece is encoded by
// itself and, with a letter that merges with nothing, at lengths around the border.
TEST_F(TokenizerTest, ShortAndLongPiecesAgreeWithAPlainMerge) {
  std::vector<std::string> more;
  for (const char* token : {"ab", "ba", "aa", "bb", "aba", "abab", "bba", "aab", "baab", "aaaa"}) {
    more.push_back(token);
  }
  auto t = ParseTiktoken(TiktokenText(more), "t");
  ASSERT_TRUE(t.ok());
  const auto plain = [&](const std::string& piece) {
    std::vector<std::string> parts;
    for (const char c : piece) parts.emplace_back(1, c);
    for (;;) {
      size_t best = more.size(), at = 0;
      for (size_t i = 0; i + 1 < parts.size(); ++i) {
        for (size_t r = 0; r < best; ++r) {
          if (parts[i] + parts[i + 1] == more[r]) {
            best = r;
            at = i;
          }
        }
      }
      if (best == more.size()) break;
      parts[at] += parts[at + 1];
      parts.erase(parts.begin() + static_cast<int64_t>(at) + 1);
    }
    std::vector<int32_t> ids;
    for (const std::string& part : parts) {
      ids.push_back(part.size() == 1
                        ? static_cast<unsigned char>(part[0])
                        : 256 + static_cast<int32_t>(std::find(more.begin(), more.end(), part) -
                                                     more.begin()));
    }
    return ids;
  };
  const Rng rng(1, "bpe test");
  int64_t draw = 0;
  for (const int length : {5, 33, 63, 64, 65, 66, 100, 300}) {
    for (int i = 0; i < 40; ++i) {
      std::string piece;
      for (int k = 0; k < length; ++k) piece.push_back(rng.Below(draw++, 2) == 0 ? 'a' : 'b');
      ASSERT_EQ(Encode(**t, piece), plain(piece)) << piece;
    }
  }
}

// Quadratic work would take minutes here.
TEST_F(TokenizerTest, LongPiecesTakeNoQuadraticTime) {
  auto t = ParseTiktoken(TiktokenText({"  ", "    ", "aa", "aaaa", "ab"}), "t");
  ASSERT_TRUE(t.ok());
  for (const std::string& text :
       {std::string(1000000, ' '), std::string(1000000, 'a'), std::string(1000000, '\n') + "x",
        std::string(1000000, '\xff'), std::string(1000000, '!')}) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(*(*t)->Decode(Encode(**t, text)), text);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
  }
}

TEST_F(TokenizerTest, AnyBytesComeBack) {
  auto t =
      ParseTiktoken(TiktokenText({"\xff\xfe", "th", "the", " the", "\xc3\xa9", "\xe2\x82"}), "t");
  ASSERT_TRUE(t.ok());
  const Rng rng(3, "bpe test");
  const char* const kParts[] = {"the",          " the ",    "é",    "€",
                                "\xff\xfe",     "\xe2\x82", "\n\n", "  ",
                                "'ll",          "\xc0",     "12",   "\xf0\x9f\x98\x80",
                                "\xed\xa0\x80", "\x80",     "!"};
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (uint64_t k = 0; k < rng.Below(1000 * i, 20); ++k) {
      const uint64_t pick = rng.Below(1000 * i + k + 1, 16);
      text += pick == 15 ? std::string(1, static_cast<char>(rng.Below(1000 * i + k + 500, 256)))
                         : std::string(kParts[pick]);
    }
    ASSERT_EQ(*(*t)->Decode(Encode(**t, text)), text) << absl::CEscape(text);
  }
}

TEST_F(TokenizerTest, ThreadsShareOne) {
  auto t = ParseTiktoken(TiktokenText({"th", "the", " the"}), "t");
  ASSERT_TRUE(t.ok());
  std::string text;
  for (int i = 0; i < 2000; ++i) text += i % 3 == 0 ? " the" : "th\xff!\n ";
  const std::vector<int32_t> expected = Encode(**t, text);
  std::vector<std::thread> threads;
  std::vector<int> same(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] { same[i] = Encode(**t, text) == expected; });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(same, ElementsAre(1, 1, 1, 1));
}

TEST_F(TokenizerTest, RefusesDamagedTiktokenFiles) {
  const std::string good = TiktokenText({"ab", "cd"});
  const size_t line = good.find("\n", good.size() / 2) + 1;
  const struct {
    const char* name;
    std::string text;
    const char* says;
  } kCases[] = {
      {"empty", "", "holds no tokens"},
      {"cut base64", good + "QU 258\n", "line 259 of"},
      {"bad digit", good + "Q*I= 258\n", "is not a base64 token"},
      {"padding inside", good + "Q=I= 258\n", "is not a base64 token"},
      {"no rank", good + "QUI=\n", "line 259 of"},
      {"empty rank", good + "QUI= \n", "has no rank"},
      {"rank is text", good + "QUI= x\n", "has no rank"},
      {"rank with rest", good + "QUI= 258 1\n", "has no rank"},
      {"negative rank", good + "QUI= -1\n", "has no rank"},
      {"huge rank", good + "QUI= 99999999999999999999\n", "has no rank"},
      {"gap", good + "QUI= 259\n", "ranks below are missing"},
      {"duplicate rank", good + "QUI= 257\n", "the rank 257 twice"},
      {"duplicate token", good + Base64("ab") + " 258\n", "the same token the ids 256 and 258"},
      {"missing byte", TiktokenText({}).substr(TiktokenText({}).find('\n') + 1), "missing"},
      {"no byte 0", "QUI= 0\n", "no token for the single byte 0x00"},
      {"huge line", good + std::string(100000, 'A') + " 258\n", "too long"},
      {"huge token", good + Base64(std::string(513, 'x')) + " 258\n", "513 bytes"},
      {"binary", std::string(300, '\xff'), "line 1 of"},
      {"empty token", good + " 258\n", "is not a base64 token"},
      {"cut file", good.substr(0, line + 2), "is not a base64 token"},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    const std::string path = WriteText("t.tiktoken", c.text);
    const absl::Status status = OpenTokenizer(path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
    EXPECT_THAT(std::string(status.message()), HasSubstr(path));
    ExpectOneSentence(status);
  }
  EXPECT_TRUE(OpenTokenizer(WriteText("t.tiktoken", good)).ok());
  // Windows line ends and a missing last one are no damage.
  std::string windows;
  for (const char c : good) windows += c == '\n' ? std::string("\r\n") : std::string(1, c);
  windows.resize(windows.size() - 2);
  EXPECT_TRUE(OpenTokenizer(WriteText("t.tiktoken", windows)).ok());
}

// vocab.json in GPT-2's alphabet: printable bytes as themselves, the others from U+0100.
std::string Character(int byte) {
  static const std::vector<std::string> kAll = [] {
    std::vector<std::string> all(256);
    int next = 0x100;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b > 0x20 && b < 0x7f) || (b > 0xa0 && b != 0xad);
      const int point = printable ? b : next++;
      if (point < 0x80) {
        all[b] = std::string(1, static_cast<char>(point));
      } else {
        all[b] = {static_cast<char>(0xc0 | point >> 6), static_cast<char>(0x80 | (point & 63))};
      }
    }
    return all;
  }();
  return kAll[byte];
}

std::string VocabJson(const std::string& more) {
  std::string json = "{";
  for (int b = 0; b < 256; ++b) {
    const std::string c = Character(b);
    absl::StrAppend(&json, b == 0 ? "" : ", ", "\"", c == "\"" || c == "\\" ? "\\" : "", c,
                    "\": ", b);
  }
  return json + more + "}";
}

TEST_F(TokenizerTest, ReadsVocabJsonAndMerges) {
  WriteText("vocab.json", VocabJson(", \"th\": 256, \"the\": 257, \"Ġthe\": 258, \"he\": 259, "
                                    "\"<|endoftext|>\": 260, \"xyz\": 261"));
  // "he" is there as a token and a merge, but "th" goes first.
  WriteText("merges.txt", "#version: 0.2\nt h\nth e\nĠ the\nh e\n");
  auto t = OpenTokenizer(folder_);
  ASSERT_TRUE(t.ok()) << t.status();
  EXPECT_EQ((*t)->vocabulary(), 262);
  EXPECT_EQ((*t)->end_of_text(), 260);
  EXPECT_THAT(Encode(**t, "the the he"), ElementsAre(257, 258, ' ', 259));
  EXPECT_THAT(Encode(**t, "xyz"), ElementsAre('x', 'y', 'z'));  // no merges lead to it
  const std::vector<int32_t> special = Encode(**t, "<|endoftext|>");
  EXPECT_EQ(special.size(), 13);  // ordinary text
  EXPECT_EQ(*(*t)->Decode({258, 260, 261, 10}), " thexyz\n");
  const std::string mixed("\x00\xad\x7f\xff the", 8);
  EXPECT_EQ(*(*t)->Decode(Encode(**t, mixed)), mixed);
}

TEST_F(TokenizerTest, RefusesDamagedVocabAndMerges) {
  const std::string merges = "#version: 0.2\nt h\n";
  const std::string good = VocabJson(", \"th\": 256");
  const struct {
    const char* name;
    std::string vocab, merges;
    const char* says;
  } kCases[] = {
      {"empty", "", merges, "is not a JSON object"},
      {"cut", good.substr(0, good.size() - 3), merges, "is not a JSON object"},
      {"array", "[1, 2]", merges, "is not a JSON object"},
      {"empty object", "{}", merges, "is not a JSON object"},
      {"not UTF-8", "{\"\xff\": 0}", merges, "is not a JSON object"},
      {"deep", std::string(200000, '['), merges, "is not a JSON object"},
      {"id is text", VocabJson(", \"th\": \"256\""), merges, "gives the token 'th' the id \"256\""},
      {"id is a fraction", VocabJson(", \"th\": 256.0"), merges, "the id 256.0"},
      {"id is negative", VocabJson(", \"th\": -1"), merges, "the id -1"},
      {"id is huge", VocabJson(", \"th\": 99999999999999999999999"), merges,
       "gives the token 'th'"},
      {"gap", VocabJson(", \"th\": 300"), merges, "the id 300"},
      {"twice", VocabJson(", \"th\": 255"), merges, "the id 255 twice"},
      {"alphabet", VocabJson(", \"t h\": 256"), merges, "not in GPT-2's alphabet"},
      {"alphabet, far", VocabJson(", \"東\": 256"), merges, "not in GPT-2's alphabet"},
      {"empty token", VocabJson(", \"\": 256"), merges, "not in GPT-2's alphabet"},
      {"no bytes", "{\"a\": 0}", "", "no token for the single byte"},
      {"one word", good, "#version: 0.2\nth\n", "line 2 of"},
      {"three words", good, "t h e\n", "is not two tokens"},
      {"unknown", good, "t x\n", "lacks"},
      {"merge twice", good, "t h\nt h\n", "merge 2 of"},
      {"merges not UTF-8", good, "\xff \xfe\n", "is not two tokens"},
      {"merges huge line", good, std::string(100000, 'a') + " b\n", "is not two tokens"},
  };
  for (const auto& c : kCases) {
    SCOPED_TRACE(c.name);
    WriteText("vocab.json", c.vocab);
    WriteText("merges.txt", c.merges);
    const absl::Status status = OpenTokenizer(folder_).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
    EXPECT_THAT(std::string(status.message()), HasSubstr(folder_));
    ExpectOneSentence(status);
  }
  WriteText("vocab.json", good);
  WriteText("merges.txt", merges);
  EXPECT_TRUE(OpenTokenizer(folder_).ok());
}

TEST_F(TokenizerTest, OpensByName) {
  auto bytes = OpenTokenizer("bytes");
  ASSERT_TRUE(bytes.ok());
  EXPECT_STREQ((*bytes)->name(), "bytes");
  EXPECT_EQ(OpenTokenizer("byte").status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(OpenTokenizer(Path("no.tiktoken")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(OpenTokenizer(folder_).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::create_directory(Path("d.tiktoken"));
  EXPECT_THAT(std::string(OpenTokenizer(Path("d.tiktoken")).status().message()),
              HasSubstr("regular file"));
}

}  // namespace
}  // namespace stretto
