// What a rank's flight record says about where it was.
#ifndef STRETTO_TOOLS_RUN_FLIGHT_H_
#define STRETTO_TOOLS_RUN_FLIGHT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace stretto {

struct FlightNote {
  int rank = -1;
  std::string in_flight;      // the oldest operation that had not finished; empty: none
  std::string last_finished;  // empty: none
  // The newest collective that the rank entered, by the name of the group.
  std::map<std::string, int64_t> entered;
};
// Of the text of a flight-rank<r>.json; nothing when it is none.
std::optional<FlightNote> ParseFlight(const std::string& text);

// The ranks that entered fewer collectives of `group`, which holds all `ranks`, than the rank that
// is furthest: those wait for these. Empty when they cannot be told: records are missing, or all
// ranks are equally far.
std::vector<int> Behind(const std::vector<FlightNote>& notes, int ranks, const std::string& group);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_FLIGHT_H_
