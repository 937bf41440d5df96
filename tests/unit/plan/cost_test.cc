#include "stretto/plan/cost.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace stretto {
namespace {

using ::testing::HasSubstr;

CostModel Example() {
  CostModel cost;
  cost.device = "a \"device\"";
  cost.forward = {{1e-3, 2e-6, 3e-9}, {0, 1e-6, 0}};
  cost.backward_input = {{1e-3, 4e-6, 3e-9}};
  cost.backward_weight = {{.fixed = 0.5}};
  cost.woven = 0.9;
  cost.boundary_bytes_per_token = 1536;
  cost.link_latency = 2e-6;
  cost.link_bytes_per_second = 4e10;
  return cost;
}

CostModel WithParts() {
  CostModel cost = Example();
  DeviceCost& parts = cost.parts.emplace();
  parts.model = "gpt2 hidden 64";
  parts.measured = "2 ranks over mpi";
  parts.ranks = 2;
  parts.layers = {{.name = "attn.qkv", .forward = {1e-5, 2e-8, 0}, .backward_weight = {0, 3e-8, 0}},
                  {.name = "attn", .backward_input = {0, 0, 3e-11}}};
  parts.hidden = 0.75;
  parts.update_per_element = 1e-10;
  parts.ring_per_token = 4e-9;
  parts.machine.all_gather = {.latency = 1e-6, .bytes_per_second = 1e10};
  parts.network.emplace().point_to_point = {.latency = 5e-6, .bytes_per_second = 2e9};
  return cost;
}

TEST(CostModel, SecondsFollowTokensPairsAndShares) {
  const CostModel cost = Example();
  const Program program = MakeProgram(ScheduleKind::kOneF1B, 2, 2, 1,
                                      {{.tokens = 30, .lengths = {20, 10}, .pipelines = {0}},
                                       {.tokens = 30, .lengths = {20, 10}, .pipelines = {0, 1}}})
                              .value();
  const double pairs = 20 * 21 / 2 + 10 * 11 / 2;
  const auto seconds = [&](StageWork work, int stage, int item) {
    return cost.Seconds(program, {.work = work, .stage = stage, .item = item});
  };
  EXPECT_DOUBLE_EQ(seconds(StageWork::kForward, 0, 0), 1e-3 + 30 * 2e-6 + pairs * 3e-9);
  EXPECT_DOUBLE_EQ(seconds(StageWork::kForward, 0, 1), 1e-3 + (30 * 2e-6 + pairs * 3e-9) / 2);
  EXPECT_DOUBLE_EQ(seconds(StageWork::kForward, 1, 0), 30 * 1e-6);
  EXPECT_DOUBLE_EQ(seconds(StageWork::kBackward, 1, 0),
                   seconds(StageWork::kBackwardInput, 1, 0) + 0.5);
  EXPECT_DOUBLE_EQ(cost.BoundarySeconds(program.items[0]), 2e-6 + 30 * 1536 / 4e10);
  EXPECT_DOUBLE_EQ(cost.BoundarySeconds(program.items[1]), 2e-6 + 15 * 1536 / 4e10);
}

TEST(CostModel, ScalingLayersLeavesWhatIsNone) {
  const CostModel before = WithParts();
  CostModel cost = before;
  ScaleLayers(3, &cost);
  EXPECT_EQ(cost.parts->Find("attn")->backward_input.per_pair,
            3 * before.parts->Find("attn")->backward_input.per_pair);
  for (size_t i = 0; i < before.forward.size(); ++i) {
    EXPECT_DOUBLE_EQ(cost.forward[i].Seconds(10, 20), 3 * before.forward[i].Seconds(10, 20));
  }
  EXPECT_EQ(cost.backward_weight.size(), before.backward_weight.size());
  EXPECT_EQ(cost.parts->machine, before.parts->machine);
  EXPECT_EQ(cost.parts->update_per_element, before.parts->update_per_element);
  EXPECT_EQ(cost.link_latency, before.link_latency);
}

TEST(CostModel, TheFileGoesThereAndBack) {
  CostModel alone = WithParts();
  alone.parts->network.reset();
  for (const CostModel& cost : {Example(), WithParts(), alone}) {
    const auto parsed = ParseCostModel(ToJson(cost), "costs.json");
    ASSERT_TRUE(parsed.ok()) << parsed.status().message();
    EXPECT_EQ(*parsed, cost);
  }
}

// A run that goes on compares texts.
TEST(CostModel, FilesOlderThanRingsCostsKeepTheirText) {
  CostModel cost = WithParts();
  std::string text = ToJson(cost);
  const size_t at = text.rfind('\n', text.find("\"ring_per_token\""));
  ASSERT_NE(at, std::string::npos);
  text.erase(at, text.find('\n', at + 1) - at);
  const absl::StatusOr<CostModel> parsed = ParseCostModel(text, "costs.json");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  cost.parts->ring_per_token = 0;
  EXPECT_EQ(*parsed, cost);
  EXPECT_EQ(ToJson(*parsed), text);
}

TEST(CostModel, NamesWhatIsWrongWithAFile) {
  const std::string good = ToJson(WithParts());
  const auto error = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    text.replace(at, from.size(), to);
    return std::string(ParseCostModel(text, "costs.json").status().message());
  };
  EXPECT_THAT(error("{", "["), HasSubstr("costs.json is no cost model"));
  EXPECT_THAT(error("\"version\": 1", "\"version\": 2"), HasSubstr("\"version\" must be 1"));
  EXPECT_THAT(error("\"woven\": 0.9", "\"woven\": -1"), HasSubstr("\"woven\""));
  EXPECT_THAT(error("\"woven\"", "\"wovne\""), HasSubstr("wov"));
  EXPECT_THAT(error("\"fixed\": 0.001", "\"fixed\": \"x\""),
              HasSubstr("\"fixed\" must be a number"));
  EXPECT_THAT(error("\"per_pair\": 0.0", "\"per_pear\": 0.0"), HasSubstr("per_p"));
  EXPECT_THAT(error("\"a \\\"device\\\"\"", "3"), HasSubstr("\"device\""));
  EXPECT_THAT(error("\"forward\": [", "\"forward\": 1, \"x\": ["), HasSubstr("\"forward\""));
  EXPECT_THAT(error("\"hidden\": 0.75", "\"hidden\": 1.5"), HasSubstr("\"hidden\""));
  for (const char* number : {"-1", "1e300", "\"x\"", "null"}) {
    EXPECT_THAT(error("\"ring_per_token\": 4e-09", std::string("\"ring_per_token\": ") + number),
                HasSubstr("\"ring_per_token\" must be a number from 0 to 1e9"));
  }
  EXPECT_THAT(error("\"ring_per_token\": 4e-09", "\"ring_per_token\": 1.1e-3"),
              HasSubstr("costs.json: \"ring_per_token\" must be at most 0.001 seconds"));
  EXPECT_THAT(error("\"ring_per_token\"", "\"ring_per_token\": 0, \"ring_per_token\""),
              HasSubstr("costs.json: parts.ring_per_token: is given twice; remove one"));
  EXPECT_THAT(error("\"assumed\": false", "\"assumed\": 0"), HasSubstr("\"assumed\""));
  EXPECT_THAT(error("\"latency\": 1e-06", "\"latency\": -1"), HasSubstr("\"latency\""));
  EXPECT_THAT(error("\"latency\": 1e-06", "\"latency\": 1e308"),
              HasSubstr("\"latency\" must be a number from 0 to 1e9"));
  EXPECT_THAT(error("\"bytes_per_second\": 2000000000.0", "\"bytes_per_second\": 1e-308"),
              HasSubstr("\"bytes_per_second\" must be 0 (no limit) or a number of at least 1"));
  EXPECT_THAT(error("\"machine\"", "\"machines\""), HasSubstr("machine"));
  EXPECT_THAT(error("\"attn.qkv\": {", "\"attn.qkv\": {\"x\": 1, "), HasSubstr("\"x\""));
  EXPECT_THAT(error("\"ranks\"", "\"rank\""), HasSubstr("rank"));
  EXPECT_THAT(std::string(ParseCostModel("", "costs.json").status().message()),
              HasSubstr("'costs.json' is empty"));
}

TEST(ReadCostModel, TakesRegularFilesOnly) {
  EXPECT_THAT(std::string(ReadCostModel("/dev/zero").status().message()),
              HasSubstr("'/dev/zero' is no regular file"));
  EXPECT_THAT(std::string(ReadCostModel("/tmp").status().message()), HasSubstr("no regular file"));
  const absl::Status absent = ReadCostModel("/nowhere/costs.json").status();
  EXPECT_EQ(absent.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(absent.message()), HasSubstr("'/nowhere/costs.json' could not be read"));
}

}  // namespace
}  // namespace stretto
