// main() of a rank test: makes the world, runs the body, and says which rank failed.
#ifndef STRETTO_TESTS_SUPPORT_RANK_MAIN_H_
#define STRETTO_TESTS_SUPPORT_RANK_MAIN_H_

#include <cstdio>
#include <string>
#include <vector>

#include "stretto/comm/world.h"
#include "stretto/core/device.h"
#include "stretto/core/log.h"
#include "tests/support/training.h"

namespace stretto::testing {

inline int RankMain(absl::Status (*body)(World&), WorldOptions options = {}) {
  options.timeout = std::chrono::seconds(120);
  auto world = World::Create(options);
  if (!world.ok()) {
    std::fprintf(stderr, "%s\n", std::string(world.status().message()).c_str());
    return 1;
  }
  SetLogRank((*world)->rank(), (*world)->size());
  const absl::Status status = body(**world);
  if (!status.ok()) {
    std::fprintf(stderr, "rank %d: %s\n", (*world)->rank(), std::string(status.message()).c_str());
    return 1;
  }
  return 0;
}

// Whether every rank has a GPU of its own. Where one has none, rank 0 says why, for ctest to skip.
inline absl::StatusOr<bool> EveryRankHasAGpu(World& world) {
  const absl::Status usable = DescribeDevice(Device::Cuda(world.info().local_rank)).status();
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> missing,
                           world.AllGather("GPUs", std::string(usable.message())));
  for (const std::string& why : missing) {
    if (why.empty()) continue;
    if (world.rank() == 0) std::printf("SKIP: %s\n", why.c_str());
    return false;
  }
  return true;
}

// TinyRun with files in `scratch` of rank 0, which writes them; all ranks return the same.
inline absl::StatusOr<TrainConfig> SharedTinyRun(World& world, const ScratchDirectory& scratch,
                                                 const std::string& family) {
  TrainConfig config = TinyRun(scratch, family);
  STRETTO_ASSIGN_OR_RETURN(const std::vector<std::string> paths,
                           world.AllGather("scratch", scratch.path()));
  config.output = paths[0] + "/run";
  config.data.train = paths[0] + "/train.bin";
  config.data.validation = paths[0] + "/validation.bin";
  return config;
}

}  // namespace stretto::testing

#endif  // STRETTO_TESTS_SUPPORT_RANK_MAIN_H_
