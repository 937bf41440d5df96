#include "tools/arguments.h"

#include <gmock/gmock.h>

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Values {
  std::string text = "none";
  std::string choice = "a";
  int64_t count = 3;
  double fraction = 0.5;
  bool flag = false;
};

struct Parsed {
  Values values;
  absl::Status status;
  std::vector<std::string> rest;
  bool help;
};

Parsed Parse(std::vector<const char*> words, const std::string& rest = "FILE...") {
  Parsed parsed;
  Arguments arguments("program", "does things", rest);
  arguments.Add("text", "T", "a text", &parsed.values.text);
  arguments.AddChoice("choice", {"a", "b"}, "a choice", &parsed.values.choice);
  arguments.Add("count", "N", "a count", &parsed.values.count);
  arguments.Add("fraction", "F", "a fraction", &parsed.values.fraction);
  arguments.AddFlag("flag", "a flag", &parsed.values.flag);
  words.insert(words.begin(), "program");
  parsed.status = arguments.Parse(static_cast<int>(words.size()), words.data());
  parsed.rest = arguments.rest();
  parsed.help = arguments.help();
  return parsed;
}

TEST(ArgumentsTest, TakesBothForms) {
  const Parsed p = Parse({"--text", "x y", "in", "--count=-7", "--fraction", "2.5e-1", "--flag",
                          "--choice=b", "-", "--", "--count"});
  ASSERT_TRUE(p.status.ok()) << p.status;
  EXPECT_EQ(p.values.text, "x y");
  EXPECT_EQ(p.values.count, -7);
  EXPECT_EQ(p.values.fraction, 0.25);
  EXPECT_TRUE(p.values.flag);
  EXPECT_EQ(p.values.choice, "b");
  EXPECT_THAT(p.rest, ElementsAre("in", "-", "--count"));
  EXPECT_EQ(Parse({"--text="}).values.text, "");
  EXPECT_EQ(Parse({"--text=a=b"}).values.text, "a=b");
  EXPECT_EQ(Parse({}).values.text, "none");
}

TEST(ArgumentsTest, RefusesInOneSentence) {
  const struct {
    std::vector<const char*> words;
    const char* says;
  } kCases[] = {
      {{"--cuont", "3"}, "does not know --cuont; did you mean --count?"},
      {{"--entirely-different"}, "see --help"},
      {{"--count"}, "--count needs a value, a whole number"},
      {{"--count", "3x"}, "--count must be a whole number, not '3x'"},
      {{"--count", "99999999999999999999"}, "must be a whole number"},
      {{"--count="}, "must be a whole number"},
      {{"--fraction", "nan"}, "must be a number"},
      {{"--choice", "c"}, "--choice must be one of a|b, not 'c'"},
      {{"--flag=1"}, "--flag takes no value"},
      {{"-x"}, "does not know -x"},
  };
  for (const auto& c : kCases) {
    const absl::Status status = Parse(c.words).status;
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.says));
  }
  EXPECT_THAT(std::string(Parse({"stray"}, "").status.message()),
              HasSubstr("does not expect 'stray'"));
}

TEST(ArgumentsTest, HelpListsOptionsWithDefaults) {
  EXPECT_TRUE(Parse({"--help", "--nonsense"}).help);
  Values values;
  Arguments arguments("program", "does things", "FILE...");
  arguments.Add("count", "N", "a count", &values.count);
  EXPECT_THAT(arguments.Help(), HasSubstr("usage: program [options] FILE..."));
  EXPECT_THAT(arguments.Help(), HasSubstr("--count N"));
  EXPECT_THAT(arguments.Help(), HasSubstr("a count (default 3)"));
}

}  // namespace
}  // namespace stretto
