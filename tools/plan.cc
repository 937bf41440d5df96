// What a run will hold in memory, compute and send, from its configuration alone: nothing is
// allocated, read or started.
#include <algorithm>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/parallel/bucket_plan.h"
#include "stretto/train/config.h"
#include "stretto/train/flops.h"
#include "stretto/train/memory.h"
#include "tools/arguments.h"
#include "tools/suggest.h"

namespace stretto {
namespace {

constexpr int kFits = 0, kTooLittle = 1;
constexpr size_t kBuffersShown = 20;

// The plan of the rank that needs the most memory: of the data-parallel ranks of a stage the first
// has the largest share of rows.
absl::StatusOr<RunPlan> LargestPlan(const TrainConfig& config, int ranks) {
  STRETTO_ASSIGN_OR_RETURN(RunPlan largest, PlanRun(config, ranks, 0));
  const int64_t of_stage = config.parallel.dp * config.parallel.tp;
  for (int64_t place = 0; place < config.parallel.pp; ++place) {
    for (int64_t t = 0; t < config.parallel.tp; ++t) {
      STRETTO_ASSIGN_OR_RETURN(RunPlan plan,
                               PlanRun(config, ranks, static_cast<int>(place * of_stage + t)));
      if (plan.arena_bytes > largest.arena_bytes) largest = std::move(plan);
    }
  }
  return largest;
}

absl::StatusOr<RunPlan> PlanOf(TrainConfig config, int ranks) {
  STRETTO_RETURN_IF_ERROR(config.Resolve(ranks));
  return LargestPlan(config, ranks);
}

// One change of the configuration that saves memory, and how to ask for it.
struct Change {
  std::string option;
  std::function<void(TrainConfig&, int& ranks)> apply;
};

std::vector<Change> Changes(const TrainConfig& config, int ranks) {
  std::vector<Change> changes;
  const auto recompute = [&](const char* value) {
    changes.push_back({absl::StrCat("runtime.recompute=", value),
                       [value](TrainConfig& c, int&) { c.runtime.recompute = value; }});
  };
  const auto loss_chunk = [&](int64_t chunk) {
    changes.push_back({absl::StrCat("runtime.loss_chunk=", chunk),
                       [chunk](TrainConfig& c, int&) { c.runtime.loss_chunk = chunk; }});
  };
  const auto micro = [&](int64_t samples) {
    changes.push_back({absl::StrCat("batch.micro=", samples),
                       [samples](TrainConfig& c, int&) { c.batch.micro = samples; }});
  };
  // Cheapest in time first.
  constexpr int64_t kChunk = 8192;
  const bool chunked = config.runtime.loss_chunk > 0 && config.runtime.loss_chunk <= kChunk;
  if (!chunked && config.model.vocabulary > 2 * kChunk) loss_chunk(kChunk);
  for (int64_t m = config.batch.micro / 2; m >= 1; m /= 2) micro(m);
  if (config.runtime.recompute == "none") recompute("norms");
  if (config.runtime.recompute != "block") recompute("block");
  if (config.runtime.device == "cuda" && !config.optimizer.offload) {
    changes.push_back(
        {"optimizer.offload=true", [](TrainConfig& c, int&) { c.optimizer.offload = true; }});
  }
  for (int64_t zero = config.parallel.zero + 1; config.parallel.dp > 1 && zero <= 3; ++zero) {
    changes.push_back({absl::StrCat("parallel.zero=", zero),
                       [zero](TrainConfig& c, int&) { c.parallel.zero = zero; }});
  }
  return changes;
}

// One sentence: what to change so that a rank needs at most `limit` bytes.
std::string Advice(const TrainConfig& config, int ranks, int64_t limit) {
  const auto try_plan = [&](const TrainConfig& c, int n) -> std::optional<int64_t> {
    const auto plan = PlanOf(c, n);
    if (!plan.ok() || plan->arena_bytes > limit) return std::nullopt;
    return plan->arena_bytes;
  };
  const auto sentence = [&](const std::string& what, int64_t bytes) {
    return absl::StrCat("set ", what, ", which needs ", HumanBytes(bytes), " a rank");
  };
  const std::vector<Change> changes = Changes(config, ranks);
  for (const Change& change : changes) {
    TrainConfig c = config;
    int n = ranks;
    change.apply(c, n);
    if (const auto bytes = try_plan(c, n)) return sentence(change.option, *bytes);
  }
  // All of them together, of each kind the strongest; then more ranks, too.
  TrainConfig all = config;
  int n = ranks;
  std::vector<std::string> options;
  for (const Change& change : changes) {
    change.apply(all, n);
    const std::string key = change.option.substr(0, change.option.find('='));
    if (!options.empty() && options.back().rfind(key + "=", 0) == 0) options.pop_back();
    options.push_back(change.option);
  }
  std::string text;
  for (const std::string& option : options)
    absl::StrAppend(&text, text.empty() ? "" : ", ", option);
  if (options.size() > 1) {
    if (const auto bytes = try_plan(all, n)) return sentence(text, *bytes);
  }
  const std::string and_options = text.empty() ? "" : " and set " + text;
  for (int more = 2 * ranks; more <= 4096; more *= 2) {
    TrainConfig c = all;
    c.parallel.dp = 0;
    c.batch.global = std::max<int64_t>(c.batch.global, more);
    if (const auto bytes = try_plan(c, more)) {
      return absl::StrCat("use ", more, " ranks", and_options, ", which needs ", HumanBytes(*bytes),
                          " a rank");
    }
  }
  return "parameters and gradients alone are too large for it: choose a smaller model or "
         "runtime.dtype=bf16";
}

struct Summary {
  TrainConfig config;  // resolved
  int ranks = 1;
  RunPlan plan;
  StepFlops flops;  // of a step, all ranks
  int64_t parameters = 0;
  int64_t device_memory = -1;         // -1: not given
  std::string advice;                 // when it does not fit
  std::vector<NamedBytes> snapshots;  // memory of a machine

