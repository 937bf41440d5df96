// Runs the keeper of one node (stretto/snapshot/keeper.h).
#include "stretto/snapshot/keeper.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "src/observe/file.h"
#include "stretto/core/exit_code.h"
#include "stretto/snapshot/commit.h"
#include "stretto/snapshot/snapshotter.h"
#include "tools/arguments.h"

namespace {

// Writes what the keeper does to a file, a JSON object a line with one write each, and lets it wait
// there for as long as is wanted.
class Observer {
 public:
  Observer(int64_t node, std::map<std::string, std::chrono::milliseconds> pauses)
      : node_(node), pauses_(std::move(pauses)) {}
  absl::Status Open(const std::string& path) {
    // O_NONBLOCK: a FIFO that nobody reads is an error, not a wait.
    descriptor_ = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0644);
    if (descriptor_ >= 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("stretto-keeper cannot write --trace ", path, ": ", std::strerror(errno)));
  }
  void operator()(const stretto::KeeperEvent& event) const {
    if (descriptor_ >= 0) {
      stretto::observe_internal::WriteAll(
          descriptor_, "the trace",
          absl::StrFormat("{\"time\": %.6f, \"node\": %d, \"event\": \"%s\", \"step\": %d, "
                          "\"round\": %d}\n",
                          stretto::observe_internal::UnixSeconds(), node_, event.what, event.step,
                          event.round))
          .IgnoreError();
    }
    if (const auto pause = pauses_.find(event.what); pause != pauses_.end()) {
      std::this_thread::sleep_for(pause->second);
    }
  }

 private:
  int64_t node_;
  std::map<std::string, std::chrono::milliseconds> pauses_;
  int descriptor_ = -1;
};

// KeeperEvent::what, but for the states of slots.
constexpr const char* kEvents[] = {"seal",  "encode", "rebuild", "commit",  "pass",
                                   "round", "spill",  "spilled", "damaged", "read"};

absl::Status CheckEvent(const std::string& event) {
  std::vector<std::string> names(std::begin(kEvents), std::end(kEvents));
  for (const auto state :
       {stretto::SlotState::kEmpty, stretto::SlotState::kWriting, stretto::SlotState::kSealed,
        stretto::SlotState::kProtected, stretto::SlotState::kCommitted}) {
    names.emplace_back(stretto::Name(state));
  }
  if (std::find(names.begin(), names.end(), event) != names.end()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("stretto-keeper: --slow knows no event '", event,
                                                 "', only ", absl::StrJoin(names, ", ")));
}

// "encode=10,commit=5"
absl::StatusOr<std::map<std::string, std::chrono::milliseconds>> ParsePauses(
    const std::string& text) {
  std::map<std::string, std::chrono::milliseconds> pauses;
  const std::vector<std::string> parts = absl::StrSplit(text, ',', absl::SkipEmpty());
  for (const std::string& part : parts) {
    const size_t equals = part.find('=');
    int milliseconds = 0;
    if (equals == std::string::npos || !absl::SimpleAtoi(part.substr(equals + 1), &milliseconds) ||
        milliseconds < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("stretto-keeper: --slow must be EVENT=MILLISECONDS,..., not '", part, "'"));
    }
    if (absl::Status known = CheckEvent(part.substr(0, equals)); !known.ok()) return known;
    pauses[part.substr(0, equals)] = std::chrono::milliseconds(milliseconds);
  }
  return pauses;
}

stretto::Keeper* running = nullptr;
void OnSignal(int) { running->Stop(); }

absl::Status Run(const stretto::KeeperOptions& options) {
  // Signals to the trainers' group are not for this process.
  setpgid(0, 0);
  STRETTO_ASSIGN_OR_RETURN(const auto keeper, stretto::Keeper::Start(options));
  running = keeper.get();
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  signal(SIGPIPE, SIG_IGN);
  STRETTO_RETURN_IF_ERROR(stretto::PrintText(absl::StrCat("ready ", keeper->port(), "\n")));
  const absl::Status status = keeper->Run();
  signal(SIGTERM, SIG_IGN);
  signal(SIGINT, SIG_IGN);
  return status;
}

absl::Status Ask(const std::string& keeper, const std::string& token) {
  STRETTO_ASSIGN_OR_RETURN(const std::string state, stretto::AskKeeper(keeper, token));
  return stretto::PrintText(state);
}

}  // namespace

