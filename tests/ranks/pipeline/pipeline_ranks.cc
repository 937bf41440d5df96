// Random programs under mpirun: 500 plans over all numbers of ranks that ctest runs this with.
#include <cstdio>

#include "tests/support/pipeline_cases.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

absl::Status RunAll(World& world) {
  STRETTO_ASSIGN_OR_RETURN(const int ran, testing::RunRandomPrograms(world, 500));
  if (world.rank() == 0) std::printf("%d programs\n", ran);
  return ran > 0 ? absl::OkStatus() : absl::InternalError("no program is for this many ranks");
}

}  // namespace
}  // namespace stretto

int main() { return stretto::testing::RankMain(stretto::RunAll); }
