#include "stretto/train/suggest.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstddef>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/start_thread.h"
#include "stretto/train/memory.h"

namespace stretto {
namespace {

std::vector<int64_t> Divisors(int64_t n) {
  std::vector<int64_t> divisors;
  for (int64_t d = 1; d <= n; ++d) {
    if (n % d == 0) divisors.push_back(d);
  }
  return divisors;
}

// Refusals of one kind differ in their numbers.
std::string KindOf(const std::string& reason) {
  std::string kind;
  for (const char c : reason) {
    if (std::isdigit(static_cast<unsigned char>(c)) == 0) kind += c;
  }
  return kind;
}

// The first, and `times` what it has more than the second.
StepPrediction Extrapolated(const StepPrediction& a, const StepPrediction& b, double times) {
  StepPrediction sum;
  for (double StepPrediction::*const part :
       {&StepPrediction::seconds, &StepPrediction::compute, &StepPrediction::update,
        &StepPrediction::bubble, &StepPrediction::data, &StepPrediction::tensor,
        &StepPrediction::pipeline}) {
    sum.*part = std::max(0.0, a.*part + times * (a.*part - b.*part));
  }
  return sum;
}

class Search {
 public:
  Search(const TrainConfig& config, const CostModel& cost, const SuggestOptions& options)
      : config_(config), cost_(cost), options_(options) {}

  absl::StatusOr<Suggestions> Run() {
    for (const int64_t tp : Values("parallel.tp", config_.parallel.tp, Divisors(options_.ranks))) {
      for (const int64_t pp :
           Values("parallel.pp", config_.parallel.pp, Divisors(options_.ranks))) {
        // Fixed ones may be of any size: their product need not be a number.
        if (tp > options_.ranks || pp > options_.ranks || options_.ranks % (tp * pp) != 0) {
          // Unless one of them is fixed this is no layout at all.
          if (Fixed("parallel.tp") || Fixed("parallel.pp")) {
            Refuse(absl::StrCat("parallel.tp ", tp, " times parallel.pp ", pp,
                                " does not divide the ", options_.ranks, " ranks"));
          }
          continue;
        }
        AddLayouts(tp, pp);
      }
    }
    // Plans are pure: layouts are tried on all cores.
    const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> threads;
    for (unsigned t = 1; t < cores; ++t) {
      absl::StatusOr<std::thread> started =
          StartThread("a search for layouts", [this] { TryAll(); });
      if (!started.ok()) break;  // those that there are do its part
      threads.push_back(*std::move(started));
    }
    TryAll();
    for (std::thread& thread : threads) thread.join();
    STRETTO_RETURN_IF_ERROR(status_);
    const auto key = [](const Suggestion& s) {
      const TrainConfig::Parallel& p = s.config.parallel;
      return std::tuple(s.step.seconds, s.memory_bytes, p.tp, p.pp, p.schedule, p.chunks, p.zero,
                        s.config.batch.micro);
    };
    std::sort(found_.feasible.begin(), found_.feasible.end(),
              [&](const Suggestion& a, const Suggestion& b) { return key(a) < key(b); });
    for (auto& [kind, refusal] : refused_) found_.refused.push_back(std::move(refusal));
    std::stable_sort(found_.refused.begin(), found_.refused.end(),
                     [](const Refusal& a, const Refusal& b) { return a.count > b.count; });
    return std::move(found_);
  }

 private:
  bool Fixed(const char* name) const {
    return std::find(options_.fixed.begin(), options_.fixed.end(), name) != options_.fixed.end();
  }
  template <class T>
  std::vector<T> Values(const char* name, const T& fixed, std::vector<T> free) const {
    return Fixed(name) ? std::vector<T>{fixed} : std::move(free);
  }
  void Refuse(const std::string& reason, int64_t count = 1) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Refusal& refusal = refused_[KindOf(reason)];
    // Which one is the example must not depend on threads.
    if (refusal.count == 0 || reason < refusal.reason) refusal.reason = reason;
    refusal.count += count;
  }

