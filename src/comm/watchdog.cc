#include "src/comm/watchdog.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "src/core/start_thread.h"

namespace stretto {
namespace {

constexpr auto kLook = std::chrono::milliseconds(250);  // between looks at "trouble"
constexpr int kPublishEvery = 2;                        // looks
constexpr char kSilence[] =
    " no heartbeat: the process is stopped, its machine hangs or the network to it is down";

}  // namespace

void ProgressBoard::AddGroup(int id, int size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  GroupProgress& g = groups_[id];
  g.sends.assign(static_cast<std::size_t>(size), 0);
  g.receives.assign(static_cast<std::size_t>(size), 0);
}

void ProgressBoard::Entered(int id, int64_t sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  groups_[id].entered = sequence;
}

void ProgressBoard::Started(int id, int64_t sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  groups_[id].started = sequence;
}

void ProgressBoard::Finished(int id, int64_t sequence) {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t& finished = groups_[id].finished;
  finished = std::max(finished, sequence);
}

int64_t ProgressBoard::Sends(int id, int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ++groups_[id].sends[static_cast<std::size_t>(peer)];
}

int64_t ProgressBoard::Receives(int id, int peer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return ++groups_[id].receives[static_cast<std::size_t>(peer)];
}

std::string ProgressBoard::ToText(int64_t beat, const std::string& summary) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text = absl::StrCat("beat ", beat, "\n");
  for (const auto& [id, g] : groups_) {
    absl::StrAppend(&text, "group ", id, " ", g.entered, " ", g.started, " ", g.finished, "\n");
    for (std::size_t p = 0; p < g.sends.size(); ++p) {
      if (g.sends[p] > 0) absl::StrAppend(&text, "sends ", id, " ", p, " ", g.sends[p], "\n");
      if (g.receives[p] > 0) {
        absl::StrAppend(&text, "receives ", id, " ", p, " ", g.receives[p], "\n");
      }
    }
  }
  absl::StrAppend(&text, "summary ", summary);
  return text;
}

ProgressBoard::Parsed ProgressBoard::Parse(const std::string& text) {
  Parsed parsed;
  std::istringstream lines(text);
  std::string word;
  while (lines >> word) {
    if (word == "summary") {
      lines.get();
      std::getline(lines, parsed.summary, '\0');
      break;
    }
    if (word == "beat") {
      lines >> parsed.beat;
      continue;
    }
    int id = 0;
    lines >> id;
    GroupProgress& g = parsed.groups[id];
    if (word == "group") {
      lines >> g.entered >> g.started >> g.finished;
      continue;
    }
    std::size_t peer = 0;
    int64_t count = 0;
    lines >> peer >> count;
    if (!lines || peer > (1u << 24)) break;
    std::vector<int64_t>& counts = word == "sends" ? g.sends : g.receives;
    if (counts.size() <= peer) counts.resize(peer + 1, 0);
    counts[peer] = count;
  }
  return parsed;
}

Watchdog::Watchdog(Store& store, int rank, const std::string& name, const FlightRecorder& recorder)
    : store_(store), rank_(rank), prefix_(absl::StrCat("state/", name, "/")), recorder_(recorder) {}

