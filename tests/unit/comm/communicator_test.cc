#include "stretto/comm/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/strings/str_cat.h"
#include "stretto/core/log.h"

namespace stretto {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::string Message(const absl::Status& s) { return std::string(s.message()); }

Tensor Floats(std::vector<float>& v) {
  return Tensor::Of(v.data(), DType::kF32, {static_cast<int64_t>(v.size())});
}

WorldOptions Timeout(int ms) {
  WorldOptions options;
  options.timeout = std::chrono::milliseconds(ms);
  return options;
}

TEST(Communicator, TimeOutNamesTheRankTheOperationAndItsLabel) {
  std::vector<absl::Status> seen(3);
  const absl::Status status = World::RunThreads(
      3,
      [&](World& world) -> absl::Status {
        Communicator c(world);
        std::vector<float> a(10), b(10);
        STRETTO_RETURN_IF_ERROR(
            c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "first bucket")));
        if (world.rank() == 2) {  // hangs
          std::this_thread::sleep_for(std::chrono::milliseconds(3500));
          return absl::OkStatus();
        }
        const Ticket t = c.AllReduce(c.all(), Floats(b), ReduceOp::kSum, "second bucket");
        absl::Status& mine = seen[static_cast<std::size_t>(world.rank())];
        mine = c.Wait(t);
        // Sticky.
        EXPECT_EQ(c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "third")), mine);
        EXPECT_EQ(c.status(), mine);
        EXPECT_TRUE(c.Done(t));
        return absl::OkStatus();
      },
      Timeout(1200));
  EXPECT_TRUE(status.ok()) << status;
  bool named = false;
  for (int r = 0; r < 2; ++r) {
    EXPECT_FALSE(seen[r].ok());
    // Whoever gives up first tells the other.
    EXPECT_THAT(Message(seen[r]),
                AllOf(HasSubstr("rank 2 never entered all_reduce(all) seq 2 [second bucket]"),
                      HasSubstr("last finished: all_reduce"), HasSubstr("[first bucket]")));
    named |= absl::IsDeadlineExceeded(seen[r]);
  }
  EXPECT_TRUE(named);
}

TEST(Communicator, TimeOutOfAReceiveNamesItsSender) {
  absl::Status seen;
  const absl::Status status = World::RunThreads(
      2,
      [&](World& world) -> absl::Status {
        Communicator c(world);
        std::vector<float> a(10);
        if (world.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2500));
          return absl::OkStatus();
        }
        seen = c.Wait(c.Receive(c.all(), Floats(a), 1, "boundary"));
        return absl::OkStatus();
      },
      Timeout(500));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Message(seen),
              HasSubstr("rank 1 never entered receive(all) seq 1 from rank 1 [boundary]"));
}

TEST(Communicator, TimeOutSeesARankThatStillComputes) {
  absl::Status seen;
  const absl::Status status = World::RunThreads(
      2,
      [&](World& world) -> absl::Status {
        Communicator c(world);
        std::vector<float> a(10);
        if (world.rank() == 0) {
          seen = c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "x"));
          return absl::OkStatus();
        }
        STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream,
                                 Stream::Create(Device::Cpu(), {StreamMode::kFifo, 1, 16}));
        stream->Enqueue([] { std::this_thread::sleep_for(std::chrono::milliseconds(2800)); });
        c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "x", stream->Record());
        EXPECT_TRUE(stream->Synchronize().ok());
        EXPECT_FALSE(c.WaitAll().ok());
        return absl::OkStatus();
      },
      Timeout(1000));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Message(seen),
              HasSubstr("rank 1 entered all_reduce(all) seq 1 [x] but still waits for "
                        "its own computation"));
}

TEST(Communicator, AnEventHoldsAnOperationBack) {
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    Communicator c(world);
    STRETTO_ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream,
                             Stream::Create(Device::Cpu(), {StreamMode::kFifo, 1, 16}));
    std::vector<float> a(5000, 0.0f), b(3, 1.0f);
    float* data = a.data();
    stream->Enqueue([data] {
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
      for (int i = 0; i < 5000; ++i) data[i] = 2.0f;
    });
    const Ticket late = c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "late", stream->Record());
    // A send of another kind need not wait for it.
    const Ticket send = c.Send(c.all(), Floats(b), 1 - world.rank(), "early");
    std::vector<float> got(3);
    STRETTO_RETURN_IF_ERROR(c.Wait(c.Receive(c.all(), Floats(got), 1 - world.rank(), "early")));
    STRETTO_RETURN_IF_ERROR(c.Wait(send));
    EXPECT_FALSE(c.Done(late));
    STRETTO_RETURN_IF_ERROR(c.Wait(*stream, late));
    EXPECT_EQ(a[0], 4.0f);
    EXPECT_EQ(a[4999], 4.0f);
    return stream->Synchronize();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(Communicator, AFailedRankIsNamedToTheOthers) {
  std::vector<absl::Status> seen(3);
  std::vector<double> seconds(3);
  const absl::Status status = World::RunThreads(3, [&](World& world) -> absl::Status {
    Communicator c(world);
    std::vector<float> a(10);
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "x")));
    if (world.rank() == 1) {
      std::vector<float> odd(7);
      seen[1] = c.Wait(c.ReduceScatter(c.all(), Floats(a), Floats(odd), "odd"));
      return absl::OkStatus();
    }
    const auto begin = std::chrono::steady_clock::now();
    seen[static_cast<std::size_t>(world.rank())] =
        c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "y"));
    seconds[static_cast<std::size_t>(world.rank())] =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(absl::IsInvalidArgument(seen[1])) << seen[1];
  EXPECT_THAT(Message(seen[1]), HasSubstr("reduce_scatter(all) [odd] on rank 1"));
  for (int r : {0, 2}) {
    EXPECT_THAT(Message(seen[r]), HasSubstr("rank 1 failed while rank")) << r;
    EXPECT_THAT(Message(seen[r]), HasSubstr("[odd]")) << r;
    EXPECT_LT(seconds[r], 3.0);
  }
}

