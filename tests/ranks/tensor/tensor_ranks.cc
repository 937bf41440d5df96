// One step under every layout that this number of ranks can have, under mpirun: loss and every
// gradient against one rank's, and the same bits as the same layout on threads.
#include <cstdio>

#include "tests/support/layout_step.h"
#include "tests/support/rank_main.h"

namespace stretto {
namespace {

using testing::Layout;
using testing::StepOptions;

absl::Status Check(World& world, const ModelConfig& config, const Layout& layout,
                   const StepOptions& options) {
  const auto batches = testing::UnevenBatches(config.vocabulary, layout.dp);
  STRETTO_ASSIGN_OR_RETURN(const testing::StepOutcome many,
                           testing::StepUnder(world, config, layout, options, batches));
  absl::Status verdict;
  if (world.rank() == 0) {
    const auto compare = [&]() -> absl::Status {
      STRETTO_ASSIGN_OR_RETURN(
          const testing::StepOutcome one,
          testing::StepOnThreads(config, {}, {.dtype = options.dtype},
                                 testing::UnevenBatches(config.vocabulary, 1)));
      const testing::StepError error = testing::CompareSteps(many, one);
      std::printf("%s %s %s: largest error %.2g (%s), %ld bytes over the tensor axis\n",
                  config.family.c_str(), layout.Name().c_str(), Name(options.dtype), error.worst,
                  error.where.c_str(), static_cast<long>(many.tensor_bytes));
      if (!(error.worst <= (options.dtype == DType::kF64 ? 1e-9 : 1e-5))) {
        return absl::InternalError(absl::StrCat(config.family, " ", layout.Name(), " differs by ",
                                                error.worst, " in ", error.where));
      }
      STRETTO_ASSIGN_OR_RETURN(const testing::StepOutcome threads,
                               testing::StepOnThreads(config, layout, options, batches));
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

// Sizes that ranks cannot share evenly: three key heads on two, GPT-2's vocabulary on four.
absl::Status CheckSizes(World& world) {
  if (world.size() == 2) {
    ModelConfig config = testing::OddModel("qwen3", false);
    config.kv_heads = 3;
    return Check(world, config, {.tp = 2}, {});
  }
  if (world.size() == 4) {
    ModelConfig config = testing::OddModel("gpt2", true);
    config.vocabulary = 50257;
    config.hidden = 8;
    return Check(world, config, {.tp = 4}, {});
  }
  return absl::OkStatus();
}

absl::Status RunAll(World& world) {
  STRETTO_RETURN_IF_ERROR(CheckSizes(world));
  for (const char* family : {"gpt2", "qwen3"}) {
    ModelConfig config = testing::OddModel(family, std::string(family) == "gpt2");
    config.layers = 7;
    config.heads = config.kv_heads = 5;
    for (int tp = 1; tp <= std::min(5, world.size()); ++tp) {
      for (int pp = 1; pp <= config.layers; ++pp) {
        if (world.size() % (tp * pp) != 0) continue;
        Layout layout = {.dp = world.size() / (tp * pp), .pp = pp, .tp = tp};
        if (layout.dp > 7) continue;  // there are 7 micro-batches
        for (layout.pieces = 1; layout.pieces <= (tp > 1 ? 3 : 1); ++layout.pieces) {
          for (const DType dtype : {DType::kF64, DType::kF32}) {
            STRETTO_RETURN_IF_ERROR(Check(world, config, layout, {.dtype = dtype}));
          }
        }
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace stretto

int main() { return stretto::testing::RankMain(stretto::RunAll); }
