#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "stretto/observe/metrics.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

StepStats Stats(int64_t step) {
  StepStats s;
  s.step = step;
  s.loss = 4.25;
  s.grad_norm = 1.5;
  s.lr = 3e-4;
  s.tokens = 8192;
  s.tokens_per_second = 83100;
  s.step_ms = 98.58;
  s.memory_bytes = int64_t{1300} << 20;
  return s;
}

class Console {
 public:
  Console() : file_(std::tmpfile()) {}
  ~Console() { std::fclose(file_); }
  std::FILE* file() { return file_; }
  std::string Text() {
    std::rewind(file_);
    std::string text;
    char buffer[4096];
    size_t n = 0;
    while ((n = std::fread(buffer, 1, sizeof(buffer), file_)) > 0) text.append(buffer, n);
    return text;
  }

 private:
  std::FILE* file_;
};

size_t Count(const std::string& text, const std::string& what) {
  size_t n = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++n;
  return n;
}

TEST(StepStatsLine, HasHumanUnits) {
  EXPECT_EQ(
      StepStatsLine(Stats(7), 1000),
      "step    7/1000 | loss   4.2500 | norm   1.500 | lr 3.00e-04 |   98.6ms | 83.1k tok/s | "
      " 1.27GiB");
}

TEST(StepStatsLine, StaysAlignedOverMagnitudes) {
  const size_t width = StepStatsLine(Stats(7), 1000).size();
  for (const double rate : {0.4, 7.0, 999.4, 999.6, 1000.0, 99949.0, 99951.0, 1e6, 3.2e9, 5e13}) {
    for (const double ms : {0.01, 9.994, 9.996, 999.0, 9999.0, 9999.6, 5e6}) {
      StepStats s = Stats(1000);
      s.tokens_per_second = rate;
      s.step_ms = ms;
      s.loss = 11.0;
      s.grad_norm = 123.25;
      s.memory_bytes = int64_t{80} << 30;
      EXPECT_EQ(StepStatsLine(s, 1000).size(), width) << StepStatsLine(s, 1000);
    }
  }
  StepStats bad = Stats(3);
  bad.loss = std::numeric_limits<double>::quiet_NaN();
  bad.grad_norm = std::numeric_limits<double>::infinity();
  EXPECT_EQ(StepStatsLine(bad, 1000).size(), width) << StepStatsLine(bad, 1000);
}

TEST(StepStatsLine, ShowsWhatIsKnownOnly) {
  StepStats s = Stats(7);
  EXPECT_THAT(StepStatsLine(s, 0), Not(HasSubstr("mfu")));
  EXPECT_THAT(StepStatsLine(s, 0), Not(HasSubstr("eval")));
  s.mfu_causal = 0.421;
  s.mfu_palm = 0.502;
  s.eval_loss = 4.125;
  s.comm_exposed_ms = s.step_ms / 4;
  s.exposed_data_ms = s.step_ms / 10;
  s.exposed_pipeline_ms = 0.15 * s.step_ms;
  const std::string line = StepStatsLine(s, 0);
  EXPECT_THAT(line, HasSubstr("mfu 42.1% (palm 50.2%)"));
  EXPECT_THAT(line, HasSubstr("comm 25.0% (data 10.0, pipeline 15.0)"));
  EXPECT_THAT(line, HasSubstr("eval 4.1250"));
}

TEST(ConsoleSink, PlainWhenNotATerminal) {
  Console console;
  ConsoleSink sink(console.file(), {.total_steps = 3});
  for (int64_t step = 1; step <= 3; ++step) ASSERT_TRUE(sink.Write(Stats(step)).ok());
  ASSERT_TRUE(sink.Finish().ok());
  const std::string text = console.Text();
  EXPECT_EQ(Count(text, "\n"), 3u);
  EXPECT_THAT(text, Not(HasSubstr("\033")));
  EXPECT_THAT(text, Not(HasSubstr("\r")));
}

TEST(ConsoleSink, LogsEveryFewStepsAndWhatMatters) {
  Console console;
  ConsoleSink sink(console.file(), {.total_steps = 25, .log_every = 10});
  for (int64_t step = 1; step <= 25; ++step) {
    StepStats s = Stats(step);
    if (step == 13) s.eval_loss = 4.5;
    if (step == 17) {
      s.skipped = true;
      s.skipped_total = 1;
    }
    ASSERT_TRUE(sink.Write(s).ok());
  }
  const std::string text = console.Text();
  EXPECT_EQ(Count(text, "\n"), 6u) << text;  // 1, 10, 13, 17, 20, 25
  EXPECT_THAT(text, HasSubstr("eval 4.5000"));
  EXPECT_THAT(text, HasSubstr("skipped (1 so far)"));
}

TEST(ConsoleSink, LiveLineIsRedrawnAndRemoved) {
  Console console;
  {
    ConsoleSink sink(console.file(), {.total_steps = 100,
                                      .log_every = 50,
                                      .live = ConsoleOptions::When::kAlways,
                                      .colour = ConsoleOptions::When::kNever});
    for (int64_t step = 1; step <= 60; ++step) ASSERT_TRUE(sink.Write(Stats(step)).ok());
  }
  const std::string text = console.Text();
  EXPECT_EQ(Count(text, "\n"), 2u);
  EXPECT_EQ(Count(text, "\r\033[K"), 60u);  // before each redraw and at the end
  EXPECT_THAT(text, HasSubstr("60%  step 60/100"));
  EXPECT_THAT(text, HasSubstr("0:04 left"));  // 40 steps of 98.58 ms
  EXPECT_THAT(text, ::testing::EndsWith("\r\033[K"));
}

TEST(ConsoleSink, Colour) {
  Console console;
  ConsoleSink sink(console.file(), {.colour = ConsoleOptions::When::kAlways});
  ASSERT_TRUE(sink.Write(Stats(1)).ok());
  EXPECT_THAT(console.Text(), HasSubstr("\033[32m  4.2500\033[0m"));
}

TEST(ConsoleSink, WriteErrorIsReported) {
  std::FILE* full = std::fopen("/dev/full", "w");
  if (full == nullptr) GTEST_SKIP() << "no /dev/full";
  {
    ConsoleSink sink(full);
    EXPECT_EQ(sink.Write(Stats(1)).code(), absl::StatusCode::kResourceExhausted);
  }
  std::fclose(full);
}

}  // namespace
}  // namespace stretto
