// stretto-convert and stretto-plan, run as users run them, and a run that starts from what the
// former wrote.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "stretto/comm/world.h"
#include "stretto/core/rng.h"
#include "stretto/data/token_file.h"
#include "stretto/model/huggingface.h"
#include "stretto/model/model.h"
#include "stretto/plan/cost.h"
#include "stretto/snapshot/huggingface.h"
#include "stretto/train/trainer.h"
#include "tests/support/harness.h"
#include "tests/support/run_program.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class ModelTools : public testing::Programs {
 protected:
  // Both streams.
  Result Convert(const std::string& arguments) const {
    return Run(STRETTO_CONVERT " " + arguments + " 2>&1");
  }
  Result Plan(const std::string& arguments) const {
    return Run(STRETTO_PLAN " " + arguments + " 2>&1");
  }
};

class ConvertTool : public ModelTools {
 protected:
  // A model directory with a recognisable value in every element, in several shards.
  void WriteModel(const std::string& family) {
    config_.model = testing::OddModel(family, false);
    if (family != "gpt2") config_.model.hidden = 24;
    config_.model.vocabulary = 257;
    ASSERT_TRUE(config_.model.Resolve().ok());
    config_.eos_tokens = {4, 6};
    model_ = BuildModel(config_.model).value();
    std::vector<SafetensorsItem> items;
    std::vector<std::vector<float>> memory;
    for (const ParameterInfo& p : model_.graph.parameters) {
      for (const HfPiece& piece : HfPieces(config_.model, p.spec.name)) {
        const int64_t columns = p.columns(), n = piece.rows * columns;
        std::vector<float>& values = memory.emplace_back(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) {
          const int64_t row = piece.transpose ? i % piece.rows : i / columns;
          const int64_t column = piece.transpose ? i / piece.rows : i % columns;
          values[static_cast<size_t>(i)] = Element(p, piece.first_row + row, column);
        }
        std::vector<int64_t> shape = {piece.rows, columns};
        if (p.spec.shape.size() == 1) shape = {piece.rows};
        if (piece.transpose) std::swap(shape[0], shape[1]);
        items.push_back({piece.hf_name, DType::kF32, shape, nullptr});
      }
    }
    for (size_t i = 0; i < items.size(); ++i) items[i].data = memory[i].data();
    ASSERT_TRUE(WriteHfWeights(Path("hf"), items, 20000).ok());
    WriteText("hf/config.json", HfConfigJson(config_).value());
  }
  static float Element(const ParameterInfo& p, int64_t row, int64_t column) {
    const Rng rng(1, p.spec.name);
    return static_cast<float>(0.1 * rng.Normal(static_cast<uint64_t>(row * p.columns() + column)));
  }

  HfConfig config_;
  Model model_;
};

TEST_F(ConvertTool, RunStartsFromTheWeightsAndTheyGoBack) {
  for (const std::string family : {"gpt2", "qwen3"}) {
    WriteModel(family);
    ASSERT_FALSE(std::filesystem::exists(Path("hf/model.safetensors"))) << "not in shards";
    const Result from = Convert("from-hf hf ours");
    ASSERT_EQ(from.code, 0) << from.output;
    ASSERT_EQ(Convert("to-hf ours back").code, 0);
    EXPECT_EQ(ReadText("back/config.json"), ReadText("hf/config.json"));
    const HfWeights before = HfWeights::Open(Path("hf")).value();
    const HfWeights after = HfWeights::Open(Path("back")).value();
    ASSERT_EQ(after.names(), before.names());
    for (const std::string& name : before.names()) {
      std::vector<float> a(static_cast<size_t>(before.Find(name)->elements())), b = a;
      ASSERT_TRUE(before.Read(name, DType::kF32, a.data()).ok());
      ASSERT_TRUE(after.Read(name, DType::kF32, b.data()).ok());
      EXPECT_EQ(a, b) << name;
      EXPECT_EQ(after.Find(name)->shape, before.Find(name)->shape) << name;
    }

    auto tokens = TokenFileWriter::Create(Path("t.bin"), 257).value();
    std::vector<int32_t> ids(400);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i * i % 257);
    ASSERT_TRUE(tokens->Append(ids).ok());
    ASSERT_TRUE(tokens->Finish().ok());
    TrainConfig config;  // two ranks, rows cut between them
    const absl::Status loaded = LoadConfig(
        Path("ours/model.json"),
        {"data.train=" + Path("t.bin"), "data.sequence_length=16", "batch.global=2",
         "output=" + Path("run"), "metrics.json=false", "runtime.threads=1", "runtime.dtype=bf16"},
        ConfigRef(&config));
    ASSERT_TRUE(loaded.ok()) << loaded;
    for (const std::string& initial : {Path("ours"), Path("ours/step-00000000")}) {
      config.checkpoint.initial = initial;
      const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
        STRETTO_ASSIGN_OR_RETURN(const auto trainer, Trainer::Create(world, config));
        EXPECT_EQ(trainer->step(), 0);
        for (const ParameterInfo& p : model_.graph.parameters) {
          STRETTO_ASSIGN_OR_RETURN(const Tensor value, trainer->Parameter(p.spec.name));
          int64_t wrong = 0;
          for (int64_t i = 0; i < value.elements(); ++i) {
            const BFloat16 expected(Element(p, i / p.columns(), i % p.columns()));
            wrong += testing::Get(value, i) != static_cast<float>(expected);
          }
          EXPECT_EQ(wrong, 0) << p.spec.name;
        }
        STRETTO_RETURN_IF_ERROR(trainer->Step().status());
        return trainer->Finish();
      });
      EXPECT_TRUE(status.ok()) << status;
    }
    config.checkpoint.initial = Path("nowhere");
    const absl::Status status =
        World::RunThreads(2, [&](World& world) { return Trainer::Create(world, config).status(); });
    EXPECT_THAT(std::string(status.message()), HasSubstr("nowhere"));
    std::filesystem::remove_all(Path("hf"));
  }
}

