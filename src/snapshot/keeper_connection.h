// How a trainer, or who asks at a terminal, reaches a keeper.
#ifndef STRETTO_SRC_SNAPSHOT_KEEPER_CONNECTION_H_
#define STRETTO_SRC_SNAPSHOT_KEEPER_CONNECTION_H_

#include <chrono>
#include <cstdint>
#include <string>

#include "src/comm/socket.h"
#include "stretto/core/status.h"

namespace stretto::snapshot_internal {

// A keeper answers at once, save when it is asked what can be restored.
inline constexpr std::chrono::milliseconds kKeeperPatience = std::chrono::seconds(30);

struct KeeperConnection {
  net::Fd fd;
  std::string job;
  int32_t node = 0, nodes = 1;
};

// `where`: the path of a socket, or host:port. Errors name it and say what to do, but for what the
// keeper itself says: UNAVAILABLE when nobody is there or the other side hangs up,
// DEADLINE_EXCEEDED when it says nothing, FAILED_PRECONDITION when it is no keeper.
absl::StatusOr<KeeperConnection> ConnectToKeeper(
    const std::string& where, const std::string& token,
    std::chrono::milliseconds patience = kKeeperPatience);

}  // namespace stretto::snapshot_internal

#endif  // STRETTO_SRC_SNAPSHOT_KEEPER_CONNECTION_H_