  // Those of so many ranks on each axis that a run would not refuse.
  void AddLayouts(int64_t tp, int64_t pp) {
    const int64_t dp = options_.ranks / (tp * pp);
    if (Fixed("parallel.dp") && config_.parallel.dp != 0 && config_.parallel.dp != dp) {
      return Refuse(
          absl::StrCat("parallel.dp would be ", dp, ", and is fixed to ", config_.parallel.dp));
    }
    if (tp > options_.machine_ranks) {
      return Refuse(absl::StrCat("parallel.tp ", tp, " is more than the ", options_.machine_ranks,
                                 " ranks of a machine"));
    }
    // The ranks of an axis are neighbours: some of its groups would lie on two machines.
    if (options_.ranks > options_.machine_ranks && options_.machine_ranks % tp != 0) {
      return Refuse(absl::StrCat("parallel.tp ", tp, " does not divide the ",
                                 options_.machine_ranks, " ranks of a machine"));
    }
    std::vector<std::string> schedules = {"1f1b"};
    if (pp > 1) schedules = {"1f1b", "interleaved", "zb-h1", "v-shaped"};
    for (const std::string& schedule :
         Values("parallel.schedule", config_.parallel.schedule, schedules)) {
      std::vector<int64_t> all_chunks = {0};
      if (schedule == "interleaved" && pp > 1) {
        all_chunks = {2};
        for (int64_t c = 4; c <= 8 && pp * c <= config_.model.layers; c *= 2) {
          all_chunks.push_back(c);
        }
      }
      for (const int64_t chunks : Values("parallel.chunks", config_.parallel.chunks, all_chunks)) {
        TrainConfig layout = config_;
        layout.parallel.dp = dp;
        layout.parallel.tp = tp;
        layout.parallel.pp = pp;
        layout.parallel.schedule = schedule;
        layout.parallel.chunks = chunks;
        if (const absl::Status refused = layout.Resolve(options_.ranks); !refused.ok()) {
          const std::string text(refused.message());
          Refuse(text.substr(0, text.find('\n')));
          continue;
        }
        std::vector<int64_t> levels = {1};
        if (dp > 1) levels = {1, 2, 3};
        for (const int64_t zero : Values("parallel.zero", config_.parallel.zero, levels)) {
          layout.parallel.zero = zero;
          layouts_.push_back(layout);
        }
      }
    }
  }

  void TryAll() {
    for (size_t i = next_++; i < layouts_.size(); i = next_++) {
      const absl::Status status = Try(layouts_[i]);
      if (status.ok()) continue;
      const std::lock_guard<std::mutex> lock(mutex_);
      status_.Update(status);
    }
  }

  // All micro-batch sizes of a layout.
  absl::Status Try(TrainConfig layout) {
    const int64_t share = (layout.batch.global - 1) / layout.parallel.dp + 1;
    std::vector<int64_t> sizes = {config_.batch.micro};
    for (int64_t m = 1; m <= share; m *= 2) sizes.push_back(m);
    sizes = Values("batch.micro", config_.batch.micro, sizes);
    for (int64_t& m : sizes) m = std::min(m, share);
    std::sort(sizes.begin(), sizes.end());
    sizes.erase(std::unique(sizes.begin(), sizes.end()), sizes.end());
    const std::vector<std::string> recomputes = Values<std::string>(
        "runtime.recompute", config_.runtime.recompute, {"none", "norms", "block"});
    // A larger micro-batch does not need less recomputation.
    size_t least = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      layout.batch.micro = sizes[i];
      if (const absl::Status refused = layout.Resolve(options_.ranks); !refused.ok()) {
        Refuse(std::string(refused.message()));
        continue;
      }
      // Each place is planned with the program of all of them.
      constexpr int64_t kMostCount = 4096;
      const int64_t count = (share - 1) / sizes[i] + 1;
      if (layout.parallel.pp > 1 && count > kMostCount) {
        Refuse(absl::StrCat("parallel.pp ", layout.parallel.pp, " with ", count,
                            " micro-batches of ", sizes[i],
                            ": pipelines are suggested for at most ", kMostCount,
                            " in a step; raise batch.micro or lower batch.global"));
        continue;
      }
      for (; least < recomputes.size(); ++least) {
        layout.runtime.recompute = recomputes[least];
        STRETTO_ASSIGN_OR_RETURN(const bool fits, TryOne(layout));
        if (fits) break;
      }
      if (least < recomputes.size()) continue;
      Refuse("memory: the largest rank needs more than it has, whatever is recomputed",
             static_cast<int64_t>(sizes.size() - i));
      break;
    }
    return absl::OkStatus();
  }

  absl::StatusOr<StepPrediction> Predict(const TrainConfig& layout,
                                         const std::vector<RunPlan>& plans) const {
    // Once a pipeline is full, its rounds are alike: of a long step two shorter ones are simulated,
    // which say what a round adds.
    constexpr int64_t kMostMicroBatches = 64;
    const TrainConfig::Parallel& p = layout.parallel;
    const int64_t round = 2 * p.pp * p.chunks, micro = layout.batch.micro;
    const int64_t keep = std::max(kMostMicroBatches, 4 * round);
    const int64_t skipped = p.pp > 1 ? (plans.front().micro_batches - keep) / round : 0;
    if (skipped < 1) return PredictStep(layout, plans, cost_, options_.machine_ranks);
    TrainConfig shorter = layout;
    const auto without = [&](int64_t rounds) {
      shorter.batch.global -= rounds * round * micro * p.dp;
      return PredictStep(shorter, options_.ranks, cost_, options_.machine_ranks);
    };
    STRETTO_ASSIGN_OR_RETURN(const StepPrediction longer, without(skipped));
    STRETTO_ASSIGN_OR_RETURN(const StepPrediction shortest, without(1));
    return Extrapolated(longer, shortest, static_cast<double>(skipped));
  }