// Rank 0 waits for rank 1, which has given up because of rank 2: that is the one to name.
TEST(Communicator, ARankThatGaveUpIsNotTheCause) {
  std::vector<absl::Status> seen(3);
  const absl::Status status = World::RunThreads(
      3,
      [&](World& world) -> absl::Status {
        const int rank = world.rank();
        Communicator c(world);
        STRETTO_ASSIGN_OR_RETURN(const Group low,
                                 c.MakeGroup("low", rank < 2 ? RankList{0, 1} : RankList{2}));
        STRETTO_ASSIGN_OR_RETURN(const Group high,
                                 c.MakeGroup("high", rank > 0 ? RankList{1, 2} : RankList{0}));
        std::vector<float> a(10);
        absl::Status& mine = seen[static_cast<std::size_t>(rank)];
        mine = rank == 2
                   ? c.Wait(c.Send(high, Floats(a), 7, "bad"))
                   : c.Wait(c.AllReduce(rank == 0 ? low : high, Floats(a), ReduceOp::kSum, "sum"));
        return world.Barrier("everybody has said so");
      },
      Timeout(30000));
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_THAT(Message(seen[1]),
              HasSubstr("rank 2 failed while rank 1 waited for all_reduce(high) seq 1 [sum]: "));
  EXPECT_THAT(Message(seen[0]),
              HasSubstr("rank 2 failed while rank 0 waited for all_reduce(low) seq 1 [sum]: "));
}

TEST(Communicator, DifferentSizesAreAnError) {
  std::vector<absl::Status> seen(2);
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    Communicator c(world);
    std::vector<float> a(10 + static_cast<std::size_t>(world.rank()));
    seen[static_cast<std::size_t>(world.rank())] =
        c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "sizes"));
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_FALSE(seen[0].ok());
  EXPECT_FALSE(seen[1].ok());
  EXPECT_THAT(Message(seen[0]) + Message(seen[1]), HasSubstr("disagree on the size"));
}

TEST(Communicator, RefusesWhatItCannotDo) {
  const auto refused = [](const std::function<Ticket(Communicator&)>& submit) {
    absl::Status seen;
    EXPECT_TRUE(World::RunThreads(1, [&](World& world) -> absl::Status {
                  Communicator c(world);
                  seen = c.Wait(submit(c));
                  return absl::OkStatus();
                }).ok());
    return seen;
  };
  std::vector<float> a(12);
  const auto tensor = [&] { return Tensor::Of(a.data(), DType::kF32, {4, 3}); };
  EXPECT_TRUE(refused([&](Communicator& c) {
                return c.AllReduce(c.all(), tensor(), ReduceOp::kSum, "fine");
              }).ok());
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.AllReduce(c.all(), tensor().Columns(0, 2), ReduceOp::kSum, "strided");
              })),
              HasSubstr("not contiguous"));
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.AllReduce(c.all(), Tensor::Of(a.data(), DType::kU8, {4}), ReduceOp::kSum,
                                   "");
              })),
              HasSubstr("cannot reduce u8"));
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.AllReduce(c.all(), Tensor::Of(a.data(), DType::kF32, {4}, Device::Cuda(0)),
                                   ReduceOp::kSum, "");
              })),
              HasSubstr("not in host memory"));
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.ReduceScatterAddMany(c.all(), {tensor()}, {tensor()}, "on the host");
              })),
              HasSubstr("cannot add to"));
  EXPECT_THAT(
      Message(refused([&](Communicator& c) { return c.Broadcast(c.all(), tensor(), 1, "root"); })),
      HasSubstr("root 1 is outside the group of 1"));
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.AllReduce(Group(), tensor(), ReduceOp::kSum, "nobody's");
              })),
              HasSubstr("does not know the group"));
  EXPECT_THAT(Message(refused([&](Communicator& c) {
                return c.AllToAll(c.all(), tensor(), {13}, tensor(), {13}, "too many");
              })),
              HasSubstr("the counts do not fit"));
}

