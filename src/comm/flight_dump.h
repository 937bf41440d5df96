#ifndef STRETTO_SRC_COMM_FLIGHT_DUMP_H_
#define STRETTO_SRC_COMM_FLIGHT_DUMP_H_

namespace stretto {

class FlightRecorder;

// The recorder is about to go away: no dump of it begins after this returns.
void ForgetFlightDump(const FlightRecorder* recorder);

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_FLIGHT_DUMP_H_