  absl::StatusOr<bool> TryOne(const TrainConfig& layout) {
    const auto bytes = [](const RunPlan& plan) { return plan.arena_bytes + plan.overhead_bytes; };
    int64_t most = 0;
    std::vector<RunPlan> plans;
    for (int64_t place = 0; place < layout.parallel.pp; ++place) {
      STRETTO_ASSIGN_OR_RETURN(RunPlan plan, PlanPlace(layout, options_.ranks, place));
      most = std::max(most, bytes(plan));
      if (most > options_.memory_bytes) return false;
      plans.push_back(std::move(plan));
    }
    // Of a tensor axis the first rank has the largest parts, but the second needs a little more
    // where those are equal: a table of what it counts in the norm, which leaves out what the first
    // has as well.
    const int64_t near = most - most / 64;
    for (int64_t place = 0; layout.parallel.tp > 1 && place < layout.parallel.pp; ++place) {
      if (bytes(plans[static_cast<size_t>(place)]) < near) continue;
      STRETTO_ASSIGN_OR_RETURN(const RunPlan second, PlanPlace(layout, options_.ranks, place, 1));
      most = std::max(most, bytes(second));
    }
    if (most > options_.memory_bytes) return false;
    Suggestion suggestion = {.config = layout, .memory_bytes = most};
    STRETTO_ASSIGN_OR_RETURN(suggestion.step, Predict(layout, plans));
    const std::lock_guard<std::mutex> lock(mutex_);
    found_.feasible.push_back(std::move(suggestion));
    return true;
  }

  const TrainConfig& config_;
  const CostModel& cost_;
  const SuggestOptions& options_;
  std::vector<TrainConfig> layouts_;
  std::atomic<size_t> next_ = 0;
  std::mutex mutex_;  // of what follows
  absl::Status status_;
  Suggestions found_;
  std::map<std::string, Refusal> refused_;
};

}  // namespace

absl::Status CheckSuggests(const TrainConfig& config) {
  if (!config.data.documents) return absl::OkStatus();
  return absl::UnimplementedError(
      "data.documents is on, and layouts are suggested for samples of equal length only; set "
      "data.documents=false");
}

absl::StatusOr<Suggestions> Suggest(const TrainConfig& config, const CostModel& cost,
                                    const SuggestOptions& options) {
  constexpr int kMost = 4096;
  if (options.ranks < 1 || options.ranks > kMost) {
    return absl::InvalidArgumentError(
        absl::StrCat("layouts are suggested for 1 to ", kMost, " devices, not ", options.ranks));
  }
  if (options.memory_bytes < 1 || options.machine_ranks < 1) {
    return absl::InvalidArgumentError(
        "a device needs memory, and a machine a device, to suggest layouts for");
  }
  STRETTO_RETURN_IF_ERROR(CheckSuggests(config));
  // What is planned for each layout grows with these.
  constexpr int64_t kMostLayers = 1024, kMostSamples = int64_t{1} << 40;
  if (config.model.layers > kMostLayers) {
    return absl::InvalidArgumentError(absl::StrCat("model.layers is ", config.model.layers,
                                                   ", and layouts are suggested for at most ",
                                                   kMostLayers, "; lower it"));
  }
  if (config.batch.global > kMostSamples) {
    return absl::InvalidArgumentError(absl::StrCat("batch.global is ", config.batch.global,
                                                   ", and layouts are suggested for at most ",
                                                   kMostSamples, "; lower it"));
  }
  return Search(config, cost, options).Run();
}

std::string WhySlower(const StepPrediction& fast, const StepPrediction& slow) {
  std::vector<std::pair<double, const char*>> parts = {
      {slow.compute - fast.compute, "compute"},
      {slow.bubble - fast.bubble, "bubble"},
      {slow.data - fast.data, "exposed data axis"},
      {slow.tensor - fast.tensor, "exposed tensor axis"},
      {slow.pipeline - fast.pipeline, "exposed between stages"},
      {slow.update - fast.update, "update"}};
  std::stable_sort(parts.begin(), parts.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  const double difference = slow.seconds - fast.seconds;
  std::string text;
  // As far as it takes to explain the most of the difference.
  double explained = 0;
  for (const auto& [seconds, name] : parts) {
    if (seconds <= 0 || explained >= 0.75 * difference) break;
    absl::StrAppendFormat(&text, "%s%s +%.3g ms", text.empty() ? "" : ", ", name, 1e3 * seconds);
    explained += seconds;
  }
  return text.empty() ? "as fast" : text;
}

}  // namespace stretto