TEST(Communicator, GroupsMustBeTheSameOnTheirRanks) {
  std::vector<absl::Status> seen(2);
  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                Communicator c(world);
                EXPECT_EQ(c.all().id, 0);
                const RankList list = world.rank() == 0 ? RankList{0, 1} : RankList{1, 0};
                seen[static_cast<std::size_t>(world.rank())] = c.MakeGroup("pair", list).status();
                return absl::OkStatus();
              }).ok());
  for (const absl::Status& s : seen)
    EXPECT_THAT(Message(s), HasSubstr("the same ranks in the same order"));

  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                Communicator c(world);
                const RankList list = world.rank() == 0 ? RankList{0, 1} : RankList{0};
                seen[static_cast<std::size_t>(world.rank())] = c.MakeGroup("pair", list).status();
                return absl::OkStatus();
              }).ok());
  EXPECT_THAT(Message(seen[0]), HasSubstr("rank 1 gave an impossible list"));
  EXPECT_THAT(Message(seen[1]), HasSubstr("must hold this rank"));
}

// Ids make the tags: a rank that went on with a group that others refused would never meet them.
TEST(Communicator, AGroupThatRanksDisagreeOnIsRefusedEverywhere) {
  std::vector<absl::Status> seen(4);
  std::vector<int> ids(4);
  const absl::Status status = World::RunThreads(4, [&](World& world) -> absl::Status {
    Communicator c(world);
    const RankList lists[] = {{0, 1}, {1, 0}, {2, 3}, {2, 3}};
    const std::size_t me = static_cast<std::size_t>(world.rank());
    seen[me] = c.MakeGroup("pair", lists[me]).status();
    STRETTO_ASSIGN_OR_RETURN(const Group all, c.MakeGroup("again", {0, 1, 2, 3}));
    ids[me] = all.id;
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  for (const absl::Status& s : seen) {
    EXPECT_THAT(Message(s), HasSubstr("the same ranks in the same order"));
  }
  EXPECT_EQ(ids, std::vector<int>(4, ids[0]));
}

TEST(Communicator, CountsBytesByGroupName) {
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    Communicator c(world);
    STRETTO_ASSIGN_OR_RETURN(const Group pair, c.MakeGroup("pair", {1, 0}));
    std::vector<float> part(1000), all(2000);
    STRETTO_RETURN_IF_ERROR(c.Wait(c.ReduceScatter(pair, Floats(part), Floats(all), "rs")));
    STRETTO_RETURN_IF_ERROR(c.Wait(c.AllGather(pair, Floats(all), Floats(part), "ag")));
    EXPECT_EQ(c.BytesSent("pair"), 8000);
    EXPECT_EQ(c.BytesSent("all"), 0);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(Communicator, TwoOnOneWorldDoNotMix) {
  const absl::Status status = World::RunThreads(2, [&](World& world) -> absl::Status {
    Communicator first(world);
    Communicator second(world);
    EXPECT_NE(first.all().id, second.all().id);
    std::vector<float> a(9, 1.0f), b(9, 10.0f);
    const bool swap = world.rank() == 1;  // submitted in another order on each rank
    Communicator& early = swap ? second : first;
    Communicator& late = swap ? first : second;
    const Ticket t1 = early.AllReduce(early.all(), Floats(swap ? b : a), ReduceOp::kSum, "1");
    const Ticket t2 = late.AllReduce(late.all(), Floats(swap ? a : b), ReduceOp::kSum, "2");
    while (!early.Done(t1) || !late.Done(t2)) std::this_thread::yield();
    EXPECT_EQ(a[8], 2.0f);
    EXPECT_EQ(b[8], 20.0f);
    return first.status();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(Communicator, LeavingEarlyIsReported) {
  SetLogSink([](LogLevel, const std::string&) {});
  std::vector<absl::Status> seen(2);
  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                Communicator c(world);
                std::vector<float> a(10);
                const Ticket t = c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "x");
                if (world.rank() == 1) return c.Wait(t);
                seen[0] = c.Wait(t);
                // Rank 0 goes away; rank 1 waits for something that never comes.
                return absl::OkStatus();
              }).ok());
  EXPECT_TRUE(World::RunThreads(2, [&](World& world) -> absl::Status {
                Communicator c(world);
                std::vector<float> a(10);
                if (world.rank() == 0) return absl::OkStatus();
                seen[1] = c.Wait(c.AllReduce(c.all(), Floats(a), ReduceOp::kSum, "x"));
                return absl::OkStatus();
              }).ok());
  SetLogSink(nullptr);
  EXPECT_TRUE(seen[0].ok()) << seen[0];
  EXPECT_THAT(Message(seen[1]), HasSubstr("rank 0"));
  EXPECT_THAT(Message(seen[1]), HasSubstr("left"));
}

}  // namespace
}  // namespace stretto
