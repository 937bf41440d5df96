// stretto-bench on the CPU with small sizes: what it says, never how fast it is.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "support/run_program.h"

namespace stretto::testing {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

constexpr char kSmall[] =
    "kernels --device cpu --threads 1 --repetitions 1 --tokens 12 --length 5 --hidden 24 --heads 4 "
    "--kv-heads 2 --ffn 40 --vocabulary 53 --parameters 1001 ";

class BenchProgram : public Programs {
 protected:
  Result Bench(const std::string& arguments) const {
    return Run(absl::StrCat(STRETTO_BENCH " ", arguments, " 2>&1"));
  }
  nlohmann::json Results(const std::string& name) const {
    return nlohmann::json::parse(ReadText(name), nullptr, false);
  }
  // Names that differ, and times above 0.
  static void ExpectSound(const nlohmann::json& file) {
    ASSERT_TRUE(file.is_object());
    EXPECT_EQ(file["program"], "stretto-bench");
    EXPECT_FALSE(file["device"].get<std::string>().empty());
    std::set<std::string> names;
    for (const auto& result : file["results"]) {
      const std::string name = result["name"];
      EXPECT_TRUE(names.insert(name).second) << name;
      const double seconds = result["seconds"];
      EXPECT_TRUE(std::isfinite(seconds) && seconds > 0) << name;
      if (file["command"] != "comm") continue;
      const double host = result["host_seconds"];
      EXPECT_TRUE(host > 0 && host <= seconds) << name;
    }
    EXPECT_FALSE(names.empty());
  }
  static std::set<std::string> Names(const nlohmann::json& file) {
    std::set<std::string> names;
    for (const auto& result : file["results"]) names.insert(result["name"].get<std::string>());
    return names;
  }
};

TEST_F(BenchProgram, KernelsOfEveryFamilyAndType) {
  for (const std::string dtype : {"f32", "bf16", "f64"}) {
    const Result r = Bench(absl::StrCat(kSmall, "--dtype ", dtype, " --json k.json"));
    ASSERT_EQ(r.code, 0) << r.output;
    const nlohmann::json file = Results("k.json");
    ExpectSound(file);
    EXPECT_EQ(file["command"], "kernels");
    const std::set<std::string> names = Names(file);
    for (const char* name :
         {"copy", "linear qkv 24x48 forward", "linear up and gelu forward", "attention 2x5 forward",
          "attention 2x5 backward", "layernorm backward", "rmsnorm + residual forward",
          "swiglu backward", "rope", "qk norm and rope forward", "qk norm and rope backward input",
          "qk norm backward weight", "embedding backward", "loss fused", "adamw"}) {
      EXPECT_EQ(names.count(name), 1u) << name << " of " << dtype;
    }
    for (const auto& result : file["results"]) {
      EXPECT_NE(result.contains("bytes_per_second"), result.contains("flops_per_second"));
      EXPECT_GT(result["share"], 0) << result;
    }
  }
}

TEST_F(BenchProgram, OnlyWhatIsAskedFor) {
  ASSERT_EQ(Bench(absl::StrCat(kSmall, "--only swiglu --json k.json")).code, 0);
  EXPECT_EQ(Results("k.json")["results"].size(), 4u);  // copy, product and two
  const Result none = Bench(absl::StrCat(kSmall, "--only nothing"));
  EXPECT_EQ(none.code, 1);
  EXPECT_THAT(none.output, HasSubstr("no kernel has 'nothing' in its name"));
}

TEST_F(BenchProgram, CommunicationAlone) {
  const Result r = Bench("comm --device cpu --max-bytes 4096 --repetitions 1 --json c.json");
  ASSERT_EQ(r.code, 0) << r.output;
  const nlohmann::json file = Results("c.json");
  ExpectSound(file);
  EXPECT_EQ(Names(file).count("all_to_all 4096"), 1u);
}

#ifdef STRETTO_WITH_MPI
TEST_F(BenchProgram, CommunicationBetweenRanks) {
  const Result r = Run(absl::StrCat(
      STRETTO_MPIRUN " 3 " STRETTO_BENCH " comm --device cpu --min-bytes 4 --max-bytes 5000 "
                     "--factor 10 --repetitions 1 --json c.json 2>&1"));
  ASSERT_EQ(r.code, 0) << r.output;
  const nlohmann::json file = Results("c.json");
  ExpectSound(file);
  EXPECT_EQ(file["ranks"], 3);
  // Bus bandwidth over the algorithm's, for three ranks.
  for (const auto& result : file["results"]) {
    const double factor = result["bus_bytes_per_second"].get<double>() /
                          result["algorithm_bytes_per_second"].get<double>();
    const std::string operation = result["operation"];
    const double expected = operation == "all_reduce"                                 ? 4.0 / 3
                            : operation == "broadcast" || operation == "send_receive" ? 1.0
                                                                                      : 2.0 / 3;
    EXPECT_NEAR(factor, expected, 1e-9) << operation;
    EXPECT_EQ(result["bytes"].get<int64_t>() % 12, 0);  // whole elements for each rank
  }
  EXPECT_EQ(Names(file).count("send_receive 12"), 1u);
}
#endif

constexpr char kModel[] =
    R"({"steps": 5, "model": {"family": "gpt2", "vocabulary": 257, "layers": 1, "hidden": 16,
        "heads": 2, "max_positions": 16}, "data": {"tokenizer": "bytes", "sequence_length": 16},
        "batch": {"global": 4, "micro": 4}, "runtime": {"device": "cpu", "threads": 1},
        "optimizer": {"lr": 1e-4, "schedule": "constant"}})";

