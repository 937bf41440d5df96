#include "stretto/train/config.h"

#include <algorithm>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace stretto {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

TEST(TrainConfig, DefaultsResolve) {
  TrainConfig config;
  ASSERT_TRUE(config.Resolve(3).ok()) << config.Resolve(3);
  EXPECT_EQ(config.parallel.dp, 3);
  EXPECT_EQ(config.batch.micro, 3);  // of 8 samples no rank has more than 3
  EXPECT_EQ(config.model.kv_heads, 4);
  EXPECT_EQ(config.metrics.flight_directory, "runs/default/flight");

  const std::string once = PrintConfig(ConfigRef(&config));
  ASSERT_TRUE(config.Resolve(3).ok());
  EXPECT_EQ(PrintConfig(ConfigRef(&config)), once);
}

TEST(TrainConfig, KeepsWhatIsSet) {
  TrainConfig config;
  config.batch.micro = 2;
  config.parallel.dp = 2;
  config.metrics.flight_directory = "elsewhere";
  ASSERT_TRUE(config.Resolve(2).ok());
  EXPECT_EQ(config.batch.micro, 2);
  EXPECT_EQ(config.metrics.flight_directory, "elsewhere");
}

TEST(TrainConfig, PrintedFormParsesBack) {
  TrainConfig config;
  config.seed = 77;
  config.optimizer.lr = 0.1 + 0.2;  // needs all digits
  config.sample.prompt = "a \"quoted\"\nprompt";
  config.runtime.stream = "fifo";
  config.checkpoint.async = false;
  ASSERT_TRUE(config.Resolve(1).ok());
  const std::string text = PrintConfig(ConfigRef(&config));
  TrainConfig parsed;
  const absl::Status status = ParseConfig(text, "test", {}, ConfigRef(&parsed));
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(PrintConfig(ConfigRef(&parsed)), text);
  EXPECT_EQ(parsed.optimizer.lr, 0.1 + 0.2);
  EXPECT_EQ(parsed.sample.prompt, config.sample.prompt);
}

TEST(TrainConfig, EveryFieldCanBeSetByName) {
  TrainConfig config;
  const absl::Status status = ParseConfig(
      R"({
        "seed": 2, "steps": 7, "output": "o",
        "model": {"family": "llama", "layers": 2},
        "data": {"train": "t", "validation": "v", "tokenizer": "x.tiktoken", "sequence_length": 33,
                 "shuffle": false, "document_attention": false, "prefetch": false},
        "batch": {"global": 5, "micro": 3, "tokens": 0, "capacity": 0},
        "optimizer": {"name": "adamw", "lr": 0.5, "beta1": 0.1, "beta2": 0.2, "eps": 0.3,
                      "weight_decay": 0.4, "moments": "bf16", "masters": false,
                      "offload": true, "clip_norm": 0.6, "schedule": "wsd", "warmup": 3,
                      "final_fraction": 0.7, "decay_fraction": 0.8},
        "parallel": {"dp": 1, "overlap": false, "bucket_bytes": 9},
        "runtime": {"device": "cpu", "dtype": "bf16", "threads": 3, "stream": "fifo",
                    "recompute": "block", "loss_chunk": 11, "timeout_seconds": 1.5,
                    "host_memory_bytes": 12, "peak_tflops": 13.5},
        "evaluate": {"every": 4, "samples": 14},
        "sample": {"prompt": "p", "tokens": 15, "temperature": 0.9, "top_k": 16},
        "checkpoint": {"every": 17, "keep": 18, "async": false, "resume": "must"},
        "spikes": {"nonfinite": "stop", "max_loss": 19.5, "max_skipped": 20},
        "metrics": {"json": false, "tensorboard": true, "curve": false, "log_every": 21,
                    "flight_directory": "f"}
      })",
      "test", {"runtime.loss_chunk=99"}, ConfigRef(&config));
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(config.runtime.loss_chunk, 99);
  EXPECT_EQ(config.optimizer.decay_fraction, 0.8);
  EXPECT_EQ(config.spikes.max_loss, 19.5);
  EXPECT_EQ(config.metrics.log_every, 21);
  EXPECT_EQ(config.data.sequence_length, 33);
  EXPECT_EQ(config.checkpoint.resume, "must");
  EXPECT_TRUE(config.Resolve(1).ok()) << config.Resolve(1);
}

TEST(TrainConfig, UnknownNameIsRefusedWithTheNearest) {
  TrainConfig config;
  const absl::Status status =
      ParseConfig(R"({"optimizer": {"weight_decai": 0.1}})", "test", {}, ConfigRef(&config));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), HasSubstr("weight_decay"));
}

TEST(TrainConfig, ReportsAllErrorsAtOnce) {
  TrainConfig config;
  config.model.heads = 3;  // does not divide hidden
  config.parallel.dp = 5;
  config.data.sequence_length = 5000;
  config.data.tokenizer = "";
  config.evaluate.every = 10;
  config.optimizer.beta1 = 1;
  config.optimizer.eps = 0;
  config.runtime.dtype = "f64";
  config.runtime.device = "cuda";
  config.runtime.timeout_seconds = 0;
  config.runtime.host_memory_bytes = 0;
  config.output = "";
  const std::string message = Message(config.Resolve(2));
  for (const char* field : {"model.hidden", "parallel.dp", "data.sequence_length", "data.tokenizer",
                            "evaluate.every", "optimizer.beta1", "optimizer.eps", "runtime.dtype",
                            "runtime.timeout_seconds", "runtime.host_memory_bytes", "output"}) {
    EXPECT_THAT(message, HasSubstr(field));
  }
  EXPECT_EQ(std::count(message.begin(), message.end(), '\n'), 10) << message;
}

