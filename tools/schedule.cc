// Draws pipeline schedules: who works on what and when, the bubble, and the activations held. The
// times are simulated.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "stretto/core/exit_code.h"
#include "stretto/plan/cost.h"
#include "stretto/plan/program.h"
#include "stretto/sim/timeline.h"
#include "tools/arguments.h"
#include "tools/files.h"

namespace stretto {
namespace {

struct Options {
  std::string kind = "1f1b", costs, svg, trace;
  int64_t ranks = 4, chunks = 0, micro_batches = 8, width = 120;
  double forward = 1, backward_input = 1, backward_weight = 1, link = 0;
  bool list = false;
};

absl::Status Run(const Options& o) {
  STRETTO_ASSIGN_OR_RETURN(const ScheduleKind kind, ParseScheduleKind(o.kind));
  constexpr int64_t kMost = 4096;
  if (o.ranks < 1 || o.ranks > kMost || o.chunks < 0 || o.chunks > kMost || o.micro_batches < 0 ||
      o.micro_batches > kMost || o.width < 20 || o.width > 10000) {
    return absl::InvalidArgumentError(
        "--ranks must be 1 to 4096, --chunks and --micro-batches 0 to 4096, --width 20 to 10000");
  }
  constexpr int64_t kMostActions = 1 << 17;
  if (o.ranks * std::max<int64_t>(1, o.chunks) * o.micro_batches > kMostActions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--ranks times --chunks times --micro-batches must be at most ", kMostActions));
  }
  int64_t chunks = o.chunks;
  if (chunks == 0) {
    chunks = kind == ScheduleKind::kVShaped || kind == ScheduleKind::kInterleaved ? 2 : 1;
  }
  const double share = static_cast<double>(chunks);
  CostModel cost =
      UniformCost(o.forward / share, o.backward_input / share, o.backward_weight / share);
  cost.link_latency = o.link;
  if (!o.costs.empty()) {
    STRETTO_ASSIGN_OR_RETURN(cost, ReadCostModel(o.costs));
  }
  for (const double seconds : {o.forward, o.backward_input, o.backward_weight, o.link}) {
    if (!(seconds >= 0 && seconds <= 1e9)) {
      return absl::InvalidArgumentError("seconds must be 0 to 1e9");
    }
  }
  const PlanItem item = {.tokens = 1, .lengths = {1}, .pipelines = {0}};
  STRETTO_ASSIGN_OR_RETURN(
      const Program program,
      MakeProgram(kind, 1, static_cast<int>(o.ranks), static_cast<int>(chunks),
                  std::vector<PlanItem>(static_cast<size_t>(o.micro_batches), item)));
  STRETTO_ASSIGN_OR_RETURN(const Timeline timeline, Simulate(program, cost));
  // Times of a trace are nanoseconds of 64 bits.
  constexpr double kMostSeconds = 9e9;
  if (!o.trace.empty() && timeline.seconds > kMostSeconds) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--trace shows at most %g s, not %g; give smaller times", kMostSeconds, timeline.seconds));
  }
  STRETTO_ASSIGN_OR_RETURN(const Schedule schedule,
                           MakeSchedule(kind, static_cast<int>(o.ranks), static_cast<int>(chunks),
                                        static_cast<int>(o.micro_batches)));
  const std::vector<int> frames = FramesInFlight(schedule);
  std::string held;
  for (int rank = 0; rank < schedule.ranks; ++rank) {
    int sum = 0;
    for (int stage = 0; stage < schedule.stages; ++stage) {
      if (schedule.rank_of_stage[static_cast<size_t>(stage)] == rank) {
        sum += frames[static_cast<size_t>(stage)];
      }
    }
    absl::StrAppend(&held, rank > 0 ? " " : "", sum);
  }
  std::string out = o.list ? program.Describe() : "";
  absl::StrAppend(&out, DrawText(program, timeline, static_cast<int>(o.width)));
  absl::StrAppendFormat(&out,
                        "F forward, D backward, B and W its halves\n"
                        "simulated: %.6g s, ranks idle %.1f %% of it; activations of %s held by "
                        "each rank: %s\n",
                        timeline.seconds, 100 * timeline.IdleFraction(),
                        chunks > 1 ? "micro-batches of one chunk" : "micro-batches", held);
  STRETTO_RETURN_IF_ERROR(PrintText(out));
  if (!o.svg.empty()) STRETTO_RETURN_IF_ERROR(WriteTextFile(o.svg, DrawSvg(program, timeline)));
  if (!o.trace.empty()) {
    STRETTO_RETURN_IF_ERROR(WriteTextFile(o.trace, ChromeTrace(program, timeline)));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main(int argc, char** argv) {
  stretto::Options o;
  stretto::Arguments arguments("stretto-schedule",
                               "Draws a pipeline schedule on a virtual clock, with its bubble and "
                               "the activations it holds.",
                               "");
  arguments.AddChoice("kind", {"gpipe", "1f1b", "interleaved", "zb-h1", "v-shaped"}, "the schedule",
                      &o.kind);
  arguments.Add("ranks", "N", "ranks of the pipeline", &o.ranks);
  arguments.Add("chunks", "N", "stages on each rank; 0: as the schedule wants, 2 for interleaved",
                &o.chunks);
  arguments.Add("micro-batches", "N", "micro-batches of a step", &o.micro_batches);
  arguments.Add("forward", "S", "seconds of a micro-batch on a rank", &o.forward);
  arguments.Add("backward-input", "S", "... of the first half of backward", &o.backward_input);
  arguments.Add("backward-weight", "S", "... of the second half", &o.backward_weight);
  arguments.Add("link", "S", "seconds between two stages", &o.link);
  arguments.Add("costs", "FILE", "a cost model instead of these", &o.costs);
  arguments.Add("width", "N", "characters of a line", &o.width);
  arguments.AddFlag("list", "print the actions of each rank, too", &o.list);
  arguments.Add("svg", "FILE", "write a picture there", &o.svg);
  arguments.Add("trace", "FILE", "write a trace for Perfetto there", &o.trace);
  absl::Status status = arguments.Parse(argc, argv);
  if (arguments.help()) return stretto::EndProgram(stretto::PrintText(arguments.Help()));
  if (status.ok() && !o.costs.empty()) {
    const std::string given =
        arguments.FirstGiven({"forward", "backward-input", "backward-weight", "link"});
    if (!given.empty()) {
      status = absl::InvalidArgumentError(
          absl::StrCat("--", given, " does not go with --costs, which has all times; give one"));
    }
  }
  if (status.ok()) status = stretto::Run(o);
  return stretto::EndProgram(status);
}
