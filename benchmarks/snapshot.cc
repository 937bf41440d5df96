// stretto-bench snapshot CONFIG: what snapshots in memory cost a run, on whatever device: steps
// without, with one each step, and with one as often as link and keeper allow, in one process.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/bench.h"
#include "stretto/core/arena.h"
#include "stretto/core/copy.h"
#include "stretto/core/stream.h"
#include "stretto/snapshot/snapshotter.h"
#include "stretto/train/memory.h"
#include "tools/arguments.h"
#include "tools/run/keepers.h"
#include "tools/run/process.h"

namespace stretto::bench {
namespace {

constexpr double kMostWarmUp = 300;  // seconds until both slots have been filled
constexpr double kPatience = 300;    // seconds for a snapshot to become durable
constexpr double kTrouble = 5;       // seconds in which a keeper may get out of trouble by itself

struct Options {
  int64_t steps = 20, keepers = 1;
  std::string spill;  // folder; empty: none
};

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The keeper of each rank: that of the environment, else some that are started here and end with
// the object.
class OwnKeepers {
 public:
  absl::Status Start(World& world, const Options& options) {
    std::vector<std::string> told;  // token and addresses
    absl::Status status;
    if (Variable("STRETTO_KEEPER").empty() && world.rank() == 0) {
      std::random_device random;
      const std::string token = absl::StrCat(absl::Hex(random()), absl::Hex(random()));
      setenv("STRETTO_JOB_TOKEN", token.c_str(), 1);
      const std::filesystem::path own(OwnPath());
      std::error_code ignored;
      std::string program;
      for (const auto& place : {own.parent_path(), own.parent_path().parent_path() / "tools"}) {
        if (program.empty() && std::filesystem::exists(place / "stretto-keeper", ignored)) {
          program = (place / "stretto-keeper").string();
        }
      }
      absl::StatusOr<Keepers> started =
          Keepers::Start({.count = options.keepers,
                          .program = program,
                          .job = absl::StrCat("bench-", getpid()),
                          .directory = options.spill.empty() ? "none" : options.spill});
      status = started.status();
      if (started.ok()) {
        keepers_ = *std::move(started);
        told = keepers_.addresses();
        told.push_back(token);
      }
    }
    STRETTO_RETURN_IF_ERROR(world.Agree("starting keepers", status));
    std::string text;
    for (const std::string& word : told) absl::StrAppend(&text, word, " ");
    STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all, world.AllGather("keepers", text));
    told.clear();
    for (size_t at = 0, end; (end = all[0].find(' ', at)) != std::string::npos; at = end + 1) {
      told.push_back(all[0].substr(at, end - at));
    }
    if (told.empty()) return absl::OkStatus();
    setenv("STRETTO_JOB_TOKEN", told.back().c_str(), 1);
    const auto count = static_cast<int64_t>(told.size()) - 1;
    const int64_t mine = world.rank() * count / world.size();
    setenv("STRETTO_KEEPER", told[static_cast<size_t>(mine)].c_str(), 1);
    return absl::OkStatus();
  }

 private:
  Keepers keepers_;
};

// Bytes a second between the device and page-locked memory, out and in; within memory on a CPU.
struct LinkRates {
  double out = 0, in = 0;
};
absl::StatusOr<LinkRates> MeasureLink(Device device) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(device, {.workspace_bytes = 0}));
  STRETTO_ASSIGN_OR_RETURN(const Arena there, Arena::Create(device, "link", kBytes));
  STRETTO_ASSIGN_OR_RETURN(const Arena here, Arena::CreateHost(device, "link", kBytes));
  const auto rate = [&](std::byte* to, const std::byte* from) -> absl::StatusOr<double> {
    std::vector<double> seconds;
    for (int i = 0; i < 6; ++i) {
      const double start = Now();
      CopyBytes(*stream, to, from, kBytes);
      STRETTO_RETURN_IF_ERROR(stream->Synchronize());
      if (i > 0) seconds.push_back(Now() - start);  // the first one touches the memory
    }
    return static_cast<double>(kBytes) / Median(std::move(seconds));
  };
  LinkRates rates;
  STRETTO_ASSIGN_OR_RETURN(rates.out, rate(here.data(), there.data()));
  STRETTO_ASSIGN_OR_RETURN(rates.in, rate(there.data(), here.data()));
  return rates;
}

// Whether this rank's keeper has been in trouble (no memory, say) all the time for a while.
class Trouble {
 public:
  bool Lasts() {
    if (Now() - asked_ < 1) return lasts_;
    asked_ = Now();
    const auto state = AskKeeper(Variable("STRETTO_KEEPER"), Variable("STRETTO_JOB_TOKEN"));
    const bool now = state.ok() && state->find("\ntrouble ") != std::string::npos;
    if (!now || since_ < 0) since_ = now ? asked_ : -1;
    return lasts_ = now && asked_ - since_ > kTrouble;
  }