TEST_F(BenchProgram, StepsPrintWhatCompareReads) {
  WriteText("m.json", kModel);
  const Result r = Bench("train m.json --json t.json");
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("\"tokens_per_second\": "));
  const nlohmann::json line = nlohmann::json::parse(r.output, nullptr, false);
  ASSERT_TRUE(line.is_object()) << r.output;
  EXPECT_EQ(line["tokens_per_step"], 64);
  EXPECT_GT(line["tokens_per_second"], 0);
  ExpectSound(Results("t.json"));
}

TEST_F(BenchProgram, ProfileListsLayers) {
  WriteText("m.json", kModel);
  const Result r = Bench("train m.json --profile --json p.json");
  ASSERT_EQ(r.code, 0) << r.output;
  const nlohmann::json file = Results("p.json");
  ExpectSound(file);
  EXPECT_EQ(Names(file).count("micro-batch"), 1u);
  EXPECT_GT(file["results"].size(), 8u);
}

// Refused before tokens are made up, and nothing is left in the folder for temporary files.
// It starts the keeper beside it, and that is gone afterwards.
TEST_F(BenchProgram, SnapshotsCountWhatWasTaken) {
  WriteText("m.json", kModel);
  const Result r = Bench("snapshot m.json --steps 3 --spill spilled --json s.json");
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("until COMMITTED"));
  EXPECT_THAT(r.output, HasSubstr("until it was on disk"));
  const nlohmann::json file = Results("s.json");
  ExpectSound(file);
  const std::set<std::string> expected = {"off", "every step", "every k steps", "capture",
                                          "set-up"};
  EXPECT_EQ(Names(file), expected);
  for (const auto& result : file["results"]) {
    if (result["name"] == "off") {
      EXPECT_EQ(result["captured"], 0);
    }
    if (result["name"] == "every step") {
      EXPECT_EQ(result["captured"].get<int>() + result["passed_over"].get<int>(), 3);
    }
    if (result["name"] == "every k steps") {
      EXPECT_GT(result["captured"], 0);
    }
    if (result["name"] == "capture") {
      EXPECT_GT(result["committed_seconds"], 0);
    }
  }
  const Result again = Bench("snapshot m.json --steps 3 --spill spilled");
  EXPECT_EQ(again.code, 2);
  EXPECT_TRUE(IsOneSentence(again.output)) << again.output;
}

// It says so soon, and the keeper once.
TEST_F(BenchProgram, SnapshotsWithoutMemoryAreAnError) {
  WriteText("m.json", kModel);
  const Result r = Run("export STRETTO_JOB_TOKEN=secret STRETTO_KEEPER=./s.sock; { " STRETTO_KEEPER
                       " --job small --socket s.sock --memory 1000 > ready 2> said & } && "
                       "until [ -s ready ]; do sleep 0.01; done; timeout 60 " STRETTO_BENCH
                       " snapshot m.json --steps 2 2>&1; code=$?; kill $!; wait; exit $code");
  EXPECT_EQ(r.code, 1) << r.output;
  EXPECT_THAT(r.output, HasSubstr("no snapshot was taken within"));
  EXPECT_THAT(r.output, HasSubstr("trouble "));
  const std::string said = ReadText("said"), warning = "no snapshots: ";
  ASSERT_NE(said.find(warning), std::string::npos) << said;
  EXPECT_EQ(said.find(warning, said.find(warning) + 1), std::string::npos) << said;
}

