// Keepers and trainers of several nodes in one process, over real sockets and shared memory.
#ifndef STRETTO_TESTS_UNIT_SNAPSHOT_KEEPERS_H_
#define STRETTO_TESTS_UNIT_SNAPSHOT_KEEPERS_H_

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "stretto/core/cut.h"
#include "stretto/snapshot/keeper.h"
#include "stretto/snapshot/slot.h"
#include "stretto/snapshot/snapshotter.h"
#include "unit/snapshot/testing.h"

namespace stretto {

inline constexpr int64_t kRows = 101, kColumns = 37;

// The whole state after `step`, whatever the layout.
inline float Value(int64_t step, int64_t element) {
  return static_cast<float>(step * 1000003 + element % 9973) * 0.25f;
}

// What a rank has of it: rows of a matrix, and all of a vector that rank 0 owns.
struct RankState {
  std::vector<float> matrix, vector;
  int64_t columns = 0, first = 0, rows = 0;
  StateRegistry registry;

  RankState(int rank, int ranks, int64_t of_columns = kColumns) : columns(of_columns) {
    const Range mine = CutEvenly(kRows, ranks, rank);
    first = mine.first;
    rows = mine.count;
    matrix.resize(static_cast<size_t>(rows * columns));
    vector.resize(19);
    EXPECT_TRUE(registry
                    .Add({.name = "w",
                          .global_shape = {kRows, columns},
                          .first_row = first,
                          .local = Tensor::Of(matrix.data(), DType::kF32, {rows, columns})})
                    .ok());
    EXPECT_TRUE(registry
                    .Add({.name = "b",
                          .global_shape = {19},
                          .local = Tensor::Of(vector.data(), DType::kF32, {19}),
                          .owned = rank == 0})
                    .ok());
  }
  void Set(int64_t step) {
    for (size_t i = 0; i < matrix.size(); ++i) {
      matrix[i] = Value(step, first * columns + static_cast<int64_t>(i));
    }
    for (size_t i = 0; i < vector.size(); ++i) vector[i] = -Value(step, static_cast<int64_t>(i));
  }
  void ExpectIs(int64_t step) const {
    RankState expected = *this;
    expected.Set(step);
    EXPECT_EQ(matrix, expected.matrix) << "step " << step;
    EXPECT_EQ(vector, expected.vector) << "step " << step;
  }
};

// A keeper and the thread that it runs in.
struct Node {
  std::unique_ptr<Keeper> keeper;
  std::thread thread;
  explicit Node(const KeeperOptions& options) {
    auto started = Keeper::Start(options);
    EXPECT_TRUE(started.ok()) << started.status();
    if (!started.ok()) return;
    keeper = *std::move(started);
    thread = std::thread([this] { EXPECT_TRUE(keeper->Run().ok()); });
  }
  ~Node() {
    if (keeper == nullptr) return;
    keeper->Stop();
    thread.join();
  }
};

class Keepers : public ::testing::Test {
 protected:
  void Start(int nodes, int data = -1, int parity = -1, const std::string& directory = "") {
    job_ = absl::StrCat("test-", getpid());
    std::vector<std::string> peers;
    {
      std::vector<net::Fd> taken;
      for (int n = 0; n < nodes; ++n) {
        int port = 0;
        taken.push_back(*net::Listen("127.0.0.1", 0, &port));
        peers.push_back(absl::StrCat("127.0.0.1:", port));
      }
    }
    for (int n = 0; n < nodes; ++n) {
      KeeperOptions& o = options_.emplace_back();
      o.job = job_;
      o.token = "secret";
      o.node = n;
      o.nodes = nodes;
      o.peers = peers;
      o.data = data;
      o.parity = parity;
      o.directory = directory;
      o.threads = threads_;
      o.spill_interval = std::chrono::milliseconds(1);
      o.socket = scratch_.File(absl::StrCat("node", n));
      nodes_.push_back(std::make_unique<Node>(o));
    }
  }
  // The node's keeper goes with its memory, and another one takes its place.
  void Lose(int node) { nodes_[node].reset(); }
  void Replace(int node) { nodes_[node] = std::make_unique<Node>(options_[node]); }

