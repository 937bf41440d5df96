// The report of one failure, for people and for programs. What is not known says so.
#ifndef STRETTO_TOOLS_RUN_INCIDENT_H_
#define STRETTO_TOOLS_RUN_INCIDENT_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tools/run/fate.h"
#include "tools/run/flight.h"

namespace stretto {

struct Incident {
  int64_t number = 0;
  int64_t restarts = 0;  // of this supervisor before it
  int ranks = 0;         // of the job that failed
  Cause cause;
  double noticed = 0;  // Unix seconds
  std::vector<RankFate> fates;
  std::map<int, FlightNote> flights;  // by rank
  std::vector<std::string> launcher;  // its last lines, where its end is the cause or none is known
  std::optional<int64_t> last_step;   // the last that any rank had completed
  std::optional<int64_t> restored_step;  // what the job went on from afterwards; 0: the beginning
  bool restarting = false;
  std::string decision;  // "restart 1 with 2 ranks in 1 s"
  // Seconds of each phase between the failure and the first new step, one after the other.
  std::optional<double> detect;      // until the supervisor knew
  std::optional<double> end;         // until nothing of the job was left
  std::optional<double> back_off;    // waiting, on purpose
  std::optional<double> start;       // until the ranks had found each other
  std::optional<double> load;        // set-up, until the state was restored
  std::optional<double> first_step;  // until a step was done

  std::optional<int64_t> StepsLost() const;
  // All phases together; nothing while one is unknown.
  std::optional<double> SecondsLost() const;
};

std::string ToJson(const Incident& incident);
// Some lines.
std::string ToText(const Incident& incident);
// "3 incidents: rank 1 was killed by SIGKILL (twice), the job hung ...; 7 steps and 12.5 s lost".
std::string History(const std::vector<Incident>& incidents);

}  // namespace stretto

#endif  // STRETTO_TOOLS_RUN_INCIDENT_H_
