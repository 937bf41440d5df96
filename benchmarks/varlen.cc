// stretto-bench varlen CONFIG: the same steps of documents of unequal length with static meshes and
// with those that are cut anew for each step, beside what the planner's clock predicts.
#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "benchmarks/bench.h"
#include "stretto/data/length_distribution.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/train/flops.h"
#include "stretto/train/sequence_planner.h"
#include "tools/arguments.h"
#include "tools/files.h"

namespace stretto::bench {

double PredictedSeconds(const TrainConfig& config, const CostModel* cost,
                        const SequencePlan& plan) {
  double seconds = plan.makespan;
  if (cost != nullptr && cost->parts) {
    seconds += cost->parts->step_fixed + cost->parts->update_per_element *
                                             static_cast<double>(ParameterCount(config.model)) /
                                             static_cast<double>(config.parallel.data_ranks());
  }
  return seconds;
}

namespace {

struct Method {
  std::string name, mesh;
  int64_t cp = 1;
  TrainConfig config;
  std::vector<std::vector<double>> seconds;  // by batch, of each round
  double exposed = 0, ring_bytes = 0;        // of a step: of rank 0, and of all ranks
  std::vector<SequencePlan> plans;           // by batch
};

absl::StatusOr<LengthDistribution> Distribution(const std::string& lengths) {
  if (absl::StatusOr<LengthDistribution> named = LengthDistribution::Named(lengths); named.ok()) {
    return named;
  }
  absl::StatusOr<std::string> text = ReadRegularFile("--lengths: the file", lengths);
  if (absl::IsNotFound(text.status())) {
    return absl::InvalidArgumentError(
        absl::StrCat("--lengths is '", lengths, "', neither github, byted nor a file of lengths (",
                     std::string(text.status().message()), ")"));
  }
  STRETTO_RETURN_IF_ERROR(text.status());
  STRETTO_ASSIGN_OR_RETURN(std::vector<int64_t> all, ParseLengths(*text, lengths));
  return LengthDistribution::Of(std::move(all));
}

// A document of one token is none in a token file: its token goes to another one.
void JoinSingles(int64_t longest, std::vector<int64_t>* lengths) {
  const auto singles = std::count(lengths->begin(), lengths->end(), 1);
  std::erase(*lengths, 1);
  size_t next = 0;
  for (auto left = singles; left > 0 && next < lengths->size();) {
    if ((*lengths)[next] == longest) {
      ++next;
      continue;
    }
    ++(*lengths)[next];
    --left;
  }
}

// Static meshes of all sizes that can hold the longest document, then the others.
std::vector<Method> Methods(const TrainConfig& config, int64_t data_ranks,
                            const std::vector<std::string>& meshes) {
  std::vector<Method> methods;
  for (int64_t cp = 1; cp <= data_ranks; ++cp) {
    if (data_ranks % cp != 0 || cp * config.batch.capacity < config.data.sequence_length) continue;
    methods.push_back({.name = absl::StrCat("static, cp ", cp), .mesh = "static", .cp = cp});
  }
  methods.push_back({.name = "unbalanced", .mesh = "unbalanced"});
  methods.push_back({.name = "dynamic", .mesh = "dynamic"});
  std::erase_if(methods, [&](const Method& m) {
    return !meshes.empty() && std::count(meshes.begin(), meshes.end(), m.mesh) == 0;
  });
  for (Method& m : methods) {
    m.config = config;
    m.config.parallel.mesh = m.mesh;
    m.config.parallel.cp = m.cp;
    m.config.parallel.dp = 0;
  }
  return methods;
}

struct Options {
  std::string lengths = "byted", fit;
  std::vector<std::string> meshes;  // empty: all
  int64_t seed = 1, rounds = 3, warm_up = kWarmUp;
};

absl::Status Run(World& world, TrainConfig config, const Options& options, Results* results) {
  STRETTO_RETURN_IF_ERROR(SameEverywhere(
      world, config,
      absl::StrCat(options.lengths, " ", options.seed, " ", options.rounds, " ", options.warm_up,
                   " ", options.fit, " ", absl::StrJoin(options.meshes, ","))));
  if (config.data.sequence_length < 2) {
    return world.Agree(
        "reading the configuration",
        absl::InvalidArgumentError("data.sequence_length is 1, and a document has two "
                                   "tokens at least; raise it"));
  }
  config.data.documents = true;
  config.data.shuffle = false;
  config.parallel.cost_model = options.fit;
  TrainConfig resolved = config;
  resolved.parallel.mesh = "dynamic";
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the configuration",
                                      ResolveSteps(world.size(), &resolved, options.warm_up)));
  config.batch = resolved.batch;
  config.steps = resolved.steps;
  // One batch a step, so that all methods meet the same.
  std::vector<int64_t> lengths;
  std::vector<std::vector<int64_t>> batches;
  const auto draw = [&]() -> absl::Status {
    STRETTO_ASSIGN_OR_RETURN(const LengthDistribution distribution, Distribution(options.lengths));
    for (int64_t step = 0; step < config.steps; ++step) {
      batches.push_back(distribution.Batch(static_cast<uint64_t>(options.seed),
                                           static_cast<uint64_t>(step), config.batch.tokens,
                                           config.data.sequence_length));
      JoinSingles(config.data.sequence_length, &batches.back());
      lengths.insert(lengths.end(), batches.back().begin(), batches.back().end());
    }
    return absl::OkStatus();
  };
  STRETTO_RETURN_IF_ERROR(world.Agree("drawing documents", draw()));
  CostModel fitted;
  absl::Status read;
  if (!options.fit.empty()) {
    absl::StatusOr<CostModel> file = ReadCostModel(options.fit);
    read = file.status();
    if (read.ok()) fitted = *std::move(file);
  }
  STRETTO_RETURN_IF_ERROR(world.Agree("reading the cost model", read));
  const CostModel* const cost = options.fit.empty() ? nullptr : &fitted;
  std::vector<Method> methods = Methods(config, resolved.parallel.data_ranks(), options.meshes);
  Tell(world, absl::StrFormat("measuring %d meshes, in %d round%s of %d steps", methods.size(),
                              options.rounds, options.rounds == 1 ? "" : "s", config.steps));
  for (int64_t round = 0; round < options.rounds; ++round) {
    for (Method& m : methods) {
      double sent = 0;
      const auto inspect = [&](Trainer& trainer) -> absl::Status {
        m.config = trainer.config();
        sent = static_cast<double>(trainer.BytesSent("cp"));
        return absl::OkStatus();
      };
      STRETTO_ASSIGN_OR_RETURN(const std::vector<StepStats> steps,
                               TimedSteps(world, m.config, inspect, &lengths, options.warm_up));
      STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                               world.AllGather("bytes", absl::StrCat(sent)));
      m.ring_bytes = 0;
      for (const std::string& bytes : all) m.ring_bytes += std::stod(bytes);
      m.ring_bytes /= static_cast<double>(config.steps);
      m.seconds.resize(steps.size());
      m.exposed = 0;
      for (size_t i = 0; i < steps.size(); ++i) {
        m.seconds[i].push_back(1e-3 * steps[i].step_ms);
        m.exposed += 1e-3 * steps[i].comm_exposed_ms / static_cast<double>(steps.size());
      }
      double sum = 0;
      for (const auto& of_batch : m.seconds) sum += of_batch.back();
      Tell(world, absl::StrFormat("round %d of %d, %s on lengths of %s: %.1f ms a step", round + 1,
                                  options.rounds, m.name, options.lengths,
                                  1e3 * sum / static_cast<double>(steps.size())));
    }
  }
  const size_t measured = methods.front().seconds.size();
  const size_t skipped = batches.size() - measured;  // while warming up
  for (Method& m : methods) {
    const int places = world.info().local_size / static_cast<int>(m.config.parallel.tp);
    STRETTO_ASSIGN_OR_RETURN(const SequencePlanOptions plan,
                             SequenceOptionsOf(m.config, std::max(1, places)));
    for (size_t i = 0; i < measured; ++i) {
      STRETTO_ASSIGN_OR_RETURN(m.plans.emplace_back(), PlanSequences(batches[skipped + i], plan));
    }
  }
  // Of several rounds: the first ones build what libraries need for shapes that they have not met.
  const auto of_batch = [&](const Method& m, size_t i) { return LowerDecile(m.seconds[i]); };
  const auto mean = [&](const Method& m) {
    double sum = 0;
    for (size_t i = 0; i < measured; ++i) sum += of_batch(m, i);
    return sum / static_cast<double>(measured);
  };
  const Method* best_static = nullptr;
  for (const Method& m : methods) {
    if (m.mesh != "static") continue;
    if (best_static == nullptr || mean(m) < mean(*best_static)) best_static = &m;
  }
  results->command = "varlen";
  results->ranks = world.size();
  results->device = DeviceName(methods.front().config.runtime.device == "cuda"
                                   ? Device::Cuda(world.info().local_rank)
                                   : Device::Cpu());
  const auto tokens = static_cast<double>(config.batch.tokens);
  if (world.rank() == 0) {
    int64_t longest = 0;
    for (const int64_t length : lengths) longest = std::max(longest, length);
    absl::PrintF(
        "%s, %d ranks, documents of %s up to %d tokens (longest %d), %d tokens a step, capacity "
        "%d\n%-14s %10s %10s %12s %9s %9s %10s %12s %10s %6s\n",
        results->device, world.size(), options.lengths, config.data.sequence_length, longest,
        config.batch.tokens, config.batch.capacity, "mesh", "ms a step", "first ms", "tokens/s",
        "x static", "least x", "exposed ms", "ring MB", "simulated", "ratio");
  }
  for (const Method& m : methods) {
    double least = 1e9, predicted = 0;
    std::vector<double> of_batches;
    for (size_t i = 0; i < measured; ++i) {
      if (best_static != nullptr) {
        // Against the better static mesh of this very batch.
        double rival = 1e30;
        for (const Method& s : methods) {
          if (s.mesh == "static") rival = std::min(rival, of_batch(s, i));
        }
        least = std::min(least, rival / of_batch(m, i));
      }
      of_batches.push_back(of_batch(m, i));
      predicted += PredictedSeconds(m.config, cost, m.plans[i]) / static_cast<double>(measured);
    }
    const double seconds = mean(m);
    double first = 0;  // as runs meet batches, with whatever is built for new shapes
    for (size_t i = 0; i < measured; ++i) first += m.seconds[i].front();
    first /= static_cast<double>(measured);
    results->results.push_back({{"name", m.name},
                                {"seconds", seconds},
                                {"first_seconds", first},
                                {"tokens_per_second", tokens / seconds},
                                {"exposed_seconds", m.exposed},
                                {"ring_bytes", m.ring_bytes},
                                {"simulated_seconds", predicted},
                                {"ratio", predicted / seconds},
                                {"seconds_of_batches", of_batches}});
    std::string beside = absl::StrFormat("%9s %9s", "-", "-");
    if (best_static != nullptr) {
      const double speed_up = mean(*best_static) / seconds;
      results->results.back()["speed_up"] = speed_up;
      results->results.back()["least_speed_up_of_a_batch"] = least;
      beside = absl::StrFormat("%9.3f %9.3f", speed_up, least);
    }
    if (world.rank() != 0) continue;
    absl::PrintF("%-14s %10.2f %10.2f %12.0f %s %10.2f %12.2f %10.2f %6.3f\n", m.name,
                 1e3 * seconds, 1e3 * first, tokens / seconds, beside, 1e3 * m.exposed,
                 m.ring_bytes / 1e6, 1e3 * predicted, predicted / seconds);
  }
  return absl::OkStatus();
}

}  // namespace

