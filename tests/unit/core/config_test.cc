#include "stretto/core/config.h"

#include <sys/stat.h>

#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

struct Norm {
  double epsilon = 1e-5;
  void Visit(ConfigVisitor& v) {
    v.Field("epsilon", &epsilon, "added to the variance", {.min = 0, .max = 1});
  }
  bool operator==(const Norm&) const = default;
};

struct Model {
  int64_t layers = 12;
  int64_t heads = 6;
  bool bias = true;
  std::string activation = "gelu";
  Norm norm;
  void Visit(ConfigVisitor& v) {
    v.Field("layers", &layers, "transformer blocks", {.min = 1});
    v.Field("heads", &heads, "attention heads", {.min = 1, .max = 512});
    v.Field("bias", &bias, "linear layers have biases");
    v.Choice("activation", &activation, {"gelu", "swiglu", "relu"}, "of the MLP: a | b");
    v.Section("norm", &norm, "normalisation");
  }
  bool operator==(const Model&) const = default;
};

struct Config {
  Model model;
  double learning_rate = 6e-4;
  int64_t steps = 100;
  std::string name = "run \"1\"";
  std::vector<int64_t> milestones = {10, 20};
  std::vector<std::string> files;
  void Visit(ConfigVisitor& v) {
    v.Section("model", &model, "the network");
    v.Field("learning_rate", &learning_rate, "peak, per step", {.min = 0});
    v.Field("steps", &steps, "optimizer steps");
    v.Field("name", &name, "of the run");
    v.Field("milestones", &milestones, "steps at which something happens");
    v.Field("files", &files, "token files");
  }
  bool operator==(const Config&) const = default;
};

absl::Status Parse(const std::string& json, Config* config, std::vector<std::string> sets = {}) {
  return ParseConfig(json, "test.json", sets, ConfigRef(config));
}

// The message of a parse that must fail.
std::string Error(const std::string& json, std::vector<std::string> sets = {}) {
  Config config;
  const absl::Status status = Parse(json, &config, std::move(sets));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << json;
  return std::string(status.message());
}

TEST(ConfigTest, ReadsValuesAndComments) {
  Config config;
  const absl::Status status = Parse(R"(// a run
    { "model": { "layers": 3, /* few */ "bias": false, "norm": { "epsilon": 1e-6 },
                 "activation": "swiglu" },
      "learning_rate": 1, "steps": 1e6, "name": "\u00e9 // not a comment",
      "milestones": [], "files": ["a", "b"] })",
                                    &config);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(config.model.layers, 3);
  EXPECT_EQ(config.model.heads, 6);  // the default
  EXPECT_FALSE(config.model.bias);
  EXPECT_EQ(config.model.norm.epsilon, 1e-6);
  EXPECT_EQ(config.model.activation, "swiglu");
  EXPECT_EQ(config.learning_rate, 1.0);
  EXPECT_EQ(config.steps, 1000000);
  EXPECT_EQ(config.name, "\xc3\xa9 // not a comment");
  EXPECT_THAT(config.milestones, IsEmpty());
  EXPECT_THAT(config.files, ElementsAre("a", "b"));
}

TEST(ConfigTest, EmptyTextOfAnObjectKeepsTheDefaults) {
  Config config;
  ASSERT_TRUE(Parse("{}", &config).ok());
  EXPECT_EQ(config, Config());
}