// A keeper there removes what it takes for older snapshots.
TEST_F(BenchProgram, SnapshotsAreWrittenToAFolderOfTheirOwn) {
  WriteText("m.json", kModel);
  ASSERT_EQ(Run("mkdir -p full/step-00000001 && echo mine > full/step-00000001/file").code, 0);
  for (const std::string spill : {"full", "m.json"}) {
    const Result r = Bench("snapshot m.json --steps 2 --spill " + spill);
    EXPECT_EQ(r.code, 2);
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr("--spill " + spill + " is no empty folder"));
  }
  EXPECT_EQ(ReadText("full/step-00000001/file"), "mine\n");
}

TEST_F(BenchProgram, StepsThatCannotBeMeasuredAreOneSentence) {
  WriteText("m.json", kModel);
  const auto refused = [&](const std::string& arguments, const std::string& sentence) {
    const Result r =
        Run(absl::StrCat("mkdir -p T && TMPDIR=T " STRETTO_BENCH " ", arguments, " 2>&1"));
    EXPECT_EQ(r.code, 2) << arguments;
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr(sentence)) << arguments;
    EXPECT_EQ(Run("ls T").output, "") << arguments;
  };
  for (const char* command : {"train", "predict"}) {
    for (const char* global : {"1000000000", "9223372036854775807"}) {
      refused(absl::StrCat(command, " m.json --set batch.global=", global),
              absl::StrCat("batch.global (", global, ") times data.sequence_length (16)"));
    }
    refused(absl::StrCat(command, " m.json --set metrics.trace_steps=1"), "metrics.trace_file");
  }
  refused("train m.json --set parallel.dp=3", "parallel.dp is 3 but 1 rank runs");
  // When tokens have been made up.
  refused("train m.json --set data.tokenizer=absent", "absent");
  const Result r = Run("TMPDIR=/nosuch " STRETTO_BENCH " train m.json 2>&1");
  EXPECT_EQ(r.code, 1);
  EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
  EXPECT_THAT(r.output, HasSubstr("TMPDIR"));
}

TEST_F(BenchProgram, AskedToStopItWritesTheTrace) {
  WriteText("m.json", kModel);
  // Only the signal ends the run and the trace's window.
  const Result r = Run(
      "mkdir T && { TMPDIR=T " STRETTO_BENCH
      " train m.json --set model.hidden=256 --set steps=1000000 --set metrics.trace_steps=900000 "
      "--set metrics.trace_from=2 --set metrics.trace_file=trace.json 2>&1 & } && "
      "pid=$! && sleep 2 && kill -TERM $pid; wait $pid; echo code $?; ls T");
  EXPECT_THAT(r.output, HasSubstr("a signal asked to stop after "));
  EXPECT_THAT(r.output, ::testing::EndsWith("code 1\n"));
  EXPECT_TRUE(Results("trace.json").contains("traceEvents"));
}

TEST_F(BenchProgram, FullStandardOutputIsAnError) {
  WriteText("m.json", kModel);
  for (const std::string arguments :
       {"train m.json", "train m.json --profile", "fit m.json --repetitions 1"}) {
    const Result r = Run(absl::StrCat(STRETTO_BENCH " ", arguments, " 2>&1 >/dev/full"));
    EXPECT_EQ(r.code, 1) << arguments;
    EXPECT_THAT(r.output, HasSubstr("standard output could not be written")) << arguments;
  }
}

class CompareFiles : public BenchProgram {
 protected:
  void Write(const std::string& name, double copy, double adamw, const std::string& more = "",
             const std::string& command = "kernels") const {
    WriteText(name, absl::StrCat(R"({"program": "stretto-bench", "command": ")", command,
                                 R"(", "device": "d", "ranks": 1, "results": [)",
                                 R"({"name": "copy", "seconds": )", copy, "},",
                                 R"({"name": "adamw", "seconds": )", adamw, "}", more, "]}"));
  }
};

TEST_F(CompareFiles, PlantedChangeIsFlagged) {
  Write("a.json", 1e-3, 2e-3);
  Write("b.json", 1e-3, 2.2e-3);
  const Result slower = Bench("compare a.json b.json");
  EXPECT_EQ(slower.code, 1);
  EXPECT_THAT(slower.output, HasSubstr("1.100  slower"));
  EXPECT_THAT(slower.output, HasSubstr("1 slower, 0 faster by more than 5 %; 0 in one file only"));
  const Result faster = Bench("compare b.json a.json");
  EXPECT_EQ(faster.code, 0);
  EXPECT_THAT(faster.output, HasSubstr("0.909  faster"));
}