  // The slots of a node's ranks, of this job as they are now.
  std::vector<SlotMemory*> SlotsOf(int node) {
    opened_.clear();
    std::vector<SlotMemory*> slots;
    for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
      const std::string name = "/" + file.path().filename().string();
      if (name.find(absl::StrCat("/stretto-", job_, "-", node, "-")) != 0) continue;
      slots.push_back(opened_.emplace_back(*SlotMemory::Open(name)).get());
    }
    return slots;
  }

  std::string Status(int node) { return *AskKeeper(options_[node].socket, "secret"); }
  using Body = std::function<absl::Status(World&, RankState&, Snapshotter&)>;
  int NodeOf(const World& world) const {
    const int nodes = static_cast<int>(nodes_.size());
    return in_blocks_ ? world.rank() * nodes / world.size() : world.rank() % nodes;
  }
  // `ranks` trainers, dealt to the nodes in turn, or in blocks of neighbours.
  absl::Status Train(int ranks, const Body& body) {
    return World::RunThreads(ranks, [&](World& world) -> absl::Status {
      RankState state(world.rank(), world.size(), columns_);
      const auto node = static_cast<size_t>(NodeOf(world));
      STRETTO_ASSIGN_OR_RETURN(const auto snapshots,
                               Snapshotter::Create(world, state.registry,
                                                   {.keeper = options_[node].socket,
                                                    .token = "secret",
                                                    .timeout = std::chrono::seconds(20),
                                                    .leaving = std::chrono::seconds(2)}));
      return body(world, state, *snapshots);
    });
  }
  // Waits until nothing of a snapshot is under way on the node; whether that came about.
  bool Settles(int node) {
    for (int i = 0; i < 2000; ++i) {
      const std::string text = Status(node);
      if (text.find("WRITING") == std::string::npos && text.find("SEALED") == std::string::npos &&
          text.find("PROTECTED") == std::string::npos) {
        return true;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return false;
  }
  // Steps from what was restored to `last`. All are committed but the first, which come before the
  // keepers have memory for them.
  absl::Status TrainTo(int ranks, int64_t last) {
    return Train(ranks, [&](World& world, RankState& state, Snapshotter& snapshots) {
      const int64_t from = snapshots.restorable() ? snapshots.restorable()->epoch : 0;
      auto patience = std::chrono::milliseconds(50);
      for (int64_t step = from + 1; step <= last; ++step) {
        state.Set(step);
        const absl::Status met = world.Barrier(absl::StrCat("step ", step));
        if (!met.ok()) return met;
        snapshots.Capture(step, [step] { return absl::StrCat("{\"step\":", step, "}"); });
        snapshots.Wait();
        if (snapshots.stats().captured == 0) {
          patience = std::min<std::chrono::milliseconds>(2 * patience, std::chrono::seconds(1));
          std::this_thread::sleep_for(patience);
        }
        if (!Settles(NodeOf(world))) {
          return absl::DeadlineExceededError(absl::StrCat("step ", step, " does not end"));
        }
      }
      return absl::OkStatus();
    });
  }
  // All ranks restore `step`.
  absl::Status ExpectRestored(int ranks, int64_t step) {
    return Train(ranks, [&](World&, RankState& state, Snapshotter& snapshots) {
      EXPECT_TRUE(snapshots.restorable().has_value());
      if (!snapshots.restorable()) return absl::NotFoundError("nothing");
      EXPECT_EQ(snapshots.restorable()->epoch, step);
      EXPECT_EQ(snapshots.restorable()->trainer_state, absl::StrCat("{\"step\":", step, "}"));
      const absl::Status restored = snapshots.Restore();
      if (restored.ok()) state.ExpectIs(step);
      return restored;
    });
  }
  // The newest committed step, when nothing is under way any more.
  int64_t Committed() {
    for (size_t n = 0; n < nodes_.size(); ++n) EXPECT_TRUE(Settles(static_cast<int>(n)));
    const std::string text = Status(0);
    int64_t newest = 0;
    for (size_t at = 0; (at = text.find("COMMITTED step ", at)) != std::string::npos; ++at) {
      newest = std::max<int64_t>(newest, std::stoll(text.substr(at + 15)));
    }
    return newest;
  }

  TempDirectory scratch_;
  std::string job_;
  bool in_blocks_ = false;
  int64_t columns_ = kColumns;
  int threads_ = 2;
  std::vector<KeeperOptions> options_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::shared_ptr<SlotMemory>> opened_;
};

}  // namespace stretto

#endif  // STRETTO_TESTS_UNIT_SNAPSHOT_KEEPERS_H_
