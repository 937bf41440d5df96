// Programs on ranks that are threads; tests/ranks has them under mpirun.
#include "stretto/parallel/pipeline.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>

#include "stretto/sim/timeline.h"
#include "tests/support/pipeline_cases.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;

TEST(Messages, BothEndsAgree) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    const Program program = testing::RandomProgram(seed).value();
    std::vector<std::vector<BoundaryMessage>> of_rank;
    for (int r = 0; r < program.ranks(); ++r) {
      of_rank.push_back(MessagesOf(program, r));
      EXPECT_TRUE(std::is_sorted(
          of_rank.back().begin(), of_rank.back().end(),
          [](const BoundaryMessage& a, const BoundaryMessage& b) { return a.order < b.order; }));
    }
    // Between two ranks, what one sends is what the other receives, in the same order.
    for (int a = 0; a < program.ranks(); ++a) {
      for (int b = 0; b < program.ranks(); ++b) {
        std::vector<std::string> sent, received;
        for (const BoundaryMessage& m : of_rank[static_cast<size_t>(a)]) {
          if (m.peer == b && !m.receive) {
            sent.push_back(absl::StrCat(m.order, " ", m.item, " ", m.stage, " ", m.forward));
          }
        }
        for (const BoundaryMessage& m : of_rank[static_cast<size_t>(b)]) {
          if (m.peer == a && m.receive) {
            received.push_back(absl::StrCat(m.order, " ", m.item, " ", m.stage, " ", m.forward));
          }
        }
        EXPECT_EQ(sent, received) << seed;
      }
    }
  }
}

TEST(Messages, BuffersOfKnownSchedules) {
  const std::vector<PlanItem> items(8, {.tokens = 1, .lengths = {1}, .pipelines = {0}});
  const auto buffers = [&](ScheduleKind kind, int chunks, int rank) {
    return BuffersOf(MakeProgram(kind, 1, 4, chunks, items).value(), rank);
  };
  // One gradient is being taken while the next one is made.
  EXPECT_EQ(buffers(ScheduleKind::kGPipe, 1, 0).receives, 2);
  EXPECT_EQ(buffers(ScheduleKind::kGPipe, 1, 0).kept, 0);
  EXPECT_GE(buffers(ScheduleKind::kOneF1B, 1, 1).sends, 1);
  EXPECT_LE(buffers(ScheduleKind::kOneF1B, 1, 1).receives, 4);
  // The turn of the V lies on the last rank: activations and gradients stay there.
  EXPECT_GE(buffers(ScheduleKind::kVShaped, 2, 3).kept, 1);
  EXPECT_EQ(buffers(ScheduleKind::kVShaped, 2, 2).kept, 0);
}

// 500 random plans with shared and unequal items on real ranks.
TEST(PipelineExecutor, RandomProgramsRunToTheirEnd) {
  std::atomic<int> ran{0};
  for (int ranks = 1; ranks <= 8; ++ranks) {
    const absl::Status status = World::RunThreads(
        ranks,
        [&](World& world) -> absl::Status {
          STRETTO_ASSIGN_OR_RETURN(const int n, testing::RunRandomPrograms(world, 560));
          if (world.rank() == 0) ran += n;
          return absl::OkStatus();
        },
        {.timeout = std::chrono::seconds(60)});
    ASSERT_TRUE(status.ok()) << ranks << " ranks: " << status.message();
  }
  EXPECT_GE(ran, 500);
}

TEST(PipelineExecutor, RandomDelaysChangeNothing) {
  const absl::Status status = World::RunThreads(
      4, [](World& world) { return testing::RunRandomPrograms(world, 60).status(); },
      {.timeout = std::chrono::seconds(60), .random_delay_us = 300, .delay_seed = 7});
  EXPECT_TRUE(status.ok()) << status.message();
}

// The same plans with each pipeline for itself: those that the simulator calls a circle hang on
// real ranks, and the hang ends with an error.
TEST(PipelineExecutor, WithoutLevelsAHangIsCaught) {
  int caught = 0;
  for (uint64_t seed = 0; seed < 500 && caught < 2; ++seed) {
    const Program program = testing::RandomProgram(seed, /*levels=*/false).value();
    if (program.ranks() > 4 || Simulate(program, UniformCost(1, 1, 1)).ok()) continue;
    const absl::Status status =
        World::RunThreads(program.ranks(),
                          [&](World& world) {
                            Communicator comm(world);
                            return testing::RunProgram(comm, comm.all(), program);
                          },
                          {.timeout = std::chrono::milliseconds(500)});
    EXPECT_FALSE(status.ok()) << seed;
    ++caught;
  }
  EXPECT_EQ(caught, 2);
}

TEST(PipelineExecutor, NamesWhatDoesNotFit) {
  const auto run = [](const Program& created, const Program& given, int64_t capacity) {
    return std::string(World::RunThreads(1, [&](World& world) -> absl::Status {
                         Communicator comm(world);
                         Budget budget(-1, -1, -1);
                         STRETTO_ASSIGN_OR_RETURN(const auto stream, Stream::Create(Device::Cpu()));
                         STRETTO_ASSIGN_OR_RETURN(
                             const auto executor,
                             PipelineExecutor::Create(comm, comm.all(), *stream,
                                                      BuffersOf(created, 0), capacity, 3,
                                                      DType::kF32, budget));
                         testing::CheckingWorker worker(comm, comm.all(), given);
                         return executor->Run(RankProgram(given, 0), worker);
                       }).message());
  };
  const std::vector<PlanItem> items(2, {.tokens = 5, .lengths = {5}, .pipelines = {0}});
  const Program plain = MakeProgram(ScheduleKind::kOneF1B, 1, 1, 1, items).value();
  const Program folded = MakeProgram(ScheduleKind::kVShaped, 1, 1, 2, items).value();
  const Program two = MakeProgram(ScheduleKind::kOneF1B, 1, 2, 1, items).value();
  EXPECT_EQ(run(folded, folded, 5), "");
  EXPECT_THAT(run(plain, plain, 4), HasSubstr("item 0 has 5 tokens"));
  EXPECT_THAT(run(plain, folded, 5), HasSubstr("the program needs more"));
  EXPECT_THAT(run(two, two, 5), HasSubstr("for 2 ranks"));
  EXPECT_THAT(run(plain, two, 5), HasSubstr("for 2 ranks"));
}

}  // namespace
}  // namespace stretto