TEST_F(ConvertTool, SaysWhatIsWrong) {
  WriteModel("llama");
  EXPECT_EQ(Convert("--help").code, 0);
  EXPECT_EQ(Convert("").code, 2);
  EXPECT_EQ(Convert("from-hf hf").code, 2);
  EXPECT_THAT(Convert("from-hf none ours").output,
              HasSubstr("'none/config.json' could not be read"));
  EXPECT_THAT(Convert("to-hf hf back").output, HasSubstr("hf"));
  EXPECT_THAT(Convert("to-hf hf back --dtype f16").output, HasSubstr("stored|f32|bf16"));
  std::string text = ReadText("hf/config.json");
  WriteText("hf/config.json",
            text.replace(text.find("\"hidden_size\": 24"), 17, "\"hidden_size\": 30"));
  const Result wrong = Convert("from-hf hf ours");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.output,
              HasSubstr("has shape [257, 24], but its config.json makes it [257, 30]"));
  EXPECT_FALSE(std::filesystem::exists(Path("ours")));
}

class PlanTool : public ModelTools {
 protected:
  void SetUp() override {
    ModelTools::SetUp();
    WriteText("c.json", R"({
      "model": {"family": "llama", "vocabulary": 128256, "layers": 16, "hidden": 2048,
                "heads": 32, "kv_heads": 8, "ffn": 8192, "max_positions": 8192},
      "data": {"train": "not/there.bin", "sequence_length": 8192},
      "batch": {"global": 64, "micro": 4}, "runtime": {"dtype": "bf16"}})");
  }
};

TEST_F(PlanTool, FitsOrSaysWhatToChange) {
  const Result fits = Plan("c.json --set batch.micro=1 --ranks 8 --device-memory 80GiB");
  EXPECT_EQ(fits.code, 0) << fits.output;
  for (const char* part :
       {"optimizer state", "activations", "palm", "causal", "gradients", "fits: "}) {
    EXPECT_THAT(fits.output, HasSubstr(part));
  }
  const Result large = Plan("c.json --ranks=8 --device-memory=40GiB");
  EXPECT_EQ(large.code, 1);
  EXPECT_THAT(large.output, HasSubstr("does not fit: needs "));
  // What it says is true.
  const size_t at = large.output.find("; set ") + 6;
  const std::string option = large.output.substr(at, large.output.find(", which needs") - at);
  const Result advised = Plan("c.json --ranks 8 --device-memory 40GiB --set " + option);
  EXPECT_EQ(advised.code, 0) << option << "\n" << advised.output;
}

TEST_F(PlanTool, FallsBackToMoreRanksAndSmallerModels) {
  const std::string all =
      " --set batch.micro=1 --set runtime.recompute=block"
      " --set runtime.loss_chunk=8192 ";
  EXPECT_THAT(Plan("c.json --device-memory 16GiB" + all).output,
              HasSubstr("; use 2 ranks, which needs 1"));
  EXPECT_THAT(Plan("c.json --device-memory 1GB" + all).output, HasSubstr("smaller model"));
  EXPECT_THAT(Plan("c.json --set model.layers=64 --device-memory 40GiB").output,
              HasSubstr("does not fit"));
}