 private:
  double asked_ = Now(), since_ = -1;  // not in trouble
  bool lasts_ = false;
};

// Waits until `there` holds; the seconds since `start`.
template <class Condition>
std::optional<double> Until(double start, const Condition& there) {
  while (!there()) {
    if (Now() - start > kPatience) return std::nullopt;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return Now() - start;
}

// Steps with a snapshot each `every` steps; 0: none.
struct Phase {
  std::string name;
  int64_t every = 0, steps = 0, captured = 0, passed_over = 0;
  double step_seconds = 0;     // median
  double blocked_seconds = 0;  // all together: the stream's, for copies
  double host_seconds = 0;     // all together: the host's, until copies were enqueued
  double copy_seconds = 0, seal_seconds = 0;
};

absl::StatusOr<Phase> RunPhase(Trainer& trainer, const std::string& name, int64_t every,
                               int64_t steps) {
  Phase phase = {.name = name, .every = every, .steps = steps};
  const SnapshotStats before = *trainer.snapshot_stats();
  int64_t asked = 0;
  std::vector<double> seconds;
  for (int64_t i = 0; i < steps; ++i) {
    STRETTO_ASSIGN_OR_RETURN(const StepStats stats, trainer.Step());
    // The first one ends what the phase before has begun.
    if (i > 0) seconds.push_back(stats.step_ms * 1e-3);
    phase.blocked_seconds += stats.exposed_snapshot_ms * 1e-3;
    if (every == 0 || i % every != 0) continue;
    trainer.Snapshot();
    ++asked;
  }
  // The last one ends here, so that each phase has its own.
  SnapshotStats after = before;
  Until(Now(), [&] {
    after = *trainer.snapshot_stats();
    return after.captured + after.passed_over - before.captured - before.passed_over >= asked;
  });
  phase.step_seconds = Median(std::move(seconds));
  phase.captured = after.captured - before.captured;
  phase.passed_over = after.passed_over - before.passed_over;
  phase.host_seconds = after.waited_seconds - before.waited_seconds;
  phase.copy_seconds = after.copy_seconds;
  phase.seal_seconds = after.seal_seconds;
  return phase;
}

// Seconds from the call of Snapshot on, no step beside it.
struct Durable {
  std::optional<double> committed, spilled;
};

bool HoldsCheckpoint(const std::string& folder) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    if (std::filesystem::exists(entry.path() / "stretto.json", ignored)) return true;
  }
  return false;
}

bool IsNewOrEmpty(const std::string& folder) {
  std::error_code error;
  if (std::filesystem::status(folder, error).type() == std::filesystem::file_type::not_found) {
    return true;
  }
  return std::filesystem::is_directory(folder, error) && std::filesystem::is_empty(folder, error) &&
         !error;
}

Json JsonOf(const Phase& p, const Phase& off) {
  return {{"name", p.name},
          {"seconds", p.step_seconds},
          {"every", p.every},
          {"steps", p.steps},
          {"captured", p.captured},
          {"passed_over", p.passed_over},
          {"ratio", p.step_seconds / off.step_seconds},
          {"blocked_seconds_per_step", p.blocked_seconds / static_cast<double>(p.steps)},
          {"host_blocked_seconds_per_step", p.host_seconds / static_cast<double>(p.steps)}};
}

