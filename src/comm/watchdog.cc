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

std::vector<std::pair<int, std::string>> Numbered(Store& store, const std::string& prefix) {
  std::vector<std::pair<int, std::string>> result;
  auto listed = store.List(prefix);
  if (!listed.ok()) return result;
  for (auto& [key, value] : *listed) {
    int rank = 0;
    if (absl::SimpleAtoi(key.substr(prefix.size()).c_str(), &rank)) {
      result.emplace_back(rank, std::move(value));
    }
  }
  std::sort(result.begin(), result.end());
  return result;
}

std::vector<int> Ranks(const std::vector<std::pair<int, std::string>>& numbered) {
  std::vector<int> ranks;
  for (const auto& [rank, unused] : numbered) ranks.push_back(rank);
  return ranks;
}

std::string RanksText(const std::vector<int>& ranks) {
  constexpr std::size_t kNamed = 8;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size() && i < kNamed; ++i) {
    absl::StrAppend(&text, i == 0 ? "" : ", ", ranks[i]);
  }
  if (ranks.size() > kNamed) absl::StrAppend(&text, " and ", ranks.size() - kNamed, " more");
  return text;
}

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
    if (absl::IsUnavailable(control) && known_.dead.empty()) {
      // The control plane went away with rank 0.
      known_.dead = {0};
      known_.since = std::chrono::steady_clock::now();
      trouble_flag_.store(true, std::memory_order_release);
    }
    if (wake_.wait_for(lock, kLook, [this] { return stop_; })) return;
  }
}

Watchdog::Trouble Watchdog::Known() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return known_;
}

Watchdog::Trouble Watchdog::Ask() {
  Trouble now;
  now.dead = Ranks(Numbered(store_, "dead/"));
  now.left = Ranks(Numbered(store_, "left/"));
  now.failed = Numbered(store_, "failed/");
  const std::lock_guard<std::mutex> lock(mutex_);
  if (now.any() &&
      (now.dead != known_.dead || now.left != known_.left || now.failed != known_.failed)) {
    now.since = std::chrono::steady_clock::now();
    known_ = now;
    trouble_flag_.store(true, std::memory_order_release);
  }
  return known_;
}

void Watchdog::Fail(const std::string& message) {
  // Best effort: if the control plane is gone, the others notice that themselves.
  if (store_.Set(absl::StrCat("failed/", rank_), message).ok()) {
    store_.Add("trouble", 1).status().IgnoreError();
  }
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
  if (!first.ok()) return std::string(first.status().message());

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
  std::vector<int> quiet;
  for (int r : others) {
    if (silent(r)) quiet.push_back(r);
  }
  const std::string silence =
      quiet.empty()
          ? ""
          : absl::StrCat("; ", RanksText(quiet),
                         " sends no heartbeat: the process is stopped or its machine hangs");
  // Among those that are missing, the silent ones are the cause and the others wait like us.
  std::vector<int> causes;
  std::set_intersection(absent.begin(), absent.end(), quiet.begin(), quiet.end(),
                        std::back_inserter(causes));
  if (!causes.empty()) absent = causes;
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
  if (!quiet.empty()) {
    return absl::StrCat(RanksText(quiet), " entered ", what,
                        " but sends no heartbeat: the process is stopped or its machine hangs; ",
                        last_operation(quiet[0]));
  }
  return absl::StrCat(
      "all ranks entered ", what,
      " and answer, so its messages stall: check the network, or raise the time-out");
}

}  // namespace stretto
