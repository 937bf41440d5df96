// Small training runs on generated text, with ranks as threads.
#ifndef STRETTO_TESTS_SUPPORT_TRAINING_H_
#define STRETTO_TESTS_SUPPORT_TRAINING_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <ostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/core/rng.h"
#include "stretto/data/dataset.h"
#include "stretto/train/trainer.h"

namespace stretto::testing {

// A directory that goes away with the object.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    static std::atomic<int> counter{0};
    path_ = std::filesystem::temp_directory_path() /
            absl::StrCat("stretto-test-", getpid(), "-", counter++);
    std::filesystem::create_directories(path_);
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

// Byte tokens with structure to learn: documents of words from a small set, 256 between documents.
inline std::vector<int32_t> GeneratedTokens(int64_t count, uint64_t seed) {
  const char* words[] = {"and ", "the ", "lord ", "said ", "unto ", "king ", "of ", "israel, "};
  const Rng rng(seed, "test/text");
  std::vector<int32_t> ids;
  uint64_t n = 0;
  while (static_cast<int64_t>(ids.size()) < count) {
    if (rng.Below(n++, 12) == 0) ids.push_back(256);
    for (const char* c = words[rng.Below(n++, 8)]; *c != 0; ++c) ids.push_back(*c);
  }
  ids.resize(static_cast<size_t>(count));
  return ids;
}

// A tiny model on generated text in `directory`, which receives the token files.
inline TrainConfig TinyRun(const ScratchDirectory& directory, const std::string& family = "qwen3") {
  TrainConfig c;
  c.steps = 6;
  c.output = directory / "run";
  c.model.family = family;
  c.model.vocabulary = 257;
  c.model.layers = 2;
  c.model.hidden = 20;
  c.model.heads = 2;
  c.model.kv_heads = family == "gpt2" ? 2 : 1;
  c.model.head_dim = 6;
  c.model.ffn = 34;
  c.model.max_positions = 32;
  c.data.train = directory / "train.bin";
  c.data.validation = directory / "validation.bin";
  c.data.sequence_length = 24;
  c.batch.global = 11;  // does not divide by 2, 3, 4 or 8
  c.batch.micro = 2;
  c.optimizer.lr = 5e-3;
  c.optimizer.warmup = 2;
  c.parallel.bucket_bytes = 4096;  // several buckets
  c.runtime.threads = 1;
  c.runtime.device = "cpu";
  c.runtime.timeout_seconds = 60;
  c.checkpoint.resume = "never";
  if (!std::filesystem::exists(c.data.train)) {
    (void)WriteTokenFile(c.data.train, GeneratedTokens(4000, 1), 257);
    (void)WriteTokenFile(c.data.validation, GeneratedTokens(900, 2), 257);
  }
  return c;
}

// How ranks share a run; see ParallelConfig.
struct TrainLayout {
  int dp = 1, pp = 1, tp = 1, zero = 1;
  std::string schedule = "1f1b";
  int chunks = 0;
  int pieces = 1;  // tp_chunks

  int ranks() const { return dp * pp * tp; }
  // Of letters and digits, as names of tests are.
  std::string Name() const {
    std::string name = absl::StrCat("Dp", dp, "Pp", pp, "Tp", tp, "Zero", zero);
    if (pp > 1) absl::StrAppend(&name, schedule, "Chunks", chunks);
    if (pieces > 1) absl::StrAppend(&name, "Pieces", pieces);
    std::erase_if(name, [](char c) { return c == '-'; });
    return name;
  }
};
inline void PrintTo(const TrainLayout& layout, std::ostream* out) { *out << layout.Name(); }
inline TrainConfig With(TrainConfig config, const TrainLayout& layout) {
  config.parallel.dp = layout.dp;
  config.parallel.pp = layout.pp;
  config.parallel.tp = layout.tp;
  config.parallel.tp_chunks = layout.pieces;
  config.parallel.zero = layout.zero;
  config.parallel.schedule = layout.schedule;
  config.parallel.chunks = layout.chunks;
  return config;
}

// How a run keeps parameters and the optimizer's state.
struct Precision {
  std::string name, dtype = "f32", moments = "f32";
  bool masters = true;

  TrainConfig Of(TrainConfig config) const {
    config.runtime.dtype = dtype;
    config.optimizer.moments = moments;
    config.optimizer.masters = masters;
    return config;
  }
};
inline void PrintTo(const Precision& precision, std::ostream* out) { *out << precision.name; }
inline std::vector<Precision> AllPrecisions() {
  return {{"F32"},
          {"F32Bf16Moments", "f32", "bf16"},
          {"Bf16", "bf16"},
          {"Bf16Bf16Moments", "bf16", "bf16"},
          {"Bf16NoMasters", "bf16", "f32", false},
          {"Bf16NoMastersBf16Moments", "bf16", "bf16", false}};
}

struct RunRecord {
  absl::Status status;
  std::vector<StepStats> steps;                // of rank 0
  std::vector<std::vector<float>> parameters;  // final, of rank 0, in graph order
  double eval_loss = 0;
};

// Runs config.steps - (resumed) steps on `ranks` threads; `after` runs on every rank at the end.
inline RunRecord TrainOnThreads(int ranks, const TrainConfig& config,
                                const WorldOptions& world_options = {},
                                const std::function<absl::Status(Trainer&)>& after = nullptr) {
  RunRecord record;
  std::mutex mutex;
  record.status = World::RunThreads(
      ranks,
      [&](World& world) -> absl::Status {
        STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
        while (trainer->step() < config.steps) {
          STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer->Step());
          if (world.rank() == 0) {
            const std::lock_guard<std::mutex> lock(mutex);
            record.steps.push_back(stats);
          }
        }
        STRETTO_ASSIGN_OR_RETURN(const double loss, trainer->Evaluate());
        if (world.rank() == 0) record.eval_loss = loss;
        // All ranks ask, because with ZeRO-3 each of them has a part.
        for (const ParameterInfo& p : trainer->model().graph.parameters) {
          STRETTO_ASSIGN_OR_RETURN(const Tensor t, trainer->Parameter(p.spec.name));
          if (world.rank() == 0) {
            record.parameters.emplace_back();
            for (int64_t i = 0; i < t.elements(); ++i) {
              record.parameters.back().push_back(
                  t.dtype == DType::kF32   ? t.Flat().as<float>()[i]
                  : t.dtype == DType::kF64 ? static_cast<float>(t.Flat().as<double>()[i])
                                           : static_cast<float>(t.Flat().as<BFloat16>()[i]));
            }
          }
        }
        if (after) STRETTO_RETURN_IF_ERROR(after(*trainer));
        return trainer->Finish();
      },
      world_options);
  return record;
}

// Losses, norms of the gradient and the held-out loss to a relative tolerance, tokens exactly.
inline void ExpectNear(const RunRecord& got, const RunRecord& expected, double tolerance) {
  ASSERT_TRUE(got.status.ok()) << got.status.message();
  ASSERT_TRUE(expected.status.ok()) << expected.status.message();
  ASSERT_EQ(got.steps.size(), expected.steps.size());
  for (size_t i = 0; i < got.steps.size(); ++i) {
    EXPECT_NEAR(got.steps[i].loss / expected.steps[i].loss, 1, tolerance) << "step " << i + 1;
    EXPECT_NEAR(got.steps[i].grad_norm / expected.steps[i].grad_norm, 1, tolerance)
        << "step " << i + 1;
    EXPECT_EQ(got.steps[i].tokens, expected.steps[i].tokens);
  }
  EXPECT_NEAR(got.eval_loss / expected.eval_loss, 1, tolerance);
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_TRAINING_H_