TEST(ConfigTest, ReportsAllErrorsAtOnce) {
  const std::string message = Error(
      R"({"model": {"layers": 0, "heeds": 4, "bias": 1, "activation": "gelo"},
          "learning_rate": "fast", "steps": 1.5, "name": 3, "milestones": [1, "x", 2.5],
          "files": "a", "stepz": 1})",
      {"model.layrs=3", "nonsense"});
  for (const char* part : {
           "test.json: 13 errors in the configuration:",
           "\n  model.layers: 0 is out of range; give at least 1",
           "\n  model.heeds: is not a known name; did you mean \"model.heads\"?",
           "\n  model.bias: expected true or false, got the number 1",
           "\n  model.activation: expected one of \"gelu\", \"swiglu\", \"relu\", got the string "
           "\"gelo\"; did you mean \"gelu\"?",
           "\n  learning_rate: expected a number, got the string \"fast\"",
           "\n  steps: expected an integer, got the number 1.5",
           "\n  name: expected a string, got the number 3",
           "\n  milestones[1]: expected an integer, got the string \"x\"",
           "\n  milestones[2]: expected an integer, got the number 2.5",
           "\n  files: expected a list of strings, got the string \"a\"",
           "\n  stepz: is not a known name; did you mean \"steps\"?",
           "\n  --set model.layrs: is not a known name; did you mean \"model.layers\"?",
           "\n  --set nonsense: expected PATH=VALUE",
       }) {
    EXPECT_THAT(message, HasSubstr(part));
  }
}

TEST(ConfigTest, FindsFieldsThatAreInAnotherSection) {
  EXPECT_THAT(Error(R"({"epsilon": 1e-6})"),
              HasSubstr("epsilon: is not a known name; did you mean \"model.norm.epsilon\"?"));
  EXPECT_THAT(Error("{}", {"heads=3"}), HasSubstr("did you mean \"model.heads\"?"));
  EXPECT_THAT(Error(R"({"zzzzzzzzzz": 1})"), Not(HasSubstr("did you mean")));
}

TEST(ConfigTest, RefusesNumbersThatDoNotFit) {
  for (const char* value : {"1.5", "true", "null", "\"1\"", "[1]", "{}", "9223372036854775808",
                            "18446744073709551616", "1e19", "-1e19", "1e999"}) {
    Error(std::string("{\"steps\": ") + value + "}");
  }
  Config config;
  ASSERT_TRUE(Parse(R"({"steps": -9223372036854775808, "milestones": [9223372036854775807, -0.0]})",
                    &config)
                  .ok());
  EXPECT_EQ(config.steps, std::numeric_limits<int64_t>::min());
  EXPECT_THAT(config.milestones, ElementsAre(std::numeric_limits<int64_t>::max(), 0));
  for (const char* value : {"NaN", "Infinity", "1e999", "-1e999", "-1", "null", "true"}) {
    Error(std::string("{\"learning_rate\": ") + value + "}");
    Error("{}", {std::string("learning_rate=") + value});
  }
  EXPECT_THAT(Error(R"({"model": {"norm": {"epsilon": 2.5}}})"),
              HasSubstr("model.norm.epsilon: 2.5 is out of range; give 0 to 1"));
}

TEST(ConfigTest, RefusesDuplicates) {
  EXPECT_THAT(Error(R"({"steps": 1, "steps": 2})"), HasSubstr("steps: is given twice"));
  EXPECT_THAT(Error(R"({"model": {"layers": 1, "bias": true, "layers": 1}})"),
              HasSubstr("model.layers: is given twice"));
  EXPECT_THAT(Error(R"({"model": {"layers": 1}, "model": {"layers": 1}})"),
              HasSubstr("  model: is given twice"));
  Config config;  // the same name in different sections is fine
  EXPECT_THAT(Error(R"({"model": {"steps": 1}, "steps": 2})"), Not(HasSubstr("twice")));
}

TEST(ConfigTest, BrokenTextIsAnErrorAndNothingElse) {
  EXPECT_THAT(Error(""), HasSubstr("test.json: is not valid JSON"));
  EXPECT_THAT(Error("{\n  \"steps\": }"), HasSubstr("line 2"));
  for (const char* text : {"{", "[", "\"", "{\"a\"", "{\"steps\": 1,}", "/*", "{} x", "\\", "{\"a",
                           "\xff\xfe", "{\"name\": \"\xc3\x28\"}", "{\"\xff\": 1}", "nul",
                           "{\"name\": \"\\ud800\"}", "{'steps': 1}"}) {
    EXPECT_THAT(Error(text), Not(HasSubstr("json.exception"))) << text;
  }
  for (const char* text : {"[]", "1", "null", "\"x\""}) {
    EXPECT_THAT(Error(text), HasSubstr("expected an object"));
  }
  EXPECT_THAT(Error(std::string("{\"steps\": 1}\0", 13)), HasSubstr("not valid"));
}

