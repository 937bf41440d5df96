#include "stretto/comm/world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "stretto/comm/communicator.h"
#include "support/no_threads.h"

namespace stretto {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(World, AllGatherAndBarrier) {
  const absl::Status status = World::RunThreads(5, [](World& world) -> absl::Status {
    for (int round = 0; round < 20; ++round) {
      STRETTO_ASSIGN_OR_RETURN(
          const std::vector<std::string> all,
          world.AllGather("names", absl::StrCat("r", world.rank(), ".", round)));
      EXPECT_EQ(all.size(), 5u);
      for (int r = 0; r < 5; ++r) EXPECT_EQ(all[r], absl::StrCat("r", r, ".", round));
      STRETTO_RETURN_IF_ERROR(world.Barrier("between"));
    }
    // What past meetings left behind stays small.
    EXPECT_LE(world.store().List("meet/")->size(), 15u);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

// Contract 11: what std::thread throws comes back as a status.
TEST(World, ThreadsThatCannotBeStartedAreErrors) {
  bool ran = false;
  absl::StatusOr<std::unique_ptr<StoreServer>> server = absl::UnknownError("");
  absl::Status world;
  {
    const testing::NoMoreThreads none;
    server = StoreServer::Start(StoreOptions());
    world = World::RunThreads(2, [&](World&) {
      ran = true;
      return absl::OkStatus();
    });
  }
  EXPECT_TRUE(absl::IsResourceExhausted(server.status())) << server.status();
  EXPECT_THAT(std::string(server.status().message()), HasSubstr("raise the limit on threads"));
  EXPECT_TRUE(absl::IsResourceExhausted(world)) << world;
  EXPECT_FALSE(ran);

  const absl::Status status = World::RunThreads(1, [](World& world) -> absl::Status {
    const testing::NoMoreThreads none;
    Communicator c(world);
    EXPECT_TRUE(absl::IsResourceExhausted(c.status())) << c.status();
    EXPECT_THAT(std::string(c.status().message()), HasSubstr("the thread of the watchdog"));
    EXPECT_EQ(c.MakeGroup("g", {0}).status(), c.status());
    EXPECT_EQ(InstallFlightDumpOnSignal(c, ".").code(), absl::StatusCode::kResourceExhausted);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(World, BarrierNamesWhoIsMissing) {
  WorldOptions options;
  options.timeout = std::chrono::milliseconds(600);
  std::vector<absl::Status> seen(4);
  const absl::Status status = World::RunThreads(
      4,
      [&](World& world) -> absl::Status {
        if (world.rank() % 2 == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          return absl::OkStatus();
        }
        seen[static_cast<std::size_t>(world.rank())] = world.Barrier("load data");
        return absl::OkStatus();
      },
      options);
  EXPECT_TRUE(status.ok());
  for (int r : {0, 2}) {
    EXPECT_TRUE(absl::IsDeadlineExceeded(seen[r])) << seen[r];
    EXPECT_THAT(std::string(seen[r].message()),
                HasSubstr("ranks 1, 3 did not come to 'load data'"));
  }
}

TEST(World, BarrierSeesThatARankLeft) {
  std::vector<absl::Status> seen(2);
  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                if (world.rank() == 0) return absl::OkStatus();
                seen[1] = world.Barrier("x");
                return absl::OkStatus();
              }).ok());
  EXPECT_THAT(std::string(seen[1].message()), HasSubstr("rank 0 left the job"));
}

TEST(World, DifferentStepsAreNoticed) {
  std::vector<absl::Status> seen(2);
  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                seen[static_cast<std::size_t>(world.rank())] =
                    world.Barrier(world.rank() == 0 ? "load" : "save");
                return absl::OkStatus();
              }).ok());
  EXPECT_THAT(std::string(seen[0].message()),
              HasSubstr("rank 1 came to 'save' while rank 0 came to 'load'"));
}

TEST(World, AgreeCarriesTheLowestFailure) {
  std::vector<absl::Status> seen(4);
  EXPECT_TRUE(World::RunThreads(4, [&](World& world) -> absl::Status {
                EXPECT_TRUE(world.Agree("config", absl::OkStatus()).ok());
                absl::Status mine;
                if (world.rank() == 2) mine = absl::NotFoundError("no file tokens.bin");
                if (world.rank() == 3) mine = absl::InternalError("something else");
                seen[static_cast<std::size_t>(world.rank())] = world.Agree("data", mine);
                return absl::OkStatus();
              }).ok());
  for (const absl::Status& s : seen) {
    EXPECT_TRUE(absl::IsNotFound(s)) << s;
    EXPECT_EQ(std::string(s.message()), "rank 2 failed in data: no file tokens.bin");
  }
}

TEST(World, RunThreadsReturnsTheFirstError) {
  const absl::Status status = World::RunThreads(3, [](World& world) -> absl::Status {
    if (world.rank() == 1) return absl::AbortedError("rank 1 stops");
    return world.Barrier("never complete");
  });
  EXPECT_EQ(status, absl::AbortedError("rank 1 stops"));
  EXPECT_FALSE(World::RunThreads(0, [](World&) { return absl::OkStatus(); }).ok());
}

TEST(World, NobodyIsDeadAtFirst) {
  EXPECT_TRUE(World::RunThreads(2, [](World& world) -> absl::Status {
                EXPECT_THAT(world.DeadRanks(), ElementsAre());
                return world.Barrier("end");
              }).ok());
}

}  // namespace
}  // namespace stretto
