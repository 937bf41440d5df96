#include "tools/run/incident.h"

#include <time.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "tools/run/process.h"
#include "tools/run/words.h"

namespace stretto {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kKinds[] = {"unknown", "killed", "exited", "stopped", "hung", "launcher"};

template <class T>
Json OrUnknown(const std::optional<T>& value) {
  return value ? Json(*value) : Json("unknown");
}
Json OrUnknown(const std::string& text) { return text.empty() ? Json("unknown") : Json(text); }

std::string TimeText(double unix_seconds) {
  if (unix_seconds <= 0) return "unknown";
  const auto whole = static_cast<time_t>(unix_seconds);
  struct tm utc;
  gmtime_r(&whole, &utc);
  std::array<char, 32> text;
  strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &utc);
  return absl::StrFormat("%s.%03dZ", text.data(),
                         static_cast<int>((unix_seconds - static_cast<double>(whole)) * 1e3));
}

std::array<std::pair<const char*, const std::optional<double>*>, 6> Phases(const Incident& i) {
  return {{{"detect", &i.detect},
           {"end", &i.end},
           {"back_off", &i.back_off},
           {"start", &i.start},
           {"load", &i.load},
           {"first_step", &i.first_step}}};
}

// The last line that says something.
std::string LastLine(const std::string& said) {
  std::string text = CleanText(said);
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  const size_t newline = text.rfind('\n');
  return newline == std::string::npos ? text : text.substr(newline + 1);
}

std::string RestoredText(const Incident& i) {
  if (!i.restored_step) return "unknown";
  return *i.restored_step == 0 ? "the beginning" : absl::StrCat("step ", *i.restored_step);
}

}  // namespace

std::optional<int64_t> Incident::StepsLost() const {
  if (!last_step || !restored_step) return std::nullopt;
  return std::max<int64_t>(*last_step - *restored_step, 0);
}

std::optional<double> Incident::SecondsLost() const {
  double sum = 0;
  for (const auto& [name, seconds] : Phases(*this)) {
    if (!*seconds) return std::nullopt;
    sum += **seconds;
  }
  return sum;
}