TEST_F(PlanTool, AdvisesAndShowsShards) {
  const std::string all =
      "c.json --ranks 8 --set batch.micro=1 --set runtime.recompute=block"
      " --set runtime.loss_chunk=8192 ";
  EXPECT_THAT(Plan(all + "--device-memory 8GiB").output, HasSubstr("; set parallel.zero=2, "));
  EXPECT_THAT(Plan(all + "--device-memory 6GiB").output, HasSubstr("; set parallel.zero=3, "));
  EXPECT_EQ(Plan(all + "--device-memory 6GiB --set parallel.zero=3").code, 0);
  const Result events = Plan(all + "--set parallel.zero=3 --buckets");
  EXPECT_EQ(events.code, 0);
  EXPECT_THAT(events.output, HasSubstr("before F embed"));
  EXPECT_THAT(events.output, HasSubstr(": gather ahead parameters "));
  EXPECT_THAT(Plan(all + "--buckets").output, HasSubstr("stage 0, ZeRO-1"));
}

TEST_F(PlanTool, JsonHasTheSameFigures) {
  const Result r = Plan("c.json --json --ranks 2");
  EXPECT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("\"arena_bytes\": "));
  EXPECT_THAT(r.output, HasSubstr("\"flops_per_step\""));
  EXPECT_EQ(r.output.find("fits"), std::string::npos);  // nobody asked
}

TEST_F(PlanTool, CoversTheTensorAxis) {
  const Result whole = Plan("c.json --ranks 1 --json");
  const Result shared = Plan("c.json --ranks 4 --json --set parallel.tp=4");
  EXPECT_EQ(shared.code, 0) << shared.output;
  const auto number = [](const Result& r, const std::string& name) {
    const size_t at = r.output.find("\"" + name + "\": ");
    return at == std::string::npos ? -1 : std::stoll(r.output.substr(at + name.size() + 4));
  };
  EXPECT_EQ(number(whole, "tensor_axis"), 0);
  EXPECT_GT(number(shared, "tensor_axis"), 0);
  // A quarter of the memory, and the norms.
  EXPECT_LT(number(shared, "arena_bytes"), number(whole, "arena_bytes") * 27 / 100);
  EXPECT_GT(number(shared, "arena_bytes"), number(whole, "arena_bytes") * 25 / 100);
  EXPECT_THAT(Plan("c.json --ranks 4 --set parallel.tp=4").output, HasSubstr("tensor axis"));
  EXPECT_THAT(Plan("c.json --ranks 4 --set parallel.tp=3").output,
              HasSubstr("parallel.tp is 3 but 4 ranks run"));
}

TEST_F(PlanTool, SuggestsLayoutsThatFit) {
  const Result r = Plan("c.json --suggest --gpus 8 --memory 40GiB --top 3");
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("ASSUMED"));
  EXPECT_THAT(r.output, HasSubstr("\n2 is "));
  EXPECT_THAT(r.output, HasSubstr("\n3 is "));
  EXPECT_THAT(r.output, Not(HasSubstr("\n4 is ")));
  EXPECT_THAT(r.output, HasSubstr("such as: memory: "));
  const size_t at = r.output.find("the first: ") + 11;
  const std::string options = r.output.substr(at, r.output.find('\n', at) - at);
  const Result first = Plan("c.json --ranks 8 --device-memory 40GiB " + options);
  EXPECT_EQ(first.code, 0) << options << "\n" << first.output;
  const Result fixed =
      Plan("c.json --suggest --gpus 8 --memory 40GiB --set parallel.tp=2 --set parallel.zero=3");
  EXPECT_EQ(fixed.code, 0) << fixed.output;
  EXPECT_THAT(fixed.output, HasSubstr("--set parallel.tp=2 "));
  EXPECT_THAT(fixed.output, HasSubstr("--set parallel.zero=3 "));
  const Result one =
      Plan("c.json --suggest --gpus 1 --memory 40GiB --set runtime.device_memory_bytes=1073741824");
  EXPECT_THAT(one.output, HasSubstr("1 device of 1.00 GiB"));
  const Result none = Plan("c.json --suggest --gpus 2 --memory 1GiB");
  EXPECT_EQ(none.code, 1) << none.output;
  EXPECT_THAT(none.output, HasSubstr("\n0 fit, "));
  EXPECT_THAT(Plan("--help").output, HasSubstr("; 1: it does\nnot, no layout does, "));
}

