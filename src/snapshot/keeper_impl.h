// The keeper's main thread: connections, and the commit protocol between them.
#ifndef STRETTO_SRC_SNAPSHOT_KEEPER_IMPL_H_
#define STRETTO_SRC_SNAPSHOT_KEEPER_IMPL_H_

#include <atomic>
#include <filesystem>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "src/comm/socket.h"
#include "src/snapshot/keeper_slots.h"
#include "src/snapshot/keeper_wire.h"
#include "src/snapshot/keeper_work.h"
#include "src/snapshot/manifest.h"
#include "stretto/core/budget.h"
#include "stretto/snapshot/commit.h"
#include "stretto/snapshot/keeper.h"

namespace stretto {

namespace snapshot_internal {

// A place that one keeper has at a time: who holds the lock on a file, which goes with it.
class PlaceLock {
 public:
  PlaceLock() = default;
  // ALREADY_EXISTS while somebody has it, INVALID_ARGUMENT where there can be no such file.
  static absl::StatusOr<PlaceLock> Take(const KeeperOptions& options, const std::string& socket);
  PlaceLock(PlaceLock&&) = default;
  PlaceLock& operator=(PlaceLock&&) = default;
  ~PlaceLock();

 private:
  net::Fd fd_;
  std::string path_;
};

}  // namespace snapshot_internal

// A status on its way to another thread, without the counted references inside.
struct Told {
  explicit Told(const absl::Status& status) : code(status.code()), message(status.message()) {}
  absl::Status status() const { return absl::Status(code, message); }
  absl::StatusCode code;
  std::string message;
};

struct Keeper::Impl {
  using Kind = snapshot_internal::KeeperKind;

  struct Connection {
    net::Fd fd;
    std::string in, out;
    std::optional<snapshot_internal::KeeperRole> role;  // since its hello
    int node = -1;                                      // of a keeper
    bool local = false;                                 // over the Unix socket
    bool broken = false;
    net::Clock::time_point since, heard;
    // Of a trainer.
    int rank = -1;
    uint64_t run = 0;  // that has claimed the keeper
    uint64_t attempt = 0;
    bool waits = false;  // for what can be restored
  };

  // What this node's trainers do. A slot that is being written is given up only when no pen is on
  // it any more, for the next writer may be another process.
  struct Writing {
    int64_t epoch = -1;    // the last that was begun or passed over
    int64_t refused = -1;  // the last that was passed over because this one was being written
    int slot = -1;         // of it
    std::set<int> pens;    // ranks that write
    std::set<int> done;    // ranks that have
    bool doomed = false;
  };

  Impl(KeeperOptions o, ParityLayout l);
  ~Impl();
  absl::Status Start(const ErasureCode& code);
  absl::Status Loop();

  // keeper.cc: connections.
  void Poll();
  void AcceptAll(const net::Fd& listener, bool local);
  void Read(Connection& c);
  void Flush(Connection& c);
  void Handle(Connection& c, wire::Reader& frame);
  void Greet(Connection& c, wire::Reader& frame);
  void Serve(const net::Fd& fd);  // a reader, in a thread of its own
  absl::Status Answer(const net::Fd& fd, const SnapshotId& id, SlotState least, int32_t what,
                      int64_t offset, int64_t size);
  void Send(Connection& c, wire::Writer& frame);
  void Refuse(Connection& c, const absl::Status& status);
  void Remove(std::list<Connection>::iterator c);
  void Adopt(Connection c);
  void ConnectToLeader();  // in a thread
  Connection* PeerOf(int node);
  void Post(std::function<void()> work);  // from any thread, to be run by the main one
  void Beat();

  // keeper_trainers.cc: trainers.
  void HandleTrainer(Connection& c, Kind kind, wire::Reader& frame);
  void Claim(Connection& c, uint64_t run);
  void Attach(Connection& c, wire::Reader& frame);
  void Begin(Connection& c, int64_t epoch);
  void Seal(Connection& c, wire::Reader& frame);
  void LetGo(int rank, bool sealed);  // a rank's pen
  void AnswerWaiting();
  bool MemoryIsReady(int slot);
  void PrepareFree();
  std::string Describe() const;

  // Does what the protocol wants, and publishes the state of the slots.
  void Act();
  void Damaged(const SnapshotId& id, const std::string& what);
  void Done(const snapshot_internal::KeeperWork::Task& task, const absl::Status& status);
  void Tell(const char* what, const SnapshotId& id) const {
    if (options.observer) options.observer({what, id.epoch, id.round});
  }

  // keeper_spill.cc: snapshots on disk.
  void Spill(const SnapshotId& id);
  void SpillMine(const SnapshotId& id);
  void InBackground(std::function<void()> body);  // one at a time, each after the one before
  void TellSpilled(const SnapshotId& id, const absl::Status& status,
                   const std::vector<snapshot_internal::ManifestFile>& files);
  void Spilled(int node, wire::Reader& frame);
  void ForgetSpiller(int node);  // a keeper that is gone
  void FinishSpill();

  KeeperOptions options;
  ParityLayout layout;
  Budget budget;
  CommitProtocol protocol;
  std::unique_ptr<snapshot_internal::KeeperSlots> slots;
  std::unique_ptr<snapshot_internal::KeeperWork> work;
  snapshot_internal::PlaceLock lock, socket_lock;
  net::Fd tcp, unix_socket, wake;
  int port = 0;
  std::atomic<bool> stop = false;
  std::list<Connection> connections;
  net::Clock::time_point last_beat, last_connect;
  std::string trouble;  // why nothing can be restored or protected at present
  int64_t committed = 0, passed = 0;
  NodeSlots told;  // states that the observer knows
  int64_t told_round = 0;

  uint64_t attempt = 0;
  int local_ranks = 0;
  std::map<int, snapshot_internal::RankPart> attached;  // sizes are set by Seal
  snapshot_internal::KeeperSlots::Capacities capacities;
  Writing writing;

  std::mutex mutex;
  std::vector<std::function<void()>> posted;
  std::thread connector;
  std::atomic<bool> connecting = false;
  struct Server {
    std::thread thread;
    std::shared_ptr<net::Fd> fd;
    std::shared_ptr<std::atomic<bool>> done;
  };
  std::list<Server> servers;

  // Of a snapshot on its way to disk.
  struct Spilling {
    SnapshotId id;
    std::map<int, std::vector<snapshot_internal::ManifestFile>> reports;  // by node
    absl::Status failed;
  };
  std::optional<Spilling> spilling;  // node 0
  net::Clock::time_point last_spill;
  const std::filesystem::file_time_type started = std::filesystem::file_time_type::clock::now();
  std::thread spiller;
  bool writes_files = false;
};

}  // namespace stretto

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_IMPL_H_