absl::Status Measure(World& world, const TrainConfig& config, const Options& options,
                     Results* results) {
  OwnKeepers keepers;
  STRETTO_RETURN_IF_ERROR(keepers.Start(world, options));
  return WithTrainer(world, config, nullptr, kWarmUp, [&](Trainer& trainer) -> absl::Status {
    if (!trainer.snapshot_stats()) {
      return world.Agree("finding a keeper",
                         absl::FailedPreconditionError("snapshot.every is 0: nothing to measure"));
    }
    const Device device = trainer.config().runtime.device == "cuda"
                              ? Device::Cuda(world.info().local_rank)
                              : Device::Cpu();
    STRETTO_ASSIGN_OR_RETURN(const LinkRates link, MeasureLink(device));
    // Until libraries are warm and both slots have been filled: the keeper makes their memory, and
    // the driver page-locks it, in the background.
    int64_t warm_up = 0;
    double first_snapshot = 0;
    const double start = Now();
    double asked = start;
    Durable durable;
    bool enough = false, stuck = false;
    absl::Status spilled;
    Trouble trouble;
    while (!enough) {
      STRETTO_RETURN_IF_ERROR(trainer.Step().status());
      if (first_snapshot == 0 && trainer.snapshot_stats()->captured > 0) {
        first_snapshot = Now() - start;
        // The keeper writes the first that is committed.
        if (world.rank() == 0 && !options.spill.empty()) {
          durable.spilled = Until(asked, [&] { return HoldsCheckpoint(options.spill); });
          if (!durable.spilled) {
            spilled = absl::ResourceExhaustedError(
                absl::StrCat("no snapshot was in ", options.spill, " within ", kPatience,
                             " s; the keeper's lines above say why: a full disk, or a slower one"));
          }
        }
      }
      asked = Now();
      trainer.Snapshot();
      ++warm_up;
      // The same for all ranks: where one has no memory, none has snapshots.
      const bool mine = trainer.snapshot_stats()->captured >= 3 || Now() - start > kMostWarmUp;
      stuck = !mine && trouble.Lasts();
      STRETTO_ASSIGN_OR_RETURN(
          const std::vector<std::string> all,
          world.AllGather(absl::StrCat("warm ", warm_up), mine    ? "warm"
                                                          : stuck ? "stuck"
                                                                  : "not yet"));
      enough = std::count(all.begin(), all.end(), "warm") == world.size() ||
               std::count(all.begin(), all.end(), "stuck") > 0;
      STRETTO_RETURN_IF_ERROR(world.Agree(absl::StrCat("writing ", warm_up), spilled));
      // Small models are faster than their keepers' set-up.
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    absl::Status some_taken;
    const int64_t captured = trainer.snapshot_stats()->captured;
    if (captured == 0 || stuck) {
      const auto state = AskKeeper(Variable("STRETTO_KEEPER"), Variable("STRETTO_JOB_TOKEN"));
      some_taken = absl::ResourceExhaustedError(absl::StrCat(
          captured == 0 ? "no snapshot was" : "too few snapshots were", " taken within ",
          std::llround(Now() - start),
          " s; the keeper says: ", state.ok() ? *state : std::string(state.status().message())));
    }
    STRETTO_RETURN_IF_ERROR(world.Agree("the first snapshots", some_taken));
    STRETTO_ASSIGN_OR_RETURN(const Phase off, RunPhase(trainer, "off", 0, options.steps));
    STRETTO_ASSIGN_OR_RETURN(const Phase each, RunPhase(trainer, "every step", 1, options.steps));
    // The distance that it has come to: the smallest at which none is passed over.
    const int64_t k = trainer.snapshot_stats()->stride;
    STRETTO_ASSIGN_OR_RETURN(const Phase some,
                             RunPhase(trainer, "every k steps", 1, std::max(options.steps, 2 * k)));
    // One with nothing beside it: the next that no rank passes over.
    double captured_at = 0;
    for (bool taken = false; !taken;) {
      STRETTO_RETURN_IF_ERROR(trainer.Step().status());
      const std::string what = absl::StrCat("durable ", trainer.step());
      STRETTO_RETURN_IF_ERROR(world.Barrier(what));
      const int64_t passed = trainer.snapshot_stats()->passed_over;
      captured_at = Now();
      trainer.Snapshot();
      const bool mine = trainer.snapshot_stats()->passed_over == passed;
      STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                               world.AllGather(absl::StrCat(what, " taken"), mine ? "1" : "0"));
      taken = std::count(all.begin(), all.end(), "1") == world.size();
    }
    if (world.rank() == 0) {
      durable.committed = Until(captured_at, [&] {
        const auto state = AskKeeper(Variable("STRETTO_KEEPER"), Variable("STRETTO_JOB_TOKEN"));
        return state.ok() && CommittedStep(*state) == trainer.step();
      });
    }
    STRETTO_RETURN_IF_ERROR(world.Barrier("durable all"));
    STRETTO_RETURN_IF_ERROR(trainer.Finish());
    const SnapshotStats last = *trainer.snapshot_stats();
    const auto bytes = static_cast<double>(last.bytes);
    results->command = "snapshot";
    results->ranks = world.size();
    results->device = DeviceName(device);
    for (const Phase* p : {&off, &each, &some}) results->results.push_back(JsonOf(*p, off));
    const auto rate = [&](double seconds) { return seconds > 0 ? bytes / seconds : 0; };
    Json capture = {{"name", "capture"},
                    {"seconds", some.copy_seconds},
                    {"bytes", last.bytes},
                    {"k", k},
                    {"effective_k", static_cast<double>(some.steps) /
                                        static_cast<double>(std::max<int64_t>(1, some.captured))},
                    {"bytes_per_second", rate(some.copy_seconds)},
                    {"alone_bytes_per_second", rate(last.copy_seconds)},
                    {"pinned_out_bytes_per_second", link.out},
                    {"pinned_in_bytes_per_second", link.in},
                    {"seal_seconds", some.seal_seconds},
                    {"warm_up_steps", warm_up},
                    {"first_snapshot_seconds", first_snapshot}};
    if (durable.committed) capture["committed_seconds"] = *durable.committed;
    if (durable.spilled) capture["spilled_seconds"] = *durable.spilled;
    Json set_up = {{"name", "set-up"}, {"seconds", 0.0}};
    double total = 0;
    for (const auto& [phase, seconds] : trainer.set_up_seconds()) {
      set_up[phase] = seconds;
      total += seconds;
    }
    set_up["seconds"] = total;
    results->results.push_back(capture);
    results->results.push_back(set_up);
    if (world.rank() != 0) return absl::OkStatus();
    std::printf("%s, %d rank%s; a snapshot of a rank has %s\n", results->device.c_str(),
                world.size(), world.size() == 1 ? "" : "s", HumanBytes(last.bytes).c_str());
    std::printf("%-14s %10s %8s %8s %8s %12s %12s\n", "snapshots", "step", "ratio", "taken",
                "passed", "blocked", "host blocked");
    for (const Phase* p : {&off, &each, &some}) {
      const std::string name = p == &some ? absl::StrCat("every ", k, " steps") : p->name;
      std::printf("%-14s %7.2f ms %8.4f %8lld %8lld %9.3f ms %9.3f ms\n", name.c_str(),
                  p->step_seconds * 1e3, p->step_seconds / off.step_seconds,
                  static_cast<long long>(p->captured), static_cast<long long>(p->passed_over),
                  1e3 * p->blocked_seconds / static_cast<double>(p->steps),
                  1e3 * p->host_seconds / static_cast<double>(p->steps));
    }
    std::printf(
        "copies beside steps %.2f GB/s, alone %.2f GB/s; page-locked memory alone out %.2f, in "
        "%.2f GB/s\n",
        rate(some.copy_seconds) * 1e-9, rate(last.copy_seconds) * 1e-9, link.out * 1e-9,
        link.in * 1e-9);
    std::printf("a snapshot took %.3f s beside steps until it was sealed", some.seal_seconds);
    if (durable.committed) std::printf("; alone %.3f s until COMMITTED", *durable.committed);
    if (durable.spilled) std::printf("; %.3f s until it was on disk", *durable.spilled);
    std::printf("\nset-up:");
    for (const auto& [phase, seconds] : trainer.set_up_seconds()) {
      std::printf(" %s %.2f s,", phase.c_str(), seconds);
    }
    std::printf(" %.2f s in all\n", total);
    return absl::OkStatus();
  });
}

}  // namespace