TEST(ConfigTest, DeepNestingIsRefusedBeforeItCostsTheStack) {
  constexpr int kDeep = 1000000;
  EXPECT_THAT(Error("{\"files\": " + std::string(kDeep, '[') + std::string(kDeep, ']') + "}"),
              HasSubstr("deeper than 100"));
  EXPECT_THAT(Error(std::string(kDeep, '[')), HasSubstr("deeper than 100"));
  Error("{}", {"files=" + std::string(kDeep, '[')});
  // Brackets in strings and comments do not count.
  Config config;
  const std::string brackets(200, '[');
  EXPECT_TRUE(
      Parse("{/*" + brackets + "*/ \"name\": \"\\\"" + brackets + "\" //" + brackets + "\n}",
            &config)
          .ok());
}

TEST(ConfigTest, SettingsOverrideTheText) {
  Config config;
  const absl::Status status = Parse(
      R"({"model": {"layers": 3}, "steps": 5})", &config,
      {"model.layers=4", "model.layers=5", "model.norm.epsilon=0.5", "model.bias=false",
       "model.activation=relu", "name=a=b", "milestones=[3,4]", "files=[\"x\"]", "steps=1e3"});
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(config.model.layers, 5);
  EXPECT_EQ(config.model.norm.epsilon, 0.5);
  EXPECT_FALSE(config.model.bias);
  EXPECT_EQ(config.model.activation, "relu");
  EXPECT_EQ(config.name, "a=b");
  EXPECT_THAT(config.milestones, ElementsAre(3, 4));
  EXPECT_THAT(config.files, ElementsAre("x"));
  EXPECT_EQ(config.steps, 1000);
}

TEST(ConfigTest, StringSettingsAreBareOrQuoted) {
  for (const auto& [text, value] : std::vector<std::pair<std::string, std::string>>{
           {"123", "123"}, {"true", "true"}, {"\"q\"", "q"}, {"", ""}, {"[x", "[x"}}) {
    Config config;
    ASSERT_TRUE(Parse("{}", &config, {"name=" + text}).ok());
    EXPECT_EQ(config.name, value);
  }
}

TEST(ConfigTest, BadSettingsAreNamed) {
  EXPECT_THAT(Error("{}", {"steps=many"}),
              HasSubstr("--set steps: expected an integer, got the string \"many\""));
  EXPECT_THAT(Error("{}", {"steps="}), HasSubstr("--set steps: expected an integer"));
  EXPECT_THAT(Error("{}", {"model.layers=0"}), HasSubstr("--set model.layers: 0 is out of range"));
  EXPECT_THAT(Error("{}", {"model=3"}), HasSubstr("--set model: is a section"));
  EXPECT_THAT(Error("{}", {"=3"}), HasSubstr("expected PATH=VALUE"));
  EXPECT_THAT(Error("{}", {"model.activation=tanh"}), HasSubstr("expected one of"));
  EXPECT_THAT(Error("{}", {"files=a"}), HasSubstr("expected a list of strings"));
  EXPECT_THAT(Error(R"({"model": 3})"), HasSubstr("model: expected a section (an object)"));
}

