// Keepers and their trainers where nothing is damaged (keeper_damage_test.cc).
#include "stretto/snapshot/keeper.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "src/snapshot/keeper_slots.h"
#include "stretto/snapshot/checkpoint.h"
#include "stretto/snapshot/snapshotter.h"
#include "unit/snapshot/keepers.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

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

// Of a keeper's status; -1: it does not say.
int64_t NumberOf(const std::string& status, const std::string& name) {
  const size_t at = status.find("\n" + name + " ");
  return at == std::string::npos ? -1 : std::stoll(status.substr(at + name.size() + 2));
}

// Blocks of many pieces, of which several threads take the next; pieces that end between ranks, and
// behind a node's data. Two nodes mirror each other, which computes nothing.
TEST_F(Keepers, SeveralLanesMakeParityAndRebuild) {
  columns_ = 54001;
  threads_ = 4;
  for (const int nodes : {2, 3}) {
    Start(nodes);
    const int ranks = 2 * nodes - 1;  // one node has less
    ASSERT_TRUE(TrainTo(ranks, 6).ok());
    const int64_t step = Committed();
    ASSERT_GT(step, 0);
    for (int lost = 0; lost < nodes; ++lost) {  // what the first gave back is read for the next
      Lose(lost);
      Replace(lost);
      const absl::Status restored = ExpectRestored(ranks, step);
      ASSERT_TRUE(restored.ok()) << restored;
      int64_t shard = 0;  // of node 0, which has the most
      for (const SlotMemory* slot : SlotsOf(0)) {
        if (const auto header = slot->ReadHeader(); header.ok() && header->id.epoch == step) {
          shard += (header->payload_bytes + 63) / 64 * 64;
        }
      }
      const ParityLayout layout = *ParityLayout::Create(nodes, nodes - 1, 1);
      EXPECT_GT(layout.BlockBytes(shard), 4 << 20);  // pieces for all lanes
      // Each piece once. Ranks that come begin another round: a piece of each lane may be on its
      // way then, and comes again.
      const int64_t read = NumberOf(Status(lost), "read to rebuild");
      const int64_t needed = layout.group_size() * layout.data() * layout.BlockBytes(shard);
      EXPECT_GE(read, needed);
      EXPECT_LE(read, needed + threads_ * layout.data() * (1 << 20));
    }
    std::set<std::string> rebuilt, then;
    for (const SlotMemory* slot : SlotsOf(nodes - 1)) {
      if (const auto header = slot->ReadHeader(); header.ok() && header->id.epoch == step) {
        rebuilt.insert(slot->name());
      }
    }
    EXPECT_FALSE(rebuilt.empty());
    const LogCapture log;
    ASSERT_TRUE(TrainTo(ranks, step + 3).ok());
    EXPECT_EQ(Committed(), step + 3);
    // What it had open to those that were replaced is not what it reads from.
    EXPECT_THAT(log.text(), Not(HasSubstr("encoding the snapshot of step")));
    // It has the room for snapshots to come, and is not made anew.
    for (const SlotMemory* slot : SlotsOf(nodes - 1)) then.insert(slot->name());
    EXPECT_TRUE(std::includes(then.begin(), then.end(), rebuilt.begin(), rebuilt.end()));
    nodes_.clear();
    options_.clear();
  }
}