TEST_F(CompareFiles, NoiseIsNot) {
  Write("a.json", 1e-3, 2e-3);
  Write("b.json", 1.04e-3, 1.93e-3);
  const Result r = Bench("compare a.json b.json");
  EXPECT_EQ(r.code, 0);
  EXPECT_THAT(r.output, Not(HasSubstr("  slower")));
  EXPECT_THAT(r.output, Not(HasSubstr("  faster")));
  EXPECT_EQ(Bench("compare a.json b.json --tolerance 3").code, 1);
  Write("c.json", 1e-3, 2.2e-3);
  EXPECT_EQ(Bench("compare --tolerance=20 a.json c.json").code, 0);
}

TEST_F(CompareFiles, WhatOnlyOneFileHasIsListed) {
  Write("a.json", 1e-3, 2e-3, R"(, {"name": "old", "seconds": 1})");
  Write("b.json", 1e-3, 2e-3, R"(, {"name": "new", "seconds": 1})");
  const Result r = Bench("compare a.json b.json");
  EXPECT_EQ(r.code, 0);
  EXPECT_THAT(r.output, HasSubstr("2 in one file only"));
}

TEST_F(CompareFiles, WrongFilesAreOneSentence) {
  Write("a.json", 1e-3, 2e-3);
  Write("comm.json", 1e-3, 2e-3, "", "comm");
  WriteText("broken.json", "{\"program\": \"stretto-be");
  WriteText("other.json", "{\"program\": \"stretto-bench\", \"results\": [{\"name\": 3}]}");
  WriteText("list.json", "[1, 2]");
  for (const char* file : {"comm.json", "broken.json", "other.json", "list.json", "absent.json"}) {
    const Result r = Bench(absl::StrCat("compare a.json ", file));
    EXPECT_EQ(r.code, 2) << file;
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
  }
}

class Costs : public BenchProgram {
 protected:
  void SetUp() override {
    BenchProgram::SetUp();
    WriteText("small.json", R"({
      "steps": 4,
      "model": {"family": "llama", "vocabulary": 300, "layers": 2, "hidden": 32, "heads": 2,
                "kv_heads": 2, "ffn": 48, "tie_embeddings": false},
      "data": {"sequence_length": 12}, "batch": {"global": 4, "micro": 2},
      "runtime": {"device": "cpu", "threads": 1}})");
  }
};

TEST_F(Costs, AFitHasAllLayersAndLinks) {
  const Result r = Bench("fit small.json --repetitions 1 --output one.json");
  ASSERT_EQ(r.code, 0) << r.output;
  const nlohmann::json one = Results("one.json");
  EXPECT_EQ(one["parts"]["ranks"], 1);
  EXPECT_FALSE(one["parts"]["assumed"]);
  EXPECT_THAT(one["parts"]["measured"].get<std::string>(), HasSubstr("1 thread each, stretto "));
  std::set<std::string> layers;
  for (const auto& [name, halves] : one["parts"]["layers"].items()) {
    layers.insert(name);
    double seconds = 0;
    for (const auto& half : halves) {
      for (const double part : half) seconds += part;
    }
    EXPECT_GT(seconds, 0) << name;
  }
  for (const char* name : {"embed", "attn_norm", "attn.qkv", "attn", "attn.out", "mlp_norm",
                           "mlp.gate_up", "mlp.down", "norm", "head"}) {
    EXPECT_EQ(layers.count(name), 1u) << name;
  }
  EXPECT_GT(one["forward"][0]["per_token"].get<double>() + one["forward"][0]["fixed"].get<double>(),
            0);
  EXPECT_GT(one["parts"]["update_per_element"], 0);
  EXPECT_EQ(one["parts"]["machine"]["all_gather"]["latency"], 0);  // nobody to talk to
}