TEST_F(PlanTool, SuggestsByAFitOfTheSameModelOnly) {
  WriteText("stages.json", ToJson(UniformCost(1, 1, 1)));
  WriteText("broken.json", "{");
  CostModel other = UniformCost(1, 1, 1);
  other.parts.emplace().layers = {{.name = "x"}};
  other.parts->model = "another model";
  other.parts->ranks = 2;
  WriteText("other.json", ToJson(other));
  other.parts->ranks = 1;
  WriteText("one.json", ToJson(other));
  WriteText("empty.json", "");
  const std::string good = "c.json --suggest --gpus 2 --memory 80GiB ";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"c.json --suggest", "--suggest needs --gpus"},
      {"c.json --suggest --gpus 0 --memory 80GiB", "--suggest needs --gpus"},
      {"c.json --suggest --gpus 5000 --memory 80GiB", "not 5000"},
      {"c.json --suggest --gpus 2", "--suggest needs --memory"},
      {"c.json --suggest --gpus 2 --memory 80GX", "--memory must be a size"},
      {"c.json --suggest --gpus 2 --memory 80", "write its unit"},
      {good + "--machine 0", "--machine must be"},
      // Not what one rank has no room for.
      {good + "--set data.documents=true --set batch.capacity=1", "data.documents is on"},
      {good + "--top 0", "--top 1 or more"},
      {good + "--fit none.json", "'none.json' could not be read"},
      {good + "--fit empty.json", "'empty.json' is empty"},
      {good + "--fit .", "'.' is no regular file but a directory"},
      {good + "--fit ''", "--fit must be the name of a file"},
      {good + "--fit one.json", "one.json was fitted on one rank"},
      {good + "--set runtime.device=cpu", "runtime.device is cpu; give --fit"},
      {good + "--set runtime.dtype=f64", "runtime.dtype is f64"},
      {good + "--json", "leave out --json, or --suggest to plan one layout"},
      {good + "--buckets", "leave out --buckets, or --suggest to plan one layout"},
      {good + "--keepers 1", "leave out --keepers, or --suggest to plan one layout"},
      {good + "--parity 0", "leave out --parity, or --suggest to plan one layout"},
      {good + "--ranks 1", "--ranks does not go with --suggest; give --gpus"},
      {good + "--device-memory 80GiB", "--device-memory does not go with --suggest; give --memory"},
      {good + "--fit broken.json", "broken.json is no cost model"},
      {good + "--fit stages.json", "stages only"},
      {good + "--fit other.json", "was fitted to another model"},
      {"c.json --machine 8", "--machine belongs to --suggest"},
      {"c.json --gpus 2", "--gpus belongs to --suggest"},
      {"c.json --fit other.json", "--fit belongs to --suggest"}};
  for (const auto& [arguments, text] : cases) {
    const Result r = Plan(arguments);
    EXPECT_EQ(r.code, 2) << arguments;
    EXPECT_THAT(r.output, HasSubstr(text)) << arguments;
    EXPECT_TRUE(testing::IsOneSentence(r.output)) << r.output;
  }
}

TEST_F(PlanTool, SaysWhatIsWrong) {
  EXPECT_EQ(Plan("").code, 2);
  EXPECT_THAT(Plan("none.json").output, HasSubstr("none.json"));
  EXPECT_THAT(Plan("c.json --device-memory 80GX").output, HasSubstr("not '80GX'"));
  EXPECT_THAT(Plan("c.json --device-memory -1").output, HasSubstr("not '-1'"));
  EXPECT_THAT(Plan("c.json --ranks 0").output, HasSubstr("--ranks must be"));
  EXPECT_THAT(Plan("c.json --parity 1").output, HasSubstr("--parity goes with --keepers"));
  EXPECT_THAT(Plan("c.json --ranks 2 --keepers 2 --parity -5").output,
              HasSubstr("or -1 for the default, not -5"));
  EXPECT_THAT(Plan("c.json --ranks 2 --keepers 2 --parity 2").output,
              HasSubstr("parity 2 leaves no data of 2 keepers"));
  for (const char* keepers : {"99999999999", "3", "-1", "4294967297"}) {
    const Result r = Plan(absl::StrCat("c.json --ranks 2 --keepers ", keepers));
    EXPECT_EQ(r.code, 2);
    EXPECT_TRUE(testing::IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr(absl::StrCat("--ranks, 2, not ", keepers)));
  }
  EXPECT_THAT(Plan("c.json --ranks 2 --keepers 2 --parity 4294967297").output,
              HasSubstr("not 4294967297"));
  EXPECT_EQ(Plan("c.json --ranks 2 --keepers 2 --parity -1").output,
            Plan("c.json --ranks 2 --keepers 2").output);
  EXPECT_THAT(Plan("c.json --ranks 65").output, HasSubstr("batch.global is 64"));
  EXPECT_THAT(Plan("c.json --set model.layer=3").output, HasSubstr("model.layers"));
  for (const char* mode : {"", " --suggest --gpus 1 --memory 80GiB"}) {
    const Result full = Run(STRETTO_PLAN " c.json" + std::string(mode) + " 2>&1 >/dev/full");
    EXPECT_EQ(full.code, 1);
    EXPECT_THAT(full.output, HasSubstr("standard output could not be written: No space left"));
  }
}

}  // namespace
}  // namespace stretto