int Varlen(int argc, const char* const* argv) {
  std::vector<std::string> sets;
  std::string json;
  Options options;
  Arguments arguments(
      "stretto-bench varlen",
      "Measures steps on documents of unequal length with every static mesh and with a dynamic "
      "one\n"
      "(mpirun -np 2 stretto-bench varlen ...). data.sequence_length is the longest document,\n"
      "batch.tokens and batch.capacity say what a step and a rank have. `x static` is the speed\n"
      "against the best static mesh, `least x` that of the batch where it is least, against the\n"
      "best static mesh of that batch. Times are each batch's best round, `first ms` the first "
      "one.",
      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.Add("lengths", "NAME", "github, byted, or a file of lengths, one a line",
                &options.lengths);
  arguments.Add("fit", "FILE", "the cost model to plan with; without one costs follow FLOPs",
                &options.fit);
  arguments.Add("mesh", "NAME", "only static, dynamic or unbalanced; may be repeated",
                &options.meshes);
  arguments.Add("seed", "N", "of the documents' lengths", &options.seed);
  arguments.Add("rounds", "N", "how often each mesh runs `steps` steps", &options.rounds);
  arguments.Add("warm-up", "N", "first steps of a round that are not counted", &options.warm_up);
  arguments.Add("json", "FILE", "also write the results there", &json);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (options.rounds < 1 || options.rounds > 100 || options.seed < 0)) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--rounds must be 1 to 100 and --seed at least 0, not ", options.rounds,
                     " and ", options.seed));
  }
  if (parsed.ok() && (options.warm_up < 0 || options.warm_up > 1000)) {
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--warm-up must be 0 to 1000, not ", options.warm_up));
  }
  for (const std::string& mesh : options.meshes) {
    if (!parsed.ok() || mesh == "static" || mesh == "dynamic" || mesh == "unbalanced") continue;
    parsed = absl::InvalidArgumentError(
        absl::StrCat("--mesh is '", mesh, "'; give static, dynamic or unbalanced"));
  }
  absl::StatusOr<TrainConfig> config;
  if (parsed.ok()) {
    config = LoadOne("varlen", arguments.rest(), sets);
    parsed = config.status();
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  Results results;
  return RunInWorld([&](World& world) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(CheckOutput(world, json));
    STRETTO_RETURN_IF_ERROR(Run(world, *config, options, &results));
    absl::Status written;
    if (world.rank() == 0) written = results.Write(json);
    return world.Agree("writing the results", written);
  });
}

}  // namespace stretto::bench
