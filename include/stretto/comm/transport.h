// Point-to-point messages between ranks: all that a backend of `comm` has to provide on the CPU.
// The collectives are written once over it, so MPI, TCP and threads give the same bits.
#ifndef STRETTO_COMM_TRANSPORT_H_
#define STRETTO_COMM_TRANSPORT_H_

#include <cstdint>
#include <string>

#include "stretto/core/status.h"

namespace stretto {

// Non-blocking sends and receives. Messages between two ranks with the same tag match in the order
// they were posted. All calls come from one thread per rank. Buffers stay untouched by the caller
// until Test says done. Never blocks; nothing is allocated per message in steady state.
class Transport {
 public:
  using Request = int32_t;  // >= 0; free for reuse once Test returned true

  virtual ~Transport() = default;
  virtual const char* name() const = 0;  // "mpi", "tcp", "threads"
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual absl::StatusOr<Request> Send(const void* data, int64_t bytes, int peer, int tag) = 0;
  virtual absl::StatusOr<Request> Receive(void* data, int64_t bytes, int peer, int tag) = 0;
  // Drives progress; true when the request has completed (and is then free). A peer that is gone or
  // a message of another size is an error that names the peer and the tag.
  virtual absl::StatusOr<bool> Test(Request request) = 0;
  // After a failure: forgets every request in flight, so that their buffers may be freed. The
  // transport is of no further use.
  virtual void Abandon() = 0;
  // Payload bytes handed to Send so far (messages to oneself included).
  virtual int64_t bytes_sent() const = 0;
};

}  // namespace stretto

#endif  // STRETTO_COMM_TRANSPORT_H_