// Before anything is measured, which would take longer than the test may.
TEST_F(Costs, FitChecksItsOutputFirst) {
  WriteText("old.json", "old");
  ASSERT_EQ(Run("mkdir folder").code, 0);
  for (const std::string output : {"absent/c.json", "folder"}) {
    const Result r =
        Bench(absl::StrCat("fit small.json --set data.sequence_length=1000000 --output ", output));
    EXPECT_EQ(r.code, 1);
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr(absl::StrCat("opening the output: ", output)));
  }
  ASSERT_EQ(Run("mkfifo pipe && ln -s pipe link").code, 0);
  for (const std::string output : {"pipe", "link"}) {
    const Result r = Bench("fit small.json --repetitions 1 --output " + output);
    EXPECT_EQ(r.code, 2);
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr(output + " is a pipe, which nobody may ever read"));
  }
  EXPECT_EQ(
      Run("(" STRETTO_BENCH " fit small.json --repetitions 1 --output /dev/stdout; echo $?) | "
          "tail -1")
          .output,
      "0\n");
  const Result full = Bench("fit small.json --repetitions 1 --output /dev/full");
  EXPECT_EQ(full.code, 1);
  EXPECT_THAT(full.output, HasSubstr("/dev/full could not be written"));
  // A disk without space: the old file stays, and nothing beside it.
  const Result limited = Run("(ulimit -f 0; trap '' XFSZ; " STRETTO_BENCH
                             " fit small.json --repetitions 1 --output old.json 2>&1 | cat)");
  EXPECT_THAT(limited.output, HasSubstr("could not be written"));
  EXPECT_EQ(ReadText("old.json"), "old");
  EXPECT_EQ(Run("ls *.tmp 2>/dev/null").output, "");
  ASSERT_EQ(Bench("fit small.json --repetitions 1 --output old.json").code, 0);
  EXPECT_TRUE(Results("old.json").contains("parts"));
}

TEST_F(Costs, OneSizeIsNoFit) {
  const Result r = Bench("fit small.json --set batch.micro=1 --set data.sequence_length=1");
  EXPECT_EQ(r.code, 2);
  EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
  EXPECT_THAT(r.output, HasSubstr("raise batch.micro or data.sequence_length"));
}

#ifdef STRETTO_WITH_MPI
// One rank says so for all.
TEST_F(Costs, RanksStartedDifferentlyAreRefused) {
  for (const char* arguments :
       {"fit small.json --repetitions 1$OMPI_COMM_WORLD_RANK",
        "fit small.json --set seed=$OMPI_COMM_WORLD_RANK",
        "predict small.json --rounds 1$OMPI_COMM_WORLD_RANK",
        "predict small.json --fit $OMPI_COMM_WORLD_RANK.json",
        "fit small.json --steps $OMPI_COMM_WORLD_RANK", "varlen small.json $MESH",
        "train small.json --set "
        "optimizer.lr=1e-$OMPI_COMM_WORLD_RANK"}) {
    WriteText("start.sh", absl::StrCat("[ $OMPI_COMM_WORLD_RANK = 1 ] || MESH='--mesh static'\n"
                                       "exec " STRETTO_BENCH " ",
                                       arguments));
    const Result r = Run(STRETTO_MPIRUN " 2 sh start.sh 2>&1");
    EXPECT_NE(r.code, 0);
    const std::string sentence = "rank 1 was started with another configuration";
    const size_t at = r.output.find(sentence);
    ASSERT_NE(at, std::string::npos) << r.output;
    EXPECT_EQ(r.output.find(sentence, at + 1), std::string::npos) << r.output;
  }
}