TEST(TrainConfig, ChecksRangesOfFieldsSetByAProgram) {
  TrainConfig config;
  config.steps = 0;
  config.optimizer.schedule = "cosin";
  config.optimizer.lr = std::numeric_limits<double>::quiet_NaN();
  const absl::Status status = config.Resolve(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), AllOf(HasSubstr("steps"), HasSubstr("optimizer.schedule"),
                                     HasSubstr("optimizer.lr")));
}

TEST(TrainConfig, SizesBeyondAnyMachineAreRefused) {
  const auto resolved = [](auto change) {
    TrainConfig config;
    change(config);
    return std::string(config.Resolve(1).message());
  };
  EXPECT_THAT(resolved([](TrainConfig& c) { c.runtime.threads = 100000; }),
              HasSubstr("runtime.threads"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.runtime.timeout_seconds = 1e300; }),
              HasSubstr("runtime.timeout_seconds"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.model.layers = 10000, c.model.hidden = 1 << 20; }),
              HasSubstr("2^50"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.batch.micro = c.batch.global = 1 << 30; }),
              HasSubstr("2^31 - 1 tokens"));
}

TEST(TrainConfig, RanksWithoutWorkAreRefused) {
  TrainConfig config;
  config.batch.global = 3;
  EXPECT_THAT(Message(config.Resolve(4)), HasSubstr("batch.global"));
  EXPECT_TRUE(TrainConfig().Resolve(8).ok());
  EXPECT_FALSE(TrainConfig().Resolve(0).ok());
}

TEST(TrainConfig, DocumentsHaveSizesOfTheirOwn) {
  TrainConfig config;
  config.data.documents = true;
  config.data.sequence_length = 1000;
  config.batch.global = 3;
  config.parallel.pp = 2;
  ASSERT_TRUE(config.Resolve(6).ok()) << config.Resolve(6);
  EXPECT_EQ(config.parallel.dp, 3);
  EXPECT_EQ(config.batch.capacity, 1000);
  EXPECT_EQ(config.batch.tokens, 3000);  // on any number of ranks
  EXPECT_EQ(config.micro_batch_tokens(), 1000);
  config.parallel.dp = config.batch.tokens = 0;
  ASSERT_TRUE(config.Resolve(2).ok()) << config.Resolve(2);
  EXPECT_EQ(config.batch.tokens, 3000);
  config = TrainConfig();
  config.data.documents = true;
  config.data.sequence_length = 1000;
  config.batch.capacity = 300;
  config.batch.tokens = 5000;
  config.parallel.cp = 4;
  ASSERT_TRUE(config.Resolve(8).ok()) << config.Resolve(8);
  EXPECT_EQ(config.parallel.dp, 2);
  EXPECT_EQ(config.parallel.data_ranks(), 8);
  EXPECT_TRUE(config.Resolve(8).ok());  // changes nothing
  EXPECT_EQ(config.parallel.dp, 2);
}

TEST(TrainConfig, DocumentsThatCannotBeSharedAreRefused) {
  const auto resolved = [](auto change) {
    TrainConfig config;
    config.data.documents = true;
    config.data.sequence_length = 1000;
    config.batch.capacity = 300;
    config.parallel.mesh = "dynamic";
    change(config);
    return std::string(config.Resolve(4).message());
  };
  EXPECT_EQ(resolved([](TrainConfig&) {}), "");
  EXPECT_THAT(resolved([](TrainConfig& c) { c.batch.capacity = 200; }),
              HasSubstr("4 ranks together hold 800 tokens"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.parallel.mesh = "static"; }),
              HasSubstr("1 rank holds 300 tokens of a document"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.batch.tokens = 999; }),
              HasSubstr("batch.tokens is 999"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.parallel.cp = 2; }),
              HasSubstr("set parallel.cp to 1"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.parallel.zero = 2; }),
              HasSubstr("set parallel.zero to 1"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.parallel.pp = 2, c.parallel.schedule = "gpipe"; }),
              HasSubstr("parallel.schedule is gpipe"));
  EXPECT_THAT(resolved([](TrainConfig& c) {
                c.parallel.pp = 4, c.parallel.schedule = "interleaved", c.model.layers = 8;
                c.batch.capacity = 1000;
              }),
              HasSubstr("choose 1f1b, zb-h1 or v-shaped"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.batch.tokens = int64_t{1} << 62; }),
              HasSubstr("2^40"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.batch.global = int64_t{1} << 62; }),
              HasSubstr("(batch.global) x 1000; at most 2^40"));
  EXPECT_THAT(resolved([](TrainConfig& c) { c.data.documents = false; }),
              AllOf(HasSubstr("parallel.mesh is dynamic but data.documents is off"),
                    HasSubstr("batch.capacity is 300 but")));
  EXPECT_THAT(resolved([](TrainConfig& c) {
                c.parallel.mesh = "static", c.parallel.cp = 3, c.parallel.tp = 2;
              }),
              HasSubstr("parallel.cp times parallel.tp is 3 x 2 but 4 ranks run"));
}

TEST(TrainConfig, ByteTokenizerNeedsItsIdsOnlyForSampling) {
  TrainConfig config;
  config.model.vocabulary = 61;
  EXPECT_TRUE(config.Resolve(1).ok());
  config.sample.tokens = 5;
  EXPECT_THAT(Message(config.Resolve(1)), HasSubstr("257"));
}

TEST(TrainConfig, DataIsRequiredOnlyToTrain) {
  TrainConfig config;
  EXPECT_THAT(Message(config.RequireData()), HasSubstr("data.train"));
  config.data.train = "a.bin";
  EXPECT_TRUE(config.RequireData().ok());
}

}  // namespace
}  // namespace stretto
