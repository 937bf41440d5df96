// What somebody has changed, cut short or removed in a keeper's memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <filesystem>
#include <string>

#include "absl/strings/str_cat.h"
#include "unit/snapshot/keepers.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class DamagedKeepers : public Keepers {};

TEST_F(DamagedKeepers, AFlippedByteIsRefusedByName) {
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

TEST_F(DamagedKeepers, ADamagedSlotIsRebuiltFromTheOthers) {
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
TEST_F(DamagedKeepers, ADamagedTableIsRebuiltForAnotherLayout) {
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
TEST_F(DamagedKeepers, DamagedBytesOfAnotherNodeAreToldToItsKeeper) {
  Start(2);
  ASSERT_TRUE(TrainTo(2, 12).ok());
  const int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (SlotMemory* slot : SlotsOf(1)) slot->payload()[100] ^= std::byte{1};
  in_blocks_ = true;  // rank 1 is on node 0 now, and its part still on node 1
  const LogCapture log;
  std::atomic<int> found = 0;
  const absl::Status damaged =
      Train(4, [&](World& world, RankState&, Snapshotter& snapshots) -> absl::Status {
        const absl::Status restored = snapshots.Restore();
        // Who comes when its keeper has been told finds nothing more to read.
        EXPECT_TRUE(restored.ok() || absl::IsDataLoss(restored) || absl::IsUnavailable(restored))
            << restored;
        if (absl::IsDataLoss(restored)) ++found;
        return world.Agree("restoring", restored);
      });
  EXPECT_FALSE(damaged.ok());
  EXPECT_GT(found, 0);
  EXPECT_THAT(log.text(), HasSubstr("is damaged on node 1 and given up there"));
  const absl::Status restored = ExpectRestored(4, step);
  EXPECT_TRUE(restored.ok()) << restored;
}

// Else the keeper would end by SIGBUS where it reads.
TEST_F(DamagedKeepers, MemoryThatSomebodyCutsShortIsDamaged) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  int64_t step = Committed();
  ASSERT_GT(step, 0);
  for (const int64_t bytes : {int64_t{0}, int64_t{8192}}) {
    for (const SlotMemory* slot : SlotsOf(1)) {
      ASSERT_EQ(truncate(("/dev/shm" + slot->name()).c_str(), bytes), 0);
      EXPECT_THAT(Status(1), HasSubstr(absl::StrCat(slot->name(), " was cut short")));
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

TEST_F(DamagedKeepers, MemoryThatIsCutShortUnderTrainersIsMadeAnew) {
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

TEST_F(DamagedKeepers, MemoryThatIsCutShortBeforeItIsRestoredIsDataLoss) {
  Start(1);
  ASSERT_TRUE(TrainTo(1, 4).ok());
  ASSERT_GT(Committed(), 0);
  const absl::Status status =
      Train(1, [&](World&, RankState&, Snapshotter& snapshots) -> absl::Status {
        EXPECT_TRUE(snapshots.restorable().has_value());
        // Behind the header, which stays as it is.
        for (SlotMemory* slot : SlotsOf(0)) {
          EXPECT_EQ(truncate(("/dev/shm" + slot->name()).c_str(), 4096), 0);
        }
        const absl::Status restored = snapshots.Restore();
        EXPECT_TRUE(absl::IsDataLoss(restored)) << restored;
        return absl::OkStatus();
      });
  EXPECT_TRUE(status.ok()) << status;
}

// Starting again helps there, so it must not look like something that was asked for and is not
// there (ExitCodeOf).
TEST_F(DamagedKeepers, WhatIsGoneBetweenTellingAndRestoringIsUnavailable) {
  Start(2, /*data=*/1, /*parity=*/0);
  ASSERT_TRUE(TrainTo(2, 8).ok());
  ASSERT_GT(Committed(), 0);
  // Their own parts, and parts that they read from the others.
  for (const int ranks : {2, 3}) {
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
          // With the same layout rank 0 has its own part, until its keeper has heard of the loss.
          const bool may_have = ranks == 2 && world.rank() == 0;
          EXPECT_TRUE(absl::IsUnavailable(restored) || (may_have && restored.ok())) << restored;
          return absl::OkStatus();
        });
    EXPECT_TRUE(met.ok()) << met;
    ASSERT_TRUE(TrainTo(2, 8).ok());
    ASSERT_GT(Committed(), 0);
  }
}

TEST_F(DamagedKeepers, ARemovedSlotIsLostAndMadeAnew) {
  Start(3);
  ASSERT_TRUE(TrainTo(3, 12).ok());
  const int64_t step = Committed();
  EXPECT_THAT(Status(1), Not(HasSubstr("trouble")));
  for (SlotMemory* slot : SlotsOf(1)) {
    slot->Unlink();
    EXPECT_THAT(Status(1), HasSubstr(absl::StrCat("lacks what rank 1 wrote: /dev/shm", slot->name(),
                                                  " was removed")));
  }
  EXPECT_THAT(Status(0), Not(HasSubstr("trouble")));
  const LogCapture log;
  const absl::Status restored = ExpectRestored(3, step);
  EXPECT_TRUE(restored.ok()) << restored;
  EXPECT_THAT(log.text(), HasSubstr("was removed"));
  ASSERT_TRUE(TrainTo(3, step + 8).ok());
  EXPECT_GT(Committed(), step);
}

TEST_F(DamagedKeepers, WhatIsDamagedDoesNotServeToRebuild) {
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

}  // namespace
}  // namespace stretto