absl::Status Watchdog::Start() {
  STRETTO_ASSIGN_OR_RETURN(thread_, StartThread("the watchdog", [this] { Loop(); }));
  return absl::OkStatus();
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

absl::Status Watchdog::Publish() {
  return store_.Set(absl::StrCat(prefix_, rank_), board_.ToText(++beat_, recorder_.Summary()));
}

void Watchdog::Loop() {
  std::string last_trouble;
  for (int64_t look = 0;; ++look) {
    absl::Status control;
    if (look % kPublishEvery == 0) control = Publish();
    if (control.ok()) {
      const absl::StatusOr<std::string> trouble = store_.TryGet("trouble");
      if (trouble.ok() && *trouble != last_trouble) {
        last_trouble = *trouble;
        Ask();
      }
      if (absl::IsUnavailable(trouble.status())) control = trouble.status();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    const auto first = [](const std::vector<std::pair<int, std::string>>& told) {
      return !told.empty() && told[0].first == 0;
    };
    if (absl::IsUnavailable(control) && known_.dead.empty() && !first(known_.failed) &&
        !first(known_.gave_up)) {
      // The control plane went away with rank 0, without a word.
      known_.dead = {0};
      known_.since = std::chrono::steady_clock::now();
      trouble_flag_.store(true, std::memory_order_release);
    }
    if (wake_.wait_for(lock, kLook, [this] { return stop_; })) return;
  }
}

Watchdog::News Watchdog::Known() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return known_;
}

Watchdog::News Watchdog::Ask() {
  const Trouble now = AskForTrouble(store_);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (now.any() && now != known_) {
    // Those that give up are no news.
    const bool cause =
        now.dead != known_.dead || now.failed != known_.failed || now.left != known_.left;
    if (cause) known_.since = std::chrono::steady_clock::now();
    static_cast<Trouble&>(known_) = now;
    trouble_flag_.store(true, std::memory_order_release);
  }
  return known_;
}

void Watchdog::Fail(const std::string& message, bool own) {
  TellTrouble(store_, rank_, message, own);
  Publish().IgnoreError();
}

absl::StatusOr<std::map<int, ProgressBoard::Parsed>> Watchdog::ReadAll() {
  STRETTO_ASSIGN_OR_RETURN(const auto listed, store_.List(prefix_));
  std::map<int, ProgressBoard::Parsed> states;
  for (const auto& [key, value] : listed) {
    int rank = 0;
    if (absl::SimpleAtoi(key.substr(prefix_.size()).c_str(), &rank)) {
      states[rank] = ProgressBoard::Parse(value);
    }
  }
  return states;
}

std::string Watchdog::Diagnose(const Group& group, CommOp op, int64_t sequence, int peer,
                               const std::string& what) {
  const absl::StatusOr<std::map<int, ProgressBoard::Parsed>> first = ReadAll();
  if (!first.ok()) {
    return absl::StrCat(what, " does not finish, and ", std::string(first.status().message()));
  }

  const bool point_to_point = op == CommOp::kSend || op == CommOp::kReceive;
  const auto entered = [&](const ProgressBoard::Parsed& state) -> int64_t {
    const auto g = state.groups.find(group.id);
    if (g == state.groups.end()) return 0;
    if (!point_to_point) return g->second.entered;
    const std::vector<int64_t>& counts = op == CommOp::kSend ? g->second.receives : g->second.sends;
    const std::size_t me = static_cast<std::size_t>(group.index);
    return me < counts.size() ? counts[me] : 0;
  };
  std::vector<int> others;
  if (point_to_point) {
    others.push_back(group.ranks[static_cast<std::size_t>(peer)]);
  } else {
    for (int r : group.ranks) {
      if (r != rank_) others.push_back(r);
    }
  }
  std::vector<int> absent;
  std::vector<int> inside;
  std::sort(others.begin(), others.end());
  for (int r : others) {
    const auto state = first->find(r);
    (state == first->end() || entered(state->second) < sequence ? absent : inside).push_back(r);
  }
  const auto last_operation = [&](int r) {
    const auto state = first->find(r);
    return state == first->end() ? std::string("it has no communicator yet")
                                 : absl::StrCat("there, ", state->second.summary);
  };

  // A heartbeat that stands still tells a stopped process from one that is busy elsewhere.
  std::this_thread::sleep_for(kLook * kPublishEvery * 5 / 2);
  const absl::StatusOr<std::map<int, ProgressBoard::Parsed>> second = ReadAll();
  const auto silent = [&](int r) {
    if (!second.ok() || first->count(r) == 0 || second->count(r) == 0) return false;
    return first->at(r).beat == second->at(r).beat;
  };
  std::vector<int> quiet, quiet_here;
  for (const auto& [r, unused] : *first) {
    if (r == rank_ || !silent(r)) continue;
    quiet.push_back(r);
    if (std::binary_search(others.begin(), others.end(), r)) quiet_here.push_back(r);
  }
  const std::string silence =
      quiet.empty()
          ? ""
          : absl::StrCat("; ", RanksText(quiet), quiet.size() == 1 ? " sends" : " send", kSilence);
  // Among those that are missing, the silent ones are the cause and the others wait like us.
  std::vector<int> causes;
  std::set_intersection(absent.begin(), absent.end(), quiet_here.begin(), quiet_here.end(),
                        std::back_inserter(causes));
  if (causes.empty() && absent.empty()) causes = quiet_here;
  if (!causes.empty()) {
    // How far they came is only known from what they published last.
    const auto last = first->find(causes[0]);
    return absl::StrCat(
        RanksText(causes), causes.size() == 1 ? " sends" : " send", kSilence, ", and ", what,
        " waits for it; when last heard of, ",
        last == first->end() ? std::string("it had no communicator yet") : last->second.summary);
  }
  if (!absent.empty()) {
    return absl::StrCat(RanksText(absent), " never entered ", what, "; ", last_operation(absent[0]),
                        silence);
  }
  std::vector<int> waiting;
  for (int r : inside) {
    const auto g = first->at(r).groups.find(group.id);
    if (!point_to_point && g != first->at(r).groups.end() && g->second.started < sequence) {
      waiting.push_back(r);
    }
  }
  if (!waiting.empty()) {
    return absl::StrCat(RanksText(waiting), " entered ", what,
                        " but still waits for its own computation before it; ",
                        last_operation(waiting[0]), silence);
  }
  return absl::StrCat(
      "all ranks entered ", what,
      " and answer, so its messages stall: check the network, or raise the time-out");
}

}  // namespace stretto
