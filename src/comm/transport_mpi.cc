#include "src/comm/transport_mpi.h"

#include <limits>

#include "absl/strings/str_cat.h"

namespace stretto {

std::string MpiErrorText(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) return absl::StrCat("MPI error ", code);
  return std::string(text, static_cast<std::size_t>(length));
}

absl::StatusOr<Transport::Request> MpiTransport::Post(void* data, int64_t bytes, int peer, int tag,
                                                      bool receives) {
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  if (peer < 0 || peer >= size_) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", peer, " is outside a world of ", size_, " ranks"));
  }
  if (bytes > std::numeric_limits<int>::max()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a message of ", bytes, " bytes is too long for MPI, whose counts end at 2 GiB; cut it"));
  }
  if (free_.empty()) {
    // Many at once: how many messages are in flight in which step depends on timing.
    constexpr std::size_t kMore = 256;
    free_.reserve(slots_.size() + kMore);
    for (std::size_t i = 0; i < kMore; ++i)
      free_.push_back(static_cast<Request>(slots_.size() + i));
    slots_.resize(slots_.size() + kMore);
  }
  const Request request = free_.back();
  Slot& slot = slots_[static_cast<std::size_t>(request)];
  slot.bytes = bytes;
  slot.peer = peer;
  slot.tag = tag;
  slot.receives = receives;
  const int count = static_cast<int>(bytes);
  const int code = receives
                       ? MPI_Irecv(data, count, MPI_BYTE, peer, tag, communicator_, &slot.request)
                       : MPI_Isend(data, count, MPI_BYTE, peer, tag, communicator_, &slot.request);
  if (code != MPI_SUCCESS) {
    return absl::UnavailableError(absl::StrCat("cannot post a ",
                                               receives ? "receive from" : "send to", " rank ",
                                               peer, " (tag ", tag, "): ", MpiErrorText(code)));
  }
  free_.pop_back();
  return request;
}

absl::StatusOr<Transport::Request> MpiTransport::Send(const void* data, int64_t bytes, int peer,
                                                      int tag) {
  bytes_sent_ += bytes;
  return Post(const_cast<void*>(data), bytes, peer, tag, false);
}

absl::StatusOr<Transport::Request> MpiTransport::Receive(void* data, int64_t bytes, int peer,
                                                         int tag) {
  return Post(data, bytes, peer, tag, true);
}

absl::StatusOr<bool> MpiTransport::Test(Request request) {
  if (abandoned_) return absl::FailedPreconditionError("the transport was given up after an error");
  Slot& slot = slots_[static_cast<std::size_t>(request)];
  int done = 0;
  MPI_Status status;
  const int code = MPI_Test(&slot.request, &done, &status);
  if (code != MPI_SUCCESS) {
    return absl::UnavailableError(absl::StrCat("the message ", slot.receives ? "from" : "to",
                                               " rank ", slot.peer, " (tag ", slot.tag,
                                               ") failed: ", MpiErrorText(code)));
  }
  if (done == 0) return false;
  free_.push_back(request);
  if (slot.receives) {
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    if (count != slot.bytes) {
      return absl::InternalError(absl::StrCat(
          "rank ", slot.peer, " sent ", count, " bytes where the receive has ", slot.bytes,
          " (tag ", slot.tag, "); the ranks disagree on the size of the operation"));
    }
  }
  return true;
}

}  // namespace stretto
