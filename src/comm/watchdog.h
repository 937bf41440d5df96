// Knows what the other ranks do while this one waits.
#ifndef STRETTO_SRC_COMM_WATCHDOG_H_
#define STRETTO_SRC_COMM_WATCHDOG_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "src/comm/trouble.h"
#include "stretto/comm/communicator.h"
#include "stretto/comm/recorder.h"
#include "stretto/comm/store.h"

namespace stretto {

// How far a rank is in each group: written by its main thread, published by its watchdog.
class ProgressBoard {
 public:
  struct GroupProgress {
    int64_t entered = 0;  // collectives submitted
    int64_t started = 0;  // ... and posted
    int64_t finished = 0;
    std::vector<int64_t> sends, receives;  // point-to-point operations submitted, by peer index
  };
  void AddGroup(int id, int size);
  void Entered(int id, int64_t sequence);
  void Started(int id, int64_t sequence);
  void Finished(int id, int64_t sequence);
  // Both return the number of the operation, from 1.
  int64_t Sends(int id, int peer);
  int64_t Receives(int id, int peer);

  // Text form; `beat` changes at each publication, so that readers can tell a silent rank.
  std::string ToText(int64_t beat, const std::string& summary) const;
  struct Parsed {
    int64_t beat = 0;
    std::string summary;
    std::map<int, GroupProgress> groups;
  };
  static Parsed Parse(const std::string& text);

 private:
  mutable std::mutex mutex_;
  std::map<int, GroupProgress> groups_;
};

// A background thread for each Communicator. It publishes this rank's progress twice a second, also
// when the rank hangs, and watches for ranks that died, left or failed.
class Watchdog {
 public:
  // Ranks in trouble, and since when this rank knows.
  struct News : Trouble {
    std::chrono::steady_clock::time_point since;
  };

  Watchdog(Store& store, int rank, const std::string& name, const FlightRecorder& recorder);
  ~Watchdog();
  // Once, before anything is watched. RESOURCE_EXHAUSTED when there is no thread to be had.
  absl::Status Start();

  ProgressBoard& board() { return board_; }
  // Cheap enough for every poll.
  bool trouble() const { return trouble_flag_.load(std::memory_order_acquire); }
  News Known() const;
  // Asks the control plane now.
  News Ask();
  // Tells the other ranks that this one gives up, and why; see TellTrouble.
  void Fail(const std::string& message, bool own);
  // Why `group`'s operation number `sequence` does not finish: one sentence about the ranks to
  // blame.
  std::string Diagnose(const Group& group, CommOp op, int64_t sequence, int peer,
                       const std::string& what);

 private:
  void Loop();
  absl::Status Publish();
  absl::StatusOr<std::map<int, ProgressBoard::Parsed>> ReadAll();

  Store& store_;
  const int rank_;
  const std::string prefix_;
  const FlightRecorder& recorder_;
  ProgressBoard board_;
  std::atomic<bool> trouble_flag_ = false;
  std::atomic<int64_t> beat_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  News known_;
  std::thread thread_;
};

}  // namespace stretto

#endif  // STRETTO_SRC_COMM_WATCHDOG_H_
