// Plans of sequences for batches of documents: who works on what, how long that takes beside other
// methods, and pictures. Times are simulated.
#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/data/length_distribution.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/sequence_plan.h"
#include "stretto/sim/sequence_simulation.h"
#include "tools/arguments.h"
#include "tools/files.h"

namespace stretto {
namespace {

struct Options {
  std::string lengths = "byted", file, fit, svg, method = "all";
  int64_t tokens = 33218887, longest = 2097152, steps = 1, seed = 1;
  int64_t pipelines = 512, stages = 1, capacity = 8192, context = 0, machine = 0;
  int64_t tensor = 2, layers = 32;
  double median = 1024, sigma = 1.5, ring_bytes = 4096, host = 25e9, token_bytes = 139264;
  double compute = 1, network = 1;
  bool json = false, list = false;
};

// A row of the table: a method with its memory.
struct Row {
  std::string name;
  SequenceMethod method = SequenceMethod::kStatic;
  bool offload = false, ranks_from_memory = false;
};
const std::vector<Row>& Rows() {
  static const auto& rows = *new std::vector<Row>{
      {"static", SequenceMethod::kStatic},
      {"unbalanced", SequenceMethod::kUnbalanced},
      {"unbalanced+offload(memory)", SequenceMethod::kUnbalanced, true, true},
      {"unbalanced+offload", SequenceMethod::kUnbalanced, true},
      {"balanced", SequenceMethod::kBalanced},
      {"balanced+offload", SequenceMethod::kBalanced, true},
      {"balanced-pipelines", SequenceMethod::kBalancedPipelines},
      {"balanced-pipelines+offload", SequenceMethod::kBalancedPipelines, true},
  };
  return rows;
}

struct Result {
  Row row;
  double seconds = 0, mean = 0, bound = 0, worst = 0;  // means over steps; worst of seconds / bound
  double ring_bytes = 0;
  int64_t max_tokens = 0;
  int levels = 0, peers = 0;
  SequencePlan plan;  // of the first step
};

// `costs`: whose times these are.
absl::StatusOr<SequencePlanOptions> PlanOptions(const Options& o, std::string* costs) {
  const auto range = [](const char* name, int64_t value, int64_t most) {
    if (value >= 1 && value <= most) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("--", name, " must be 1 to ", most, ", not ", value));
  };
  STRETTO_RETURN_IF_ERROR(range("pipelines", o.pipelines, 1 << 15));
  STRETTO_RETURN_IF_ERROR(range("stages", o.stages, 1 << 10));
  STRETTO_RETURN_IF_ERROR(range("tensor", o.tensor, 8));
  STRETTO_RETURN_IF_ERROR(range("steps", o.steps, 10000));
  STRETTO_RETURN_IF_ERROR(range("layers", o.layers, 10000));
  STRETTO_RETURN_IF_ERROR(range("tokens", o.tokens, int64_t{1} << 36));
  STRETTO_RETURN_IF_ERROR(range("longest", o.longest, int64_t{1} << 31));
  STRETTO_RETURN_IF_ERROR(range("capacity", o.capacity, int64_t{1} << 31));
  if (o.machine < 0 || o.context < 0 || o.seed < 0) {
    return absl::InvalidArgumentError("--machine, --context and --seed must not be negative");
  }
  if (!(o.compute > 0 && o.compute <= 1000 && o.network > 0 && o.network <= 1000)) {
    return absl::InvalidArgumentError("--compute and --network must be above 0, at most 1000");
  }
  SequencePlanOptions options = {.pipelines = static_cast<int>(o.pipelines),
                                 .stages = static_cast<int>(o.stages),
                                 .capacity = o.capacity};
  const auto tensor = static_cast<int>(o.tensor);
  const int64_t machine = o.machine > 0 ? o.machine : std::max<int64_t>(1, 8 / o.tensor);
  options.pipelines_per_machine = static_cast<int>(std::min<int64_t>(machine, o.pipelines));
  *costs = "costs of ByteScale's figures";
  options.cost = ByteScaleCost(tensor);
  options.memory = ByteScaleMemory(tensor);
  if (!o.fit.empty()) {
    STRETTO_ASSIGN_OR_RETURN(const CostModel cost, ReadCostModel(o.fit));
    *costs = absl::StrCat("costs of ", cost.device,
                          cost.parts ? absl::StrCat(", ", cost.parts->measured) : "");
    if (cost.parts && !cost.parts->assumed && cost.parts->ranks < 2) {
      std::fprintf(stderr,
                   "warning: %s was fitted on one rank, so messages between ranks cost nothing\n",
                   o.fit.c_str());
    }
    options.cost = SequenceCostOf(cost, o.layers, o.ring_bytes);
    options.memory = {.bytes_per_token = o.token_bytes, .host_bytes_per_second = o.host};
  }
  for (StageCost* half : {&options.cost.forward, &options.cost.backward}) {
    half->fixed *= o.compute;
    half->per_token *= o.compute;
    half->per_pair *= o.compute;
  }
  for (OperationCost* link : {&options.cost.machine, &options.cost.network}) {
    link->latency *= o.network;
    link->bytes_per_second /= o.network;
  }
  options.context = static_cast<int>(std::min(o.context, o.pipelines));
  return options;
}

absl::StatusOr<std::vector<std::vector<int64_t>>> Batches(const Options& o) {
  std::vector<std::vector<int64_t>> batches;
  if (!o.file.empty()) {
    STRETTO_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(o.file));
    STRETTO_ASSIGN_OR_RETURN(std::vector<int64_t> lengths, ParseLengths(text, o.file));
    batches.push_back(std::move(lengths));
    return batches;
  }
  absl::StatusOr<LengthDistribution> distribution =
      o.lengths == "log-normal" ? LengthDistribution::LogNormal(o.median, o.sigma)
                                : LengthDistribution::Named(o.lengths);
  STRETTO_RETURN_IF_ERROR(distribution.status());
  for (int64_t step = 0; step < o.steps; ++step) {
    batches.push_back(distribution->Batch(static_cast<uint64_t>(o.seed),
                                          static_cast<uint64_t>(step), o.tokens, o.longest));
  }
  return batches;
}

