// Documents that ranks share, under mpirun: loss and every gradient against one rank that has them
// whole, and the same bits as on threads.
#include <cstdio>

#include "tests/support/context_cases.h"
#include "tests/support/layout_step.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

using testing::Layout;

absl::Status Check(World& world, const ModelConfig& config, const Layout& layout, DType dtype) {
  STRETTO_ASSIGN_OR_RETURN(
      const testing::DealtItems dealt,
      testing::Deal(layout.dp, testing::RingItems(layout.dp, 5, 60, 11), config.vocabulary, 11));
  STRETTO_ASSIGN_OR_RETURN(
      const testing::StepOutcome many,
      testing::StepUnder(world, config, layout, {.dtype = dtype}, dealt.shares));
  absl::Status verdict;
  if (world.rank() == 0) {
    const auto compare = [&]() -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(const testing::StepOutcome one,
                               testing::StepOnThreads(config, {}, {.dtype = dtype}, dealt.whole));
      const testing::StepError error = testing::CompareSteps(many, one);
      std::printf("%s %s %s: largest error %.2g (%s), %ld bytes around rings\n",
                  config.family.c_str(), layout.Name().c_str(), Name(dtype), error.worst,
                  error.where.c_str(), static_cast<long>(many.ring_bytes));
      if (!(error.worst <= (dtype == DType::kF64 ? 1e-9 : 1e-5))) {
        return absl::InternalError(absl::StrCat(config.family, " ", layout.Name(), " differs by ",
                                                error.worst, " in ", error.where));
      }
      STRETTO_ASSIGN_OR_RETURN(
          const testing::StepOutcome threads,
          testing::StepOnThreads(config, layout, {.dtype = dtype}, dealt.shares));
      if (threads.loss != many.loss || threads.gradients != many.gradients) {
        return absl::InternalError(
            absl::StrCat(config.family, " ", layout.Name(), " has other bits than on threads"));
      }
      return absl::OkStatus();
    };
    verdict = compare();
  }
  return world.Agree("comparing", verdict);
}

absl::Status RunAll(World& world) {
  for (const char* family : {"gpt2", "qwen3"}) {
    ModelConfig config = testing::OddModel(family);
    config.max_positions = 60;
    for (const int tp : {1, 2}) {
      for (const int pp : {1, 2}) {
        if (world.size() % (tp * pp) != 0) continue;
        const Layout layout = {.dp = world.size() / (tp * pp), .pp = pp, .tp = tp};
        const DType dtype = tp == 1 && config.family == "gpt2" ? DType::kF32 : DType::kF64;
        STRETTO_RETURN_IF_ERROR(Check(world, config, layout, dtype));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main() { return stretto::testing::RankMain(stretto::RunAll); }