TEST_F(Costs, LayoutsOfTwoRanksAreMeasuredAndPredicted) {
  const auto ranks2 = [&](const std::string& arguments) {
    return Run(absl::StrCat(STRETTO_MPIRUN " 2 " STRETTO_BENCH " ", arguments, " 2>&1"));
  };
  Result r = ranks2(
      "fit small.json --repetitions 1 --steps 2 --set parallel.bucket_bytes=1 --output two.json");
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("as in whole steps"));
  r = Bench("fit small.json --repetitions 1 --output one.json");
  EXPECT_EQ(r.code, 0);
  EXPECT_THAT(r.output, HasSubstr("as in a few blocks"));
  const nlohmann::json parts = Results("two.json")["parts"];
  EXPECT_EQ(parts["ranks"], 2);
  for (const char* operation : {"all_gather", "reduce_scatter", "all_reduce", "point_to_point"}) {
    const nlohmann::json& cost = parts["machine"][operation];
    EXPECT_GT(cost["bytes_per_second"].get<double>(), 0) << operation;
  }
  r = ranks2("predict small.json --fit two.json --rounds 1 --json p.json");
  ASSERT_EQ(r.code, 0) << r.output;
  const nlohmann::json file = Results("p.json");
  ExpectSound(file);
  EXPECT_EQ(Names(file),
            (std::set<std::string>{"dp 2", "tp 2", "1f1b, pp 2", "zb-h1, pp 2", "zero 3, dp 2"}));
  for (const auto& result : file["results"]) EXPECT_GT(result["ratio"], 0) << result;
  // A ring of both ranks, and what planners make of it.
  EXPECT_FALSE(parts.contains("ring_per_token"));
  const std::string documents =
      " --set data.documents=true --set data.sequence_length=64 --set batch.tokens=256 "
      "--set optimizer.warmup=100 ";
  // Micro-batches are as large as a run's, which have room.
  r = ranks2(
      "fit small.json --repetitions 1 --steps 2 --set runtime.host_memory_bytes=200000000 "
      "--output ring.json" +
      documents);
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, Not(HasSubstr("no room")));
  EXPECT_THAT(r.output, Not(HasSubstr("warmup")));  // of a run that is not this one
  r = ranks2("fit small.json --output r.json --set model.vocabulary=100" + documents);
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.output, HasSubstr("opening the tokenizer: documents of data.tokenizer (bytes) end "
                                  "with token 256, and model.vocabulary is 100; raise it"));
  r = ranks2("fit small.json --output r.json --set batch.capacity=1" + documents);
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.output, HasSubstr("raise data.sequence_length and batch.capacity to 2 at least"));
  r = ranks2("varlen small.json --fit ring.json --rounds 1 --warm-up 0 --json v.json" + documents);
  ASSERT_EQ(r.code, 0) << r.output;
  for (const auto& result : Results("v.json")["results"]) EXPECT_GT(result["ratio"], 0) << result;
  // Known before steps are measured: these would never end.
  const std::string endless = " --set steps=1000000000";
  r = ranks2(absl::StrCat("predict small.json --fit two.json --set model.hidden=64", endless));
  EXPECT_NE(r.code, 0);
  EXPECT_THAT(r.output, HasSubstr("fit it to this one"));
  r = ranks2(absl::StrCat("predict small.json --fit one.json", endless));
  EXPECT_NE(r.code, 0);
  EXPECT_THAT(r.output, HasSubstr("was fitted on one rank"));
}
#endif

// A whole model's lack of room is no error: costs are those of a fit that takes no whole steps.
TEST_F(Costs, WithoutRoomNoWholeStepsAreMeasured) {
  const auto fit = [&](int ranks, const std::string& arguments) {
    const std::string program = ranks == 1 ? "" : absl::StrCat(STRETTO_MPIRUN " ", ranks, " ");
    return Run(absl::StrCat("mkdir -p T && TMPDIR=$PWD/T ", program, STRETTO_BENCH,
                            " fit small.json --repetitions 1 ", arguments, " 2>&1"));
  };
  const std::string documents =
      " --set data.documents=true --set data.sequence_length=64 --set batch.tokens=256";
  const std::string little = " --set runtime.host_memory_bytes=1000";
  // What is in a file, whatever its times are.
  const auto fields = [&](const std::string& file) {
    const nlohmann::json flat = Results(file).flatten();
    std::set<std::string> names;
    for (const auto& [name, value] : flat.items()) names.insert(name);
    return names;
  };
#ifdef STRETTO_WITH_MPI
  const int most = 2;
#else
  const int most = 1;
#endif
  for (int ranks = 1; ranks <= most; ++ranks) {
    for (const std::string& samples : {std::string(), documents}) {
      const std::string what = absl::StrCat(ranks, " ranks", samples);
      Result r = fit(ranks, absl::StrCat("--steps 0 --output none.json", samples));
      ASSERT_EQ(r.code, 0) << what << r.output;
      EXPECT_THAT(r.output, Not(HasSubstr("no room"))) << what;
      r = fit(ranks, absl::StrCat("--steps 2 --output little.json", samples, little));
      ASSERT_EQ(r.code, 0) << what << r.output;
      EXPECT_THAT(r.output, HasSubstr("no room for whole steps: layers are as in a few blocks "
                                      "(rank 0 failed in planning"))
          << what;
      EXPECT_EQ(r.output.find("what rings add up costs nothing") != std::string::npos,
                ranks > 1 && !samples.empty())
          << r.output;
      EXPECT_EQ(fields("little.json"), fields("none.json")) << what;
      EXPECT_EQ(Results("little.json")["parts"]["measured"],
                Results("none.json")["parts"]["measured"]);
      EXPECT_EQ(Run("ls T | grep stretto-bench").output, "") << what;
    }
  }
  // Rings are measured unless told otherwise, whole steps are not on a CPU.
  if (most == 1) return;
  const Result r = fit(most, absl::StrCat("--output default.json", documents, little));
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, HasSubstr("what rings add up costs nothing"));
  EXPECT_THAT(r.output, Not(HasSubstr("no room for whole steps: layers")));
}