int Snapshot(int argc, const char* const* argv) {
  std::vector<std::string> sets;
  std::string json;
  Options options;
  Arguments arguments(
      "stretto-bench snapshot",
      "Steps without snapshots in memory, with one each step, and with one as often "
      "as link\nand keeper allow; starts keepers unless STRETTO_KEEPER names one. "
      "Also under mpirun.",
      "CONFIG.json");
  arguments.Add("set", "section.name=value", "overrides the file; may be repeated", &sets);
  arguments.Add("steps", "N", "of each measurement", &options.steps);
  arguments.Add("keepers", "N", "to start, ranks dealt to them in blocks", &options.keepers);
  arguments.Add("spill", "DIR", "new or empty folder where they write the first snapshot, timed",
                &options.spill);
  arguments.Add("json", "FILE", "also write the results there", &json);
  absl::Status parsed = arguments.Parse(argc, argv);
  if (arguments.help()) return EndProgram(PrintText(arguments.Help()));
  if (parsed.ok() && (options.steps < 2 || options.keepers < 1 || options.keepers > 1024)) {
    parsed = absl::InvalidArgumentError("--steps must be at least 2, --keepers 1 to 1024");
  }
  if (parsed.ok() && !options.spill.empty() && !IsNewOrEmpty(options.spill)) {
    parsed = absl::InvalidArgumentError(absl::StrCat(
        "--spill ", options.spill,
        " is no empty folder, and keepers remove old snapshots where they write; name a new one"));
  }
  absl::StatusOr<TrainConfig> config;
  if (parsed.ok()) {
    config = LoadOne("snapshot", arguments.rest(), sets);
    parsed = config.status();
  }
  if (!parsed.ok()) return Fail(parsed, kUsage);
  Results results;
  return RunInWorld([&](World& world) -> absl::Status {
    STRETTO_RETURN_IF_ERROR(CheckOutput(world, json));
    STRETTO_RETURN_IF_ERROR(Measure(world, *config, options, &results));
    absl::Status written;
    if (world.rank() == 0) written = results.Write(json);
    return world.Agree("writing the results", written);
  });
}

}  // namespace stretto::bench