absl::StatusOr<Result> Measure(const Row& row, const std::vector<std::vector<int64_t>>& batches,
                               SequencePlanOptions options, std::string* picture) {
  options.method = row.method;
  options.memory.offload = row.offload;
  options.ranks_from_memory = row.ranks_from_memory;
  Result result = {.row = row};
  const auto n = static_cast<double>(batches.size());
  for (size_t step = 0; step < batches.size(); ++step) {
    STRETTO_ASSIGN_OR_RETURN(SequencePlan plan, PlanSequences(batches[step], options));
    STRETTO_ASSIGN_OR_RETURN(const SequenceSimulation simulation, SimulateSequences(plan));
    result.seconds += simulation.makespan() / n;
    result.mean += simulation.mean() / n;
    result.bound += plan.lower_bound / n;
    if (plan.lower_bound > 0) {
      result.worst = std::max(result.worst, simulation.makespan() / plan.lower_bound);
    }
    result.ring_bytes += static_cast<double>(plan.ring_bytes) / n;
    result.max_tokens = std::max(result.max_tokens, plan.max_tokens);
    result.levels = std::max(result.levels, plan.levels);
    result.peers = std::max(result.peers, plan.max_peers);
    if (step > 0) continue;
    if (picture != nullptr) *picture = DrawSequences(simulation, row.name);
    result.plan = std::move(plan);
  }
  return result;
}

std::string Json(const std::vector<Result>& results) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    list.push_back({{"method", r.row.name},
                    {"simulated_seconds", r.seconds},
                    {"speedup", results.front().seconds / r.seconds},
                    {"mean_seconds", r.mean},
                    {"bound_seconds", r.bound},
                    {"worst_over_bound", r.worst},
                    {"levels", r.levels},
                    {"peers", r.peers},
                    {"max_tokens", r.max_tokens},
                    {"ring_bytes", r.ring_bytes},
                    {"first_plan", absl::StrFormat("%016x", r.plan.Hash())}});
  }
  return list.dump(2) + "\n";
}

std::string Table(const std::vector<Result>& results) {
  std::string out = absl::StrFormat("%-26s %10s %8s %9s %9s %9s %7s %6s %9s %10s\n", "simulated",
                                    "seconds", "speedup", "/ mean", "/ bound", "worst", "levels",
                                    "peers", "tokens", "ring TB");
  for (const Result& r : results) {
    absl::StrAppendFormat(&out, "%-26s %10.4g %8.2f %9.3f %9.3f %9.3f %7d %6d %9d %10.4g\n",
                          r.row.name, r.seconds, results.front().seconds / r.seconds,
                          r.seconds / r.mean, r.seconds / r.bound, r.worst, r.levels, r.peers,
                          r.max_tokens, 1e-12 * r.ring_bytes);
  }
  return out;
}

// One line an item.
std::string List(const SequencePlan& plan) {
  std::string out = plan.Describe();
  for (size_t i = 0; i < plan.items.size(); ++i) {
    const PlanItem& item = plan.items[i];
    absl::StrAppendFormat(&out, "item %d level %d pipelines %d", i, item.level,
                          item.pipelines.front());
    if (item.pipelines.size() > 1) absl::StrAppend(&out, "-", item.pipelines.back());
    absl::StrAppendFormat(&out, ", %d tokens in %d documents, %.4g s", item.tokens,
                          item.documents.size(), plan.item_seconds[i]);
    if (item.offload > 0) absl::StrAppendFormat(&out, ", %.3g offloaded", item.offload);
    out += "\n";
  }
  return out;
}

// The smallest divisor of the pipelines whose ring holds the longest document.
int ContextFor(const std::vector<std::vector<int64_t>>& batches, const SequencePlanOptions& o) {
  int64_t longest = 1;
  for (const std::vector<int64_t>& batch : batches) {
    for (const int64_t length : batch) longest = std::max(longest, length);
  }
  int context = 1;
  while (context < o.pipelines && (o.pipelines % context != 0 || context * o.capacity < longest)) {
    ++context;
  }
  return context;
}