// On standard error, by one rank.
TEST_F(Costs, WhatTakesItsTimeIsSaid) {
#ifdef STRETTO_WITH_MPI
  const std::string program = STRETTO_MPIRUN " 2 " STRETTO_BENCH " ";
  const std::string alone = "static, cp 1 on lengths of byted", dp = "dp 2";
#else
  const std::string program = STRETTO_BENCH " ";
  const std::string alone = "dynamic on lengths of byted", dp = "dp 1";
#endif
  const auto says = [&](const std::string& arguments, const std::vector<std::string>& parts) {
    const Result r = Run(absl::StrCat(program, arguments, " 2>said"));
    const std::string said = ReadText("said");
    EXPECT_EQ(r.code, 0) << said;
    EXPECT_THAT(r.output, Not(HasSubstr("measuring"))) << arguments;
    EXPECT_THAT(r.output, Not(HasSubstr("round 1 of"))) << arguments;
    size_t at = 0;
    for (const std::string& part : parts) {
      const size_t found = said.find(part, at);
      ASSERT_NE(found, std::string::npos) << part << " is not in\n" << said;
      at = found + part.size();
      EXPECT_EQ(said.find(part, at), std::string::npos) << part << " is twice in\n" << said;
    }
    EXPECT_LE(std::count(said.begin(), said.end(), '\n'), 20) << said;
    EXPECT_THAT(said, Not(HasSubstr("set-up"))) << said;  // the library's
  };
  const std::string documents = " --set data.sequence_length=64 --set batch.tokens=256 ";
  std::vector<std::string> parts = {"measuring layers on"};
#ifdef STRETTO_WITH_MPI
  parts.insert(parts.end(), {"measuring links between 2 ranks", "a micro-batch hides"});
#endif
  std::vector<std::string> all = parts;
  all.push_back("measuring 5 whole steps");
#ifdef STRETTO_WITH_MPI
  all.insert(all.end(), {"steps on documents that each rank has alone",
                         "steps on documents that all ranks share"});
#endif
  says("fit small.json --repetitions 1 --steps 2 --set data.documents=true" + documents, all);
  says("varlen small.json --rounds 2" + documents,
       {"meshes, in 2 rounds of 4 steps", absl::StrCat("round 1 of 2, ", alone),
        absl::StrCat("round 2 of 2, ", alone)});
  parts.insert(parts.end(), {"in 1 round of 4 steps", absl::StrCat("round 1 of 1, ", dp)});
  says("predict small.json --rounds 1", parts);
}

TEST_F(BenchProgram, WrongArgumentsAreOneSentence) {
  for (const char* arguments : {"",
                                "kernles",
                                "kernels --tokns 3",
                                "kernels --tokens=-1",
                                "kernels --heads 5",
                                "kernels --dtype f16",
                                "kernels extra",
                                "comm --factor 1",
                                "comm --sizes 3",
                                "train",
                                "train absent.json",
                                "train a b",
                                "compare",
                                "compare a.json",
                                "compare --tolerance=-1 a b",
                                "--json",
                                "fit",
                                "fit absent.json",
                                "fit --repetitions 0 a.json",
                                "fit --output= a.json",
                                "fit --steps some a.json",
                                "predict",
                                "predict a b",
                                "predict --rounds 0 a.json"}) {
    const Result r = Bench(arguments);
    EXPECT_EQ(r.code, 2) << arguments;
    EXPECT_TRUE(IsOneSentence(r.output)) << arguments << ": " << r.output;
  }
  EXPECT_THAT(Bench("kernles").output, HasSubstr("did you mean kernels?"));
  for (const char* arguments : {"--help", "kernels --help", "comm --help", "train --help",
                                "compare --help", "fit --help", "predict --help"}) {
    const Result r = Bench(arguments);
    EXPECT_EQ(r.code, 0) << arguments;
    EXPECT_THAT(r.output, HasSubstr("usage: stretto-bench"));
  }
}