  bool fits() const { return device_memory < 0 || plan.arena_bytes <= device_memory; }
};

// Nothing bounds a batch: beyond the largest number it counts as that.
int64_t Product(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<int64_t>::max() : product;
}

// Of all ranks, when it is full.
int64_t StepTokens(const TrainConfig& config) {
  return config.data.documents ? config.batch.tokens
                               : Product(config.batch.global, config.data.sequence_length);
}

std::string Text(const Summary& s) {
  std::string out = absl::StrFormat(
      "%s with %d parameters, %s, %d rank%s\n"
      "step: %s; micro-batch of %d tokens a rank, recompute %s\n\n"
      "memory of a rank:\n%s\n",
      s.config.model.family, s.parameters, s.config.runtime.dtype, s.ranks, s.ranks == 1 ? "" : "s",
      s.config.data.documents
          ? absl::StrFormat("%d tokens in documents of at most %d", s.config.batch.tokens,
                            s.config.data.sequence_length)
          : absl::StrFormat("%d samples of %d tokens", s.config.batch.global,
                            s.config.data.sequence_length),
      s.plan.micro_batch_tokens, s.config.runtime.recompute, s.plan.MemoryTable());
  if (!s.snapshots.empty()) {
    absl::StrAppend(&out, "host memory of a machine for snapshots:\n");
    for (const NamedBytes& m : s.snapshots) {
      absl::StrAppendFormat(&out, "  %-18s %12s\n", m.name, HumanBytes(m.bytes));
    }
    absl::StrAppend(&out, "\n");
  }
  absl::StrAppend(&out, "activations of a training micro-batch, largest buffers first:\n",
                  s.plan.stages.front().train_frame.plan.Report(kBuffersShown), "\n");
  const auto tokens = static_cast<double>(StepTokens(s.config));
  const auto flops = [&](const char* name, double value, const char* meaning) {
    absl::StrAppendFormat(&out, "  %-8s %.4g a step, %.4g a token  (%s)\n", name, value,
                          value / tokens, meaning);
  };
  absl::StrAppend(&out, "FLOPs of forward and backward, all ranks, whole documents of ",
                  s.config.data.sequence_length, " tokens:\n");
  flops("palm", s.flops.palm, "6 N and attention without its mask");
  flops("causal", s.flops.causal, "the products that run");
  absl::StrAppend(&out, "\nbytes that a rank sends in a step:\n");
  const auto sent = [&](const char* name, int64_t bytes) {
    absl::StrAppendFormat(&out, "  %-18s %12s\n", name, HumanBytes(bytes));
  };
  sent("gradients", s.plan.gradient_bytes_sent);
  sent("parameters", s.plan.parameter_bytes_sent);
  sent("scalars", s.plan.scalar_bytes_sent);
  if (s.plan.step.stages > 1) {
    sent("between stages", s.plan.boundary_bytes_sent);
    sent("tied table", s.plan.tied_bytes_sent);
  }
  if (s.config.parallel.tp > 1) sent("tensor axis", s.plan.tensor_bytes_sent);
  if (s.device_memory >= 0) {
    const std::string sizes = absl::StrCat(HumanBytes(s.plan.arena_bytes), " of ",
                                           HumanBytes(s.device_memory), " a rank");
    absl::StrAppend(&out, "\n", s.fits() ? "fits: " : "does not fit: needs ", sizes,
                    s.fits() ? "" : "; " + s.advice, "\n");
  }
  return out;
}

std::string Json(const Summary& s) {
  nlohmann::ordered_json j;
  j["ranks"] = s.ranks;
  j["parameters"] = s.parameters;
  j["micro_batch_tokens"] = s.plan.micro_batch_tokens;
  for (const NamedBytes& arena : s.plan.arenas) j["arenas"][arena.name] = arena.bytes;
  j["arena_bytes"] = s.plan.arena_bytes;
  for (const NamedBytes& arena : s.plan.host_arenas) j["host_arenas"][arena.name] = arena.bytes;
  j["snapshot_bytes"] = s.plan.snapshot_bytes;
  for (const NamedBytes& m : s.snapshots) j["snapshots"][m.name] = m.bytes;
  const auto frame = [](const FrameLayout& layout) {
    const MemoryPlan& plan = layout.plan;
    nlohmann::ordered_json f;
    f["bytes"] = layout.bytes();
    f["peak_live_bytes"] = plan.peak_live_bytes;
    std::vector<size_t> order(plan.buffers.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return plan.buffers[a].bytes > plan.buffers[b].bytes;
    });
    order.resize(std::min(order.size(), kBuffersShown));
    f["buffers"] = nlohmann::ordered_json::array();
    for (const size_t i : order) {
      const BufferSpec& b = plan.buffers[i];
      f["buffers"].push_back({{"name", b.name},
                              {"bytes", b.bytes},
                              {"offset", plan.offsets[i]},
                              {"first_action", b.first},
                              {"last_action", b.last}});
    }
    return f;
  };
  j["training_frame"] = frame(s.plan.stages.front().train_frame);
  j["evaluation_frame"] = frame(s.plan.stages.front().evaluation_frame);
  j["flops_per_step"] = {{"palm", s.flops.palm}, {"causal", s.flops.causal}};
  j["bytes_sent_per_step"] = {
      {"gradients", s.plan.gradient_bytes_sent}, {"parameters", s.plan.parameter_bytes_sent},
      {"scalars", s.plan.scalar_bytes_sent},     {"between_stages", s.plan.boundary_bytes_sent},
      {"tied_table", s.plan.tied_bytes_sent},    {"tensor_axis", s.plan.tensor_bytes_sent}};
  if (s.device_memory >= 0) {
    j["device_memory"] = s.device_memory;
    j["fits"] = s.fits();
    if (!s.fits()) j["advice"] = s.advice;
  }
  return j.dump(2) + "\n";
}

// What happens around each action of a micro-batch, on each stage of the rank.
std::string Buckets(const RunPlan& plan) {
  std::string out;
  for (const StagePlan& stage : plan.stages) {
    absl::StrAppend(&out, "stage ", stage.stage, ", ZeRO-", stage.buckets.zero, ", ",
                    stage.buckets.buckets.size(), " buckets, buffers of ",
                    HumanBytes(stage.buckets.buffer_bytes), "\n");
    if (stage.buckets.zero == 1) continue;  // nothing comes and goes
    absl::StrAppend(&out, Describe(stage.model.graph, stage.train_actions, stage.buckets.training));
  }
  return out;
}

absl::StatusOr<int> Main(int argc, char** argv) {
  std::vector<std::string> sets;
  int64_t ranks = 1;
  int64_t keepers = 0, parity = -1;
  std::string device_memory;
  bool json = false, buckets = false, suggest = false;
  SuggestArguments suggestions;
  Arguments arguments(
      "stretto-plan",
      "Prints memory, FLOPs and communication of one rank's step, or suggests layouts. Exit code "
      "0:\n"
      "it fits, with --suggest at least one layout does, or no memory to fit in is named; 1: it "
      "does\n"
      "not, no layout does, or the output cannot be written; 2: wrong usage or configuration.",
      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.Add("ranks", "N", "ranks of the run", &ranks);
  arguments.Add("device-memory", "SIZE", "what a rank has, e.g. 80GiB", &device_memory);
  arguments.Add("keepers", "N", "with so many keepers of snapshots, one a machine", &keepers);
  arguments.Add("parity", "M", "parity blocks of the keepers' code; by default 1, alone 0",
                &parity);
  arguments.AddFlag("json", "print JSON", &json);
  arguments.AddFlag("buckets", "print when buckets come and go with ZeRO-2 and 3, nothing else",
                    &buckets);
  arguments.AddFlag("suggest", "list layouts that fit, the fastest first; times are simulated",
                    &suggest);
  suggestions.AddTo(arguments);
  STRETTO_RETURN_IF_ERROR(arguments.Parse(argc, argv));
  if (arguments.help()) {
    STRETTO_RETURN_IF_ERROR(PrintText(arguments.Help()));
    return kFits;
  }
  if (arguments.rest().size() != 1) {
    return absl::InvalidArgumentError("stretto-plan needs one configuration file; see --help");
  }
  STRETTO_RETURN_IF_ERROR(suggestions.Check(arguments, suggest));
  if (suggest) return PrintSuggestions(arguments.rest()[0], sets, suggestions);
  if (ranks < 1 || ranks > (1 << 20)) {
    return absl::InvalidArgumentError(absl::StrCat("--ranks must be 1 to 1048576, not ", ranks));
  }
  const bool with_parity = !arguments.FirstGiven({"parity"}).empty();
  if (keepers < 0 || keepers > ranks) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--keepers must be 0 (none) to as many as --ranks, ", ranks, ", not ", keepers));
  }
  if (with_parity && (keepers == 0 || parity < -1 || parity > keepers)) {
    return absl::InvalidArgumentError(
        keepers == 0 ? std::string("--parity goes with --keepers, which is missing")
                     : absl::StrCat("--parity must be at least 0 and less than --keepers, ",
                                    keepers, ", or -1 for the default, not ", parity));
  }
  Summary s;
  s.ranks = static_cast<int>(ranks);
  STRETTO_RETURN_IF_ERROR(LoadConfig(arguments.rest()[0], sets, ConfigRef(&s.config)));
  if (!device_memory.empty()) {
    STRETTO_ASSIGN_OR_RETURN(s.device_memory, ParseBytes("device-memory", device_memory));
  } else {
    s.device_memory = s.config.runtime.host_memory_bytes;
  }
  STRETTO_RETURN_IF_ERROR(s.config.Resolve(s.ranks));
  STRETTO_ASSIGN_OR_RETURN(s.plan, LargestPlan(s.config, s.ranks));
  if (keepers != 0) {
    STRETTO_ASSIGN_OR_RETURN(s.snapshots, SnapshotMemory(s.plan, s.ranks, static_cast<int>(keepers),
                                                         static_cast<int>(parity)));
  }
  const int64_t tokens = StepTokens(s.config);
  s.flops = TrainingFlops(s.config.model, {tokens, Product(tokens, s.config.data.sequence_length)});
  s.parameters = ParameterCount(s.config.model);
  if (!s.fits()) s.advice = Advice(s.config, s.ranks, s.device_memory);
  STRETTO_RETURN_IF_ERROR(PrintText(buckets ? Buckets(s.plan) : json ? Json(s) : Text(s)));
  return s.fits() ? kFits : kTooLittle;
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) { return stretto::EndProgram(stretto::Main(argc, argv)); }
