// Messages over MPI. The only header of the library that includes mpi.h.
#ifndef STRETTO_SRC_COMM_TRANSPORT_MPI_H_
#define STRETTO_SRC_COMM_TRANSPORT_MPI_H_

// The deprecated C++ bindings of Open MPI are not wanted.
#define OMPI_SKIP_MPICXX 1
#include <mpi.h>

#include <cstdint>
#include <string>
#include <vector>

#include "stretto/comm/transport.h"

namespace stretto {

// What an MPI error code means, in MPI's words.
std::string MpiErrorText(int code);

class MpiTransport : public Transport {
 public:
  // `communicator` is the transport's own, with MPI_ERRORS_RETURN set.
  MpiTransport(MPI_Comm communicator, int rank, int size)
      : communicator_(communicator), rank_(rank), size_(size) {}

  const char* name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::StatusOr<Request> Send(const void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<Request> Receive(void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<bool> Test(Request request) override;
  // MPI may still write into posted buffers while it makes progress, so there is none after this:
  // the transport makes no MPI call any more, and MPI_Finalize is skipped.
  void Abandon() override { abandoned_ = true; }
  int64_t bytes_sent() const override { return bytes_sent_; }
  bool abandoned() const { return abandoned_; }

 private:
  struct Slot {
    MPI_Request request = MPI_REQUEST_NULL;
    int64_t bytes = 0;
    int peer = 0;
    int tag = 0;
    bool receives = false;
  };
  absl::StatusOr<Request> Post(void* data, int64_t bytes, int peer, int tag, bool receives);

  MPI_Comm communicator_;
  int rank_;
  int size_;
  bool abandoned_ = false;
  int64_t bytes_sent_ = 0;
  std::vector<Slot> slots_;
  std::vector<Request> free_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_TRANSPORT_MPI_H_