TEST_F(BenchProgram, VarlenComparesMeshes) {
  WriteText("m.json", kModel);
  const std::string small =
      "varlen m.json --rounds 1 --set batch.tokens=40 --lengths lengths.txt --json v.json ";
  WriteText("lengths.txt", "9\n3\n5\n16\n");
  Result r = Bench(small);
  ASSERT_EQ(r.code, 0) << r.output;
  nlohmann::json file = Results("v.json");
  ExpectSound(file);
  EXPECT_EQ(Names(file), (std::set<std::string>{"static, cp 1", "unbalanced", "dynamic"}));
  for (const nlohmann::json& row : file["results"]) EXPECT_GT(row["speed_up"], 0);
  // Without a static mesh there is nothing to compare with.
  r = Bench(small + "--mesh dynamic");
  ASSERT_EQ(r.code, 0) << r.output;
  EXPECT_THAT(r.output, Not(HasSubstr("0.000")));
  file = Results("v.json");
  ASSERT_EQ(file["results"].size(), 1u);
  EXPECT_FALSE(file["results"][0].contains("speed_up"));
  // Of 4 steps 2 are counted, of fewer than its warm-up one.
  for (const auto& [option, steps] :
       {std::pair("--set steps=3 --warm-up 1", 2u), std::pair("--set steps=4 --warm-up 6", 1u)}) {
    r = Bench(absl::StrCat(small, "--mesh dynamic ", option));
    ASSERT_EQ(r.code, 0) << r.output;
    EXPECT_EQ(Results("v.json")["results"][0]["seconds_of_batches"].size(), steps) << option;
  }
  // Before anything is measured, which would take for ever, or waited for.
  ASSERT_EQ(Run("mkfifo pipe").code, 0);
  for (const auto& [option, sentence] :
       {std::pair("--json absent/v.json", "absent/v.json"),
        std::pair("--json pipe", "pipe is a pipe"),
        std::pair("--lengths pipe", "no regular file but a pipe"),
        std::pair("--fit pipe", "no regular file but a pipe"),
        std::pair("--mesh static --fit pipe", "no regular file but a pipe"),
        std::pair("--set data.sequence_length=1", "a document has two tokens at least"),
        std::pair("--warm-up -1", "--warm-up must be 0 to")}) {
    r = Bench(absl::StrCat(small, "--set steps=1000000 ", option));
    EXPECT_NE(r.code, 0) << option;
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    EXPECT_THAT(r.output, HasSubstr(sentence)) << option;
  }
}

TEST_F(BenchProgram, FileThatCannotBeWrittenIsAnError) {
  const Result r = Bench(absl::StrCat(kSmall, "--only rope --json absent/k.json"));
  EXPECT_EQ(r.code, 1);
  EXPECT_THAT(r.output, HasSubstr("cannot be written to absent/k.json"));
  ASSERT_EQ(Run("mkfifo pipe").code, 0);
  EXPECT_THAT(Bench(absl::StrCat(kSmall, "--only rope --json pipe")).output,
              HasSubstr("pipe is a pipe"));
}

#ifdef STRETTO_GPU_TABLE
class GpuTable : public Programs {
 protected:
  Result Table(const std::string& arguments) const {
    return Run(absl::StrCat(STRETTO_PYTHON " " STRETTO_GPU_TABLE " ", arguments));
  }
};

TEST_F(GpuTable, FilesThatAreNotItsOwnAreNamedInOneSentence) {
  const auto print = [&](const std::string& step, const std::string& kernels) {
    WriteText("0.5b.json", step);
    WriteText("0.5b.kernels.json", kernels);
    const Result r = Table("--print . 2>&1 > tables");
    EXPECT_EQ(r.code, 1) << r.output;
    EXPECT_TRUE(IsOneSentence(r.output)) << r.output;
    return r.output;
  };
  const std::string step = R"({"device": "x", "results": [{}]})";
  EXPECT_THAT(print(R"({"resu)", "{}"), HasSubstr("0.5b.json is no JSON"));
  EXPECT_THAT(print("\xff", "{}"), HasSubstr("0.5b.json is no JSON"));
  EXPECT_THAT(print("[]", "{}"), HasSubstr("0.5b.json holds no results"));
  EXPECT_THAT(print(step, R"({"results": []})"), HasSubstr("0.5b.kernels.json holds no results"));
  EXPECT_THAT(print(step, step), HasSubstr("not of this version"));
  std::filesystem::remove(Path("0.5b.json"));
  EXPECT_THAT(Table("--print . 2>&1").output,
              HasSubstr("0.5b.json cannot be read: No such file or directory"));
}

TEST_F(GpuTable, AFolderThatCannotBeMadeIsWrongUsage) {
  std::filesystem::create_directory(Path("benchmarks"));
  WriteText("benchmarks/stretto-bench", "");
  WriteText("file", "");
  const Result r = Table("--build . --output file 2>&1");
  EXPECT_EQ(r.code, 2) << r.output;
  EXPECT_THAT(r.output, HasSubstr("--output: 'file' cannot be made: File exists"));
}
#endif

}  // namespace
}  // namespace stretto::testing