TEST_F(Keepers, WhatTravelsIsWhatTheCodeNeeds) {
  Start(4, 2, 2);
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
    EXPECT_EQ(NumberOf(status, "read to encode"), NumberOf(status, "committed") * each) << status;
    EXPECT_EQ(NumberOf(status, "read to rebuild"), 0);
  }
  // All k + m members of the node in the stripes, each from k others.
  Lose(1);
  Replace(1);
  for (int i = 0; i < 2000 && Status(1).find("COMMITTED") == std::string::npos; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_EQ(NumberOf(Status(1), "read to rebuild"),
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

// A peer that hangs would hold up the end of a keeper for as long as an answer may take.
TEST_F(Keepers, EndsWhileAReaderDoesNotRead) {
  columns_ = 54001;
  Start(1);
  ASSERT_TRUE(TrainTo(1, 6).ok());
  const int64_t step = Committed();
  SnapshotId id;
  for (const SlotMemory* slot : SlotsOf(0)) {
    if (const auto header = slot->ReadHeader(); header.ok() && header->id.epoch == step) {
      id = header->id;
    }
  }
  ASSERT_EQ(id.epoch, step);
  {
    auto reader = snapshot_internal::SlotReader::Connect(options_[0].peers[0], "secret", job_,
                                                         net::After(std::chrono::seconds(10)));
    ASSERT_TRUE(reader.ok()) << reader.status();
    // More than lies between sockets.
    for (int i = 0; i < 64; ++i) {
      ASSERT_TRUE(reader
                      ->Request(id, SlotState::kCommitted, snapshot_internal::kWholeShard, 0,
                                snapshot_internal::kMostReadBytes)
                      .ok());
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(500));  // until they are full
    std::atomic<bool> ended = false;
    std::thread end([&] {
      Lose(0);
      ended = true;
    });
    const net::Deadline deadline = net::After(std::chrono::seconds(20));
    while (!ended && net::Clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    EXPECT_TRUE(ended);
    reader->Interrupt();
    end.join();
  }
}

TEST(KeeperState, SaysTheNewestCommittedStep) {
  EXPECT_EQ(CommittedStep("ready 1\nslot 0 SEALED step 9 round 1\nslot 1 EMPTY step -1 round 0\n"),
            -1);
  EXPECT_EQ(CommittedStep("slot 0 COMMITTED step 8 round 3\nslot 1 COMMITTED step 12 round 3\n"),
            12);
  EXPECT_EQ(CommittedStep("trouble a COMMITTED step 7 b\n"), -1);
}

// Also with the token: what is neither keeper, rank nor reader gets no answer, and the keeper
// stays.
TEST_F(Keepers, OtherRolesAreNotLetIn) {
  Start(1);
  for (const int role : {0, 99}) {
    const auto peer = snapshot_internal::ParseHostPort(options_[0].peers[0]);
    ASSERT_TRUE(peer.ok()) << peer.status();
    const net::Deadline deadline = net::After(std::chrono::seconds(10));
    const auto fd = net::Connect(peer->host, peer->port, deadline);
    ASSERT_TRUE(fd.ok()) << fd.status();
    wire::Writer hello =
        snapshot_internal::Hello(static_cast<snapshot_internal::KeeperRole>(role), "secret", job_);
    ASSERT_TRUE(snapshot_internal::SendFrame(*fd, hello, deadline).ok());
    const absl::Status answer = snapshot_internal::ReceiveAnswer(*fd, deadline).status();
    EXPECT_TRUE(absl::IsUnavailable(answer)) << role << answer;
  }
  EXPECT_THAT(Status(0), HasSubstr("node 0 of 1"));
}

// STRETTO_KEEPER may name anything that listens.
TEST_F(Keepers, AStrangerIsNamedWithItsAddress) {
  for (const std::string greeting : {"HTTP/1.1 400 Bad Request\r\n\r\n", ""}) {
    int port = 0;
    const net::Fd stranger = *net::Listen("127.0.0.1", 0, &port);
    std::thread answers([&] {
      const net::Deadline deadline = net::After(std::chrono::seconds(10));
      net::Fd client;
      while (!(client = net::Accept(stranger)).valid() && net::Clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      // Hanging up with something unread would take back what was sent.
      uint32_t length = 0;
      EXPECT_TRUE(net::ReceiveAll(client, &length, sizeof(length), deadline).ok());
      std::string hello(length, 0);
      EXPECT_TRUE(net::ReceiveAll(client, hello.data(), hello.size(), deadline).ok());
      EXPECT_TRUE(net::SendAll(client, greeting.data(), greeting.size(), deadline).ok());
    });
    const std::string address = absl::StrCat("127.0.0.1:", port);
    const absl::Status status = AskKeeper(address, "secret").status();
    answers.join();
    EXPECT_THAT(Message(status), HasSubstr("what listens at " + address));
    EXPECT_THAT(Message(status), HasSubstr("STRETTO_KEEPER"));
    EXPECT_EQ(absl::IsFailedPrecondition(status), !greeting.empty()) << status;
  }
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
// The memory is one, wherever the sockets are.
TEST_F(Keepers, ASecondOneWithAnotherSocketLeavesTheMemoryAlone) {
  Start(1);
  ASSERT_TRUE(TrainTo(1, 4).ok());
  const int64_t step = Committed();
  KeeperOptions second = options_[0];
  second.socket = scratch_.File("another");
  second.peers.clear();
  const auto keeper = Keeper::Start(second);
  EXPECT_TRUE(absl::IsAlreadyExists(keeper.status())) << keeper.status();
  EXPECT_THAT(Message(keeper.status()), HasSubstr("node 0 runs already"));
  const absl::Status restored = ExpectRestored(1, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

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
