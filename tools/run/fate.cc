#include "tools/run/fate.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "tools/run/process.h"

namespace stretto {
namespace {

constexpr double kTogether = 0.1;  // seconds
constexpr const char* kNames[] = {"started", "stopped", "continued", "asked", "ended"};

}  // namespace

std::string EventsPath(const std::string& directory, int rank) {
  return absl::StrCat(directory, "/rank-", rank, ".events");
}

std::string ToLine(const RankEvent& event) {
  nlohmann::ordered_json j;
  j["event"] = kNames[static_cast<size_t>(event.kind)];
  j["time"] = event.time;
  if (event.kind == RankEvent::Kind::kStarted) {
    j["pid"] = event.pid;
    j["host"] = event.host;
  }
  if (event.signal != 0) j["signal"] = event.signal;
  if (event.kind == RankEvent::Kind::kEnded) {
    if (event.signal == 0) j["code"] = event.code;
    j["said"] = event.said;
  }
  return j.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

RankFate ParseEvents(int rank, const std::string& text) {
  RankFate fate;
  fate.rank = rank;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const nlohmann::json j = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!j.is_object()) continue;
    const auto number = [&](const char* key) {
      const auto it = j.find(key);
      return it != j.end() && it->is_number() ? it->get<double>() : 0.0;
    };
    const auto word = [&](const char* key) {
      const auto it = j.find(key);
      return it != j.end() && it->is_string() ? it->get<std::string>() : std::string();
    };
    const std::string event = word("event");
    const double time = number("time");
    const int signal = static_cast<int>(number("signal"));
    if (event == "started") {
      fate.pid = static_cast<int>(number("pid"));
      fate.host = word("host");
    }
    if (event == "started" || event == "continued") {
      fate.state = RankFate::State::kRunning;
      fate.since = time;
      fate.signal = 0;
    } else if (event == "stopped") {
      fate.state = RankFate::State::kStopped;
      fate.since = time;
      fate.signal = signal;
    } else if (event == "asked") {
      if (fate.asked != 0) continue;
      fate.asked = signal;
      fate.asked_at = time;
    } else if (event == "ended") {
      // A stopped rank that is ended was lost when it stopped.
      const bool stopped = fate.state == RankFate::State::kStopped && fate.asked != 0;
      fate.said = word("said");
      if (stopped) continue;
      fate.state = signal != 0 ? RankFate::State::kKilled : RankFate::State::kExited;
      fate.since = time;
      fate.signal = signal;
      fate.code = static_cast<int>(number("code"));
    }
  }
  return fate;
}

std::string Describe(const RankFate& fate) {
  switch (fate.state) {
    case RankFate::State::kUnknown:
      return "unknown";
    case RankFate::State::kRunning:
      return "running";
    case RankFate::State::kStopped:
      return "stopped by " + SignalName(fate.signal);
    case RankFate::State::kExited:
      return absl::StrCat("ended with code ", fate.code);
    case RankFate::State::kKilled:
      return "killed by " + SignalName(fate.signal);
  }
  return "unknown";
}

Cause FindCause(const std::vector<RankFate>& fates, int requested) {
  const auto trouble = [&](const RankFate& fate) {
    const bool asked = fate.asked != 0 && fate.asked_at <= fate.since;
    switch (fate.state) {
      case RankFate::State::kStopped:
      case RankFate::State::kKilled:
        return !asked;
      case RankFate::State::kExited:
        return !asked && fate.code != 0 && fate.code != requested;
      default:
        return false;
    }
  };
  const RankFate* first = nullptr;
  for (const RankFate& fate : fates) {
    if (trouble(fate) && (first == nullptr || fate.since < first->since)) first = &fate;
  }
  Cause cause;
  if (first == nullptr) return cause;
  cause.kind = first->state == RankFate::State::kStopped  ? Cause::Kind::kStopped
               : first->state == RankFate::State::kKilled ? Cause::Kind::kKilled
                                                          : Cause::Kind::kExited;
  cause.code = first->code;
  cause.signal = first->signal;
  cause.time = first->since;
  for (const RankFate& fate : fates) {
    // The launcher asks the others to end as soon as it sees the first: they may be just behind.
    const bool same = fate.state == first->state && fate.code == first->code &&
                      fate.signal == first->signal && fate.since - first->since <= kTogether;
    const bool on_its_own = fate.state == RankFate::State::kExited || trouble(fate);
    if (&fate == first || (same && on_its_own)) cause.ranks.push_back(fate.rank);
  }
  return cause;
}

std::string RankNames(const std::vector<int>& ranks) {
  if (ranks.empty()) return "an unknown rank";
  if (ranks.size() == 1) return absl::StrCat("rank ", ranks[0]);
  const bool run = ranks.back() - ranks.front() + 1 == static_cast<int>(ranks.size());
  if (ranks.size() > 2 && run) return absl::StrCat("ranks ", ranks.front(), " to ", ranks.back());
  std::string text = "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    absl::StrAppend(&text, i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
  }
  return text;
}

std::string Describe(const Cause& cause, const std::string& when) {
  const std::string who = RankNames(cause.ranks);
  const char* was = cause.ranks.size() > 1 ? " were " : " was ";
  const std::string then = when.empty() ? "" : " " + when;
  switch (cause.kind) {
    case Cause::Kind::kUnknown:
      break;
    case Cause::Kind::kKilled:
      return absl::StrCat(who, was, "killed by ", SignalName(cause.signal), then);
    case Cause::Kind::kExited:
      return absl::StrCat(who, " ended with code ", cause.code, then);
    case Cause::Kind::kStopped:
      return absl::StrCat(who, was, "stopped by ", SignalName(cause.signal), then);
    case Cause::Kind::kHung:
      return absl::StrCat("the job hung", then,
                          cause.ranks.empty() ? ", and it is unknown which rank held it up"
                                              : ": the others waited for " + who);
    case Cause::Kind::kLauncher: {
      const std::string how = cause.hung          ? "hung"
                              : cause.signal != 0 ? "was killed by " + SignalName(cause.signal)
                                                  : absl::StrCat("ended with code ", cause.code);
      // Without ranks there is no step to tell of.
      if (!cause.started) {
        return absl::StrCat("the launcher ", how, " before it had started any rank");
      }
      return absl::StrCat("the launcher ", how, then, then.empty() ? "" : ",",
                          " while ranks still ran");
    }
  }
  return absl::StrCat("the job failed", then, " for an unknown reason");
}

std::string When(const std::optional<int64_t>& step) {
  return step ? absl::StrCat("after step ", *step) : "before any step";
}

}  // namespace stretto
