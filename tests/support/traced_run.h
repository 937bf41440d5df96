// What the trace of a run has to say, checked against the plan and the metrics: for ranks as
// threads, under mpirun, and on GPUs.
#ifndef STRETTO_TESTS_SUPPORT_TRACED_RUN_H_
#define STRETTO_TESTS_SUPPORT_TRACED_RUN_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "stretto/parallel/pipeline.h"
#include "stretto/train/memory.h"
#include "tests/support/training.h"

namespace stretto::testing {

using Json = nlohmann::json;

inline constexpr double kRounding = 0.002;  // microseconds, of the file's last digit

// What a file says about one rank.
struct RankTrace {
  std::string name;
  std::map<int, std::string> rows;                  // by thread
  std::map<std::string, std::vector<Json>> slices;  // by row without its number, as they began
  const std::vector<Json>& Of(const std::string& row) { return slices[row]; }
};

inline int64_t Arg(const Json& slice, const char* name) {
  return slice["args"].value(name, int64_t{-1});
}
inline double End(const Json& slice) {
  return slice["ts"].get<double>() + slice["dur"].get<double>();
}

inline Json ReadJson(const std::string& path) {
  std::ifstream in(path);
  return Json::parse(in, nullptr, /*allow_exceptions=*/false);
}

inline std::map<int, RankTrace> Parse(const Json& file) {
  std::map<int, RankTrace> ranks;
  std::map<std::pair<int, int>, std::vector<Json>> threads;
  for (const Json& event : file["traceEvents"]) {
    RankTrace& rank = ranks[event["pid"]];
    if (event["name"] == "process_name") rank.name = event["args"]["name"];
    if (event["name"] == "thread_name") rank.rows[event["tid"]] = event["args"]["name"];
    if (event["ph"] == "X") threads[{event["pid"], event["tid"]}].push_back(event);
  }
  for (auto& [key, slices] : threads) {
    std::stable_sort(slices.begin(), slices.end(),
                     [](const Json& a, const Json& b) { return a["ts"] < b["ts"]; });
    RankTrace& rank = ranks[key.first];
    std::string row = rank.rows.at(key.second);
    row = row.substr(0, row.find(" ("));
    for (size_t i = 0; i < slices.size(); ++i) {
      EXPECT_GE(slices[i]["dur"].get<double>(), 0);
      if (i > 0) {
        EXPECT_LE(End(slices[i - 1]), slices[i]["ts"].get<double>() + kRounding)
            << slices[i - 1] << " overlaps " << slices[i];
      }
      rank.slices[row].push_back(slices[i]);
    }
  }
  for (auto& [number, rank] : ranks) {
    for (auto& [row, slices] : rank.slices) {
      std::stable_sort(slices.begin(), slices.end(),
                       [](const Json& a, const Json& b) { return a["ts"] < b["ts"]; });
    }
  }
  return ranks;
}

// The compute row against the program, and what travels between stages.
inline void CheckActions(const TrainConfig& config, const Mesh& mesh, RankTrace& trace) {
  const bool pipeline = config.parallel.pp > 1;
  const int micro_batches =
      static_cast<int>(config.batch.global / config.parallel.dp / config.batch.micro);
  const Program program = StepProgram(config, pipeline ? micro_batches : 1).value();
  const int place = mesh.Coord("pp");
  using Action = std::tuple<int64_t, std::string, int64_t, int64_t, int64_t, int64_t>;
  std::vector<Action> expected, seen;
  using Message = std::tuple<int64_t, std::string, bool, int64_t, int64_t, int64_t>;
  std::multiset<Message> messages, travelled;
  for (int64_t step = 3; step < 5; ++step) {
    for (int i = 0; i < (pipeline ? 1 : micro_batches); ++i) {
      for (const ProgramAction& a : program.of_rank[static_cast<size_t>(place)]) {
        expected.emplace_back(step, Name(a.work), a.stage, a.item, a.order, pipeline ? a.item : i);
      }
    }
    expected.emplace_back(step, "optimizer", -1, -1, -1, -1);
    for (const BoundaryMessage& m : MessagesOf(program, place)) {
      messages.insert({step, m.receive ? "receive" : "send", m.forward, m.stage, m.item,
                       mesh.Along({"pp"})[static_cast<size_t>(m.peer)]});
    }
  }
  for (const Json& s : trace.Of("compute")) {
    seen.emplace_back(Arg(s, "step"), s["cat"], Arg(s, "stage"), Arg(s, "item"), Arg(s, "order"),
                      Arg(s, "micro_batch"));
  }
  EXPECT_EQ(seen, expected);
  for (const char* row : {"pp send", "pp receive"}) {
    for (const Json& s : trace.Of(row)) {
      const std::string name = s["name"];
      if (name.rfind("tied", 0) == 0) continue;
      // A forward action is followed by one stage more, so the message says which way it goes.
      travelled.insert({Arg(s, "step"), s["cat"], name.rfind("activations", 0) == 0,
                        Arg(s, "stage"), Arg(s, "item"), Arg(s, "peer")});
    }
  }
  EXPECT_EQ(travelled, messages);
}

// Every collective of the data axis once, and the bytes of each axis.
inline void CheckCollectives(const TrainConfig& config, int ranks, int rank, RankTrace& trace) {
  const RunPlan plan = PlanRun(config, ranks, rank).value();
  const auto sent = [&](std::initializer_list<const char*> rows) {
    int64_t bytes = 0;
    for (const char* row : rows) {
      for (const Json& s : trace.Of(row)) bytes += Arg(s, "bytes");
    }
    return bytes;
  };
  // For messages: what was sent by each name.
  const auto listed = [&](const char* row) {
    std::map<std::string, std::pair<int, int64_t>> names;
    for (const Json& s : trace.Of(row)) {
      auto& [count, bytes] = names[s["name"]];
      ++count;
      bytes += Arg(s, "bytes");
    }
    std::string text;
    for (const auto& [name, sum] : names) {
      text += absl::StrCat("\n", name, ": ", sum.first, " times, ", sum.second, " bytes");
    }
    return text;
  };
  EXPECT_EQ(sent({"dp"}), 2 * (plan.gradient_bytes_sent + plan.parameter_bytes_sent))
      << listed("dp");
  EXPECT_EQ(sent({"tp"}), 2 * plan.tensor_bytes_sent) << listed("tp");
  EXPECT_EQ(sent({"pp send"}), 2 * (plan.boundary_bytes_sent + plan.tied_bytes_sent));
  EXPECT_EQ(sent({"all"}), 2 * plan.scalar_bytes_sent);
  if (config.parallel.dp == 1 || config.parallel.zero > 1) return;
  std::multiset<std::tuple<int64_t, std::string, int64_t, int64_t>> expected, seen;
  for (const StagePlan& stage : plan.stages) {
    for (size_t b = 0; b < stage.buckets.buckets.size(); ++b) {
      for (int64_t step = 3; step < 5; ++step) {
        for (const char* op : {"reduce_scatter", "all_gather"}) {
          expected.insert({step, op, stage.stage, static_cast<int64_t>(b)});
        }
      }
    }
  }
  for (const Json& s : trace.Of("dp")) {
    seen.insert({Arg(s, "step"), s["cat"], Arg(s, "stage"), Arg(s, "bucket")});
  }
  EXPECT_EQ(seen, expected);
}

// The waits of the trace are those of the metrics, which are a little longer.
inline void CheckExposed(const TrainConfig& config, const std::vector<StepStats>& steps,
                         RankTrace& trace) {
  // Two clocks of a GPU are read for a wait, to about a microsecond each.
  const double per_wait = config.runtime.device == "cuda" ? 2 : kRounding;
  for (const StepStats& s : steps) {
    const std::pair<const char*, double> axes[] = {{"wait for data", s.exposed_data_ms},
                                                   {"wait for tensor", s.exposed_tensor_ms},
                                                   {"wait for context", s.exposed_context_ms},
                                                   {"wait for pipeline", s.exposed_pipeline_ms},
                                                   {"wait for world", s.exposed_world_ms}};
    double sum = 0;
    for (const auto& [name, ms] : axes) {
      EXPECT_GE(ms, 0);
      sum += ms;
      if (s.step != 3 && s.step != 4) continue;
      double traced = 0;
      int waits = 0;
      for (const Json& slice : trace.Of("exposed")) {
        if (slice["cat"] != name || Arg(slice, "step") != s.step) continue;
        traced += 1e-3 * slice["dur"].get<double>();
        ++waits;
      }
      EXPECT_LE(traced, ms + 1e-3 * per_wait * waits) << name << " in step " << s.step;
      EXPECT_TRUE(ms == 0 || waits > 0) << name;
    }
    EXPECT_DOUBLE_EQ(s.comm_exposed_ms, sum);
    EXPECT_LE(s.comm_exposed_ms, s.step_ms);
  }
}

// Steps 3 and 4 are traced; full micro-batches, as many on each data-parallel rank.
inline TrainConfig Traced(TrainConfig config) {
  config.model.layers = 4;
  config.model.heads = config.model.kv_heads = 4;
  config.batch.global = 12;
  config.metrics.trace_from = 3;
  config.metrics.trace_steps = 2;
  config.metrics.trace_file = config.output + "/trace.json";
  return config;
}

inline absl::StatusOr<std::vector<StepStats>> TrainRank(World& world, const TrainConfig& config) {
  std::vector<StepStats> steps;
  STRETTO_ASSIGN_OR_RETURN(auto trainer, Trainer::Create(world, config));
  while (trainer->step() < config.steps) {
    STRETTO_ASSIGN_OR_RETURN(steps.emplace_back(), trainer->Step());
  }
  STRETTO_RETURN_IF_ERROR(trainer->Finish());
  return steps;
}

// One rank's part of the trace of a Traced run, whose steps were `traced`, and `untraced` without.
inline void CheckTrace(TrainConfig config, int ranks, int rank, const Json& file,
                       const std::vector<StepStats>& traced,
                       const std::vector<StepStats>& untraced) {
  ASSERT_TRUE(config.Resolve(ranks).ok());
  ASSERT_TRUE(file.is_object());
  EXPECT_EQ(file["otherData"]["source"], "measured");
  EXPECT_EQ(file["otherData"]["lost_actions"], 0);
  const double error_us = file["otherData"]["clock_error_us"];
  std::map<int, RankTrace> all = Parse(file);
  ASSERT_EQ(all.size(), static_cast<size_t>(ranks));
  RankTrace& trace = all[rank];
  SCOPED_TRACE(trace.name);
  ASSERT_EQ(traced.size(), untraced.size());
  for (size_t i = 0; i < traced.size(); ++i) {
    EXPECT_EQ(traced[i].loss, untraced[i].loss);
    EXPECT_EQ(traced[i].grad_norm, untraced[i].grad_norm);
  }
  EXPECT_EQ(trace.Of("steps").size(), 2u);
  EXPECT_EQ(trace.Of("host").size(), 2u);
  CheckActions(config, MeshOf(config, ranks, rank).value(), trace);
  CheckCollectives(config, ranks, rank, trace);
  CheckExposed(config, traced, trace);
  // A message arrives after it was begun to be sent, on the common time axis.
  for (const Json& received : trace.Of("pp receive")) {
    const std::vector<Json>& sends = all[static_cast<int>(Arg(received, "peer"))].Of("pp send");
    const auto sent = std::find_if(sends.begin(), sends.end(), [&](const Json& s) {
      return s["name"] == received["name"] && Arg(s, "step") == Arg(received, "step") &&
             Arg(s, "peer") == rank;
    });
    ASSERT_NE(sent, sends.end()) << received;
    EXPECT_EQ(Arg(*sent, "bytes"), Arg(received, "bytes"));
    EXPECT_GE(End(received) + 2 * error_us, (*sent)["ts"].get<double>());
  }
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_TRACED_RUN_H_