absl::Status Run(const Options& o) {
  std::string costs;
  STRETTO_ASSIGN_OR_RETURN(SequencePlanOptions options, PlanOptions(o, &costs));
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::vector<int64_t>> batches, Batches(o));
  if (o.context == 0) options.context = ContextFor(batches, options);
  std::vector<Result> results;
  for (const Row& row : Rows()) {
    const bool pipelines = row.method == SequenceMethod::kBalancedPipelines;
    if (o.method == "all" ? pipelines && o.stages == 1 : row.name != o.method) continue;
    std::string picture;
    STRETTO_ASSIGN_OR_RETURN(Result result,
                             Measure(row, batches, options, o.svg.empty() ? nullptr : &picture));
    results.push_back(std::move(result));
    if (o.svg.empty()) continue;
    const size_t end = o.svg.ends_with(".svg") ? o.svg.size() - 4 : o.svg.size();
    const std::string path =
        o.method == "all" ? absl::StrCat(o.svg.substr(0, end), "_", row.name, ".svg") : o.svg;
    STRETTO_RETURN_IF_ERROR(WriteTextFile(path, picture));
  }
  std::string out;
  if (o.json) return PrintText(Json(results));
  if (o.list) {
    for (const Result& r : results) absl::StrAppend(&out, List(r.plan), "\n");
  }
  return PrintText(absl::StrCat(out, costs, "\n", Table(results)));
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  stretto::Options o;
  stretto::Arguments arguments(
      "stretto-sequences",
      "Plans which ranks work on which documents, by each method, and simulates a step. Without "
      "--fit\ntimes are those of ByteScale's figures for a LLaMA-7B.",
      "");
  std::vector<std::string> methods = {"all"};
  for (const stretto::Row& row : stretto::Rows()) methods.push_back(row.name);
  arguments.AddChoice("lengths", {"github", "byted", "log-normal"}, "how long documents are",
                      &o.lengths);
  arguments.Add("file", "FILE", "one batch instead: its lengths, one to a line", &o.file);
  arguments.Add("median", "N", "of log-normal lengths", &o.median);
  arguments.Add("sigma", "X", "... deviation of their logarithm", &o.sigma);
  arguments.Add("tokens", "N", "of a batch", &o.tokens);
  arguments.Add("longest", "N", "documents are cut to that", &o.longest);
  arguments.Add("steps", "N", "batches; the table has means over them", &o.steps);
  arguments.Add("seed", "N", "of the lengths", &o.seed);
  arguments.Add("pipelines", "N", "places along the data axis", &o.pipelines);
  arguments.Add("stages", "N", "of each pipeline", &o.stages);
  arguments.Add("capacity", "N", "tokens of a rank in a micro-batch", &o.capacity);
  arguments.Add("context", "N", "ranks of the static rings; 0: what the longest needs", &o.context);
  arguments.Add("machine", "N", "pipelines on a machine; 0: 8 ranks", &o.machine);
  arguments.Add("tensor", "N", "tensor ranks that the figures' times are for, 1 to 8", &o.tensor);
  arguments.AddChoice("method", methods, "the method", &o.method);
  arguments.Add("fit", "FILE", "a cost model of a transformer block instead (stretto-bench fit)",
                &o.fit);
  arguments.Add("layers", "N", "with --fit: layers", &o.layers);
  arguments.Add("ring-bytes", "N", "with --fit: bytes of a token's keys and values in a layer",
                &o.ring_bytes);
  arguments.Add("token-bytes", "N", "with --fit: bytes of a token's activations in a layer",
                &o.token_bytes);
  arguments.Add("host-rate", "N", "with --fit: bytes per second to the host's memory", &o.host);
  arguments.Add("compute", "X", "multiplies times of computation", &o.compute);
  arguments.Add("network", "X", "multiplies times of messages", &o.network);
  arguments.Add("svg", "FILE", "write a picture there; of each method with its name", &o.svg);
  arguments.AddFlag("list", "print the items of the first batch, too", &o.list);
  arguments.AddFlag("json", "print JSON", &o.json);
  absl::Status status = arguments.Parse(argc, argv);
  if (arguments.help()) return stretto::EndProgram(stretto::PrintText(arguments.Help()));
  const auto refuse = [&](const std::vector<std::string>& names, const char* why) {
    const std::string given = arguments.FirstGiven(names);
    if (status.ok() && !given.empty()) {
      status = absl::InvalidArgumentError(absl::StrCat("--", given, " ", why));
    }
  };
  if (o.fit.empty()) {
    refuse({"layers", "ring-bytes", "token-bytes", "host-rate"},
           "goes with --fit, which is missing");
  } else {
    refuse({"tensor"}, "does not go with --fit, which has all times");
  }
  if (!o.file.empty()) {
    refuse({"lengths", "median", "sigma", "tokens", "longest", "steps", "seed"},
           "does not go with --file, which has the batch");
  }
  if (o.lengths != "log-normal") refuse({"median", "sigma"}, "goes with --lengths log-normal");
  if (status.ok()) status = stretto::Run(o);
  return stretto::EndProgram(status);
}
