// Messages over one TCP connection for each pair of ranks.
#ifndef STRETTO_SRC_COMM_TRANSPORT_TCP_H_
#define STRETTO_SRC_COMM_TRANSPORT_TCP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "src/comm/socket.h"
#include "stretto/comm/store.h"
#include "stretto/comm/transport.h"

namespace stretto {

// Small messages travel with their header (eager); of a large one only the header does, and the
// data follow when the receive has been posted, straight into its buffer (rendezvous). A rank
// always reads whatever has arrived, so two ranks that send large messages to each other cannot
// block one another, and what arrives early is bounded by the eager size.
class TcpTransport : public Transport {
 public:
  // Connects all pairs, with addresses exchanged in the store. Called by all ranks.
  static absl::StatusOr<std::unique_ptr<TcpTransport>> Connect(
      Store& store, int rank, int size, const std::string& bind_address,
      const std::string& advertised_address, const std::string& job_token, net::Deadline deadline);
  ~TcpTransport() override;

  const char* name() const override { return "tcp"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::StatusOr<Request> Send(const void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<Request> Receive(void* data, int64_t bytes, int peer, int tag) override;
  absl::StatusOr<bool> Test(Request request) override;
  void Abandon() override;
  int64_t bytes_sent() const override { return bytes_sent_; }

 private:
  struct Header;
  struct Slot;
  struct Peer;

  TcpTransport(int rank, int size);
  Request NewSlot(char* data, int64_t bytes, int peer, int tag, bool receives);
  absl::Status CheckPeer(int peer) const;
  void Queue(Peer& peer, const Header& header, const char* payload, int64_t bytes, Request done);
  void Progress();
  void Flush(Peer& peer);
  void ReadFrom(Peer& peer);
  // Handles a complete header; returns false when the connection broke.
  void OnHeader(Peer& peer, const Header& header);
  void OnPayload(Peer& peer);
  void Break(Peer& peer, absl::Status why);
  bool SizesAgree(Peer& peer, const Slot& slot, int64_t bytes);
  // True when a message with this tag has arrived whole, before its receive was posted.
  static bool HasWhole(const Peer& peer, int tag);
  void LoopBack(Request request);

  int rank_;
  int size_;
  int64_t bytes_sent_ = 0;
  bool abandoned_ = false;
  net::Fd poll_;  // epoll
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<Slot> slots_;
  std::vector<Request> free_;
  std::vector<Request> self_;                    // posted messages to oneself, in order
  std::vector<std::vector<char>> idle_buffers_;  // for what arrives early
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_TRANSPORT_TCP_H_