TEST(ConfigTest, PrintedConfigurationsParseBack) {
  Config config;
  config.model.layers = -std::numeric_limits<int64_t>::max();
  config.model.layers = 1;
  config.model.norm.epsilon = 1.0 / 3;
  config.learning_rate = 4.9e-324;
  config.steps = std::numeric_limits<int64_t>::min();
  config.name = "tab\t quote\" slash\\ \xc3\xa9 \x01";
  config.milestones = {std::numeric_limits<int64_t>::max(), -1, 0};
  config.files = {"", "a,b", "]"};
  const std::string text = PrintConfig(ConfigRef(&config));
  Config back;
  const absl::Status status = Parse(text, &back);
  ASSERT_TRUE(status.ok()) << status << text;
  EXPECT_EQ(config, back);
  EXPECT_EQ(PrintConfig(ConfigRef(&back)), text);
}

TEST(ConfigTest, PrintsIndentedJson) {
  Model model;
  EXPECT_EQ(PrintConfig(ConfigRef(&model)),
            "{\n"
            "  \"layers\": 12,\n"
            "  \"heads\": 6,\n"
            "  \"bias\": true,\n"
            "  \"activation\": \"gelu\",\n"
            "  \"norm\": {\n"
            "    \"epsilon\": 1e-05\n"
            "  }\n"
            "}\n");
  struct Empty {
    void Visit(ConfigVisitor&) {}
  } empty;
  EXPECT_EQ(PrintConfig(ConfigRef(&empty)), "{}\n");
}

TEST(ConfigTest, DescribesEverySection) {
  Config config;
  const std::string text = DescribeConfig(ConfigRef(&config));
  EXPECT_THAT(text, HasSubstr("| name | type | default | range | meaning |\n"));
  EXPECT_THAT(text, HasSubstr("## `model`\n\nthe network\n"));
  EXPECT_THAT(text, HasSubstr("## `model.norm`\n\nnormalisation\n"));
  EXPECT_THAT(text, HasSubstr("| `heads` | integer | `6` | 1 to 512 | attention heads |\n"));
  EXPECT_THAT(text,
              HasSubstr("| `epsilon` | number | `1e-05` | 0 to 1 | added to the variance |\n"));
  EXPECT_THAT(text, HasSubstr("| `activation` | choice | `\"gelu\"` | `gelu`, `swiglu`, `relu` | "
                              "of the MLP: a \\| b |\n"));
  EXPECT_THAT(text, HasSubstr("| `milestones` | list of integers | `[10, 20]` |  |"));
}

TEST(ConfigTest, LoadsFiles) {
  const std::string path = ::testing::TempDir() + "stretto_config_test.json";
  std::ofstream(path) << R"({"steps": 7} // end)";
  Config config;
  ASSERT_TRUE(LoadConfig(path, {"name=x"}, ConfigRef(&config)).ok());
  EXPECT_EQ(config.steps, 7);
  EXPECT_EQ(config.name, "x");
  std::ofstream(path) << "{\"stepz\": 7}";
  EXPECT_THAT(std::string(LoadConfig(path, {}, ConfigRef(&config)).message()), HasSubstr(path));
  std::remove(path.c_str());
  const absl::Status missing = LoadConfig(path, {}, ConfigRef(&config));
  EXPECT_EQ(missing.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(missing.message()), HasSubstr(path));
  EXPECT_FALSE(LoadConfig(::testing::TempDir(), {}, ConfigRef(&config)).ok());
  // Which would be waited for.
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_THAT(std::string(LoadConfig(path, {}, ConfigRef(&config)).message()),
              HasSubstr("no regular file but a pipe"));
  std::remove(path.c_str());
}

TEST(NearestNameTest, DistanceAndTies) {
  EXPECT_EQ(NearestName("lr", {"learning_rate", "tr", "l"}), "tr");
  EXPECT_EQ(NearestName("laers", {"heads", "layers"}), "layers");
  EXPECT_EQ(NearestName("abcdef", {"abc"}), "abc");  // 3 = 1 + 6 / 3
  EXPECT_EQ(NearestName("abcde", {"ab"}), "");       // 3 > 1 + 5 / 3
  EXPECT_EQ(NearestName("x", {}), "");
  EXPECT_EQ(NearestName("", {"ab", "c"}), "c");
}

}  // namespace
}  // namespace stretto
