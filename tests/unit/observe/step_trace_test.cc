// The window of a trace, and ranks on one time axis; tests/unit/train/trace_test.cc has whole runs.
#include "stretto/observe/step_trace.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_cat.h"

namespace stretto {
namespace {

using Json = nlohmann::json;

class StepTraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = absl::StrCat(::testing::TempDir(), "stretto-step-trace-", getpid());
    std::filesystem::remove_all(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // Five steps of an action each, on three ranks whose clocks say `planted` times their number more
  // than rank 0's; what the file says.
  Json Run(StepTraceOptions options, int64_t planted) {
    options.file = directory_ + "/below/trace.json";
    const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
      Communicator comm(world);
      const auto stream = Stream::Create(Device::Cpu()).value();
      StepTraceOptions mine = options;
      mine.process = absl::StrCat("rank ", world.rank());
      mine.clock = [&, offset = planted * world.rank()] { return SteadyNanoseconds() + offset; };
      STRETTO_ASSIGN_OR_RETURN(const auto trace, StepTrace::Create(comm, *stream, mine));
      for (int64_t step = 1; step <= 5; ++step) {
        STRETTO_ASSIGN_OR_RETURN(TraceRecorder* const recorder, trace->BeginStep(step));
        const bool inside = step >= mine.first_step && step < mine.first_step + mine.steps;
        EXPECT_EQ(recorder != nullptr, inside) << step;
        EXPECT_EQ(comm.trace() != nullptr, inside) << step;
        if (recorder == nullptr) continue;
        const int action = recorder->Open("compute", "forward", "");
        recorder->Begin(action, *stream);
        recorder->End(action, *stream);
        if (trace->EndStep()) {
          EXPECT_EQ(step, mine.first_step + mine.steps - 1);
          STRETTO_RETURN_IF_ERROR(trace->Close());
        }
        STRETTO_RETURN_IF_ERROR(world.Barrier("step"));
      }
      return trace->Close();
    });
    EXPECT_TRUE(status.ok()) << status;
    std::ifstream in(options.file);
    return Json::parse(in, nullptr, /*allow_exceptions=*/false);
  }

  std::string directory_;
};

// A rank whose clock runs ahead by so much has its actions that much earlier.
TEST_F(StepTraceTest, MovesRanksByWhatTheirClocksDiffer) {
  for (const int64_t seconds : {0, 100, -100}) {
    const Json file = Run({.first_step = 2, .steps = 3}, seconds * 1'000'000'000);
    ASSERT_TRUE(file.is_object());
    EXPECT_EQ(file["otherData"]["lost_actions"], 0);
    EXPECT_EQ(file["otherData"]["ranks"], 3);
    std::map<std::pair<int, int64_t>, double> begins;  // by rank and step
    for (const Json& event : file["traceEvents"]) {
      if (event["ph"] == "X" && event["cat"] == "forward") {
        begins[{event["pid"], event["args"]["step"]}] = event["ts"];
      }
    }
    ASSERT_EQ(begins.size(), 9u);
    for (const auto& [key, begin] : begins) {
      const auto& [rank, step] = key;
      const double expected = begins[{0, step}] - 1e6 * static_cast<double>(seconds * rank);
      EXPECT_NEAR(begin, expected, 5e6) << "rank " << rank << ", step " << step;
    }
    EXPECT_GT(begins.begin()->second, 0);  // the axis begins with the window
    EXPECT_LT(begins.begin()->second, 5e6);
  }
}

TEST_F(StepTraceTest, KeepsWhatThereIsRoomFor) {
  const Json file = Run({.first_step = 1, .steps = 5, .capacity = 4}, 0);
  ASSERT_TRUE(file.is_object());
  // Each step has two actions; nothing else is communicated.
  EXPECT_EQ(file["otherData"]["lost_actions"], 3 * (10 - 4));
}

TEST_F(StepTraceTest, ReplacesNothingButATrace) {
  std::filesystem::create_directories(directory_);
  const std::string file = directory_ + "/file";
  const auto create = [&](const std::string& text) {
    std::ofstream(file) << text;
    return World::RunThreads(1, [&](World& world) {
      Communicator comm(world);
      const auto stream = Stream::Create(Device::Cpu()).value();
      return StepTrace::Create(comm, *stream, {.file = file, .steps = 1}).status();
    });
  };
  EXPECT_TRUE(create("{\"traceEvents\":[\n]}").ok());
  EXPECT_TRUE(create("").ok());
  const absl::Status refused = create("tokens");
  EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
  EXPECT_NE(refused.message().find("metrics.trace_file"), std::string::npos) << refused;
  std::string text;
  std::ifstream(file) >> text;
  EXPECT_EQ(text, "tokens");
  std::filesystem::remove(file);
  std::filesystem::create_symlink(directory_ + "/elsewhere", file);
  EXPECT_TRUE(absl::IsInvalidArgument(create("")));
}

TEST_F(StepTraceTest, WritesNothingWithoutAStepInTheWindow) {
  EXPECT_TRUE(Run({.first_step = 6, .steps = 2}, 0).is_discarded());
}

}  // namespace
}  // namespace stretto