std::string ToJson(const Incident& i) {
  Json j;
  j["version"] = 1;
  j["incident"] = i.number;
  j["time"] = i.cause.time > 0 ? Json(i.cause.time) : Json("unknown");
  j["noticed"] = i.noticed;
  j["what"] = Describe(i.cause);
  j["kind"] = kKinds[static_cast<size_t>(i.cause.kind)];
  j["first"] = i.cause.ranks.empty() ? Json("unknown") : Json(i.cause.ranks);
  const bool by_signal = i.cause.signal != 0;
  j["signal"] = by_signal ? Json(SignalName(i.cause.signal)) : Json(nullptr);
  const bool by_itself =
      !by_signal && !i.cause.hung &&
      (i.cause.kind == Cause::Kind::kExited || i.cause.kind == Cause::Kind::kLauncher);
  j["code"] = by_itself ? Json(i.cause.code) : Json(nullptr);
  j["size"] = i.ranks;
  j["restarts_before"] = i.restarts;
  j["last_step"] = OrUnknown(i.last_step);
  j["restored_step"] = i.restarting ? OrUnknown(i.restored_step) : Json(nullptr);
  j["steps_lost"] = i.restarting ? OrUnknown(i.StepsLost()) : Json(nullptr);
  Json seconds;
  for (const auto& [name, value] : Phases(i)) seconds[name] = OrUnknown(*value);
  seconds["total"] = OrUnknown(i.SecondsLost());
  j["seconds"] = std::move(seconds);
  j["decision"] = i.decision;
  j["launcher_said"] = i.launcher;
  j["ranks"] = Json::array();
  for (const RankFate& fate : i.fates) {
    Json rank;
    rank["rank"] = fate.rank;
    // At the time of a report nothing runs any more.
    const bool known_end = fate.state != RankFate::State::kRunning;
    rank["fate"] = known_end ? Describe(fate) : "unknown";
    rank["time"] = known_end && fate.since > 0 ? Json(fate.since) : Json("unknown");
    rank["asked_by"] = fate.asked != 0 ? Json(SignalName(fate.asked)) : Json(nullptr);
    rank["host"] = OrUnknown(fate.host);
    rank["pid"] = fate.pid > 0 ? Json(fate.pid) : Json("unknown");
    const auto flight = i.flights.find(fate.rank);
    const bool known = flight != i.flights.end();
    rank["operation"] = !known                             ? Json("unknown")
                        : flight->second.in_flight.empty() ? Json("none")
                                                           : Json(flight->second.in_flight);
    rank["last_operation"] = known ? OrUnknown(flight->second.last_finished) : Json("unknown");
    rank["said"] = LastLine(fate.said);
    j["ranks"].push_back(std::move(rank));
  }
  return j.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string ToText(const Incident& i) {
  std::string text = absl::StrFormat("incident %d at %s: %s\n", i.number, TimeText(i.cause.time),
                                     Describe(i.cause));
  const auto line = [&](const std::string& name, const std::string& value) {
    absl::StrAppendFormat(&text, "  %-22s%s\n", name.c_str(), value.c_str());
  };
  line("last completed step", i.last_step ? absl::StrCat(*i.last_step) : "unknown");
  if (i.restarting) {
    const std::optional<int64_t> lost = i.StepsLost();
    line("went on from",
         absl::StrCat(RestoredText(i), ", ", lost ? absl::StrCat(*lost) : "an unknown number of",
                      lost && *lost == 1 ? " step" : " steps", " lost"));
  }
  for (const RankFate& fate : i.fates) {
    if (i.cause.kind == Cause::Kind::kLauncher && !i.cause.started) continue;  // there is none
    const std::string name = absl::StrCat("rank ", fate.rank);
    std::string what = Describe(fate);
    if (fate.state == RankFate::State::kRunning) what = "has left no record of its end";
    if (fate.asked != 0 && fate.state == RankFate::State::kExited) {
      absl::StrAppend(&what, " after ", SignalName(fate.asked));
    }
    const auto flight = i.flights.find(fate.rank);
    if (flight == i.flights.end()) {
      absl::StrAppend(&what, "; operation unknown");
    } else if (!flight->second.in_flight.empty()) {
      absl::StrAppend(&what, "; in ", flight->second.in_flight);
    } else if (!flight->second.last_finished.empty()) {
      absl::StrAppend(&what, "; in no operation, the last was ", flight->second.last_finished);
    } else {
      absl::StrAppend(&what, "; in no operation yet");
    }
    line(name, what);
    const std::string said = LastLine(fate.said);
    if (!said.empty()) line("  its last line", said);
  }
  std::string seconds;
  for (const auto& [name, value] : Phases(i)) {
    std::string words = name;
    std::replace(words.begin(), words.end(), '_', ' ');
    absl::StrAppendFormat(&seconds, "%s%s %s", seconds.empty() ? "" : ", ", words,
                          *value ? absl::StrFormat("%.2f", **value) : std::string("unknown"));
  }
  const std::optional<double> total = i.SecondsLost();
  if (total) absl::StrAppendFormat(&seconds, "; %.2f in all", *total);
  line("seconds", seconds);
  line("decision", i.decision);
  if (!i.launcher.empty()) text += "  the launcher's last lines:\n";
  for (const std::string& said : i.launcher) {
    absl::StrAppend(&text, said.empty() ? "" : "    ", said, "\n");
  }
  return text;
}

std::string History(const std::vector<Incident>& incidents) {
  if (incidents.empty()) return "no incident";
  std::vector<std::pair<std::string, int>> kinds;  // in the order in which they came
  int64_t steps = 0;
  double seconds = 0;
  bool restarted = false, steps_known = true, seconds_known = true;
  for (const Incident& i : incidents) {
    const std::string what = Describe(i.cause);
    const auto known = std::find_if(kinds.begin(), kinds.end(),
                                    [&](const auto& kind) { return kind.first == what; });
    if (known == kinds.end()) {
      kinds.emplace_back(what, 1);
    } else {
      ++known->second;
    }
    if (!i.restarting) continue;  // what the job would have lost nobody knows
    restarted = true;
    steps_known = steps_known && i.StepsLost();
    seconds_known = seconds_known && i.SecondsLost();
    steps += i.StepsLost().value_or(0);
    seconds += i.SecondsLost().value_or(0);
  }
  std::string text =
      absl::StrCat(incidents.size(), incidents.size() == 1 ? " incident: " : " incidents: ");
  for (size_t k = 0; k < kinds.size(); ++k) {
    absl::StrAppend(&text, k == 0 ? "" : ", ", kinds[k].first);
    if (kinds[k].second > 1) absl::StrAppend(&text, " (", kinds[k].second, " times)");
  }
  if (!restarted) return text;
  absl::StrAppendFormat(&text, "; %s%d %s and %s%.1f s lost", steps_known ? "" : "at least ", steps,
                        steps == 1 ? "step" : "steps", seconds_known ? "" : "at least ", seconds);
  return text;
}

}  // namespace stretto
