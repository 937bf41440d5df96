// Keepers and trainers of several nodes in one process, over real sockets and shared memory.
#include "stretto/snapshot/keeper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/comm/socket.h"
#include "src/snapshot/keeper_slots.h"
#include "stretto/core/cut.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/slot.h"
#include "stretto/snapshot/snapshotter.h"
#include "unit/snapshot/testing.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kRows = 101, kColumns = 37;

// The whole state after `step`, whatever the layout.
float Value(int64_t step, int64_t element) {
  return static_cast<float>(step * 1000003 + element % 9973) * 0.25f;
}

// What a rank has of it: rows of a matrix, and all of a vector that rank 0 owns.
struct RankState {
  std::vector<float> matrix, vector;
  int64_t first = 0, rows = 0;
  StateRegistry registry;

  RankState(int rank, int ranks) {
    const Range mine = CutEvenly(kRows, ranks, rank);
    first = mine.first;
    rows = mine.count;
    matrix.resize(static_cast<size_t>(rows * kColumns));
    vector.resize(19);
    EXPECT_TRUE(registry
                    .Add({.name = "w",
                          .global_shape = {kRows, kColumns},
                          .first_row = first,
                          .local = Tensor::Of(matrix.data(), DType::kF32, {rows, kColumns})})
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
      matrix[i] = Value(step, first * kColumns + static_cast<int64_t>(i));
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
  // `ranks` trainers, dealt to the nodes in turn, or in blocks of neighbours.
  absl::Status Train(int ranks, const Body& body) {
    return World::RunThreads(ranks, [&](World& world) -> absl::Status {
      RankState state(world.rank(), world.size());
      const auto rank = static_cast<size_t>(world.rank());
      const size_t node = in_blocks_ ? rank * nodes_.size() / static_cast<size_t>(world.size())
                                     : rank % nodes_.size();
      STRETTO_ASSIGN_OR_RETURN(const auto snapshots,
                               Snapshotter::Create(world, state.registry,
                                                   {.keeper = options_[node].socket,
                                                    .token = "secret",
                                                    .timeout = std::chrono::seconds(20)}));
      return body(world, state, *snapshots);
    });
  }
  // Steps from what was restored to `last`, each captured until it is taken.
  absl::Status TrainTo(int ranks, int64_t last) {
    return Train(ranks, [&](World& world, RankState& state, Snapshotter& snapshots) {
      const int64_t from = snapshots.restorable() ? snapshots.restorable()->epoch : 0;
      for (int64_t step = from + 1; step <= last; ++step) {
        state.Set(step);
        const absl::Status met = world.Barrier(absl::StrCat("step ", step));
        if (!met.ok()) return met;
        snapshots.Capture(step, [step] { return absl::StrCat("{\"step\":", step, "}"); });
        snapshots.Wait();
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
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
    for (size_t n = 0; n < nodes_.size(); ++n) {
      std::string text;
      for (int i = 0; i < 1000; ++i) {
        text = Status(static_cast<int>(n));
        if (text.find("WRITING") == std::string::npos && text.find("SEALED") == std::string::npos &&
            text.find("PROTECTED") == std::string::npos) {
          break;
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    }
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
  std::vector<KeeperOptions> options_;
  std::vector<std::unique_ptr<Node>> nodes_;
  std::vector<std::shared_ptr<SlotMemory>> opened_;
};

TEST_F(Keepers, OneNodeGivesBackWhatItsRanksLeft) {
  Start(1);
  ASSERT_TRUE(TrainTo(2, 12).ok());
  const int64_t step = Committed();
  ASSERT_GT(step, 0);
  const absl::Status restored = ExpectRestored(2, step);
  EXPECT_TRUE(restored.ok()) << restored;
  // And training goes on from there, with the same numbers again.
  ASSERT_TRUE(TrainTo(2, step + 8).ok());
  EXPECT_GT(Committed(), step);
}

TEST_F(Keepers, ALostNodeIsRebuilt) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (int lost : {1, 0, 2}) {  // node 0 leads
    Lose(lost);
    Replace(lost);
    const absl::Status restored = ExpectRestored(3, step);
    ASSERT_TRUE(restored.ok()) << restored;
  }
  ASSERT_TRUE(TrainTo(3, step + 8).ok());
  EXPECT_GT(Committed(), step);
}

TEST_F(Keepers, TwoLostNodesAreRebuiltWithTwoParities) {
  Start(4, 2, 2);
  ASSERT_TRUE(TrainTo(4, 12).ok());
  const int64_t step = Committed();
  Lose(0);
  Lose(3);
  Replace(3);
  Replace(0);
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

TEST_F(Keepers, WhatTravelsIsWhatTheCodeNeeds) {
  Start(4, 2, 2);
  const auto number = [](const std::string& text, const std::string& name) {
    const size_t at = text.find("\n" + name + " ");
    return at == std::string::npos ? -1 : std::stoll(text.substr(at + name.size() + 2));
  };
  // The steps' numbers have as many digits, so that all snapshots are of one size.
  const absl::Status trained =
      Train(4, [&](World& world, RankState& state, Snapshotter& snapshots) -> absl::Status {
        for (int64_t step = 10; step < 24; ++step) {
          state.Set(step);
          STRETTO_RETURN_IF_ERROR(world.Barrier(absl::StrCat("step ", step)));
          snapshots.Capture(step, [step] { return absl::StrCat("{\"step\":", step, "}"); });
          snapshots.Wait();
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
        return absl::OkStatus();
      });
  ASSERT_TRUE(trained.ok()) << trained;
  const int64_t step = Committed();
  ASSERT_GT(step, 0);
  int64_t largest = 0;
  for (int n = 0; n < 4; ++n) {
    for (const SlotMemory* slot : SlotsOf(n)) {
      largest = std::max(largest, (slot->ReadHeader()->payload_bytes + 63) / 64 * 64);
    }
  }
  const ParityLayout layout = *ParityLayout::Create(4, 2, 2);
  const int64_t each = layout.parity() * layout.data() * layout.BlockBytes(largest);
  for (int n = 0; n < 4; ++n) {
    const std::string status = Status(n);
    EXPECT_EQ(number(status, "read to encode"), number(status, "committed") * each) << status;
    EXPECT_EQ(number(status, "read to rebuild"), 0);
  }
  // All k + m members of the node in the stripes, each from k others.
  Lose(1);
  Replace(1);
  for (int i = 0; i < 2000 && Status(1).find("COMMITTED") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(number(Status(1), "read to rebuild"),
            layout.group_size() * layout.data() * layout.BlockBytes(largest));
}

TEST_F(Keepers, MoreThanTheCodeBearsIsSaidAndNothingIsRestored) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  ASSERT_GT(Committed(), 0);
  Lose(0);
  Lose(1);
  Replace(0);
  Replace(1);
  // The keepers find it out alone, and still know it when trainers ask.
  for (int i = 0; i < 1000 && Status(2).find("lost 1") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  const absl::Status status = Train(3, [](World&, RankState& state, Snapshotter& snapshots) {
    EXPECT_TRUE(snapshots.lost());
    EXPECT_FALSE(snapshots.restorable().has_value());
    EXPECT_FALSE(snapshots.Restore().ok());
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(Keepers, AnotherLayoutFindsItsBoxes) {
  Start(2);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  const int64_t step = Committed();
  for (int ranks : {2, 5}) {
    const absl::Status restored = ExpectRestored(ranks, step);
    EXPECT_TRUE(restored.ok()) << restored;
  }
  // The slots change to the new layout.
  ASSERT_TRUE(TrainTo(5, step + 12).ok());
  const int64_t later = Committed();
  EXPECT_GT(later, step);
  const absl::Status restored = ExpectRestored(5, later);
  EXPECT_TRUE(restored.ok()) << restored;
}

TEST_F(Keepers, ARankThatDiesWhileOthersSealLeavesTheOlderSnapshot) {
  Start(2);
  ASSERT_TRUE(TrainTo(4, 12).ok());
  const int64_t step = Committed();
  const absl::Status died = Train(4, [&](World& world, RankState& state, Snapshotter& snapshots) {
    state.Set(step + 100);
    if (world.rank() == 2) return absl::OkStatus();  // never captures
    snapshots.Capture(step + 100, [] { return "{}"; });
    return absl::OkStatus();
  });
  ASSERT_TRUE(died.ok()) << died;
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

TEST_F(Keepers, WriteCheckpointsThatTheLoaderReads) {
  const std::string directory = scratch_.File("spilled");
  Start(2, -1, -1, directory);
  ASSERT_TRUE(TrainTo(3, 20).ok());
  ASSERT_GT(Committed(), 0);
  absl::StatusOr<CheckpointInfo> found;
  for (int i = 0; i < 500; ++i) {
    found = FindNewestCheckpoint(directory, Verify::kDigests);
    if (found.ok()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  nodes_.clear();  // whatever is being written ends first
  found = FindNewestCheckpoint(directory, Verify::kDigests);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->world_size, 3);
  EXPECT_THAT(found->trainer_state, HasSubstr(absl::StrCat(found->step)));
  for (int rank = 0; rank < 2; ++rank) {
    RankState state(rank, 2);
    const absl::Status loaded = LoadCheckpoint(*found, state.registry);
    ASSERT_TRUE(loaded.ok()) << loaded;
    state.ExpectIs(found->step);
  }
}

TEST_F(Keepers, AFlippedByteIsRefusedByName) {
  Start(1);
  ASSERT_TRUE(TrainTo(1, 12).ok());
  ASSERT_GT(Committed(), 0);
  const LogCapture log;
  for (SlotMemory* slot : SlotsOf(0)) slot->payload()[100] ^= std::byte{1};
  const absl::Status status = Train(1, [](World&, RankState& state, Snapshotter& snapshots) {
    EXPECT_FALSE(snapshots.restorable().has_value());
    EXPECT_TRUE(snapshots.lost());
    EXPECT_FALSE(snapshots.Restore().ok());
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(log.text(), HasSubstr("the bytes of w are not those that were written"));
}

TEST_F(Keepers, ADamagedSlotIsRebuiltFromTheOthers) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  const int64_t step = Committed();
  // In the data; and in the header, which keepers write anew when ranks come.
  for (const int64_t at : {int64_t{4096 + 100}, int64_t{80}, int64_t{3}}) {
    for (SlotMemory* slot : SlotsOf(1)) *(slot->payload() - 4096 + at) ^= std::byte{1};
    const LogCapture log;
    const absl::Status restored = ExpectRestored(3, step);
    EXPECT_TRUE(restored.ok()) << restored;
    if (at < 4096) continue;
    EXPECT_THAT(log.text(), HasSubstr("is damaged on node 1 and given up there"));
  }
  EXPECT_EQ(Committed(), step);
}

// Ranks that have no part of their own read the tables of all: only who has the damage gives up.
TEST_F(Keepers, ADamagedTableIsRebuiltForAnotherLayout) {
  Start(2);
  ASSERT_TRUE(TrainTo(2, 12).ok());
  const int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (SlotMemory* slot : SlotsOf(1)) {
    const auto header = slot->ReadHeader();
    ASSERT_TRUE(header.ok()) << header.status();
    if (header->id.epoch == step) slot->payload()[header->payload_bytes - 1] ^= std::byte{1};
  }
  in_blocks_ = true;  // rank 1 is on node 0 now, and its part still on node 1
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

// What they read of others' tensors is looked at when it comes. The next start finds it rebuilt.
TEST_F(Keepers, DamagedBytesOfAnotherNodeAreToldToItsKeeper) {
  Start(2);
  ASSERT_TRUE(TrainTo(2, 12).ok());
  const int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (SlotMemory* slot : SlotsOf(1)) slot->payload()[100] ^= std::byte{1};
  in_blocks_ = true;  // rank 1 is on node 0 now, and its part still on node 1
  const LogCapture log;
  const absl::Status damaged =
      Train(4, [](World& world, RankState&, Snapshotter& snapshots) -> absl::Status {
        const absl::Status restored = snapshots.Restore();
        EXPECT_TRUE(restored.ok() || absl::IsDataLoss(restored)) << restored;
        return world.Agree("restoring", restored);
      });
  EXPECT_TRUE(absl::IsDataLoss(damaged)) << damaged;
  EXPECT_THAT(log.text(), HasSubstr("is damaged on node 1 and given up there"));
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

// Else the keeper would end by SIGBUS where it reads.
TEST_F(Keepers, MemoryThatSomebodyCutsShortIsDamaged) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (const int64_t bytes : {int64_t{0}, int64_t{8192}}) {
    for (const SlotMemory* slot : SlotsOf(1)) {
      ASSERT_EQ(truncate(("/dev/shm" + slot->name()).c_str(), bytes), 0);
    }
    const LogCapture log;
    const absl::Status restored = ExpectRestored(3, step);
    EXPECT_TRUE(restored.ok()) << restored;
    EXPECT_THAT(log.text(), HasSubstr("is damaged on node 1 and given up there"));
    ASSERT_TRUE(TrainTo(3, step + 8).ok());
    EXPECT_GT(Committed(), step);
    step = Committed();
  }
}

TEST_F(Keepers, MemoryThatIsCutShortUnderTrainersIsMadeAnew) {
  Start(1);
  const absl::Status status =
      Train(1, [&](World&, RankState& state, Snapshotter& snapshots) -> absl::Status {
        int64_t taken = 0;
        for (int64_t step = 1; step < 1000 && taken < 20; ++step) {
          state.Set(step);
          snapshots.Capture(step, [step] { return absl::StrCat("{\"step\":", step, "}"); });
          if (step % 2 == 0) {
            for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
              const std::string name = file.path().filename().string();
              if (name.find(absl::StrCat("stretto-", job_, "-")) != 0) continue;
              if (truncate(file.path().c_str(), 4096) != 0) {
                EXPECT_EQ(errno, ENOENT);  // made anew just now
              }
            }
          }
          snapshots.Wait();
          taken = snapshots.stats().captured;
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
        EXPECT_GE(taken, 20);
        return absl::OkStatus();
      });
  EXPECT_TRUE(status.ok()) << status;
}

// Starting again helps there, so it must not look like something that was asked for and is not
// there (ExitCodeOf).
TEST_F(Keepers, WhatIsGoneBetweenTellingAndRestoringIsUnavailable) {
  Start(2, /*data=*/1, /*parity=*/0);
  ASSERT_TRUE(TrainTo(2, 8).ok());
  ASSERT_GT(Committed(), 0);
  // Their own parts, and parts that they read from the others.
  for (const int ranks : {2, 3}) {
    std::atomic<int> unavailable = 0;
    const absl::Status met =
        Train(ranks, [&](World& world, RankState&, Snapshotter& snapshots) -> absl::Status {
          EXPECT_TRUE(snapshots.restorable().has_value());
          STRETTO_RETURN_IF_ERROR(world.Barrier("told"));
          if (world.rank() == 0) {
            Lose(1);
            Replace(1);
          }
          STRETTO_RETURN_IF_ERROR(world.Barrier("lost"));
          const absl::Status restored = snapshots.Restore();
          EXPECT_TRUE(restored.ok() || absl::IsUnavailable(restored)) << restored;
          if (!restored.ok()) ++unavailable;
          return absl::OkStatus();
        });
    EXPECT_TRUE(met.ok()) << met;
    // With the same layout rank 0 has its own part still.
    EXPECT_EQ(unavailable, ranks == 2 ? 1 : ranks);
    ASSERT_TRUE(TrainTo(2, 8).ok());
    ASSERT_GT(Committed(), 0);
  }
}

TEST_F(Keepers, ARemovedSlotIsLostAndMadeAnew) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  const int64_t step = Committed();
  for (SlotMemory* slot : SlotsOf(1)) slot->Unlink();
  const LogCapture log;
  const absl::Status restored = ExpectRestored(3, step);
  EXPECT_TRUE(restored.ok()) << restored;
  EXPECT_THAT(log.text(), HasSubstr("was removed"));
  ASSERT_TRUE(TrainTo(3, step + 8).ok());
  EXPECT_GT(Committed(), step);
}

TEST_F(Keepers, WhatIsDamagedDoesNotServeToRebuild) {
  Start(4, 2, 2);
  ASSERT_TRUE(TrainTo(4, 12).ok());
  const int64_t step = Committed();
  for (SlotMemory* slot : SlotsOf(2)) slot->payload()[100] ^= std::byte{1};
  Lose(0);
  const LogCapture log;
  Replace(0);
  // Its ranks need not ask: node 0's keeper finds it.
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
  EXPECT_THAT(log.text(), HasSubstr("is damaged on node 2"));
}

TEST_F(Keepers, MayDieUnderTrainersThatGoOn) {
  Start(1);
  const LogCapture log;
  const absl::Status status = Train(1, [&](World&, RankState&, Snapshotter& snapshots) {
    Lose(0);
    for (int64_t step = 1; step < 4; ++step) {
      snapshots.Capture(step, [] { return "{}"; });
      snapshots.Wait();
    }
    EXPECT_EQ(snapshots.stats().captured, 0);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(log.text(), HasSubstr("no snapshot of step 1: "));
  EXPECT_THAT(log.text(), Not(HasSubstr("step 2")));  // said once
}

TEST_F(Keepers, AreReachedByPortToo) {
  Start(1);
  const std::string address = absl::StrCat("127.0.0.1:", nodes_[0]->keeper->port());
  EXPECT_THAT(*AskKeeper(address, "secret"), HasSubstr("node 0 of 1"));
  EXPECT_THAT(Message(AskKeeper(address, "wrong").status()), HasSubstr("another job token"));
}

TEST_F(Keepers, TurnStrangersAway) {
  Start(1);
  EXPECT_THAT(Message(AskKeeper(options_[0].socket, "wrong").status()),
              HasSubstr("another job token"));
  EXPECT_THAT(Message(Keeper::Start(options_[0]).status()), HasSubstr("runs already"));
  EXPECT_THAT(Message(AskKeeper(scratch_.File("nobody"), "secret").status()),
              HasSubstr("no keeper at"));
  KeeperOptions wrong;
  wrong.job = "a/b";
  EXPECT_THAT(Message(Keeper::Start(wrong).status()), HasSubstr("letters"));
  wrong.job = "a";
  EXPECT_THAT(Message(Keeper::Start(wrong).status()), HasSubstr("needs a job token"));
  wrong.nodes = 3;
  EXPECT_THAT(Message(Keeper::Start(wrong).status()), HasSubstr("0 peers"));
}

TEST_F(Keepers, SayAtTheStartThatTheyCannotWriteThere) {
  KeeperOptions o;
  o.job = "a";
  o.token = "secret";
  o.socket = scratch_.File("node0");
  o.directory = scratch_.File("file") + "/below";
  std::ofstream(scratch_.File("file")) << "text";
  const absl::Status status = Keeper::Start(o).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(Message(status), HasSubstr("snapshots cannot be written to"));
}

TEST_F(Keepers, ASilentPortIsNotWaitedForLong) {
  int port = 0;
  const net::Fd silent = *net::Listen("127.0.0.1", 0, &port);
  const absl::Status status = AskKeeper(absl::StrCat("127.0.0.1:", port), "secret").status();
  EXPECT_THAT(Message(status), HasSubstr("has not answered within 3 s"));
}

TEST_F(Keepers, LeaveOtherFilesAlone) {
  KeeperOptions o;
  o.job = "a";
  o.token = "secret";
  o.socket = scratch_.File("precious");
  std::ofstream(o.socket) << "text";
  EXPECT_THAT(Message(Keeper::Start(o).status()), HasSubstr("exists and is no socket"));
  EXPECT_EQ(std::filesystem::file_size(o.socket), 4u);
}

// Node PID of the job "test" has a name that this job's node 0 begins with.
TEST_F(Keepers, LeaveSlotsOfJobsWithSimilarNamesAlone) {
  Start(1);
  ASSERT_TRUE(TrainTo(1, 4).ok());
  const size_t slots = SlotsOf(0).size();
  ASSERT_GT(slots, 0u);
  snapshot_internal::UnlinkSlots(snapshot_internal::SlotNamePrefix("test", getpid()));
  EXPECT_EQ(SlotsOf(0).size(), slots);
}

// A second run would end the snapshots of the first, and write over what it would go on from.
TEST_F(Keepers, ASecondRunIsRefusedAndTheFirstGoesOn) {
  Start(2);
  const absl::Status status =
      Train(2, [&](World& world, RankState& state, Snapshotter& snapshots) -> absl::Status {
        if (world.rank() == 0) {
          absl::Status second;
          std::thread([&] { second = TrainTo(2, 2); }).join();
          EXPECT_TRUE(absl::IsUnavailable(second)) << second;
          EXPECT_THAT(Message(second), HasSubstr("another run has 1 rank with the keeper of job"));
        }
        for (int64_t step = 5; step < 15; ++step) {
          state.Set(step);
          STRETTO_RETURN_IF_ERROR(world.Barrier(absl::StrCat("step ", step)));
          snapshots.Capture(step, [step] { return absl::StrCat("{\"step\":", step, "}"); });
          snapshots.Wait();
          std::this_thread::sleep_for(std::chrono::milliseconds(20));
        }
        EXPECT_GT(snapshots.stats().captured, 0);
        return absl::OkStatus();
      });
  ASSERT_TRUE(status.ok()) << status;
  const int64_t step = Committed();
  EXPECT_GE(step, 5);
  const absl::Status restored = ExpectRestored(2, step);  // now that it has ended
  EXPECT_TRUE(restored.ok()) << restored;
}

TEST_F(Keepers, TheBudgetIsKept) {
  job_ = absl::StrCat("test-", getpid());
  KeeperOptions& o = options_.emplace_back();
  o.job = job_;
  o.token = "secret";
  o.socket = scratch_.File("node0");
  o.memory_bytes = 1000;
  nodes_.push_back(std::make_unique<Node>(o));
  const absl::Status status = Train(1, [](World&, RankState& state, Snapshotter& snapshots) {
    for (int64_t step = 1; step < 5; ++step) {
      snapshots.Capture(step, [] { return "{}"; });
      snapshots.Wait();
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_EQ(snapshots.stats().captured, 0);
    EXPECT_EQ(snapshots.stats().passed_over, 4);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(Keepers, AllRanksTakeTheSameStepsAndAsManyAsTheyCan) {
  Start(1);
  const absl::Status status = Train(2, [](World&, RankState&, Snapshotter& snapshots) {
    snapshots.Adapt(true);
    snapshots.Adapt(true);
    EXPECT_EQ(snapshots.stats().stride, 3);
    // Nobody misses any more: one of three is tried, and after a while one of two, and all.
    int64_t step = 0;
    for (; snapshots.stats().stride > 1 && step < 2000; ++step) {
      snapshots.Capture(step + 1, [] { return "{}"; });
      snapshots.Wait();
      EXPECT_FALSE(snapshots.missed());
      snapshots.Adapt(false);
    }
    EXPECT_LT(step, 2000);
    EXPECT_EQ(snapshots.stats().captured + snapshots.stats().passed_over, step);
    EXPECT_GE(snapshots.stats().passed_over, step / 2);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(Keepers, LeaveNothingBehind) {
  Start(2);
  ASSERT_TRUE(TrainTo(2, 4).ok());
  nodes_.clear();
  for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
    EXPECT_THAT(file.path().string(), Not(HasSubstr(job_)));
  }
  EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
}

// Those that end remove the file that others lock.
TEST_F(Keepers, AreOneAtATimeInTheirPlace) {
  KeeperOptions o;
  o.job = absl::StrCat("test-", getpid());
  o.token = "secret";
  o.socket = scratch_.File("node0");
  std::atomic<int> there = 0, started = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        const auto keeper = Keeper::Start(o);
        if (!keeper.ok()) {
          EXPECT_TRUE(absl::IsAlreadyExists(keeper.status())) << keeper.status();
          continue;
        }
        ++started;
        EXPECT_EQ(++there, 1);
        std::this_thread::sleep_for(std::chrono::microseconds(100));
        --there;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(started, 0);
  EXPECT_TRUE(std::filesystem::is_empty(scratch_.path()));
}

}  // namespace
}  // namespace stretto
