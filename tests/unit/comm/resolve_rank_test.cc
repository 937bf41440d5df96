#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "stretto/comm/world.h"

namespace stretto {
namespace {

using ::testing::HasSubstr;
using Env = std::map<std::string, std::string>;

absl::StatusOr<RankInfo> Resolve(const Env& env) {
  return ResolveRank([&env](const char* name) -> const char* {
    const auto found = env.find(name);
    return found == env.end() ? nullptr : found->second.c_str();
  });
}

struct Case {
  const char* name;
  Env env;
  std::string source;
  int rank, size, local_rank, local_size, node;
  int warnings;
};

TEST(ResolveRank, Table) {
  const Env torchrun = {{"RANK", "3"},
                        {"WORLD_SIZE", "8"},
                        {"LOCAL_RANK", "1"},
                        {"LOCAL_WORLD_SIZE", "2"},
                        {"GROUP_RANK", "1"}};
  const Env openmpi = {{"OMPI_COMM_WORLD_RANK", "2"},
                       {"OMPI_COMM_WORLD_SIZE", "4"},
                       {"OMPI_COMM_WORLD_LOCAL_RANK", "0"},
                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}};
  const Env slurm = {{"SLURM_PROCID", "5"},
                     {"SLURM_NTASKS", "6"},
                     {"SLURM_LOCALID", "2"},
                     {"SLURM_NTASKS_PER_NODE", "3"},
                     {"SLURM_NODEID", "1"}};
  Env both = torchrun;
  both.insert(openmpi.begin(), openmpi.end());
  Env leaked = openmpi;  // mpirun inside an allocation
  leaked.insert(slurm.begin(), slurm.end());
  Env step = slurm;
  step["SLURM_STEP_NUM_TASKS"] = "8";
  step["SLURM_NTASKS_PER_NODE"] = "4(x2)";
  const std::vector<Case> cases = {
      {"nothing", {}, "single process", 0, 1, 0, 1, 0, 0},
      {"torchrun", torchrun, "torchrun", 3, 8, 1, 2, 1, 0},
      {"Open MPI", openmpi, "Open MPI", 2, 4, 0, 2, 0, 0},
      {"PMI", {{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}}, "PMI", 1, 2, 0, 1, 0, 0},
      {"Slurm", slurm, "Slurm", 5, 6, 2, 3, 1, 0},
      {"the step's size counts", step, "Slurm", 5, 8, 2, 3, 1, 0},
      {"allocation without a task", {{"SLURM_NTASKS", "6"}}, "single process", 0, 1, 0, 1, 0, 0},
      {"torchrun wins", both, "torchrun", 3, 8, 1, 2, 1, 1},
      {"Slurm leaks", leaked, "Open MPI", 2, 4, 0, 2, 0, 1},
      {"empty is unset", {{"RANK", ""}, {"WORLD_SIZE", ""}}, "single process", 0, 1, 0, 1, 0, 0},
  };
  for (const Case& c : cases) {
    const auto info = Resolve(c.env);
    ASSERT_TRUE(info.ok()) << c.name << ": " << info.status();
    EXPECT_EQ(info->source, c.source) << c.name;
    EXPECT_EQ(info->rank, c.rank) << c.name;
    EXPECT_EQ(info->size, c.size) << c.name;
    EXPECT_EQ(info->local_rank, c.local_rank) << c.name;
    EXPECT_EQ(info->local_size, c.local_size) << c.name;
    EXPECT_EQ(info->node, c.node) << c.name;
    EXPECT_EQ(static_cast<int>(info->warnings.size()), c.warnings) << c.name;
  }
  EXPECT_THAT(Resolve(both)->warnings[0], HasSubstr("torchrun says rank 3 of 8 but Open MPI"));
}

TEST(ResolveRank, ErrorsNameTheVariable) {
  const auto message = [](const Env& env) {
    const auto info = Resolve(env);
    EXPECT_TRUE(absl::IsInvalidArgument(info.status()));
    return std::string(info.status().message());
  };
  EXPECT_THAT(message({{"RANK", "0"}}), HasSubstr("RANK is set without WORLD_SIZE"));
  EXPECT_THAT(message({{"WORLD_SIZE", "2"}}), HasSubstr("WORLD_SIZE is set without RANK"));
  EXPECT_THAT(message({{"RANK", "8"}, {"WORLD_SIZE", "8"}}),
              HasSubstr("RANK=8 is outside the world of WORLD_SIZE=8"));
  EXPECT_THAT(message({{"RANK", "0"}, {"WORLD_SIZE", "two"}}), HasSubstr("WORLD_SIZE='two'"));
  EXPECT_THAT(message({{"RANK", "-1"}, {"WORLD_SIZE", "2"}}), HasSubstr("RANK='-1'"));
  EXPECT_THAT(message({{"RANK", "0"}, {"WORLD_SIZE", "0"}}), HasSubstr("WORLD_SIZE=0"));
  EXPECT_THAT(message({{"OMPI_COMM_WORLD_RANK", "0"},
                       {"OMPI_COMM_WORLD_SIZE", "2"},
                       {"OMPI_COMM_WORLD_LOCAL_RANK", "3"},
                       {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}}),
              HasSubstr("OMPI_COMM_WORLD_LOCAL_RANK=3"));
}

}  // namespace
}  // namespace stretto