int main(int argc, char** argv) {
  stretto::KeeperOptions options;
  int64_t node = 0, nodes = 1, data = -1, parity = -1, keep = 2;
  int64_t threads = std::clamp<int64_t>(std::thread::hardware_concurrency() / 2, 2, 16);
  double silence = 10, spill = 60;
  std::string peers, directory = "none", ask, trace, slow;
  stretto::Arguments arguments(
      "stretto-keeper",
      "Keeps the snapshots of a node's ranks in memory, with parity of other nodes', and outlives "
      "the ranks. Writes \"ready PORT\" when it listens; ends by SIGTERM, its memory with it.",
      "");
  arguments.Add("job", "ID", "name of the job", &options.job);
  arguments.Add("node", "N", "number of this node", &node);
  arguments.Add("nodes", "N", "how many nodes there are", &nodes);
  arguments.Add("peers", "HOST:PORT,...", "keepers of all nodes, this one's included", &peers);
  arguments.Add("dir", "DIR", "where committed snapshots are written, shared by all nodes; none",
                &directory);
  arguments.Add("dir-every", "S", "seconds between two of these at least", &spill);
  arguments.Add("keep", "N", "newest of these that stay; 0: all", &keep);
  arguments.Add("data", "N", "nodes of a group with data; -1: all but those of parity", &data);
  arguments.Add("parity", "N", "nodes of a group that may be lost; -1: 1 where there are several",
                &parity);
  arguments.Add("socket", "PATH",
                "where trainers connect (STRETTO_KEEPER); empty: /tmp/stretto-UID/JOB-NODE.sock",
                &options.socket);
  arguments.Add("memory", "BYTES", "budget for slots and parity; -1: no limit",
                &options.memory_bytes);
  arguments.Add("threads", "N", "that touch new memory, rebuild and verify; half of them encode",
                &threads);
  arguments.Add("silence", "S", "seconds after which a silent keeper is taken for gone", &silence);
  arguments.Add("trace", "FILE", "one line each for what the keeper does and when", &trace);
  arguments.Add("slow", "EVENT=MS,...", "for tests: events of the trace that last longer", &slow);
  arguments.Add("ask", "ADDRESS",
                "print the state of the keeper at this socket or host:port, and end", &ask);
  absl::Status status = arguments.Parse(argc, argv);
  if (arguments.help()) return stretto::EndProgram(stretto::PrintText(arguments.Help()));
  const bool asks = !arguments.FirstGiven({"ask"}).empty();
  if (status.ok() && asks && ask.empty()) {
    status = absl::InvalidArgumentError(
        "stretto-keeper: --ask is empty; name a keeper's socket or host:port");
  }
  constexpr int64_t kMost = 1 << 16;
  const struct {
    const char* name;
    int64_t value, least;
  } numbers[] = {{"node", node, 0},      {"nodes", nodes, 1}, {"data", data, -1},
                 {"parity", parity, -1}, {"keep", keep, 0},   {"threads", threads, 1}};
  for (const auto& [name, value, least] : numbers) {
    if (status.ok() && (value < least || value > kMost)) {
      status = absl::InvalidArgumentError(absl::StrCat("stretto-keeper: --", name, " must be ",
                                                       least, " to ", kMost, ", not ", value));
    }
  }
  if (status.ok() && options.memory_bytes < -1) {
    status = absl::InvalidArgumentError(absl::StrCat(
        "stretto-keeper: --memory must be at least -1 (no limit), not ", options.memory_bytes));
  }
  if (status.ok() && !(silence >= 0.1 && silence <= 86400 && spill >= 0 && spill <= 86400)) {
    status = absl::InvalidArgumentError(
        "stretto-keeper: --silence must be 0.1 to 86400, --dir-every 0 to 86400");
  }
  if (status.ok()) {
    options.node = static_cast<int>(node);
    options.nodes = static_cast<int>(nodes);
    options.data = static_cast<int>(data);
    options.parity = static_cast<int>(parity);
    options.keep = static_cast<int>(keep);
    options.threads = static_cast<int>(threads);
    options.spill_interval = std::chrono::milliseconds(static_cast<int64_t>(spill * 1000));
    options.silence = std::chrono::milliseconds(static_cast<int64_t>(silence * 1000));
    if (!peers.empty()) {
      for (const auto& peer : absl::StrSplit(peers, ',')) options.peers.emplace_back(peer);
    }
    if (directory != "none") options.directory = directory;
    const char* token = std::getenv("STRETTO_JOB_TOKEN");
    options.token = token == nullptr ? "" : token;
    absl::StatusOr<std::map<std::string, std::chrono::milliseconds>> pauses = ParsePauses(slow);
    status = pauses.status();
    if (pauses.ok() && !(trace.empty() && pauses->empty())) {
      Observer observer(node, *std::move(pauses));
      if (!trace.empty()) status = observer.Open(trace);
      options.observer = observer;
    }
  }
  if (status.ok()) status = asks ? Ask(ask, options.token) : Run(options);
  return stretto::EndProgram(status);
}
