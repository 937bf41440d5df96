#include "tools/run/flight.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace stretto {

std::optional<FlightNote> ParseFlight(const std::string& text) {
  const nlohmann::json j = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!j.is_object() || !j.contains("rank") || !j["rank"].is_number_integer() ||
      !j.contains("records") || !j["records"].is_array()) {
    return std::nullopt;
  }
  FlightNote note;
  note.rank = j["rank"].get<int>();
  int64_t last_finish = 0;
  for (const nlohmann::json& r : j["records"]) {
    if (!r.is_object()) return std::nullopt;
    const auto number = [&](const char* key) {
      const auto it = r.find(key);
      return it != r.end() && it->is_number_integer() ? it->get<int64_t>() : int64_t{0};
    };
    const auto word = [&](const char* key) {
      const auto it = r.find(key);
      return it != r.end() && it->is_string() ? it->get<std::string>() : std::string();
    };
    const std::string op = word("op"), group = word("group_name"), label = word("label");
    // As stretto::Describe writes operations in error messages.
    std::string what = absl::StrCat(op, "(", group, ") seq ", number("sequence"));
    if (op == "send") absl::StrAppend(&what, " to rank ", number("peer"));
    if (op == "receive") absl::StrAppend(&what, " from rank ", number("peer"));
    if (!label.empty()) absl::StrAppend(&what, " [", label, "]");
    if (word("state") != "completed") {
      if (note.in_flight.empty()) note.in_flight = what;
    } else if (number("finished_us") >= last_finish) {
      last_finish = number("finished_us");
      note.last_finished = what;
    }
    if (op != "send" && op != "receive") {
      int64_t& newest = note.entered[group];
      newest = std::max(newest, number("sequence"));
    }
  }
  return note;
}

std::vector<int> Behind(const std::vector<FlightNote>& notes, int ranks, const std::string& group) {
  std::map<int, int64_t> entered;
  for (const FlightNote& note : notes) {
    const auto it = note.entered.find(group);
    entered[note.rank] = it == note.entered.end() ? 0 : it->second;
  }
  if (static_cast<int>(entered.size()) != ranks) return {};
  int64_t furthest = 0;
  for (const auto& [rank, sequence] : entered) furthest = std::max(furthest, sequence);
  std::vector<int> behind;
  for (const auto& [rank, sequence] : entered) {
    if (sequence < furthest) behind.push_back(rank);
  }
  return behind;
}

}  // namespace stretto
