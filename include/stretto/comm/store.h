// The control plane: a small TCP key-value store with its own connections, independent of MPI and
// NCCL. Bootstrap, agreement, heartbeats and the watchdog's questions go over it, and it still
// works when a collective hangs.
#ifndef STRETTO_COMM_STORE_H_
#define STRETTO_COMM_STORE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stretto/core/status.h"

namespace stretto {

struct StoreOptions {
  std::string host = "127.0.0.1";          // where rank 0 serves; clients connect here
  int port = 0;                            // 0: rank 0 picks a free port (see StoreServer::port)
  std::string bind_address = "127.0.0.1";  // server only
  std::string job_token;                   // clients with another token are turned away
  std::chrono::milliseconds connect_timeout = std::chrono::seconds(60);
};

// Serves the store from a background thread. Lives on rank 0. The death of a client (its connection
// closes without a goodbye) is visible to all others under the key "dead/<rank>", a departure with
// a goodbye under "left/<rank>"; each of them also adds 1 to the key "trouble".
class StoreServer {
 public:
  static absl::StatusOr<std::unique_ptr<StoreServer>> Start(const StoreOptions& options);
  ~StoreServer();
  int port() const;
  // Waits until every client has left or died; false when some remain after `timeout`.
  bool WaitUntilIdle(std::chrono::milliseconds timeout);

 private:
  StoreServer();
  struct State;
  std::unique_ptr<State> state_;
};

// One rank's connection. Thread-safe.
class Store {
 public:
  // Connects, retrying until options.connect_timeout; `rank` identifies this client (-1: an
  // observer whose death is nobody's concern). PERMISSION_DENIED when the job token differs.
  static absl::StatusOr<std::unique_ptr<Store>> Connect(const StoreOptions& options, int rank);
  ~Store();  // says goodbye

  absl::Status Set(const std::string& key, const std::string& value);
  // Waits until the key exists; DEADLINE_EXCEEDED names the key.
  absl::StatusOr<std::string> Get(const std::string& key, std::chrono::milliseconds timeout);
  // NOT_FOUND at once when the key does not exist.
  absl::StatusOr<std::string> TryGet(const std::string& key);
  // Adds to an integer key (0 when absent) and returns the new value.
  absl::StatusOr<int64_t> Add(const std::string& key, int64_t amount);
  // All pairs whose keys start with `prefix`, sorted by key.
  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> List(const std::string& prefix);
  // The same, as soon as there are at least `count` of them, or fewer when a rank dies or leaves
  // meanwhile: who waits should look whether it waits for that one. DEADLINE_EXCEEDED otherwise.
  absl::StatusOr<std::vector<std::pair<std::string, std::string>>> ListWhen(
      const std::string& prefix, int64_t count, std::chrono::milliseconds timeout);
  // Removes all keys that start with `prefix`.
  absl::Status Erase(const std::string& prefix);

  // The numeric address of this process as seen on the way to rank 0.
  std::string local_address() const;

 private:
  Store();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace stretto

#endif  // STRETTO_COMM_STORE_H_
